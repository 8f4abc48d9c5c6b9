"""Evaluation folders, studies and records for the tests of preferences."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from reward_models.preference import Design, build
from t2irl.preferences.pairs import Plan, make_study
from t2irl.preferences.record import Record, file_sha
from t2irl.preferences.study import Study

HOSTILE = (
    "<img src=x onerror=\"document.body.dataset.hacked='1'\"><script>document.body.dataset.hacked='1'</script>",
    "\"quoted\" & 'single' ` </p></main> &lt;b&gt;",
    "\u202eright to left override\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "ten kilobytes " * 720,
    "\u0000-free, but \u001b[31m escapes, 😀 and {{ braces }} ${x}",
)
"""Captions that a page must show as they are."""


PICTURES = 4
PLAN = Plan()
"""As a user gets it without options."""


def write_evaluation(
    folder: Path, method: str, prompts: Sequence[str], images: int = 1, checkpoint: str = "last", size: int = 32
) -> Path:
    """A folder as `t2irl eval` leaves it; pictures are noise, different for each method."""
    folder.mkdir(parents=True)
    lines = []
    for prompt_id, prompt in enumerate(prompts):
        for image in range(images):
            rng = np.random.default_rng([prompt_id, image, *method.encode(), *checkpoint.encode()])
            name = f"{method}_{prompt_id}_{image}.png"
            info = PngInfo()
            info.add_text("method", method)
            pixels = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(folder / name, pnginfo=info)
            lines.append({
                "prompt": prompt, "prompt_id": prompt_id, "image": image, "path": name, "method": method,
                "checkpoint": checkpoint, "seed": f"{prompt_id}/{image}", "scores": {"bright": float(pixels.mean()), "odd": None},
            })  # fmt: skip
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_study(
    folder: Path,
    prompts: Sequence[str],
    plan: Plan = PLAN,
    images: int = 1,
    methods: Sequence[str] = ("ours", "base"),
) -> Study:
    """A study of some methods."""
    evaluations = [write_evaluation(folder / name, name, prompts, images) for name in methods]
    return make_study(evaluations, folder / "study", plan)


def write_pool(folder: Path) -> Path:
    """`PICTURES` pictures named by number, PNG and JPEG."""
    for k in range(PICTURES):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}", format="PNG" if k % 2 else "JPEG")
    return folder


def with_shas(found: list[Record], pool: Path) -> list[Record]:
    """With the hashes of their pictures."""
    return [
        r.model_copy(update=dict(sha_a=file_sha(pool / r.image_a), sha_b=file_sha(pool / r.image_b))) for r in found
    ]


def write_preference(folder: Path, backbone: Path | None, clip: Path | None, seed: int = 0) -> Path:
    """A preference model that has learned nothing."""
    places = [None if path is None else os.path.relpath(path, folder) for path in (backbone, clip)]
    model = build(Design(*places, temperature=0.5, offset=0.1), folder, torch.device("cpu"))
    model.head.reset(seed)
    model.save(folder, "# untrained\n")
    return folder
