"""Curves as inline SVG, made without a plotting library: small multiples, grouped as the glossary is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from t2irl.evaluation.glossary import Entry, lookup

Points = list[tuple[float, float]]

TOGETHER = (
    ("likelihood ratio", ("policy/ratio_first", "policy/ratio_mean")),
    ("clipped share", ("policy/clip_fraction_high", "policy/clip_fraction_low")),
    ("loss", ("policy/loss", "loss/policy")),
    (
        "seconds per iteration",
        (
            "time/iteration_s",
            "time/rollout_s",
            "time/score_s",
            "time/score_hidden_s",
            "time/adversary_s",
            "time/update_s",
        ),
    ),
    ("seconds per measurement", ("time/evaluate_s", "time/grid_s")),
)
"""Metrics that share a chart, and its title."""
GROUPS = (
    "Held-out",
    "Monitors",
    "Rewards",
    "Adversaries",
    "Advantages",
    "Policy",
    "Regularisers",
    "Time",
    "Work",
    "Data and memory",
    "Other",
)
"""Order of the groups in a report; metrics that the glossary does not know are `Other`."""
COLORS = 6
"""Number of line colours that the style sheet defines."""
_MAX_POINTS, _SMOOTH_FROM = 300, 20
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 10.0, 10.0, 22.0


@dataclass(frozen=True)
class Series:
    """One curve: (iteration, value) in order of iterations, all finite."""

    name: str
    points: Points

    @property
    def entry(self) -> Entry | None:
        """What the glossary says of it."""
        return lookup(self.name)


@dataclass(frozen=True)
class Chart:
    """A drawn chart and what a reader or a pointer may ask of it."""

    title: str
    series: list[Series]
    svg: Markup
    data: dict[str, Any]
    """For the page's script: names, points and the plot's rectangle."""
    digits: int
    """Significant digits that its values need."""


@dataclass
class Group:
    """Charts under one heading; metrics that never changed are only named with their value."""

    title: str
    charts: list[Chart] = field(default_factory=list)
    constants: list[tuple[str, float]] = field(default_factory=list)


def collect(rows: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Points of every metric in the rows of metrics.jsonl; values that are not finite are left out."""
    found: dict[str, Points] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("iteration", "time") and isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(name, []).append((row["iteration"], float(value)))
    return found


def grouped(points: Mapping[str, Points], last: float) -> list[Group]:
    """All metrics as charts, in groups. `last`: the iteration at which the axes end."""
    groups = {title: Group(title) for title in GROUPS}
    done: set[str] = set()
    for name in points:
        if name in done:
            continue
        title, names = next(((t, [n for n in ns if n in points]) for t, ns in TOGETHER if name in ns), (name, [name]))
        done.update(names)
        entry = lookup(name)
        group = groups[entry.section if entry and entry.section in groups else "Other"]
        varying = [Series(n, points[n]) for n in names if len({y for _, y in points[n]}) > 1]
        group.constants += [(n, points[n][0][1]) for n in names if n not in {s.name for s in varying}]
        if varying:
            group.charts.append(draw(title if len(varying) > 1 else varying[0].name, varying, last))
    return [group for group in groups.values() if group.charts or group.constants]


def overview(points: Mapping[str, Points], last: float) -> Chart | None:
    """Training reward and held-out measures on one pair of axes; None unless two or more lie within 0 and 1."""
    names = ["reward/total/mean", *sorted(n for n in points if n.startswith("heldout/"))]
    series = [Series(n, points[n]) for n in names if n in points and all(-0.05 <= y <= 1.05 for _, y in points[n])]
    if len(series) < 2 or max(len(s.points) for s in series) < 2:
        return None
    return draw("training reward beside held-out measures", series, last, width=1080, height=300)


def against_distance(rows: Sequence[Mapping[str, Any]], heldout: str | None) -> Chart | None:
    """Trained sum and held-out reward, in standard deviations of the base model's scores, against the root of the
    divergence from the reference policy. None before two evaluations, or where one of them does not vary.
    """
    series = []
    for name in ("total", heldout):
        keys = ("policy/kl_reference", f"monitor/{name}/mean", f"monitor/{name}/std")
        seen = [[float(row[key]) for key in keys] for row in rows if all(row.get(key) is not None for key in keys)]
        if len(seen) < 2 or not seen[0][2]:
            return None
        points = sorted((kl**0.5, (mean - seen[0][1]) / seen[0][2]) for kl, mean, _ in seen)
        series.append(Series("trained reward" if name == "total" else f"{name}, held out", points))
    return draw("against the root of the divergence", series, series[0].points[-1][0], width=1080, height=300)


