"""A proxy for any pictures: a stand-in for an aesthetic score."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from t2irl.rewards.base import Reward
from t2irl.shapes import proxies
from t2irl.types import PromptGroups


class Vividness(Reward):
    """Mean saturation times contrast, in [0, 1]. Hacked by neon blotches."""

    class Config(Reward.Config):
        """Settings."""

        type: Literal["vividness"] = "vividness"

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """See `t2irl.shapes.proxies.vividness`."""
        return proxies.vividness(images)
