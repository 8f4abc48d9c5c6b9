"""Other ways to draw the same scenes, for style transfer. What a picture shows stays readable for the verifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from t2irl.shapes.captions import BACKGROUNDS, COLORS
from t2irl.shapes.render import SIZE, TRIANGLE_SHIFT, Object, Scene, coverage, render

LINE = 1.5
"""Width of an outline in pixels."""
INSCRIBED = {"circle": 1.0, "square": 0.88, "triangle": 0.55, "star": 0.40}
"""Distance from a shape's middle to its nearest edge, in radii."""
INK = {"white": BACKGROUNDS["black"], "gray": BACKGROUNDS["black"], "black": BACKGROUNDS["white"]}
"""Colour of outlines by background."""
PASTEL_COLORS = {
    "red": (224, 59, 63),
    "green": (58, 190, 88),
    "blue": (77, 117, 229),
    "yellow": (242, 207, 76),
    "purple": (166, 85, 198),
    "orange": (246, 137, 55),
}
"""Softer object colours, near enough to the plain ones that shapes are still recognised."""
PASTEL_BACKGROUNDS = {"white": (245, 242, 236), "black": (34, 31, 42), "gray": (146, 144, 148)}
"""Tinted backgrounds, likewise."""

Palette = Mapping[str, tuple[int, int, int]]


def _paint(canvas: np.ndarray, obj: Object, color: tuple[int, int, int]) -> None:
    rows, columns, cover = coverage(obj)
    patch = canvas[rows, columns]
    patch += cover[..., None] * (np.asarray(color, np.float32) - patch)


def _draw(scene: Scene, colors: Palette, backgrounds: Palette, ink: tuple[int, int, int] | None) -> np.ndarray:
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = backgrounds[scene.background]
    for obj in scene.objects:  # all lines first: none runs over a neighbour
        if ink is None:
            break
        r = obj.r + LINE / INSCRIBED[obj.shape]
        # A triangle's middle lies below its centre, the more so the larger it is; lines are equally wide on all sides.
        cy = obj.cy - TRIANGLE_SHIFT * (r - obj.r) if obj.shape == "triangle" else obj.cy
        _paint(canvas, replace(obj, cy=cy, r=r), ink)
    for obj in scene.objects:
        _paint(canvas, obj, colors[obj.color])
    return (canvas + 0.5).astype(np.uint8)


STYLES: dict[str, Callable[[Scene], np.ndarray]] = {
    "plain": render,
    "outlined": lambda scene: _draw(scene, COLORS, BACKGROUNDS, INK[scene.background]),
    "pastel": lambda scene: _draw(scene, PASTEL_COLORS, PASTEL_BACKGROUNDS, None),
}
"""Style -> what draws a scene: (64, 64, 3) uint8. `plain` is the style that the base model was trained on."""
SWOLLEN = (0.0, 0.5, 1.0)
"""Shares of an outline that the verifier may have taken for a part of the object, whose radius it then reads too large."""


def style_of(picture: np.ndarray, scene: Scene) -> str:
    """The style in which a scene, as the verifier read it, explains a picture best: least squared error. Both as `verify.read` gives them."""
    errors = {
        style: min(float(np.mean((draw(read) - picture) ** 2)) for read in _readings(scene))
        for style, draw in STYLES.items()
    }
    return min(errors, key=errors.__getitem__)


def strength(picture: np.ndarray, scene: Scene, style: str) -> float:
    """How far a picture has gone from the plain drawing of its scene to that in another style, 0 to 1, by least squares.

    0 for a scene without anything that the style would draw differently.
    """
    best, least = 0.0, math.inf
    for read in _readings(scene):
        plain = render(read).astype(np.float32)
        way = STYLES[style](read) - plain
        share = float(np.clip(np.vdot(picture - plain, way) / max(float(np.vdot(way, way)), 1.0), 0, 1))
        error = float(np.mean((plain + share * way - picture) ** 2))
        if error < least:
            best, least = share, error
    return best


def _readings(scene: Scene) -> list[Scene]:
    return [_shrunk(scene, share) for share in SWOLLEN]


def _shrunk(scene: Scene, share: float) -> Scene:
    """Objects less a share of an outline's width, middles where they are."""
    objects = []
    for obj in scene.objects:
        r = max(obj.r - share * LINE / INSCRIBED[obj.shape], 1.0)
        cy = obj.cy + TRIANGLE_SHIFT * (obj.r - r) if obj.shape == "triangle" else obj.cy
        objects.append(replace(obj, r=r, cy=cy))
    return replace(scene, objects=tuple(objects))