def draw(title: str, series: list[Series], last: float, width: float = 360, height: float = 180) -> Chart:
    """Draw curves over 0..`last` iterations. A long, dense curve is drawn faintly, with its moving average over it."""
    series = [Series(s.name, thin(s.points)) for s in series]
    low, high = _range([y for s in series for _, y in s.points])
    box = (_LEFT, _TOP, width - _RIGHT, height - _BOTTOM)
    last = max(last, 1)

    def at(x: float, y: float) -> str:
        return (
            f"{box[0] + x / last * (box[2] - box[0]):.1f},{box[3] - (y - low) / (high - low) * (box[3] - box[1]):.1f}"
        )

    parts = [_axes(low, high, last, box)]
    for k, s in enumerate(series):
        color = k % COLORS
        dense = len(s.points) >= _SMOOTH_FROM
        line = " ".join(at(x, y) for x, y in s.points)
        parts.append(f'<polyline class="line c{color}{" faint" if dense else ""}" points="{line}"/>')
        if dense:
            mean = " ".join(at(x, y) for x, y in smooth(s.points))
            parts.append(f'<polyline class="line c{color}" points="{mean}"/>')
        else:
            dots = (at(x, y).split(",") for x, y in s.points)
            parts += [f'<circle class="dot c{color}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in dots]
    digits = digits_for(low, high)
    ends = ((s.name, number(s.points[0][1], digits), number(s.points[-1][1], digits)) for s in series)
    label = "; ".join(f"{name} from {first} to {final}" for name, first, final in ends)
    svg = Markup('<svg viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{inner}</svg>').format(
        w=f"{width:g}", h=f"{height:g}", label=f"{title}: {label}", inner=Markup("".join(parts))
    )
    curves = [{"name": s.name, "points": [[x, float(f"{y:.{digits + 1}g}")] for x, y in s.points]} for s in series]
    return Chart(
        title,
        series,
        svg,
        {"series": curves, "box": box, "last": last, "low": low, "high": high, "digits": digits},
        digits,
    )


def _axes(low: float, high: float, last: float, box: tuple[float, float, float, float]) -> str:
    parts, digits = [], digits_for(low, high)
    for value in ticks(low, high, 4):
        y = box[3] - (value - low) / (high - low) * (box[3] - box[1])
        parts.append(f'<line class="rule" x1="{box[0]}" x2="{box[2]}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = escape(number(value, digits))
        parts.append(f'<text class="tick" x="{box[0] - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for value in ticks(0, last, 5):
        if value == int(value):
            x = box[0] + value / last * (box[2] - box[0])
            parts.append(f'<text class="tick" x="{x:.1f}" y="{box[3] + 15}" text-anchor="middle">{int(value)}</text>')
    return "".join(parts)


def _range(values: list[float]) -> tuple[float, float]:
    """Limits of the axis: the values with a little room."""
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1.0) * 0.06
    return low - room, high + room


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    raw = (high - low) / count
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(s * base for s in (1, 2, 2.5, 5, 10) if s * base >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Points) -> Points:
    """At most 300 points: means of equal stretches, the first and the last point kept."""
    if len(points) <= _MAX_POINTS:
        return points
    inner = points[1:-1]
    size = math.ceil(len(inner) / (_MAX_POINTS - 2))
    parts = [inner[k : k + size] for k in range(0, len(inner), size)]
    return [points[0], *((sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts), points[-1]]


def smooth(points: Points) -> Points:
    """Centred moving average over a tenth of the curve, over what there is of it at the ends."""
    half = max(1, len(points) // 20)
    result = []
    for k, (x, _) in enumerate(points):
        near = points[max(0, k - half) : k + half + 1]
        result.append((x, sum(y for _, y in near) / len(near)))
    return result


def number(value: float, digits: int = 4) -> str:
    """A number for people: `digits` significant digits, no needless zeros."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value)}"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return re.sub(r"e([+-])0?", lambda m: "e-" if m[1] == "-" else "e", f"{value:.3g}")
    return f"{value:.{digits}g}"


def digits_for(low: float, high: float) -> int:
    """Significant digits that tell values within [low, high] apart: four, more where they differ by little."""
    size, span = max(abs(low), abs(high)), high - low
    return 4 if span <= 0 else min(10, max(4, 3 + math.ceil(math.log10(size / span))))
