"""GenEval (arXiv 2310.11513): are the objects there that a prompt asks for, as many, of that colour, in that place?

Strict is the benchmark's yes or no. Soft gives a part of the credit for a part of the way, for training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward_models.clip import ClipScorer
from reward_models.instances import Detector, Instance, by_name

THRESHOLD, COUNTING_THRESHOLD, MOST, MARGIN = 0.3, 0.9, 16, 0.1
"""Published: least score of an object, the same for prompts that count, most objects of a class, margin of a position."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
AROUND = 0x99 / 255
"""Grey around an object whose colour is asked for."""
POSITIONS = ("left of", "right of", "above", "below")

Objects = Mapping[str, Sequence[Instance]]
Colors = Callable[[Sequence[Instance], str], Sequence[str]]
"""Objects and the name of their class -> the colour of each."""


def check_entry(entry: Any) -> None:
    """Raise ValueError, saying what is wrong, for what is no entry of GenEval's metadata."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("prompt"), str) or not entry.get("include"):
        raise ValueError("expected an object with `prompt` and `include`")
    for kind in ("include", "exclude"):
        for number, clause in enumerate(entry.get(kind) or ()):
            good = isinstance(clause, Mapping) and isinstance(clause.get("class"), str)
            if not good or not isinstance(clause.get("count"), int) or clause["count"] < 1:
                raise ValueError(f"{kind}[{number}] needs `class` and a `count` from 1")
            if clause.get("color", COLORS[0]) not in COLORS:
                raise ValueError(f"{kind}[{number}]: color = {clause['color']!r}, expected one of {', '.join(COLORS)}")
            where = clause.get("position", ("above", 0))
            if len(where) != 2 or where[0] not in POSITIONS or not 0 <= where[1] < max(number, 1):
                raise ValueError(
                    f"{kind}[{number}]: position = {where!r}, expected [left of, or the like, an earlier clause]"
                )


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a is as seen from box b; nothing when their centres are too near for their sizes."""
    boxes = np.array([a, b], dtype=float).reshape(2, 2, 2)
    centre, size = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centre[0] - centre[1]
    left = np.maximum(np.abs(offset) - MARGIN * size.sum(0), 0) * np.sign(offset)
    if np.all(np.abs(left) < 1e-3):
        return set()
    dx, dy = left / np.linalg.norm(offset)
    return {name for name, holds in zip(POSITIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}


def strict(objects: Objects, entry: Mapping[str, Any], colors: Colors) -> float:
    """1 if the picture is right, else 0. Colour and place are asked of the surest objects only, as published."""
    chosen: list[Sequence[Instance] | None] = []
    for clause in entry["include"]:
        found = list(objects.get(clause["class"], ()))[: clause["count"]]
        right = len(found) == clause["count"]
        if right and "color" in clause:
            right = list(colors(found, clause["class"])).count(clause["color"]) >= clause["count"]
        if right and "position" in clause:
            right = _placed(found, clause["position"], chosen)
        chosen.append(found if right else None)
    return float(all(c is not None for c in chosen) and not any(map(_fires(objects), entry.get("exclude") or ())))


def soft(objects: Objects, entry: Mapping[str, Any], colors: Colors) -> float:
    """Mean over clauses, in [0, 1], of what each asks for: number, colour, place, each in [0, 1].

    A number earns 1 - |wanted - found| / wanted, never less than 0, and so do objects of the wanted colour. A wrong place
    earns nothing; the published server let it have half.
    """
    chosen: list[Sequence[Instance] | None] = []
    credits = []
    for clause in entry["include"]:
        found, wanted = list(objects.get(clause["class"], ())), clause["count"]
        parts = [_nearness(len(found), wanted)]
        if "color" in clause:
            parts.append(
                _nearness(list(colors(found, clause["class"])).count(clause["color"]), wanted) if found else 0.0
            )
        best = found[:wanted]
        if "position" in clause:
            parts.append(float(bool(best) and _placed(best, clause["position"], chosen)))
        chosen.append(best or None)
        credits.append(sum(parts) / len(parts))
    credits += [1.0 - fired for fired in map(_fires(objects), entry.get("exclude") or ())]
    return sum(credits) / len(credits)


def _nearness(found: int, wanted: int) -> float:
    return max(1 - abs(wanted - found) / wanted, 0.0)


def _fires(objects: Objects) -> Callable[[Mapping[str, Any]], bool]:
    return lambda clause: len(objects.get(clause["class"], ())) >= clause["count"]


def _placed(found: Sequence[Instance], position: Sequence[Any], chosen: Sequence[Sequence[Instance] | None]) -> bool:
    relation, target = position
    others = chosen[target]
    return others is not None and all(relation in relations(a.box, b.box) for a in found for b in others)


class GenEvalScorer:
    """Detector and colour rule."""

    def __init__(self, detector: Detector, clip: ClipScorer, threshold: float, counting_threshold: float):
        self.detector, self.clip = detector, clip
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self._colors: dict[str, Tensor] = {}

    def score(self, images: Tensor, entries: Sequence[Mapping[str, Any]], rule: Callable[..., float]) -> Tensor:
        """`strict` or `soft` of (B, 3, H, W) pictures in [0, 1] for their entries: (B,) float32."""
        least = min(self.threshold, self.counting_threshold)
        scores = []
        for image, entry, found in zip(images, entries, self.detector.find(images, least), strict=True):
            threshold = self.counting_threshold if entry.get("tag") == "counting" else self.threshold
            scores.append(
                rule(by_name(found, threshold, MOST), entry, lambda o, name, x=image: self.colors(x, o, name))
            )
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    @torch.no_grad()
    def colors(self, image: Tensor, objects: Sequence[Instance], name: str) -> list[str]:
        """The colour of each object by CLIP: cut out with its surroundings grey, nearest of ten texts."""
        if name not in self._colors:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            means = self.clip.text_features(texts).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self._colors[name] = torch.nn.functional.normalize(means, dim=-1)
        crops = []
        for o in objects:
            left, top, right, bottom = o.box
            alone = torch.where(o.mask.to(image.device), image, torch.full_like(image, AROUND))
            crops.append(self.clip.preprocess(alone[None, :, top:bottom, left:right]))
        features = self.clip.seen_features(torch.cat(crops))
        return [COLORS[k] for k in (features @ self._colors[name].T).argmax(-1).tolist()]
