"""Reference images spoilt on purpose, which an adversary learns to turn down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, PositiveFloat, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from t2irl.config import Strict
from t2irl.corruptions import KINDS, whole


class Negatives(Strict):
    """A further loss, which asks for spoilt reference images to be known as such (Sinha et al., arXiv 2102.05113).

    So the adversary also learns of faults that few of the policy's pictures have yet.
    """

    kinds: tuple[str, ...] = Field(("mottle", "ghost", "warp", "blur"), min_length=1)
    """Ways to spoil a picture, one drawn for each: names of `t2irl/corruptions.py`."""
    weight: PositiveFloat = 1.0
    """Weight of the loss, that of the policy's pictures being 1."""

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise PydanticCustomError(
                "negatives", "{unknown} is no way to spoil a picture; known: {known}",
                {"unknown": ", ".join(unknown), "known": ", ".join(KINDS)},
            )  # fmt: skip
        return kinds


def spoil(pictures: Tensor, settings: Negatives, seeds: Sequence[int]) -> Tensor:
    """Pictures (B, 3, H, W) uint8, each spoilt as its own seed says: the same type, on the CPU."""
    spoilt = []
    for picture, seed in zip(pictures.cpu().float().div(255), seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        kind = settings.kinds[whole(0, len(settings.kinds) - 1, generator)]
        # What shines through is the picture itself, mirrored: another one would depend on what this process holds.
        own = torch.stack([picture.flip(-1), picture.flip(-2)])
        spoilt.append(KINDS[kind](picture[None], generator, own))
    return torch.cat(spoilt).clamp(0, 1).mul(255).round().to(torch.uint8)
