"""FLUX.2 klein, base and distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from .text import qwen_settings, qwen_tokenizer, write

WIDTH = 16
"""Of the text encoder, whose layers 9, 18 and 27 are read."""


def make_flux2_klein(folder: Path, distilled: bool = False) -> Path:
    """A Flux2KleinPipeline."""
    tokenizer = qwen_tokenizer()

    def networks() -> dict[str, Any]:
        transformer = Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=3,
            joint_attention_dim=3 * WIDTH, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
        )  # fmt: skip
        decoder = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
        )  # fmt: skip
        decoder.bn.running_mean.normal_(0, 0.3)
        decoder.bn.running_var.uniform_(0.5, 2)
        text = qwen_settings(WIDTH, tokenizer) | {"num_hidden_layers": 28}
        return {"transformer": transformer, "vae": decoder, "text_encoder": Qwen3ForCausalLM(Qwen3Config(**text))}

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return write(folder, Flux2KleinPipeline, networks, scheduler=scheduler, tokenizer=tokenizer, is_distilled=distilled)
