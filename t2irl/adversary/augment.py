"""Random changes of pictures while an adversary learns, the same for a reference image and the rollout image paired with it.

They keep the adversary from settling on traits that do not matter, such as an exact brightness or position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from t2irl.config import Strict


class Augment(Strict):
    """Changes of the pictures that an adversary learns from; scores are given to unchanged pictures."""

    flip: bool = False
    """Mirror every second picture. Not where prompts speak of left and right."""
    jitter: float = Field(default=0.0, ge=0, le=0.9)
    """Brightness, contrast and saturation are multiplied by factors in [1 - jitter, 1 + jitter]."""
    translate: float = Field(default=0.0, ge=0, le=0.5)
    """Pictures are moved by up to this share of their side in each direction; the border is repeated."""
    cutout: float = Field(default=0.0, ge=0, le=0.9)
    """Side of a gray square at a random place, as a share of the picture's side."""

    @property
    def active(self) -> bool:
        """Whether pictures change at all."""
        return self.flip or self.jitter > 0 or self.translate > 0 or self.cutout > 0


GRAY = 0.5
LUMA = (0.299, 0.587, 0.114)


def augment(images: Tensor, settings: Augment, seeds: Sequence[int]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], each changed as its own seed says. Differentiable with respect to the images."""
    draws = np.stack([np.random.default_rng(seed).random(8) for seed in seeds])
    u = torch.from_numpy(draws).to(images.device, images.dtype)
    height, width = images.shape[-2:]
    if settings.flip:
        images = torch.where((u[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
    if settings.jitter:
        images = _jitter(images, 1 + settings.jitter * (2 * u[:, 1:4] - 1))
    if settings.translate:
        rows, columns = (_moved(size, settings.translate * (2 * u[:, k] - 1)) for size, k in ((height, 4), (width, 5)))
        index = torch.arange(len(images), device=images.device).view(-1, 1, 1)
        images = images.movedim(1, -1)[index, rows[:, :, None], columns[:, None]].movedim(-1, 1)
    if settings.cutout:
        inside = (
            _inside(height, settings.cutout, u[:, 6])[:, :, None] & _inside(width, settings.cutout, u[:, 7])[:, None]
        )
        images = images.masked_fill(inside[:, None], GRAY)
    return images


def _jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast around the mean, saturation around the luma: (B, 3) factors."""
    brightness, contrast, saturation = factors.T.reshape(3, -1, 1, 1, 1)
    images = images * brightness
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    luma = (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return (luma + (images - luma) * saturation).clamp(0, 1)


def _moved(size: int, shares: Tensor) -> Tensor:
    """For each picture, where its `size` rows or columns come from: (B, size)."""
    steps = (shares * size).round().long()
    return (torch.arange(size, device=shares.device)[None] - steps[:, None]).clamp(0, size - 1)


def _inside(size: int, share: float, place: Tensor) -> Tensor:
    """For each picture, which rows or columns a square of this share covers: (B, size)."""
    side = round(share * size)
    first = (place * (size - side + 1)).long()[:, None]
    position = torch.arange(size, device=place.device)[None]
    return (position >= first) & (position < first + side)
