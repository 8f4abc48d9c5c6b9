"""Diversity-aware advantages (GARDO, arXiv 2512.24138, section 4.3): good images that differ from the others count more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from reward_models.vision import VisionBackbone
from t2irl.errors import DataError
from t2irl.geometry import even_chunks
from t2irl.guards.diversity import Distance, Factor, factors, nearest, pairwise
from t2irl.models.base import DTYPES
from t2irl.regularizers.base import Regularizer
from t2irl.types import Rollout
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts

PIXEL_SIDE = 16
"""Side that pictures are shrunk to where their pixels are the features."""


class Diversity(Regularizer):
    """A positive advantage is multiplied by the image's distance to the most alike image of its group.

    Multiplied, so that it needs no scale and changes no sign, and only positive ones, so that being different is no merit by itself.
    The advantages of a group then no longer sum to 0. Hacked by backgrounds and textures that features see and people do not.
    """

    class Config(Regularizer.Config):
        """Settings."""

        type: Literal["diversity"] = "diversity"
        path: Path | None = Path("assets/tiny-dinov2")
        """Folder of a vision transformer: DINOv2, DINOv3, SigLIP or CLIP, of transformers, timm or open_clip; published:
        DINOv3 ViT-L/16. null: the pixels themselves, shrunk to 16 x 16."""
        layers: tuple[int, ...] = Field((-1,), min_length=1)
        """Blocks whose outputs are the features, joined; negative ones count from the end."""
        size: PositiveInt | None = None
        """Side of the backbone's input in pixels; null: the folder's own."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of the backbone's blocks."""
        token: Literal["patches", "cls"] = "patches"
        """The mean of the patches, as published, or the vector of the whole picture."""
        distance: Distance = "cosine"
        """1 - cosine, as published, or the Euclidean distance."""
        factor: Factor = "relative"
        """relative: the distance divided by the group's mean, as in the released code. relative_positive: divided by the mean of its
        images of positive advantage. raw: the distance itself, as printed, which shrinks positive advantages."""
        eps: NonNegativeFloat = 1e-6
        """Added to the distance and to the mean, so that identical images keep their advantages."""

    def prepare(self, name: str, parts: Parts) -> None:
        """Load the backbone."""
        c, device = self.config, parts.family.device
        self.device, self.batch_size = device, parts.geometry.run.rollout.batch_size
        self.found: dict[str, float] = {}
        try:
            self.backbone = c.path and VisionBackbone.load(
                c.path, device, c.layers, size=c.size, dtype=DTYPES[c.precision]
            )
        except (OSError, ValueError) as error:
            raise DataError(f"regularizers.{name}: path = {c.path}: {error}") from error

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Of pictures (B, 3, H, W) uint8: (B, D) float32."""
        parts = []
        for chunk in even_chunks(len(images), self.batch_size):
            pictures = images[chunk].to(self.device).float().div(255)
            if self.backbone is None:
                parts.append(F.adaptive_avg_pool2d(pictures, PIXEL_SIDE).flatten(1) - 0.5)
            else:
                found = self.backbone(pictures)
                parts.append(found.cls if self.config.token == "cls" else found.patches.mean(1))
        return torch.cat(parts)

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Advantages with their positive ones multiplied; groups may lie across processes."""
        c, device = self.config, self.device
        features = distributed.gather_rows(self.features(rollout.trajectory.images), device)
        everyone = distributed.gather_rows(advantages, device).double()
        found = nearest(features, rollout.ids, c.distance)
        factor = factors(found, rollout.ids, everyone, c.factor, c.eps)
        self.found = {
            "nearest": float(found.mean()),
            "pairwise": pairwise(features, rollout.ids, c.distance),
            "factor_max": float(factor.max()),
        }
        return advantages * factor[rollout.own].to(advantages)

    def metrics(self) -> dict[str, float]:
        """Mean distance to the most alike image and of all pairs of a group, and the largest factor."""
        return self.found
