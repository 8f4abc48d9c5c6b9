"""The gold reward: read a picture back into a scene and hold it against its caption."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from t2irl.shapes.captions import BACKGROUNDS, COLORS, SHAPES, parse_caption
from t2irl.shapes.render import (
    SIZE,
    STAR_INNER,
    STAR_OUTER,
    TRIANGLE_OUTER,
    TRIANGLE_SHIFT,
    Object,
    Scene,
    holds,
    inside,
    render,
)

MIN_PIXELS = 40
"""A component smaller than this is not an object."""
PSNR_RANGE = (12.0, 32.0)
"""PSNR in dB at which `cleanliness` is 0 and 1."""

_COLOR_NAMES, _BACKGROUND_NAMES = tuple(COLORS), tuple(BACKGROUNDS)
PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)
"""(9, 3): the six object colours, then the three backgrounds."""
_AREA = {
    "circle": math.pi,
    "square": (2 * 0.88) ** 2,
    "triangle": 0.75 * math.sqrt(3) * TRIANGLE_OUTER**2,
    "star": 5 * STAR_OUTER * STAR_INNER * math.sin(math.pi / 5),
}
"""Area of each shape of radius 1."""


def _to_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) float in [0, 1] or uint8 -> (B, 64, 64, 3) float32 in 0..255, rounded as a saved picture is."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2:] != (SIZE, SIZE):
        raise ValueError(
            f"the shapes verifier takes pictures of shape (B, 3, {SIZE}, {SIZE}), got {tuple(images.shape)}"
        )
    if images.dtype != torch.uint8:
        images = (images.detach().float().clamp(0, 1) * 255).round()
    return images.permute(0, 2, 3, 1).float().cpu().numpy()


def nearest_palette(pixels: np.ndarray) -> np.ndarray:
    """(B, 64, 64, 3) in 0..255 -> index of the nearest palette colour, (B, 64, 64) uint8."""
    flat = pixels.reshape(-1, 3)
    distance = (PALETTE**2).sum(1) - 2.0 * flat @ PALETTE.T
    return distance.argmin(1).astype(np.uint8).reshape(pixels.shape[:3])


def components(labels: np.ndarray) -> list[tuple[int, int, tuple[slice, slice], np.ndarray]]:
    """Coloured objects in a batch of label pictures: (picture, colour, box, mask within the box), in a fixed order.

    Antialiased edges between two palette colours can lie nearest to a third one. Such rings are two pixels wide at
    most, so a component must also keep a tenth of its pixels under a 3 x 3 erosion.
    """
    found = []
    within = np.zeros((3, 3, 3), bool)
    within[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    for color in range(len(COLORS)):
        named, count = ndimage.label(labels == color, structure=within)
        if not count:
            continue
        area = np.bincount(named.ravel(), minlength=count + 1)
        for index, box in enumerate(ndimage.find_objects(named), start=1):
            if area[index] < MIN_PIXELS:
                continue
            mask = named[box][0] == index
            if ndimage.binary_erosion(mask, np.ones((3, 3), bool)).sum() * 10 >= area[index]:
                found.append((box[0].start, color, box[1:], mask))
    return found


def _fit(cover: np.ndarray, x0: int, y0: int) -> tuple[str, float, float, float]:
    """Shape, centre and radius that explain a component's coverage (h, w) best.

    Centre and radius follow from the centroid and the area, the shape is the one of highest soft IoU.
    """
    area = cover.sum()
    ys, xs = np.mgrid[0 : cover.shape[0], 0 : cover.shape[1]]
    xs, ys = xs + x0 + 0.5, ys + y0 + 0.5
    mx, my = float((cover * xs).sum() / area), float((cover * ys).sum() / area)
    best = ("circle", mx, my, 1.0)
    best_iou = -1.0
    for shape in SHAPES:
        r = math.sqrt(area / _AREA[shape])
        cy = my - TRIANGLE_SHIFT * r if shape == "triangle" else my
        # Four samples a pixel are enough to tell shapes apart; the final redraw uses all sixteen.
        offsets = [(ox, oy) for ox in (-0.25, 0.25) for oy in (-0.25, 0.25)]
        drawn = np.mean([inside(shape, (xs + ox - mx) / r, (ys + oy - cy) / r) for ox, oy in offsets], 0, np.float32)
        common = float(np.minimum(drawn, cover).sum())
        iou = common / float(area + drawn.sum() - common)
        if iou > best_iou:
            best_iou, best = iou, (shape, mx, cy, r)
    return best


def parse(images: Tensor) -> list[Scene]:
    """Read pictures back into scenes. `images`: (B, 3, 64, 64), float in [0, 1] or uint8."""
    return [scene for _, scene in read(images)]


def read(images: Tensor) -> list[tuple[np.ndarray, Scene]]:
    """Each picture as the verifier sees it, (64, 64, 3) float32 in 0..255, and the scene that it reads in it."""
    pixels = _to_pixels(images)
    return list(zip(pixels, _parse(pixels), strict=True))


def _parse(pixels: np.ndarray) -> list[Scene]:
    labels = nearest_palette(pixels)
    share = np.stack([(labels == len(COLORS) + b).sum((1, 2)) for b in range(len(BACKGROUNDS))], 1)
    backgrounds = share.argmax(1)
    objects: list[list[Object]] = [[] for _ in pixels]
    for picture, color, (rows, columns), mask in components(labels):
        y0, y1 = max(0, rows.start - 2), min(SIZE, rows.stop + 2)
        x0, x1 = max(0, columns.start - 2), min(SIZE, columns.stop + 2)
        paper = PALETTE[len(COLORS) + backgrounds[picture]]
        step = PALETTE[color] - paper
        # How far each pixel has moved from the background to the object's colour: its antialiased coverage.
        cover = np.clip((pixels[picture, y0:y1, x0:x1] - paper) @ step / (step @ step), 0, 1)
        near = ndimage.binary_dilation(
            np.pad(mask, [(rows.start - y0, y1 - rows.stop), (columns.start - x0, x1 - columns.stop)]), iterations=2
        )
        other = (labels[picture, y0:y1, x0:x1] < len(COLORS)) & (labels[picture, y0:y1, x0:x1] != color)
        solid = other & ndimage.binary_erosion(other, np.ones((2, 2), bool))
        shape, cx, cy, r = _fit(np.where(near & ~solid, cover, 0.0), x0, y0)
        objects[picture].append(Object(_COLOR_NAMES[color], shape, cx, cy, r))
    return [Scene(_BACKGROUND_NAMES[b], tuple(o)) for b, o in zip(backgrounds, objects, strict=True)]


def clauses(scene: Scene, text: str) -> tuple[int, int]:
    """(clauses that hold, clauses) of a caption: background, number of objects, each named object, relation."""
    caption = parse_caption(text)
    there = Counter((o.color, o.shape) for o in scene.objects)
    results = [scene.background == caption.background, len(scene.objects) == len(caption.objects)]
    wanted: Counter[tuple[str, str]] = Counter()
    for thing in caption.objects:
        wanted[thing] += 1
        results.append(there[thing] >= wanted[thing])
    if caption.relation is not None:
        first, second = caption.objects
        results.append(
            any(
                holds(caption.relation, a, b)
                for a in scene.objects
                for b in scene.objects
                if a is not b and (a.color, a.shape) == first and (b.color, b.shape) == second
            )
        )
    return sum(results), len(results)


def cleanliness(pixels: np.ndarray, scene: Scene) -> float:
    """How well a scene, drawn again, explains a picture (64, 64, 3) in 0..255: PSNR mapped from 12..32 dB to 0..1."""
    error = float(np.mean((pixels - render(scene).astype(np.float32)) ** 2)) / 255**2
    psnr = 10 * math.log10(1 / max(error, 1e-10))
    low, high = PSNR_RANGE
    return min(max((psnr - low) / (high - low), 0.0), 1.0)


def verify(images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
    """Gold scores of pictures for their captions.

    `images`: (B, 3, 64, 64), float in [0, 1] or uint8. Returns float32 tensors of shape (B,), all in [0, 1]:
    `clauses` (fraction that holds), `correct` (all hold), `cleanliness` and `gold` = correct * cleanliness.
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures but {len(texts)} captions")
    pixels = _to_pixels(images)
    scenes = _parse(pixels)
    held = np.array([h / n for h, n in (clauses(s, t) for s, t in zip(scenes, texts, strict=True))], np.float32)
    clean = np.array([cleanliness(p, s) for p, s in zip(pixels, scenes, strict=True)], np.float32)
    correct = (held == 1).astype(np.float32)
    scores = {"clauses": held, "correct": correct, "cleanliness": clean, "gold": correct * clean}
    return {name: torch.from_numpy(values) for name, values in scores.items()}
