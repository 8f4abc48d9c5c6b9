"""The models with a U-Net: Stable Diffusion 1.5, 2.1 and XL."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from .sd3 import VAE_SCALE, vae
from .text import CLIP_WIDTHS, clip, clip_tokenizer, write

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise of all three."""


def unet(width: int, **settings: Any) -> UNet2DConditionModel:
    """A U-Net of two resolutions, with attention to text of `width` channels in the lower one."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=width, attention_head_dim=(1, 2), **settings,
    )  # fmt: skip


def make_sd(folder: Path, version: Literal["1.5", "2.1"] = "1.5", **schedule: Any) -> Path:
    """A StableDiffusionPipeline with the scheduler that the version comes with; `schedule` changes its settings."""
    tokenizer = clip_tokenizer(folder / "tokenizer")
    if version == "1.5":
        shared = {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
        scheduler = PNDMScheduler(**BETAS, **shared | schedule)
    else:
        shared = {"set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1}
        scheduler = DDIMScheduler(**BETAS, **shared | {"prediction_type": "v_prediction"} | schedule)

    def networks() -> dict[str, Any]:
        return {
            "unet": unet(CLIP_WIDTHS[0], use_linear_projection=version == "2.1"),
            "vae": vae(8 * VAE_SCALE, quant=True, scaling_factor=0.18),
            "text_encoder": clip(CLIP_WIDTHS[0], tokenizer, projection=False),
        }

    return write(
        folder, StableDiffusionPipeline, networks, scheduler=scheduler, tokenizer=tokenizer, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def make_sdxl(folder: Path, **schedule: Any) -> Path:
    """A StableDiffusionXLPipeline; `schedule` changes the settings of its scheduler."""
    tokenizer = clip_tokenizer(folder / "tokenizer")
    shared = {"steps_offset": 1, "timestep_spacing": "leading"}

    def networks() -> dict[str, Any]:
        conditions = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        return {
            "unet": unet(
                sum(CLIP_WIDTHS), use_linear_projection=True, transformer_layers_per_block=(1, 2), **conditions,
                projection_class_embeddings_input_dim=CLIP_WIDTHS[1] + 6 * 8,
            ),
            "vae": vae(8 * VAE_SCALE, quant=True, scaling_factor=0.13, force_upcast=True),
            "text_encoder": clip(CLIP_WIDTHS[0], tokenizer, projection=False),
            "text_encoder_2": clip(CLIP_WIDTHS[1], tokenizer),
        }  # fmt: skip

    return write(
        folder, StableDiffusionXLPipeline, networks, scheduler=EulerDiscreteScheduler(**BETAS, **shared | schedule),
        tokenizer=tokenizer, tokenizer_2=tokenizer, force_zeros_for_empty_prompt=True,
    )  # fmt: skip
