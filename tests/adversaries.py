"""A random vision backbone and folders of reference images for tests of adversarial rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from t2irl.adversary.reward import AdversarialReward
from t2irl.types import PromptGroups


def write_dino(folder: Path, size: int = 64) -> Path:
    """A random Dinov2Model of two blocks, as assets/tiny-dinov2 is laid out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=size,
            patch_size=8,
            initializer_range=0.3,  # with the usual 0.02 random features hardly depend on the picture
        )
        Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder


def write_references(folder: Path, pictures: Mapping[str, Sequence[np.ndarray]]) -> Path:
    """Pictures (H, W, 3) uint8 of prompts as PNG files; the path of their index."""
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, list[str]] = {}
    for number, (prompt, arrays) in enumerate(pictures.items()):
        index[prompt] = [f"{number:03}_{k}.png" for k in range(len(arrays))]
        for name, array in zip(index[prompt], arrays, strict=True):
            Image.fromarray(array).save(folder / name)
    (folder / "index.json").write_text(json.dumps(index))
    return folder / "index.json"


def parameters(reward: AdversarialReward) -> dict[str, Tensor]:
    """A copy of what learns."""
    return {name: p.detach().clone() for name, p in reward.critic.trained.items()}


def changed(before: dict[str, Tensor], reward: AdversarialReward) -> float:
    """Share of the trained numbers that are not what they were."""
    pairs = [(before[name], p) for name, p in reward.critic.trained.items()]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def iterate(reward: AdversarialReward, images: Tensor, groups: PromptGroups) -> dict[str, float]:
    """An iteration as the loop does it: scores, then the reward's turn."""
    for part in (slice(0, 32), slice(32, 48)):
        reward.score(images[part], groups[part])
    return reward.update(images, groups)
