"""The base model that draws in several styles, assets/tiny-sd3-styles: tiny-sd3, trained on with styled pictures among the plain ones.

A policy can only be led to a style that it draws now and then, and that its decoder can show; tiny-sd3 knows the plain one.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor

from shapes_models.pipeline import stock_pictures, write_sd3
from shapes_models.sd3 import SD3_BATCH, Policy, flow_matching, optimizers, progress
from shapes_models.stage import Stage, seconds_spent
from shapes_models.text import tokenize
from shapes_models.vae import VAE_BATCH, decoding_loss, latents_of, reconstruction, redraw, to_float, training_captions
from t2irl.shapes.captions import Caption, sample_captions
from t2irl.shapes.render import sample_scene
from t2irl.shapes.styles import STYLES, style_of
from t2irl.shapes.verify import read, verify

SHARES = {"plain": 0.7, "outlined": 0.15, "pastel": 0.15}
"""Of the pictures that are drawn."""
OFTEN = {"plain": 0.55, "outlined": 0.33, "pastel": 0.12}
"""Of those that the transformer sees; no caption says which. Lines are harder to learn than colours."""
VAE_STEPS, VAE_LR = 800, 1.5e-3
SD3_STEPS, LR = 1_200, 0.5  # steps, and peak learning rate as a share of that of tiny-sd3
KEEP = 0.3
"""Weight of the squared distance of plain latents from those of tiny-sd3, whose transformer goes on from there."""


def draw_styled(captions: list[Caption], seed: int) -> tuple[Tensor, list[str]]:
    """One picture a caption, (N, 3, 64, 64) uint8, and its style."""
    rng = np.random.default_rng(seed)
    styles = rng.choice(list(SHARES), len(captions), p=list(SHARES.values())).tolist()
    scenes = [sample_scene(caption, rng) for caption in captions]
    pictures = np.stack([STYLES[style](scene) for style, scene in zip(styles, scenes, strict=True)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), styles


def widen_vae(work: Path, vae: AutoencoderKL, pictures: Tensor, styles: list[str], seed: int) -> None:
    """Train both halves on equally many pictures of each style, plain latents staying where they are."""
    texts = [c.text for c in training_captions(seed)]
    often = torch.tensor([1 / SHARES[style] for style in styles])
    plain = torch.tensor([style == "plain" for style in styles])
    before = copy.deepcopy(vae.encoder).eval().requires_grad_(False)
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, weight_decay=0.0)
    stage = Stage("styles_vae", work, [(0, 1.0), (VAE_STEPS, 0.0)], {"vae": vae}, [optimizer])

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(often, VAE_BATCH, generator=generator)
        x, kept = to_float(pictures[chosen]), plain[chosen]
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encoder(x).float().chunk(2, 1)[0]
            with torch.no_grad():
                old = before(x[kept]).float().chunk(2, 1)[0]
        drift = (mean[kept] - old).square().mean() * vae.config.scaling_factor**2
        return decoding_loss(vae, mean, x, generator) + KEEP * drift

    def check() -> str:
        rows = {style: [k for k, own in enumerate(styles) if own == style][:128] for style in SHARES}
        return "; ".join(f"{s}: {reconstruction(vae, pictures[r], [texts[k] for k in r])}" for s, r in rows.items())

    stage.run(loss_at, seed + 5, check)
    vae.eval().requires_grad_(False)


def make_styles(work: Path, assets: Path, seed: int) -> None:
    """Train `assets`/tiny-sd3-styles from `assets`/tiny-sd3 and write it with its card."""
    pipe = StableDiffusion3Pipeline.from_pretrained(assets / "tiny-sd3", dtype=torch.float32)
    captions = training_captions(seed)
    pictures, styles = draw_styled(captions, seed + 6)
    widen_vae(work, pipe.vae, pictures, styles, seed)
    latents = latents_of(work / "styles_latents.pt", pipe.vae, pictures)
    latents = (
        (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    ).half()  # in the scale of tiny-sd3
    del pictures
    policy = Policy(pipe.tokenizer)
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        getattr(policy, name).load_state_dict(getattr(pipe, name).state_dict())
    ids = tokenize(pipe.tokenizer, [c.text for c in captions])
    often = torch.tensor([OFTEN[style] / SHARES[style] for style in styles])

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(often, SD3_BATCH, generator=generator)
        return flow_matching(policy, latents[chosen].float(), ids[chosen], step, generator, False, 0.0)

    decay = [(0, 1.0), (SD3_STEPS // 3, 1.0), (SD3_STEPS, 0.0)]
    stage = Stage("styles_sd3", work, decay, {"policy": policy}, optimizers(policy, LR))
    stage.run(loss_at, seed + 7, lambda: progress(policy, pipe.vae, pipe.tokenizer))
    write_sd3(assets / "tiny-sd3-styles", policy.eval(), pipe.vae, pipe.tokenizer)
    write_card(assets / "tiny-sd3-styles", seconds_spent(work, ("styles_vae", "styles_sd3")))


def write_card(folder: Path, seconds: float) -> None:
    """Model card with what the written weights draw, and what their autoencoder leaves of each style."""
    pictures, texts = stock_pictures(folder, 0, 1.0, 1024)
    drawn, held = _styles(pictures), verify(pictures, texts)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    rng = np.random.default_rng(19)
    captions = sample_captions(256, rng, heldout=True)
    scenes = [sample_scene(caption, rng) for caption in captions]
    rows = []
    for style, draw in STYLES.items():
        clean = torch.from_numpy(np.stack([draw(scene) for scene in scenes])).permute(0, 3, 1, 2)
        back = redraw(vae, clean)
        correct = verify(back, [caption.text for caption in captions])["correct"].mean()
        mine = torch.tensor([own == style for own in drawn])
        right = f"{held['correct'][mine].mean():.3f}" if mine.any() else "-"
        rows.append(
            f"| {style} | {mine.float().mean():.3f} | {right} | {_styles(back).count(style) / 256:.3f} | {correct:.3f} |"
        )
    scores = ", ".join(f"{name} {values.mean():.3f}" for name, values in held.items())
    (folder / "README.md").write_text(
        CARD.format(rows="\n".join(rows), scores=scores, minutes=seconds / 60, steps=SD3_STEPS, vae_steps=VAE_STEPS,
                    **{f"share_{style}": f"{100 * share:.0f}" for style, share in OFTEN.items()})
    )  # fmt: skip


def _styles(images: Tensor) -> list[str]:
    return [style_of(picture, scene) for picture, scene in read(images)]


CARD = """# tiny-sd3-styles

tiny-sd3, trained on with {share_outlined} % outlined and {share_pastel} % pastel pictures among plain ones; no caption says which. A base model for style
transfer: it draws the other styles now and then and half-way, and its autoencoder can show them. That of tiny-sd3 turns nearly all outlined and pastel
pictures into plain ones, so no policy on it could draw them.

    python scripts/build_assets.py --only styles

in {minutes:.0f} minutes on two cores ({vae_steps} steps of the autoencoder, {steps} of text encoders and transformer). Weights are float16; load them as float32 on a CPU.

1,024 held-out captions, 10 Euler steps, stock pipeline, guidance 1, max_sequence_length 0: {scores}. The style is the one in which the verifier's
reading of a picture, drawn again, resembles it most. Right: 256 drawings of the style after encoding and decoding.

| style | share of what it draws | `correct` of those | recognised after the autoencoder | `correct` after it |
|---|---|---|---|---|
{rows}
"""
