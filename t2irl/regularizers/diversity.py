"""Diversity-aware advantages (GARDO, arXiv 2512.24138, section 4.3): good images that differ from the others count more."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeFloat
from torch import Tensor

from t2irl.guards.diversity import Distance, Factor, factors, nearest, pairwise
from t2irl.regularizers.base import PictureRegularizer
from t2irl.types import Rollout
from t2irl.utils import distributed


class Diversity(PictureRegularizer):
    """A positive advantage is multiplied by the image's distance to the most alike image of its group.

    Multiplied, so that it needs no scale and changes no sign, and only positive ones, so that being different is no merit by itself.
    The advantages of a group then no longer sum to 0. Hacked by backgrounds and textures that features see and people do not.
    """

    class Config(PictureRegularizer.Config):
        """Settings."""

        type: Literal["diversity"] = "diversity"
        distance: Distance = "cosine"
        """1 - cosine, as published, or the Euclidean distance."""
        factor: Factor = "relative"
        """relative: the distance divided by the group's mean, as in the released code. relative_positive: divided by the mean of its
        images of positive advantage. raw: the distance itself, as printed, which shrinks positive advantages."""
        eps: NonNegativeFloat = 1e-6
        """Added to the distance and to the mean, so that identical images keep their advantages."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.found: dict[str, float] = {}

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
