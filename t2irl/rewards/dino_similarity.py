"""Likeness to the prompt's own reference images, under frozen vision features."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from reward_models.vision import Features, VisionBackbone, l2
from t2irl.adversary.memory import Tensors
from t2irl.likeness import LikenessReward
from t2irl.models.base import DTYPES
from t2irl.rewards.base import reading


class DinoSimilarity(LikenessReward):
    """Cosine in [-1, 1] between a picture and the reference images of its prompt: of the whole, of the patches, or both.

    Hacked by copying: every image of a prompt drifts towards one reference image, and with `patches: match` towards its
    texture in any arrangement. Watch the spread within groups, and hold a measure of prompt following beside it.
    """

    class Config(LikenessReward.Config):
        """Settings."""

        type: Literal["dino_similarity"] = "dino_similarity"
        path: Path = Path("assets/tiny-dinov2")
        """Folder of a vision transformer: DINOv2, DINOv3, SigLIP or CLIP, of transformers, timm or open_clip."""
        layers: tuple[int, ...] = Field((-1,), min_length=1)
        """Blocks whose outputs are the features, joined; negative ones count from the end."""
        size: PositiveInt | None = None
        """Side of the backbone's input in pixels; null: the folder's own."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of the backbone's blocks."""
        features: Literal["cls", "patches", "both"] = "cls"
        """What is compared: the picture as a whole, its patches, or the weighted mean of the two."""
        cls_weight: NonNegativeFloat = 0.5
        """With `both`: weight of the picture as a whole."""
        patches_weight: NonNegativeFloat = 0.5
        """With `both`: weight of the patches."""
        patches: Literal["match", "place"] = "match"
        """A patch is compared with the most alike patch of the reference image, wherever it is, or with the one at the same
        place. `match` takes the mean of both directions, so that leaving something out costs as much as adding something."""

        @model_validator(mode="after")
        def _weights_fit(self) -> DinoSimilarity.Config:
            if self.features == "both" and self.cls_weight + self.patches_weight == 0:
                raise PydanticCustomError(
                    "dino_similarity", "cls_weight and patches_weight are both 0; one must be above"
                )
            return self

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        with reading(config):
            self.backbone = VisionBackbone.load(
                config.path, device, config.layers, size=config.size, dtype=DTYPES[config.precision]
            )

    def features_name(self) -> str:
        """Backbone, precision, and what is kept."""
        kept = "cls" if self.config.features == "cls" else "cls and patches"
        return f"{self.backbone.fingerprint()} {self.config.precision} {kept}"

    def reference_features(self, images: Tensor) -> Tensors:
        """Unit vectors of a reference image, only those that are used."""
        features = self.features(images)
        return (features.cls,) if self.config.features == "cls" else (features.cls, features.patches)

    def features(self, images: Tensor) -> Features:
        """Unit vectors."""
        return l2(self.backbone(images))

    def compare(self, ours: Features, theirs: Tensors) -> Tensor:
        """Cosines, weighted."""
        c = self.config
        each = torch.zeros(len(ours), len(theirs[0]), device=ours.cls.device)
        total = {"cls": (1.0, 0.0), "patches": (0.0, 1.0), "both": (c.cls_weight, c.patches_weight)}[c.features]
        if total[0]:
            each = each + total[0] * (ours.cls @ theirs[0].T)
        if total[1]:
            closest = best_match if c.patches == "match" else same_place
            each = each + total[1] * torch.stack([closest(ours.patches, other) for other in theirs[1]], 1)
        return each / sum(total)


def same_place(ours: Tensor, other: Tensor) -> Tensor:
    """Mean cosine of the patches (n, N, D) and those of one picture (N, D) at the same places, unit vectors: (n,)."""
    return (ours * other).sum(-1).mean(1)


def best_match(ours: Tensor, other: Tensor) -> Tensor:
    """Mean cosine of each patch and the most alike one of the other picture, mean of both directions: (n,)."""
    table = ours @ other.T
    return (table.amax(2).mean(1) + table.amax(1).mean(1)) / 2
