"""A small CLIP: one of the hackable proxies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from shapes_models.stage import Stage
from shapes_models.text import TEXT_WIDTH, text_config, tokenize
from shapes_models.vae import draw, to_float
from t2irl.shapes.captions import sample_captions

CLIP_STEPS, CLIP_BATCH, CLIP_PICTURES = 500, 128, 2_000


def build_clip(work: Path, tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """A small CLIP that has seen few pictures: an imperfect judge on purpose."""
    torch.manual_seed(seed)
    vision = dict(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=64,
        patch_size=8,
        projection_dim=TEXT_WIDTH,
    )
    clip = CLIPModel(CLIPConfig(text_config=text_config(tokenizer), vision_config=vision, projection_dim=TEXT_WIDTH))
    captions = sample_captions(CLIP_PICTURES, np.random.default_rng(seed + 5))
    pictures, ids = draw(captions, seed + 6), tokenize(tokenizer, [c.text for c in captions])
    stage = Stage(
        "clip",
        work,
        [(0, 1.0), (CLIP_STEPS, 0.0)],
        {"clip": clip},
        [torch.optim.AdamW(clip.parameters(), lr=1e-3, weight_decay=0.05)],
    )

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randperm(len(pictures), generator=generator)[:CLIP_BATCH]
        return clip(input_ids=ids[chosen], pixel_values=to_float(pictures[chosen]), return_loss=True).loss

    stage.run(loss_at, seed + 3)
    return clip.eval().requires_grad_(False)
