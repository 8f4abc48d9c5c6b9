"""Drawing scenes: 64 x 64 pictures, drawn at 4x and box-filtered down."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from t2irl.shapes.captions import BACKGROUNDS, COLORS, Caption

SIZE = 64
"""Side of a picture in pixels."""
SUPERSAMPLING = 4
MARGIN = 2.0
"""Pixels that every object keeps from the border."""
RADII = {1: (8.0, 20.0), 2: (7.0, 14.0), 3: (7.0, 13.0)}
"""Range of radii in pixels, by the number of objects."""
RELATION_GAP = 18.0
"""Least distance of the centres of a relation's objects along its axis, in pixels."""

_COS30, _SIN36, _COS36, _COS18 = (math.cos(math.radians(a)) for a in (30, 54, 36, 18))
STAR_OUTER, STAR_INNER, TRIANGLE_OUTER, TRIANGLE_SHIFT, SQUARE_HALF = 1.15, 0.48, 1.1, 0.15, 0.88
EXTENT = {
    "circle": (1.0, 1.0, 1.0),
    "square": (SQUARE_HALF, SQUARE_HALF, SQUARE_HALF),
    "triangle": (
        TRIANGLE_OUTER * _COS30,
        TRIANGLE_OUTER - TRIANGLE_SHIFT,
        0.5 * TRIANGLE_OUTER + TRIANGLE_SHIFT,
    ),
    "star": (STAR_OUTER * _COS18, STAR_OUTER, STAR_OUTER * _COS36),
}
"""Reach of each shape from (cx, cy): sideways, up and down, in radii."""
CORNER = {
    "circle": 1.0,
    "square": SQUARE_HALF * math.sqrt(2),
    "triangle": TRIANGLE_OUTER + TRIANGLE_SHIFT,
    "star": STAR_OUTER,
}
"""Distance of each shape's farthest point from (cx, cy), in radii."""


@dataclass(frozen=True)
class Object:
    """One object: colour and shape by name, centre (y grows downwards) and radius in pixels."""

    color: str
    shape: str
    cx: float
    cy: float
    r: float


@dataclass(frozen=True)
class Scene:
    """A picture's content: the background's name (or None when unrecognisable) and its objects."""

    background: str
    objects: tuple[Object, ...]


def inside(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Whether points at (dx, dy), in radii from the centre, lie inside a shape. Broadcasts; returns bool."""
    if shape == "circle":
        return dx * dx + dy * dy <= 1.0
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) <= SQUARE_HALF
    if shape == "triangle":  # three half planes at the distance of the inscribed circle, apex up
        dy = dy - TRIANGLE_SHIFT
        reach = 0.5 * TRIANGLE_OUTER
        return (dy <= reach) & (np.abs(dx) * _COS30 - 0.5 * dy <= reach)
    if shape == "star":  # fold the plane into one half point: the edge from the outer to the inner vertex
        angle = np.abs((np.arctan2(dx, -dy) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
        radius = np.hypot(dx, dy)
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        inner_x, inner_y = STAR_INNER * _COS36, STAR_INNER * _SIN36
        return inner_y * (STAR_OUTER - x) - y * (STAR_OUTER - inner_x) >= 0
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(EXTENT)}")


def coverage(obj: Object) -> tuple[slice, slice, np.ndarray]:
    """The share of each pixel that an object covers, as (rows, columns, (h, w) float32 in [0, 1])."""
    side, up, down = (reach * obj.r for reach in EXTENT[obj.shape])
    x0, x1 = max(0, math.floor(obj.cx - side)), min(SIZE, math.ceil(obj.cx + side))
    y0, y1 = max(0, math.floor(obj.cy - up)), min(SIZE, math.ceil(obj.cy + down))
    if x1 <= x0 or y1 <= y0:
        return slice(0, 0), slice(0, 0), np.zeros((0, 0), np.float32)
    s = SUPERSAMPLING
    xs = (np.arange(x0 * s, x1 * s, dtype=np.float32) + 0.5) / s
    ys = (np.arange(y0 * s, y1 * s, dtype=np.float32) + 0.5) / s
    mask = inside(obj.shape, (xs[None] - obj.cx) / obj.r, (ys[:, None] - obj.cy) / obj.r)
    return slice(y0, y1), slice(x0, x1), mask.reshape(y1 - y0, s, x1 - x0, s).mean((1, 3), dtype=np.float32)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: (64, 64, 3) uint8."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for obj in scene.objects:
        rows, columns, cover = coverage(obj)
        patch = canvas[rows, columns]
        patch += cover[..., None] * (np.asarray(COLORS[obj.color], np.float32) - patch)
    return (canvas + 0.5).astype(np.uint8)


def sample_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """Place a caption's objects at random: inside the canvas, not overlapping, in the relation asked for."""
    low, high = RADII[len(caption.objects)]
    while True:
        placed: list[Object] = []
        for color, shape in caption.objects:
            for _ in range(40):
                r = rng.uniform(low, high)
                side, up, down = (reach * r + MARGIN for reach in EXTENT[shape])
                cx, cy = rng.uniform(side, SIZE - side), rng.uniform(up, SIZE - down)
                candidate = Object(color, shape, cx, cy, r)
                if all(_apart(candidate, other) for other in placed):
                    placed.append(candidate)
                    break
        if len(placed) == len(caption.objects) and holds(caption.relation, *placed[:2], gap=RELATION_GAP):
            return Scene(caption.background, tuple(placed))


def _apart(a: Object, b: Object) -> bool:
    """Centres farther than 1.2 (r1 + r2), and no corner of one (squares reach 1.24 r) touching the other."""
    reach = max(1.2 * (a.r + b.r), CORNER[a.shape] * a.r + CORNER[b.shape] * b.r + 1.0)
    return math.hypot(a.cx - b.cx, a.cy - b.cy) > reach


def holds(relation: str | None, first: Object, second: Object | None = None, gap: float = 0.0) -> bool:
    """Whether `first` stands in a relation to `second`: right direction, more than `gap` px, along the longer axis."""
    if relation is None or second is None:
        return True
    dx, dy = second.cx - first.cx, second.cy - first.cy
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    return along > gap and along > abs(across)
