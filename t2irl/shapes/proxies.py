"""Three imperfect rewards of the shapes world, each with a known way to be hacked.

Pure functions of pictures (B, 3, 64, 64) float in [0, 1], and of their captions where these matter, returning (B,)
float32. The fourth proxy, a small CLIP, is a network and stands in `t2irl.rewards.tiny_clip`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from t2irl.errors import DataError
from t2irl.shapes.captions import COLORS, Caption, parse_caption
from t2irl.shapes.render import SIZE

NEAR = 60.0
"""A pixel this close to a colour (Euclidean, RGB in 0..255) counts as that colour; the nearest two colours are 71 apart."""
MIN_FRAGMENT = 4
"""Pixels from which `object_count` counts a component. The gold reward asks for ten times as many: that gap is the hack."""

_LUMA = (0.299, 0.587, 0.114)


def shapes_captions(images: Tensor, texts: Sequence[str]) -> list[Caption]:
    """The meaning of the captions. Raises DataError when the pictures or a caption are not of the shapes world."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise DataError(
            f"rewards of the shapes world take pictures of shape (B, 3, {SIZE}, {SIZE}), got {tuple(images.shape)}; "
            "use a model of that resolution, such as assets/tiny-sd3, or another reward"
        )
    if len(images) != len(texts):
        raise DataError(f"{len(images)} pictures but {len(texts)} captions; every picture needs its own")
    try:
        return [parse_caption(text) for text in texts]
    except ValueError as error:
        raise DataError(f"a reward of the shapes world met a prompt that it cannot read: {error}") from error


def color_coverage(images: Tensor, texts: Sequence[str]) -> Tensor:
    """Share of pixels within `NEAR` of an object colour that the caption names: (B,) in [0, 1].

    Hack: flood the canvas with that colour.
    """
    return _named_pixels(images, texts).any(1).float().mean((1, 2))


def vividness(images: Tensor) -> Tensor:
    """Mean saturation times contrast: (B,) in [0, 1]. Pictures may have any size, and captions do not matter.

    Saturation of a pixel is its largest minus its smallest channel (unlike HSV's it does not jump on near-black), contrast
    is twice the standard deviation of the luma 0.299 R + 0.587 G + 0.114 B over the picture, which is at most 0.5.

    Hack: neon blotches of light and dark pure colours.
    """
    pixels = images.float().clamp(0, 1)
    saturation = (pixels.amax(1) - pixels.amin(1)).mean((1, 2))
    luma = (pixels * pixels.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1)
    return saturation * 2 * luma.flatten(1).std(1, correction=0)


def object_count(images: Tensor, texts: Sequence[str]) -> Tensor:
    """Number of connected patches, `MIN_FRAGMENT` pixels or more, of the object colours that the caption names: (B,).

    Whole numbers from 0; pixels touch along edges, not at corners. Two colours named: the patches of both are added.

    Hack: many fragments, each far too small to be an object.
    """
    near = _named_pixels(images, texts).flatten(0, 1).cpu().numpy()
    planes_apart = np.zeros((3, 3, 3), bool)
    planes_apart[1] = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(near, structure=planes_apart)
    area = np.bincount(labels.ravel(), minlength=count + 1)
    plane = np.zeros(count + 1, np.int64)
    where = labels.nonzero()
    plane[labels[where]] = where[0]
    patches = plane[1:][area[1:] >= MIN_FRAGMENT]
    per_plane = np.bincount(patches, minlength=len(near)).reshape(len(images), len(COLORS))
    return torch.from_numpy(per_plane.sum(1)).float().to(images.device)


def _named_pixels(images: Tensor, texts: Sequence[str]) -> Tensor:
    """For each object colour, the pixels near to it if the caption names it, else none: (B, 6, 64, 64) bool."""
    named = [{color for color, _ in caption.objects} for caption in shapes_captions(images, texts)]
    wanted = torch.tensor([[c in names for c in COLORS] for names in named], dtype=torch.bool, device=images.device)
    pixels = images.float() * 255
    palette = pixels.new_tensor(list(COLORS.values()))
    near = torch.stack([(pixels - color.view(1, 3, 1, 1)).square().sum(1) for color in palette], 1) <= NEAR**2
    return near & wanted.view(-1, len(COLORS), 1, 1)
