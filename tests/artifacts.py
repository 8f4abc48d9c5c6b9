"""A small classifier of artifacts and labelled pictures for its tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reward_models.artifact import ArtifactClassifier, Design
from t2irl.corruptions import corrupt
from t2irl.shapes.captions import sample_captions
from t2irl.shapes.render import SIZE, render, sample_scene


def write_classifier(folder: Path, seed: int = 0, size: int = SIZE) -> Path:
    """An untrained classifier whose logits differ from picture to picture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ArtifactClassifier(Design(size, detail=8, base={"median": 0.5}), None, torch.device("cpu"))
    model.save(folder)
    return folder


def labelled_pictures(count: int, kinds: list[str], seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """`count` clean scenes and as many broken ones of the same captions: uint8, labels, captions."""
    rng = np.random.default_rng(seed)
    captions = sample_captions(count, rng)
    scenes = [[render(sample_scene(c, rng)) for c in captions] for _ in range(2)]
    clean, other = (torch.from_numpy(np.stack(s)).permute(0, 3, 1, 2) for s in scenes)
    generator = torch.Generator().manual_seed(seed)
    broken = corrupt(other.float() / 255, [kinds[k % len(kinds)] for k in range(count)], generator)
    pictures = torch.cat([clean, broken.mul(255).round().to(torch.uint8)])
    return pictures, torch.tensor([0] * count + [1] * count), [c.text for c in captions] * 2


def write_labelled(folder: Path, pictures: Tensor, labels: Tensor, prompts: list[str]) -> Path:
    """Pictures as PNG files with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k, (picture, label, prompt) in enumerate(zip(pictures, labels.tolist(), prompts, strict=True)):
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{k}.png")
        lines.append(
            json.dumps({"path": f"{k}.png", "label": label, "prompt": prompt, "kind": "base" if k % 2 else ""}) + "\n"
        )
    (folder / "labelled.jsonl").write_text("".join(lines))
    return folder / "labelled.jsonl"
