"""A light classifier of artifacts: does a picture show one, whatever its prompt?

It looks with a frozen vision backbone, with a small convolutional network of its own, or with both; their logits are added.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from reward_models.folders import read_folder
from reward_models.heads import PatchHead
from reward_models.pixels import fit_square
from reward_models.vision import VisionBackbone

WEIGHTS, SETTINGS, CARD = "artifact.safetensors", "artifact.json", "README.md"


class DetailNet(nn.Module):
    """Convolutions at a quarter of the resolution that see 30 x 30 pixels and, from a second pass at an eighth, their surroundings.

    They judge each place by itself. No normalisation: nothing depends on a picture's neighbours, and a place's logit does not
    depend on how much else is wrong.
    """

    def __init__(self, width: int):
        super().__init__()
        self.near = _convolutions((3, width, 4, 2), (width, width, 3, 1), (width, 2 * width, 4, 2), *((2 * width, 2 * width, 3, 1),) * 2)  # fmt: skip
        self.far = _convolutions((2 * width, 2 * width, 4, 2), (2 * width, 2 * width, 3, 1))
        self.place = nn.Conv2d(2 * width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, h, w) float32 of places of pictures (B, 3, H, W) in [0, 1]."""
        near = self.near(images * 2 - 1)
        around = F.interpolate(self.far(near), near.shape[-2:])
        return self.place(near + around)[:, 0].float()


def _convolutions(*shapes: tuple[int, int, int, int]) -> nn.Sequential:
    """Convolutions with ReLU; of each its inputs, outputs, kernel and stride."""
    layers = []
    for inputs, outputs, kernel, stride in shapes:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, 1)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers)


class FeatureNet(nn.Module):
    """Heads on a backbone's features: the picture as a whole, and its patches."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.whole, self.patches = PatchHead(width, hidden), PatchHead(width, hidden)

    def forward(self, whole: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float32 of the picture (B,) and its places (B, h, w), of features (B, D) and (B, h * w, D)."""
        side = math.isqrt(patches.shape[1])
        return self.whole(whole), self.patches(patches).unflatten(1, (side, side))


def pooled(places: Tensor) -> Tensor:
    """(B,) of logits of places (B, h, w): their mean, and their mean with the suspicious ones weighing most."""
    each = places.flatten(1)
    return each.mean(1) + (each * each.softmax(1)).sum(1)


@dataclass(frozen=True)
class Design:
    """What a classifier is made of, besides its weights."""

    size: int
    """Side in pixels that pictures are brought to."""
    detail: int = 0
    """Width of the convolutional network, a multiple of 8; 0: none."""
    backbone: str | None = None
    """Folder of the vision backbone, relative to the classifier's; None: none."""
    layers: tuple[int, ...] = (-1,)
    """Blocks of the backbone whose outputs are looked at."""
    hidden: int = 128
    """Hidden width of the heads on the backbone."""
    temperature: float = 1.0
    """Logits are divided by it, so that they are calibrated on pictures that were not learned from."""
    base: dict[str, float] = field(default_factory=dict)
    """Scores of the base model's own pictures: `median`, and whatever else the card gives. Empty: not measured."""


class ArtifactClassifier(nn.Module):
    """See the module. The backbone is frozen; everything else is trained."""

    def __init__(self, design: Design, backbone: VisionBackbone | None, device: torch.device):
        super().__init__()
        if not design.detail and backbone is None:
            raise ValueError("a classifier needs a backbone, detail, or both; neither is there")
        if design.detail % 8:
            raise ValueError(f"detail = {design.detail}: expected a multiple of 8, or 0")
        self.design, self.backbone = design, backbone
        self.detail = DetailNet(design.detail) if design.detail else None
        self.heads = None if backbone is None else FeatureNet(backbone.width, design.hidden)
        self.to(device)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(iter(self.trained().values())).device

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: everything but the backbone."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("backbone.")}

    def judge(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of pictures (B, 3, H, W) in [0, 1]: logits (B,) float32 before calibration, and each network's logits of places (B, h, w).

        Above 0 means that there is an artifact.
        """
        images = fit_square(images.to(self.device).float(), self.design.size)
        found, maps = torch.zeros(len(images), device=self.device), []
        if self.detail is not None:
            maps.append(self.detail(images))
        if self.backbone is not None and self.heads is not None:
            with torch.no_grad():
                features = self.backbone(images)
            whole, places = self.heads(F.normalize(features.cls, dim=-1), F.normalize(features.patches, dim=-1))
            found = found + whole
            maps.append(places)
        return found + torch.stack([pooled(places) for places in maps]).sum(0), maps

    def logits(self, images: Tensor) -> Tensor:
        """(B,) float32 of pictures (B, 3, H, W) in [0, 1], before calibration; above 0 means that there is an artifact."""
        return self.judge(images)[0]

    def clean(self, images: Tensor) -> Tensor:
        """Calibrated probability that a picture shows no artifact, (B,) float32 in [0, 1]."""
        return torch.sigmoid(-self.logits(images) / self.design.temperature)

    @torch.no_grad()
    def move(self, amount: float) -> None:
        """Add a number to every picture's logit."""
        if self.heads is not None:
            self.heads.whole.last.bias.add_(amount)
        elif self.detail is not None and self.detail.place.bias is not None:
            self.detail.place.bias.add_(amount / 2)  # it is in both means of `pooled`

    # ---------------------------------------------------------------------------------------------------------- files
    @classmethod
    def load(cls, folder: Path, device: torch.device) -> ArtifactClassifier:
        """Read a folder that `save` wrote. Raises OSError or ValueError saying what is missing or wrong."""
        design, weights = read_folder(folder, "an artifact classifier", WEIGHTS, SETTINGS, Design, device)
        if "detail.head.last.weight" in weights:
            raise ValueError(
                "an earlier version wrote it, whose convolutional network was another one; train it again: "
                "python -m reward_models.recipes.train_artifact"
            )
        backbone = None
        if design.backbone is not None:
            backbone = VisionBackbone.load(folder / design.backbone, device, design.layers, size=design.size)
        model = cls(design, backbone, device)
        model.set_trained({name: x.float() for name, x in weights.items()})
        return model.requires_grad_(False)

    @torch.no_grad()
    def set_trained(self, values: dict[str, Tensor]) -> None:
        """Set what is trained. Raises ValueError when names or shapes differ."""
        own = self.trained()
        shapes, given = ({name: tuple(x.shape) for name, x in part.items()} for part in (own, values))
        if odd := sorted(n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n)):
            raise ValueError(
                f"the weights differ, such as {odd[0]}: {given.get(odd[0])} given, {shapes.get(odd[0])} needed"
            )
        for name, parameter in own.items():
            parameter.copy_(values[name])

    def save(self, folder: Path, card: str | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Write weights, settings and, if given, the card."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: p.detach().to("cpu", dtype).contiguous() for n, p in self.trained().items()}, folder / WEIGHTS)
        (folder / SETTINGS).write_text(json.dumps(vars(self.design), indent=1) + "\n", encoding="utf-8")
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")


def scores(model: ArtifactClassifier, pictures: Tensor, batch: int = 128) -> Tensor:
    """Uncalibrated logits (n,) float64 on the CPU of pictures (n, 3, H, W) uint8."""
    with torch.no_grad():
        parts: Sequence[Any] = [model.logits(part.float().div(255)).double().cpu() for part in pictures.split(batch)]
    return torch.cat([torch.empty(0, dtype=torch.float64), *parts])
