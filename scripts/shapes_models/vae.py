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
from t2irl.shapes.render import render, sample_scene
from t2irl.shapes.verify import verify

PICTURES = 60_000
VAE_STEPS, VAE_BATCH = 1_000, 64


def draw(captions: list[Caption], seed: int) -> Tensor:
    """Render one picture a caption: (N, 3, 64, 64) uint8."""
    rng = np.random.default_rng(seed)
    pictures = np.stack([render(sample_scene(caption, rng)) for caption in captions])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_float(pictures: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1], the VAE's range."""
    return pictures.float() / 127.5 - 1


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

    def check() -> str:
        x = pictures[:128]
        with torch.no_grad():
            back = vae.decode(vae.encode(to_float(x)).latent_dist.mode()).sample
        scores = verify(back / 2 + 0.5, [c.text for c in training_captions(seed)[:128]])
        return "vae reconstruction " + " ".join(f"{k} {v.mean():.3f}" for k, v in scores.items())

    stage.run(loss_at, seed + 1, check)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_all(work: Path, vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents of the whole training set, standardised; sets the VAE's scaling and shift. (N, 4, 16, 16) float16."""
    file = work / "latents.pt"
    if not file.exists():
        with torch.autocast("cpu", torch.bfloat16):
            chunks = [vae.encode(to_float(p)).latent_dist.mode().float() for p in pictures.split(256)]
        torch.save(torch.cat(chunks), file)
    latents = torch.load(file)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return ((latents - shift) * scale).half()
