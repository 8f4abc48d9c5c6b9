"""The gold reward of the shapes world: computed from the picture, not learned."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from t2irl.rewards.base import Reward
from t2irl.shapes.proxies import shapes_captions
from t2irl.shapes.verify import verify
from t2irl.types import PromptGroups


class Shapes(Reward):
    """One measure of `t2irl.shapes.verify`, in [0, 1]. Pictures are 64 x 64 and prompts are captions of the grammar."""

    class Config(Reward.Config):
        """Settings."""

        type: Literal["shapes"] = "shapes"
        measure: Literal["clauses", "correct", "cleanliness", "gold"] = "gold"
        """clauses: share of the caption's clauses that hold. correct: 1 if all hold. cleanliness: how well the objects that
        were found, drawn again, explain the picture. gold: correct x cleanliness."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """The configured measure, (B,) in [0, 1]. Several measures of the same pictures cost one verification."""
        texts = groups.texts
        shapes_captions(images, texts)
        pixels = images.float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).contiguous().numpy()
        return _verify(pixels.tobytes(), pixels.shape, tuple(texts))[self.config.measure].to(images.device, copy=True)


@lru_cache(maxsize=2)
def _verify(pixels: bytes, shape: tuple[int, ...], texts: tuple[str, ...]) -> dict[str, Tensor]:
    return verify(torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape), texts)
