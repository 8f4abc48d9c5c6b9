"""From pictures of any size to the square that a network takes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def fit_square(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) in [0, 1]: short side resized, centre cut out. Differentiable."""
    height, width = images.shape[-2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        target = [max(round(height * scale), size), max(round(width * scale), size)]
        images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = ((images.shape[d] - size) // 2 for d in (-2, -1))
    return images[..., top : top + size, left : left + size]


def pad_square(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) in [0, 1]: long side resized, black at both ends of the short one."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    target = [round(height * scale), round(width * scale)]
    if target != [height, width]:
        images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    return F.pad(images, (left, size - target[1] - left, top, size - target[0] - top))
