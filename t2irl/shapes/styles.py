"""Other ways to draw the same scenes, for style transfer. What a picture shows stays readable for the verifier."""

from __future__ import annotations

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
