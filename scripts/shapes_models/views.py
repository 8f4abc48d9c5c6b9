"""Pictures to learn to see from: views of one picture, its near twin, and ways to spoil it. All on batches of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from t2irl.shapes.captions import COLORS, SHAPES, sample_captions
from t2irl.shapes.render import SIZE, Scene, render, sample_scene


def as_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """Rendered pictures as (N, 3, 64, 64) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def uniform(low: float, high: float, n: int, generator: Generator) -> Tensor:
    """One number a picture, (n, 1, 1, 1)."""
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)


# ------------------------------------------------------------------------------------------------------- scenes and twins
def twin(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one object of another colour, of another shape, or (where there are more) left out."""
    k = int(rng.integers(len(scene.objects)))
    one, way = scene.objects[k], int(rng.integers(3 if len(scene.objects) > 1 else 2))
    if way == 2:
        return replace(scene, objects=scene.objects[:k] + scene.objects[k + 1 :])
    if way == 1:
        other = replace(one, shape=str(rng.choice([s for s in SHAPES if s != one.shape])))
    else:
        other = replace(one, color=str(rng.choice([c for c in COLORS if c != one.color])))
    return replace(scene, objects=(*scene.objects[:k], other, *scene.objects[k + 1 :]))


def draw_pairs(n: int, seed: int) -> Tensor:
    """Scenes and their twins, (n, 2, 3, 64, 64) uint8; none of a held-out caption."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(caption, rng) for caption in sample_captions(n, rng)]
    return torch.stack([as_tensor([render(s) for s in scenes]), as_tensor([render(twin(s, rng)) for s in scenes])], 1)


# ------------------------------------------------------------------------------------------------------------------ views
def _grid(n: int) -> Tensor:
    return F.affine_grid(torch.eye(2, 3).expand(n, -1, -1), [n, 3, SIZE, SIZE], align_corners=False)


def _smooth(n: int, channels: int, cells: int, generator: Generator) -> Tensor:
    """Random fields (n, channels, 64, 64) that vary over 64 / cells pixels."""
    coarse = torch.randn(n, channels, cells, cells, generator=generator)
    return F.interpolate(coarse, [SIZE, SIZE], mode="bicubic", align_corners=False)


def places(n: int, generator: Generator) -> Tensor:
    """Where n views read their pictures: (n, 64, 64, 2) in half pictures.

    Shifted by up to 8 px, sizes up to 15 % off, gently bent so that objects move by a pixel or two against each other.
    Never mirrored or recoloured: left is not right, and red is not orange.
    """
    shift = 0.25 * (2 * torch.rand(n, 1, 1, 2, generator=generator) - 1)
    bend = 0.04 * _smooth(n, 2, 4, generator).permute(0, 2, 3, 1)
    return _grid(n) * uniform(0.85, 1.15, n, generator) + shift + bend


def read(images: Tensor, where: Tensor) -> Tensor:
    """Pictures read at places; what lies outside is as the border."""
    return F.grid_sample(images, where, padding_mode="border", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------- spoiling
def _box(images: Tensor, width: int) -> Tensor:
    return F.avg_pool2d(F.pad(images, (width // 2,) * 4, mode="replicate"), width, 1)


def _either(a: Tensor, b: Tensor, generator: Generator) -> Tensor:
    return torch.where(uniform(0, 1, len(a), generator) < 0.5, a, b)


def _grain(x: Tensor, g: Generator) -> Tensor:
    return x + uniform(0.04, 0.15, len(x), g) * torch.randn(x.shape, generator=g)


def _blur(x: Tensor, g: Generator) -> Tensor:
    return _either(_box(_box(x, 3), 3), _box(_box(x, 5), 5), g)


def _warp(x: Tensor, g: Generator) -> Tensor:
    bend = uniform(0.05, 0.12, len(x), g) * _smooth(len(x), 2, 8, g).permute(0, 2, 3, 1)
    return read(x, _grid(len(x)) + bend)


def _ghost(x: Tensor, g: Generator) -> Tensor:
    return torch.lerp(x, x.roll(1, 0), uniform(0.15, 0.4, len(x), g))


def _coarse(x: Tensor, g: Generator) -> Tensor:
    two, four = (F.interpolate(F.interpolate(x, [SIZE // k] * 2, mode="area"), [SIZE, SIZE]) for k in (2, 4))
    return _either(two, four, g)


def _smear(x: Tensor, g: Generator) -> Tensor:
    down, across = (torch.stack([x.roll(k, axis) for k in range(-3, 4)]).mean(0) for axis in (2, 3))
    return _either(down, across, g)


def _salt(x: Tensor, g: Generator) -> Tensor:
    hit = torch.rand(len(x), 1, SIZE, SIZE, generator=g) < uniform(0.01, 0.05, len(x), g)
    return torch.where(hit, torch.rand(x.shape, generator=g), x)


def _holes(x: Tensor, g: Generator) -> Tensor:
    hole = F.interpolate((torch.rand(len(x), 1, 8, 8, generator=g) < 0.06).float(), [SIZE, SIZE])
    return torch.lerp(x, uniform(0, 1, len(x), g).expand_as(x), hole)


WAYS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "grain": _grain, "blur": _blur, "warp": _warp, "ghost": _ghost, "coarse": _coarse,
}  # fmt: skip
"""Ways to spoil pictures (B, 3, 64, 64) in [0, 1] that training shows: grain, blur, warped, a second picture shining
through, coarse pixels."""
UNSEEN: dict[str, Callable[[Tensor, Generator], Tensor]] = {"smear": _smear, "salt": _salt, "holes": _holes}
"""Ways that it never shows: smeared sideways or downwards, single wrong pixels, squares cut out."""


def spoil(images: Tensor, generator: Generator, ways: dict[str, Callable[[Tensor, Generator], Tensor]]) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1], each spoilt in one of the ways, in turn."""
    result = images.clone()
    for k, way in enumerate(ways.values()):
        result[k :: len(ways)] = way(images[k :: len(ways)], generator)
    return result.clamp(0, 1)


def hybrid(images: Tensor, twins: Tensor, generator: Generator) -> Tensor:
    """Parts of each picture drawn as its twin has them: melted shapes, two colours in one object."""
    share = torch.sigmoid(6 * _smooth(len(images), 1, 10, generator))
    return torch.lerp(images, twins, share)
