"""Ways in which a picture can be broken: what an artifact reward must see, and what it can be tried on.

Each is a function of one picture (1, 3, H, W) float in [0, 1], a generator and other pictures (B, 3, H, W), one of which may
shine through; it returns the broken picture, still to be clamped. How strong it is, is drawn: from visible to plain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Corruption = Callable[[Tensor, Generator, Tensor], Tensor]


def uniform(low: float, high: float, generator: Generator) -> float:
    """A number between two others."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def whole(low: int, high: int, generator: Generator) -> int:
    """A whole number from `low` to `high`, both included."""
    return low + int(torch.randint(high - low + 1, (), generator=generator))


def sign(generator: Generator) -> int:
    """-1 or 1."""
    return 1 - 2 * whole(0, 1, generator)


def resample(images: Tensor, shift: Tensor) -> Tensor:
    """Pictures read at displaced places; `shift` (B, H, W, 2) in half pictures."""
    identity = torch.eye(2, 3).expand(len(images), -1, -1)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid + shift, padding_mode="border", align_corners=False)


def smooth_noise(one: Tensor, channels: int, cells: int, generator: Generator) -> Tensor:
    """Smooth noise, (1, channels, H, W), of about unit spread at `cells` x `cells` places."""
    noise = torch.randn(1, channels, cells, cells, generator=generator)
    return F.interpolate(noise, list(one.shape[-2:]), mode="bicubic")


def background(one: Tensor) -> Tensor:
    """The colour that most of the border has: (1, 3, 1, 1)."""
    border = torch.cat([one[..., 0, :], one[..., -1, :], one[..., 0], one[..., -1]], -1)
    return border.median(-1).values[..., None, None]


def object_pixels(one: Tensor) -> Tensor:
    """Pixels that are not background: (1, 1, H, W) bool."""
    return (one - background(one)).abs().amax(1, keepdim=True) > 0.15


def _object_colour(one: Tensor, generator: Generator) -> Tensor:
    """The colour of a random pixel of an object, or of any pixel where there is none: (1, 3, 1, 1)."""
    places = object_pixels(one).flatten().nonzero()[:, 0]
    place = whole(0, one.shape[-1] * one.shape[-2] - 1, generator)
    if len(places):
        place = int(places[place % len(places)])
    return one.flatten(2)[:, :, place][..., None, None]


