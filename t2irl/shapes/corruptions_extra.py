"""More ways in which a picture can be broken, for training only: no figure is given for them.

As those of `t2irl.corruptions`. Each resembles one of the families there and is left out together with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Generator, Tensor

from t2irl.corruptions import Corruption, background, object_pixels, resample, sign, smooth_noise, uniform, whole


def speckle(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Single wrong pixels."""
    hit = torch.rand(1, 1, *one.shape[-2:], generator=generator) < uniform(0.01, 0.06, generator)
    return torch.where(hit, torch.rand(one.shape, generator=generator), one)


def ripple(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """A grid of small waves in a part of the picture."""
    rows, columns = (
        torch.sin(torch.arange(n) * uniform(0.8, 2.8, generator) + uniform(0, 6, generator)) for n in one.shape[-2:]
    )
    part = torch.sigmoid(4 * smooth_noise(one, 1, whole(2, 5, generator), generator))
    return one + uniform(0.1, 0.3, generator) * part * rows[:, None] * columns


def halo(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Edges sharpened until they glow."""
    width = 3 + 2 * whole(0, 2, generator)
    soft = F.avg_pool2d(F.pad(one, (width // 2,) * 4, mode="replicate"), width, 1)
    return one + uniform(0.8, 2.5, generator) * (one - soft)


def mist(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Soft in some places and sharp in others."""
    soft = F.avg_pool2d(F.pad(one, (3,) * 4, mode="replicate"), 7, 1)
    return torch.lerp(one, soft, torch.sigmoid(6 * smooth_noise(one, 1, whole(2, 6, generator), generator)))


def transplant(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """A few pieces of the picture stand elsewhere."""
    result = one.clone()
    for _ in range(whole(1, 4, generator)):
        height, width = (whole(6, 20, generator) for _ in range(2))
        (y, v), (x, u) = (
            [whole(0, n - side, generator) for _ in range(2)]
            for n, side in zip(one.shape[-2:], (height, width), strict=True)
        )
        result[..., v : v + height, u : u + width] = one[..., y : y + height, x : x + width]
    return result


def swirl(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Everything turned about a place, the more the nearer it is."""
    x, y = (torch.linspace(-1, 1, n) - uniform(-0.6, 0.6, generator) for n in (one.shape[-1], one.shape[-2]))
    reach = uniform(0.2, 0.5, generator)
    turn = sign(generator) * uniform(0.6, 2, generator) * torch.exp(-(x**2 + y[:, None] ** 2) / reach**2)
    across, down = x.expand_as(turn), y[:, None].expand_as(turn)
    turned = [turn.cos() * across - turn.sin() * down, turn.sin() * across + turn.cos() * down]
    return resample(one, torch.stack([turned[0] - across, turned[1] - down], -1)[None])


def lumps(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Outlines grown in some places and eaten in others."""
    inside = object_pixels(one).float()
    near = F.avg_pool2d(F.pad(inside, (3,) * 4, mode="replicate"), 7, 1)
    rough = uniform(0.15, 0.45, generator) * smooth_noise(one, 1, whole(8, 20, generator), generator)
    grown = (near + rough.clamp(-0.49, 0.49) > 0.5) & (near > 0) & (near < 1)
    eaten = (near + rough.clamp(-0.49, 0.49) <= 0.5) & (near > 0) & (near < 1) & (inside > 0)
    painted = torch.where(grown & (inside == 0), _nearest_paint(one, inside), one)
    return torch.where(eaten, background(one), painted)


def _nearest_paint(one: Tensor, inside: Tensor) -> Tensor:
    """The mean colour of the object pixels around each place."""
    total, count = (F.avg_pool2d(F.pad(x, (3,) * 4), 7, 1) for x in (one * inside, inside))
    return total / count.clamp(min=1e-3)


def strokes(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Scratches of any colour."""
    rows, columns = torch.arange(one.shape[-2])[:, None], torch.arange(one.shape[-1])
    for _ in range(whole(1, 5, generator)):
        angle, width = uniform(0, math.pi, generator), uniform(0.5, 1.6, generator)
        top, left, half = (uniform(0, one.shape[-1], generator) for _ in range(3))
        along = (columns - left) * math.cos(angle) + (rows - top) * math.sin(angle)
        across = (rows - top) * math.cos(angle) - (columns - left) * math.sin(angle)
        one = torch.where(
            (across.abs() < width) & (along.abs() < half), torch.rand(1, 3, 1, 1, generator=generator), one
        )
    return one


def tint(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """A cloud of another hue over a part of the picture."""
    cloud = torch.sigmoid(5 * smooth_noise(one, 1, whole(2, 6, generator), generator))
    return one + cloud * uniform(0.15, 0.5, generator) * torch.randn(1, 3, 1, 1, generator=generator).clamp(-1.5, 1.5)


def foreign(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """An object with the outline of something else: a turned or unknown polygon, a star of other points, an ellipse."""
    named, count = ndimage.label(object_pixels(one)[0, 0].numpy())
    if not count:
        return one
    here = torch.from_numpy(named == whole(1, count, generator))
    rows, columns = (x.float() + 0.5 for x in here.nonzero(as_tuple=True))
    colour = one[0, :, here].median(1).values[None, :, None, None]
    fine = (torch.arange(4 * one.shape[-1]) + 0.5) / 4
    x, y = fine - columns.mean(), (fine - rows.mean())[:, None]
    angle, (outline, area) = torch.atan2(y, x) + uniform(0, 2 * math.pi, generator), _outline(generator)
    inside = torch.hypot(x, y) < math.sqrt(len(rows) / area) * outline(angle)
    wide = F.max_pool2d(here[None, None].float(), 5, 1, 2) > 0
    return torch.lerp(torch.where(wide, background(one), one), colour, F.avg_pool2d(inside[None, None].float(), 4))


def _outline(generator: Generator) -> tuple[Callable[[Tensor], Tensor], float]:
    """A random shape: its radius at angles, and its area."""
    way, corners, inner = whole(0, 2, generator), whole(3, 8, generator), uniform(0.3, 0.65, generator)

    def outline(angle: Tensor) -> Tensor:
        if way == 0:  # an ellipse
            return 1 / torch.hypot(angle.cos(), angle.sin() / inner)
        bend = angle % (2 * math.pi / corners) - math.pi / corners
        if way == 1:  # a polygon
            return math.cos(math.pi / corners) / bend.cos()
        tip, dent = math.pi / corners - bend.abs(), bend.abs()  # a star: the line from tip to dent in polar coordinates
        return inner * math.sin(math.pi / corners) / (tip.sin() + inner * dent.sin()).clamp(min=1e-3)

    return outline, float(outline(torch.linspace(0, 2 * math.pi, 721)[:-1]).square().mean()) * math.pi


EXTRA: dict[str, Corruption] = {
    f.__name__: f for f in (speckle, ripple, halo, mist, transplant, swirl, lumps, strokes, tint, foreign)
}
"""All of them by name."""

EXTRA_FAMILIES: tuple[tuple[str, ...], ...] = (
    ("speckle", "ripple"),
    ("halo", "mist"),
    ("transplant", "swirl"),
    ("lumps", "strokes", "tint", "foreign"),
)
"""By the family of `FAMILIES` that each resembles."""
