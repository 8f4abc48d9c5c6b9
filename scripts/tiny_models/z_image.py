"""Z-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from .sd3 import VAE_SCALE, vae
from .text import qwen_settings, qwen_tokenizer, write

WIDTH = 32
"""Of the text encoder."""


def make_z_image(folder: Path) -> Path:
    """A ZImagePipeline with the static shift of the genuine ones."""
    tokenizer = qwen_tokenizer()

    def networks() -> dict[str, Any]:
        transformer = ZImageTransformer2DModel(
            in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=WIDTH,
            axes_dims=[2, 4, 2], axes_lens=[640, 64, 64],
        )  # fmt: skip
        return {
            "transformer": transformer, "vae": vae(8 * VAE_SCALE, scaling_factor=0.36, shift_factor=0.12),
            "text_encoder": Qwen3Model(Qwen3Config(**qwen_settings(WIDTH, tokenizer))),
        }  # fmt: skip

    return write(
        folder, ZImagePipeline, networks, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokenizer
    )
