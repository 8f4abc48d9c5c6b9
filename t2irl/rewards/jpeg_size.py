"""The size of a picture as JPEG: the toy reward of DDPO (arXiv 2305.13301), for which it is plain what is learned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from reward_models.jpeg import jpeg_kilobytes
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups


class JpegSize(Reward):
    """Kilobytes with a sign. Hacked, or rather served, by an empty canvas (`small`) or by noise (`large`)."""

    class Config(Reward.Config):
        """Settings."""

        type: Literal["jpeg_size"] = "jpeg_size"
        prefer: Literal["small", "large"] = "small"
        """small: compressibility, minus the size. large: incompressibility, the size."""
        quality: int = Field(95, ge=1, le=95)
        """Of the JPEG file. Published: 95."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """The size in thousands of bytes, (B,) float32, negative for `small`."""
        size = jpeg_kilobytes(images, self.config.quality)
        return -size if self.config.prefer == "small" else size
