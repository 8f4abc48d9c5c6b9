"""Qwen-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .text import qwen_settings, qwen_tokenizer, write

WIDTH = 32
"""Of the text encoder."""


def make_qwen_image(folder: Path) -> Path:
    """A QwenImagePipeline with the shift of the genuine one: exponential, by size, stretched to end at 0.02."""
    tokenizer = qwen_tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=8192, base_shift=0.5, max_shift=0.9,
        shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip

    def networks() -> dict[str, Any]:
        vision = {
            "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 8,
            "out_hidden_size": WIDTH, "fullatt_block_indexes": [0],
        }  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1_000_000.0}
        text = qwen_settings(WIDTH, tokenizer) | {"rope_parameters": rope}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        transformer = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=3,
            joint_attention_dim=WIDTH, axes_dims_rope=(2, 4, 2),
        )  # fmt: skip
        decoder = AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[-0.76, -0.71, 0.91, 0.11], latents_std=[2.8, 1.5, 2.3, 2.7],
        )  # fmt: skip
        return {
            "transformer": transformer, "vae": decoder, "text_encoder": Qwen2_5_VLForConditionalGeneration(config)
        }  # fmt: skip

    return write(folder, QwenImagePipeline, networks, scheduler=scheduler, tokenizer=tokenizer)
