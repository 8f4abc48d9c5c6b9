"""Numbers read off a curve of (iteration, value) points; pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Curve = Sequence[tuple[float, float]]
"""(iteration, value) by rising iteration, not empty."""


def value_at(curve: Curve, place: float) -> float:
    """The curve's value at an iteration, by linear interpolation; that of its nearer end outside."""
    if place <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if place <= x1:
            return y0 + (y1 - y0) * (place - x0) / (x1 - x0)
    return curve[-1][1]


def crossing(curve: Curve, level: float) -> float | None:
    """The iteration, interpolated, at which a curve first reaches a level; None if it never does."""
    if curve[0][1] >= level:
        return curve[0][0]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 >= level:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None


def at_level(proxy: Curve, gold: Curve, level: float) -> float | None:
    """Gold where the proxy first reaches a level, so that methods are compared by what they gave up for the same
    gain; None if it never does.
    """
    place = crossing(proxy, level)
    return None if place is None else value_at(gold, place)


def area(curve: Curve) -> float:
    """Mean value over the iterations: the area under the curve by trapezoids, divided by its length."""
    length = curve[-1][0] - curve[0][0]
    if not length:
        return curve[0][1]
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(curve)) / length


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float, float, float]]:
    """(iteration, mean, lowest, highest) of several runs at the iterations that all of them measured."""
    tables = [dict(curve) for curve in curves]
    places = [x for x, _ in curves[0] if all(x in table for table in tables)]
    result = []
    for x in places:
        values = [table[x] for table in tables]
        result.append((x, sum(values) / len(values), min(values), max(values)))
    return result
