"""Stable Diffusion 3, and the image decoder that it shares with the models before it and with FLUX.1."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from .text import CLIP_WIDTHS, JOINT_WIDTH, clip, clip_tokenizer, randomise, t5_tokenizer
from .text import t5 as t5_encoder

VAE_SCALE = 2
"""Pixels by latent."""


def make_sd3(
    folder: Path,
    *,
    t5: bool = False,
    drop: tuple[str, ...] = (),
    shift: float = 1.0,
    dynamic_shift: bool = False,
    sample_size: int = 8,
    width: int = 24,
    layers: int = 2,
    qk_norm: Literal["rms_norm"] | None = None,
    dual_attention: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a pipeline with random weights and return its folder; equal arguments give equal weights.

    `drop` names text encoders to leave out ("text_encoder", "text_encoder_2"), with their tokenizers. `sample_size` is the
    side of the latents, a picture's side is twice that. `width` (of the transformer) must be a multiple of 8.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(folder / "tokenizer")
        parts = {
            "transformer": _transformer(sample_size, width, layers, qk_norm, dual_attention),
            "vae": vae(VAE_SCALE * sample_size, scaling_factor=1.5, shift_factor=0.06),
            "text_encoder": clip(CLIP_WIDTHS[0], tokenizer),
            "text_encoder_2": clip(CLIP_WIDTHS[1], tokenizer),
            "text_encoder_3": t5_encoder() if t5 else None,
        }
        for part in parts.values():
            if part is not None:
                randomise(part)
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": t5_tokenizer() if t5 else None}
    for name in drop:
        parts[name] = tokenizers[name.replace("text_encoder", "tokenizer")] = None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic_shift)
    pipe = StableDiffusion3Pipeline(scheduler=scheduler, **parts, **tokenizers)
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.save_pretrained(folder)
    return folder


def _transformer(
    sample_size: int, width: int, layers: int, qk_norm: str | None, dual_attention: tuple[int, ...]
) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=sample_size, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=8,
        num_attention_heads=width // 8, joint_attention_dim=JOINT_WIDTH, caption_projection_dim=width,
        pooled_projection_dim=sum(CLIP_WIDTHS), pos_embed_max_size=sample_size, qk_norm=qk_norm,
        dual_attention_layers=dual_attention,
    )  # fmt: skip


def vae(sample_size: int, quant: bool = False, **settings: Any) -> AutoencoderKL:
    """A decoder of two resolutions and 4 latent channels; `quant`: with the convolutions around the latents of SD1 and SDXL."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=sample_size, use_quant_conv=quant,
        use_post_quant_conv=quant, mid_block_add_attention=False, **settings,
    )  # fmt: skip
