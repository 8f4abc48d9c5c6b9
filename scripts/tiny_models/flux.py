"""FLUX.1: dev, which takes the guidance as a number, and schnell, which does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from .sd3 import VAE_SCALE, vae
from .text import CLIP_WIDTHS, JOINT_WIDTH, clip, clip_tokenizer, t5, t5_tokenizer, write


def make_flux(folder: Path, schnell: bool = False) -> Path:
    """A FluxPipeline; its shift depends on the size of the picture, as in dev, or is 1, as in schnell."""
    tokenizer = clip_tokenizer(folder / "tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if schnell else 3.0, use_dynamic_shifting=not schnell, base_image_seq_len=256, max_image_seq_len=4096,
        base_shift=0.5, max_shift=1.15,
    )  # fmt: skip

    def networks() -> dict[str, Any]:
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=3,
            joint_attention_dim=JOINT_WIDTH, pooled_projection_dim=CLIP_WIDTHS[0], guidance_embeds=not schnell,
            axes_dims_rope=(2, 4, 2),
        )  # fmt: skip
        return {
            "transformer": transformer, "vae": vae(8 * VAE_SCALE, scaling_factor=0.36, shift_factor=0.12),
            "text_encoder": clip(CLIP_WIDTHS[0], tokenizer, projection=False), "text_encoder_2": t5(),
        }  # fmt: skip

    return write(folder, FluxPipeline, networks, scheduler=scheduler, tokenizer=tokenizer, tokenizer_2=t5_tokenizer())
