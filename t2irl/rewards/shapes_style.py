"""Which style of the shapes world a picture is in: computed from the picture, not learned."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import field_validator, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from t2irl.rewards.base import Reward
from t2irl.shapes.proxies import shapes_captions
from t2irl.shapes.render import Scene
from t2irl.shapes.styles import STYLES, strength, style_of
from t2irl.shapes.verify import read
from t2irl.types import PromptGroups


class ShapesStyle(Reward):
    """How much a picture is in a style, given what the verifier reads in it. The caption does not matter."""

    class Config(Reward.Config):
        """Settings."""

        type: Literal["shapes_style"] = "shapes_style"
        style: str = "outlined"
        """The style asked for: plain, outlined or pastel."""
        measure: Literal["nearest", "strength"] = "nearest"
        """nearest: 1 if of its drawings in all styles the one in this style resembles the picture most, else 0. strength: how far the
        picture has gone from the plain drawing to this one, in [0, 1]; not for the plain style itself."""

        @field_validator("style")
        @classmethod
        def _known(cls, style: str) -> str:
            if style not in STYLES:
                raise PydanticCustomError(
                    "shapes_style", "{style} is no style; known: {known}", {"style": style, "known": ", ".join(STYLES)}
                )
            return style

        @model_validator(mode="after")
        def _there_is_a_way(self) -> ShapesStyle.Config:
            if self.measure == "strength" and self.style == "plain":
                raise PydanticCustomError(
                    "shapes_style",
                    "strength is the way from the plain style to another one; name that, or take measure: nearest",
                )
            return self

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """See `t2irl.shapes.styles`: (B,) in [0, 1]."""
        shapes_captions(images, groups.texts)
        return torch.tensor([self._one(*row) for row in read(images)], device=images.device)

    def _one(self, picture: np.ndarray, scene: Scene) -> float:
        if self.config.measure == "strength":
            return strength(picture, scene, self.config.style)
        return float(style_of(picture, scene) == self.config.style)
