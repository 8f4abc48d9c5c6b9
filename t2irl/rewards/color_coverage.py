"""A proxy of the shapes world: how much of the picture has the colours that the caption names."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from t2irl.rewards.base import Reward
from t2irl.shapes import proxies
from t2irl.types import PromptGroups


class ColorCoverage(Reward):
    """Share of pixels near the caption's object colours, in [0, 1]. Hacked by flooding the canvas with colour."""

    class Config(Reward.Config):
        """Settings."""

        type: Literal["color_coverage"] = "color_coverage"

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """See `t2irl.shapes.proxies.color_coverage`."""
        return proxies.color_coverage(images, groups.texts)