# ---------------------------------------------------------------------------------------------------------- texture
def grain(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Noise of each pixel by itself."""
    return one + uniform(0.04, 0.15, generator) * torch.randn(one.shape, generator=generator)


def blur(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """All edges soft."""
    width = 3 + 2 * int(torch.randint(2, (), generator=generator))
    for _ in range(2):
        one = F.avg_pool2d(F.pad(one, (width // 2,) * 4, mode="replicate"), width, 1)
    return one


def coarse(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Larger pixels."""
    side = one.shape[-1] // (2 + 2 * int(torch.randint(2, (), generator=generator)))
    return F.interpolate(F.interpolate(one, [side, side], mode="area"), list(one.shape[-2:]))


def mottle(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Stains: smooth noise of each colour."""
    return one + uniform(0.05, 0.15, generator) * smooth_noise(one, 3, whole(6, 20, generator), generator)


def bands(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Rows or columns in turn lighter and darker."""
    period, strength = whole(2, 6, generator), uniform(0.06, 0.2, generator)
    wave = torch.sin(torch.arange(one.shape[-1]) * 2 * math.pi / period + uniform(0, 6, generator)) * strength
    return one + (wave if whole(0, 1, generator) else wave[:, None])


# -------------------------------------------------------------------------------------------------------- structure
def warp(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Outlines bent."""
    field = torch.randn(1, 2, 8, 8, generator=generator) * uniform(0.05, 0.12, generator)
    smooth = F.interpolate(field, list(one.shape[-2:]), mode="bicubic")
    return resample(one, smooth.permute(0, 2, 3, 1))


def ghost(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """A second picture shines through."""
    other = others[int(torch.randint(len(others), (), generator=generator))][None]
    return torch.lerp(one, other, uniform(0.15, 0.4, generator))


def double(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Objects with a second, displaced outline."""
    offsets = [sign(generator) * whole(2, 6, generator) for _ in range(2)]
    moved, strength = one.roll(offsets, (2, 3)), uniform(0.35, 0.7, generator)
    return torch.where(object_pixels(moved) & ~object_pixels(one), torch.lerp(one, moved, strength), one)


def shatter(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Slices of the picture displaced against each other."""
    result, across = one.clone(), whole(0, 1, generator)
    size, start = one.shape[-1], 0
    while start < size:
        thick = whole(3, 9, generator)
        part = slice(start, start + thick)
        moved = sign(generator) * whole(1, 5, generator)
        if across:
            result[:, :, part] = one[:, :, part].roll(moved, 3)
        else:
            result[..., part] = one[..., part].roll(moved, 2)
        start += thick
    return result


def holes(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Parts of objects missing."""
    field, inside = smooth_noise(one, 1, whole(8, 16, generator), generator), object_pixels(one)
    if not inside.any():
        return one
    limit = field[inside].quantile(uniform(0.15, 0.45, generator))
    return torch.where(inside & (field < limit), background(one), one)


def crumbs(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Fragments of the objects' colours strewn over the picture."""
    result = one.clone()
    for _ in range(whole(8, 40, generator)):
        side = whole(1, 4, generator)
        top, left = (whole(0, one.shape[d] - side, generator) for d in (2, 3))
        result[..., top : top + side, left : left + side] = _object_colour(one, generator)
    return result


def melt(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Columns sunk or risen by different amounts, as if the paint ran."""
    depth = F.interpolate(torch.randn(1, 1, whole(12, 24, generator), generator=generator), one.shape[-1])
    shift = torch.zeros(1, *one.shape[-2:], 2)
    shift[..., 1] = depth[0] * uniform(0.06, 0.14, generator)
    return resample(one, shift)


def smear(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Everything dragged in one direction."""
    length, down = whole(5, 11, generator), whole(0, 1, generator)
    return torch.stack([one.roll(k, 2 + down) for k in range(length)]).mean(0)


def fray(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Outlines torn: pixels read from somewhere near."""
    jump = torch.randn(1, *one.shape[-2:], 2, generator=generator) * uniform(0.02, 0.06, generator)
    return resample(one, jump)


# ---------------------------------------------------------------------------------------------------- colour, light
def shade(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Light that falls off from one side to the other."""
    angle, strength = uniform(0, 2 * math.pi, generator), uniform(0.15, 0.4, generator)
    place = torch.linspace(-1, 1, one.shape[-1])
    return one + strength * (math.cos(angle) * place + math.sin(angle) * place[:, None])


def bleed(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Colours do not end where the outlines do: the channels lie beside each other."""
    parts = [
        one[:, c : c + 1].roll([sign(generator) * whole(1, 3, generator) for _ in range(2)], (2, 3))
        for c in range(one.shape[1])
    ]
    return torch.cat(parts, 1)


def neon(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Colours and contrast pushed beyond what is painted."""
    mean, strength = one.mean(1, keepdim=True), uniform(0.8, 2.5, generator)
    pushed = mean + (one - mean) * (1 + strength)
    blotches = smooth_noise(one, 3, whole(3, 8, generator), generator).sign() * uniform(0.1, 0.4, generator)
    return pushed + blotches


def flood(one: Tensor, generator: Generator, others: Tensor) -> Tensor:
    """Large ragged patches of an object's colour over the background."""
    field = smooth_noise(one, 1, whole(3, 8, generator), generator)
    covered = field < field.quantile(uniform(0.2, 0.7, generator))
    return torch.where(covered & ~object_pixels(one), _object_colour(one, generator), one)


KINDS: dict[str, Corruption] = {
    f.__name__: f
    for f in (
        grain, blur, warp, ghost, coarse, mottle, bands, double, shatter, holes, crumbs, melt, smear, fray, shade, bleed,
        neon, flood,
    )
}  # fmt: skip
"""All of them by name."""

FAMILIES: tuple[tuple[str, ...], ...] = (
    ("grain", "mottle", "fray", "bands"),
    ("blur", "coarse", "smear", "bleed", "ghost"),
    ("warp", "melt", "shatter", "double"),
    ("holes", "crumbs", "flood", "neon", "shade"),
)
"""Kinds that resemble each other, so that leaving out one family asks for what no remaining kind shows."""


def corrupt(images: Tensor, kinds: list[str], generator: Generator, known: Mapping[str, Corruption] = KINDS) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1], each broken in its own way: B names of those `known`."""
    broken = [known[kind](images[k : k + 1], generator, images) for k, kind in enumerate(kinds)]
    return torch.cat(broken).clamp(0, 1)
