"""Training pictures and the autoencoder."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from shapes_models.stage import Stage
from t2irl.shapes.captions import Caption, sample_captions
from t2irl.shapes.render import SIZE, render, sample_scene
from t2irl.shapes.verify import verify

PICTURES = 60_000
VAE_STEPS, VAE_BATCH = 1_000, 64
DECODER_STEPS = 1_000
HARD = 4.0
"""How much more often the decoder sees a star on gray than other pictures: low contrast and fine points."""


def draw(captions: list[Caption], seed: int) -> Tensor:
    """Render one picture a caption: (N, 3, 64, 64) uint8."""
    rng = np.random.default_rng(seed)
    pictures = np.stack([render(sample_scene(caption, rng)) for caption in captions])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_float(pictures: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1], the VAE's range."""
    return pictures.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


@torch.no_grad()
def redraw(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures uint8 through encoder and decoder, uint8."""
    latents = (vae.encode(to_float(part)).latent_dist.mode() for part in pictures.split(64))
    return torch.cat(
        [torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8), *(to_bytes(vae.decode(z).sample / 2 + 0.5) for z in latents)]
    )


def training_captions(seed: int) -> list[Caption]:
    """The captions of the rendered training set, none of them held out."""
    return sample_captions(PICTURES, np.random.default_rng(seed))


def build_vae(work: Path, pictures: Tensor, seed: int) -> AutoencoderKL:
    """An autoencoder, 64 px -> 4 x 16 x 16, decoding well even from slightly wrong latents."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=64,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    stage = Stage(
        "vae",
        work,
        [(0, 1.0), (VAE_STEPS, 0.0)],
        {"vae": vae},
        [torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)],
    )
    spread = 0.25

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        x = to_float(pictures[torch.randint(len(pictures), (VAE_BATCH,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encoder(x).float()
            mean, log_variance = moments.chunk(2, 1)
            noise = torch.randn(mean.shape, generator=generator)
            decoded = vae.decoder(mean + spread * noise).float()
        error = decoded - x
        prior = 5e-4 * mean.square().mean() + 1e-3 * (log_variance - 2 * math.log(spread)).square().mean()
        return error.abs().mean() + error.square().mean() + prior

    texts = [c.text for c in training_captions(seed)[:128]]
    stage.run(loss_at, seed + 1, lambda: reconstruction(vae, pictures[:128], texts))
    return vae.eval().requires_grad_(False)


def polish_decoder(work: Path, vae: AutoencoderKL, pictures: Tensor, seed: int) -> None:
    """Train the decoder on while the encoder, and so every latent, stays as it is.

    What the decoder cannot draw no policy can learn: after the joint training alone four in five stars on gray come back as
    blobs that the verifier does not take for stars, and `correct` cannot exceed 0.86.
    """
    captions = [c.text for c in training_captions(seed)[: len(pictures)]]
    often = torch.tensor([HARD if "star" in text and "gray" in text else 1.0 for text in captions])
    vae.requires_grad_(False).decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=1e-3, weight_decay=0.0)
    stage = Stage("decoder", work, [(0, 1.0), (DECODER_STEPS, 0.0)], {"decoder": vae.decoder}, [optimizer])

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        x = to_float(pictures[torch.multinomial(often, VAE_BATCH, generator=generator)])
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            mean = vae.encoder(x).float().chunk(2, 1)[0]
        return decoding_loss(vae, mean, x, generator)

    stage.run(loss_at, seed + 2, lambda: reconstruction(vae, pictures[:512], captions[:512]))
    vae.eval().requires_grad_(False)


def decoding_loss(vae: AutoencoderKL, mean: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """Error of pictures x decoded from their latents, which are made slightly wrong.

    It is divided by the picture's contrast, so that gray backgrounds, which every colour is near to, count as much as white
    and black ones.
    """
    noise = torch.randn(mean.shape, generator=generator) * torch.rand(len(x), 1, 1, 1, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = vae.decoder(mean + 0.25 * noise).float()
    weight = 1 / (x.flatten(1).std(1) + 0.05).view(-1, 1, 1, 1)
    error = decoded - x
    return ((error.abs() + error.square()) * weight / weight.mean()).mean()


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, pictures: Tensor, captions: list[str]) -> str:
    """What the verifier says of encoded and decoded pictures."""
    scores = verify(redraw(vae, pictures), captions)
    return "vae reconstruction " + " ".join(f"{k} {v.mean():.3f}" for k, v in scores.items())


@torch.no_grad()
def latents_of(file: Path, vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents as the encoder gives them, (N, 4, 16, 16) float32; kept in `file`."""
    if not file.exists():
        with torch.autocast("cpu", torch.bfloat16):
            chunks = [vae.encode(to_float(p)).latent_dist.mode().float() for p in pictures.split(256)]
        torch.save(torch.cat(chunks), file)
    return torch.load(file)


@torch.no_grad()
def encode_all(work: Path, vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents of the whole training set, standardised; sets the VAE's scaling and shift. (N, 4, 16, 16) float16."""
    latents = latents_of(work / "latents.pt", vae, pictures)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return ((latents - shift) * scale).half()
