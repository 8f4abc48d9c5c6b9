"""A pipeline folder with settings and a few weights, for what reads folders without loading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTH, LAYERS, JOINT, POOLED, TOKENS = 32, 2, 16, 8, 20


def write_network(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], stem: str) -> None:
    """Write a network's settings and zeros for its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / f"{stem}.safetensors")


def write_few_layers(folder: Path) -> Path:
    """Write a folder as StableDiffusion3Pipeline saves it, with weights of a few layers; returns it."""
    linear = {
        f"transformer_blocks.{i}.attn.{n}.weight": (WIDTH, WIDTH)
        for i in range(LAYERS)
        for n in ("to_q", "to_k", "to_out.0")
    }
    other = {"pos_embed.proj.weight": (WIDTH, 4, 2, 2), "transformer_blocks.0.attn.to_q.bias": (WIDTH,)}
    transformer = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": LAYERS, "num_attention_heads": 2,
        "attention_head_dim": WIDTH // 2, "joint_attention_dim": JOINT, "pooled_projection_dim": POOLED,
    }  # fmt: skip
    write_network(folder / "transformer", transformer, linear | other, "diffusion_pytorch_model")
    write_network(folder / "vae", {"block_out_channels": [8, 8, 8]}, {"w": (1000,)}, "diffusion_pytorch_model")
    write_network(folder / "text_encoder", {"max_position_embeddings": TOKENS}, {"w": (500, 2)}, "model")
    (folder / "scheduler").mkdir()
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
