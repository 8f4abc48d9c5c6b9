"""Labelled pictures: which show artifacts and which do not, split by prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Part = Literal["train", "select", "report"]
PARTS: tuple[Part, ...] = ("train", "select", "report")


@dataclass(frozen=True)
class Labelled:
    """A picture and what a rater said of it."""

    path: Path
    label: int
    """1: it shows an artifact, 0: it does not."""
    prompt: str
    kind: str
    """Where it comes from, such as the name of a corruption; for the card only."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom of the picture within its file; None for the whole file."""
    original: Path | None = None
    """File of the clean picture that a broken one was made from; None: there is none."""

    def picture(self) -> Image.Image:
        """The picture itself."""
        with Image.open(self.path) as image:
            return (image if self.box is None else image.crop(self.box)).convert("RGB")


def load_labelled(file: Path) -> list[Labelled]:
    """Read JSON Lines such as {"path": "a.png", "label": 1, "prompt": "a cat", "kind": "warp"}.

    Paths are relative to the file. `kind` may be missing, `box` says which part of the file the picture is, and
    `original` the file of the clean picture, itself a line, that a broken one was made from. Raises OSError or ValueError that
    names the line.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path, label, prompt = file.parent / entry["path"], entry["label"], str(entry["prompt"])
            box = tuple(entry["box"]) if "box" in entry else None
            original = file.parent / entry["original"] if "original" in entry else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{where}: {error!r}; expected {{"path": FILE, "label": 0 or 1, "prompt": TEXT}}'
            ) from error
        if label not in (0, 1):
            raise ValueError(f"{where}: label = {label!r}; expected 1 (shows an artifact) or 0")
        if not path.is_file():
            raise FileNotFoundError(f"{where}: no such file: {path}")
        if box is not None and len(box) != 4:
            raise ValueError(f"{where}: box = {list(box)}; expected left, top, right, bottom")
        found.append(Labelled(path, int(label), prompt, str(entry.get("kind", "")), box, original))
    clean = {x.path: x.prompt for x in found if x.label == 0}
    for x in found:
        if x.original is not None and (x.label == 0 or clean.get(x.original) != x.prompt):
            raise ValueError(
                f"{file}: {x.path.name}: original = {x.original.name}: expected a picture of label 0 and the same prompt, for one of label 1"
            )
    for label in (0, 1):
        if not any(x.label == label for x in found):
            raise ValueError(f"{file}: no picture has label {label}; both are needed")
    return found


def originals(items: Sequence[Labelled]) -> Tensor:
    """For each item the place among them of its original; -1: none."""
    place = {x.path: k for k, x in enumerate(items) if x.label == 0}
    return torch.tensor([-1 if x.original is None else place[x.original] for x in items])


def part_of(prompt: str, seed: int) -> Part:
    """The part that all pictures of a prompt belong to: half to learn from, a quarter to select on, a quarter to report."""
    place = hashlib.blake2b(f"{seed}/{prompt}".encode(), digest_size=4).digest()[0]
    return "train" if place < 128 else "select" if place < 192 else "report"


def split(items: Sequence[Labelled], seed: int) -> dict[Part, list[Labelled]]:
    """Items by part. Raises ValueError when a part lacks one of the labels."""
    parts: dict[Part, list[Labelled]] = {name: [x for x in items if part_of(x.prompt, seed) == name] for name in PARTS}
    for name, members in parts.items():
        if {x.label for x in members} != {0, 1}:
            raise ValueError(
                f"the part {name!r} has {len(members)} pictures and not both labels; split by prompt, {len(items)} pictures of "
                f"{len({x.prompt for x in items})} prompts are too few, or use another seed (now {seed})"
            )
    return parts


def pixels(items: Sequence[Labelled]) -> Tensor:
    """Pictures of one size as (n, 3, H, W) uint8. Raises ValueError when sizes differ."""
    arrays = [np.asarray(x.picture()) for x in items]
    sizes = {a.shape[:2] for a in arrays}
    if len(sizes) > 1:
        raise ValueError(
            f"pictures of {len(sizes)} sizes, such as {' and '.join(map(str, sorted(sizes)[:2]))}; make them equal"
        )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
