"""Objects in pictures by Mask2Former of transformers, trained on COCO: class, score, mask and box of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

SHORT, LONG, MULTIPLE = 800, 1333, 32
"""How mmdet shows pictures to this network: short side in pixels, unless the long one would be longer; padded to multiples."""
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OWN_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""What GenEval calls a class of COCO."""


@dataclass(frozen=True)
class Instance:
    """One object."""

    name: str
    score: float
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels; the last two are one behind the object."""
    mask: Tensor
    """(H, W) bool, on the CPU."""


class Detector:
    """A frozen Mask2Former for instances."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype = torch.float32, short: int = SHORT):
        self.model = model.to(device, dtype).requires_grad_(False).eval()
        self.device, self.dtype, self.short = device, dtype, short
        names = {int(k): str(v).lower() for k, v in model.config.id2label.items()}
        self.names = [OWN_NAMES.get(names[k], names[k]) for k in range(len(names))]
        self.mean, self.std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))

    @classmethod
    def load(
        cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, short: int = SHORT
    ) -> Detector:
        """Read the folder of facebook/mask2former-swin-small-coco-instance or a like one. Raises OSError or ValueError."""
        if not (folder / "config.json").is_file():
            raise FileNotFoundError("not a Mask2Former in transformers format: it lacks config.json")
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"the weights lack {len(report['missing_keys'])} tensors; is that a Mask2Former?")
        return cls(model, device, dtype, short)

    @torch.no_grad()
    def find(self, images: Tensor, threshold: float) -> list[list[Instance]]:
        """Objects of (B, 3, H, W) pictures in [0, 1] with a score above `threshold`, best first."""
        height, width = images.shape[-2:]
        scale = min(self.short / min(height, width), self.short * LONG / SHORT / max(height, width))
        size = [round(height * scale), round(width * scale)]
        shown = F.interpolate(
            images.to(self.device).float(), size, mode="bilinear", antialias=False, align_corners=False
        )
        shown = F.pad((shown - self.mean) / self.std, (0, -size[1] % MULTIPLE, 0, -size[0] % MULTIPLE))
        seen = self.model(pixel_values=shown.to(self.dtype))
        found = []
        for classes, masks in zip(seen.class_queries_logits.float(), seen.masks_queries_logits.float(), strict=True):
            # Masks are of the padded picture: enlarged to it, cut, and brought to the picture's own size.
            masks = F.interpolate(masks[None], shown.shape[-2:], mode="bilinear", align_corners=False)
            masks = F.interpolate(
                masks[..., : size[0], : size[1]], (height, width), mode="bilinear", align_corners=False
            )
            found.append(self._instances(classes, masks[0], threshold))
        return found

    def _instances(self, classes: Tensor, masks: Tensor, threshold: float) -> list[Instance]:
        """The best pairs of query and class, scored by class probability times the mean probability within the mask."""
        chances = classes.softmax(-1)[:, :-1]
        best, places = chances.flatten().topk(min(len(classes), chances.numel()))
        queries, labels = places // chances.shape[1], places % chances.shape[1]
        inside = masks > 0
        within = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
        scores = best * within[queries]
        kept = [
            k for k in scores.argsort(descending=True).tolist() if scores[k] > threshold and inside[queries[k]].any()
        ]
        return [
            Instance(self.names[int(labels[k])], float(scores[k]), _box(inside[queries[k]]), inside[queries[k]].cpu())
            for k in kept
        ]


def _box(mask: Tensor) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def by_name(instances: Sequence[Instance], threshold: float, most: int) -> dict[str, list[Instance]]:
    """Objects above a score by class, best first, at most so many of a class."""
    table: dict[str, list[Instance]] = {}
    for instance in sorted(instances, key=lambda i: -i.score):
        if instance.score > threshold and len(table.setdefault(instance.name, [])) < most:
            table[instance.name].append(instance)
    return {name: found for name, found in table.items() if found}
