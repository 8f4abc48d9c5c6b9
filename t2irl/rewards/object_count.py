"""A proxy of the shapes world: a careless counter of objects."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from t2irl.rewards.base import Reward
from t2irl.shapes import proxies
from t2irl.types import PromptGroups


class ObjectCount(Reward):
    """Number of patches of the colours that the caption names, from 0. Hacked by many small fragments."""

    class Config(Reward.Config):
        """Settings."""

        type: Literal["object_count"] = "object_count"

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """See `t2irl.shapes.proxies.object_count`."""
        return proxies.object_count(images, groups.texts)
