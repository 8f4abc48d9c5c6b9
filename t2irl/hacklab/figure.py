"""The figure of a grid: a row of panels for each proxy, a line for each method, a band from lowest to highest seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from t2irl.evaluation.charts import digits_for, number, ticks
from t2irl.hacklab.curves import Curve, mean_curve

COLORS = (
    "#2563c9", "#d9730d", "#14855a", "#c2334d", "#9a3fb5", "#0e8a9c", "#8a6d1d", "#5b6573", "#e0559b", "#5a8f1e",
)  # fmt: skip
"""Line colours; after the last they start again, dashed."""
PANEL = (250.0, 165.0)
"""Width and height of a panel."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 8.0, 24.0, 20.0
_KEY_WIDTH, _KEY_HEIGHT, _HEAD = 172.0, 18.0, 22.0

Lines = Mapping[str, Sequence[Curve]]
"""Method -> its seeds' curves."""


def figure(panels: Mapping[str, Mapping[str, Lines]], methods: Sequence[str]) -> Markup:
    """Draw a stand-alone SVG. `panels`: proxy -> measure -> method -> curves; `methods` fixes colours and the key."""
    measures = list(dict.fromkeys(name for row in panels.values() for name in row))
    width = max(PANEL[0] * max(len(measures), 1), _KEY_WIDTH)
    across = max(1, int(width // _KEY_WIDTH))
    key_height = _KEY_HEIGHT * -(-len(methods) // across) + 10
    height = key_height + len(panels) * (PANEL[1] + _HEAD)
    parts = [_key(methods, across)]
    for row, (proxy, by_measure) in enumerate(panels.items()):
        top = key_height + row * (PANEL[1] + _HEAD)
        parts.append(label(4, top + 15, f"trained on {proxy}", 13, weight=600))
        for column, measure in enumerate(measures):
            if by_measure.get(measure):
                parts.append(_panel(measure, by_measure[measure], methods, (column * PANEL[0], top + _HEAD)))
    title = f"curves of {len(methods)} methods on {len(panels)} proxies"
    return document(width, height, title, parts)


def document(width: float, height: float, title: str, parts: Sequence[str]) -> Markup:
    """A stand-alone SVG on white of elements that are SVG already; `title` is what a screen reader says."""
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{label}" '
        'font-family="system-ui, sans-serif"><rect width="{w}" height="{h}" fill="#fff"/>{inner}</svg>'
    ).format(w=f"{width:g}", h=f"{height:g}", label=title, inner=Markup("".join(parts)))


def style(method: int) -> str:
    """Stroke of a method's line, by its number."""
    dash = ' stroke-dasharray="5 3"' if method // len(COLORS) % 2 else ""
    return f'stroke="{COLORS[method % len(COLORS)]}"{dash}'


def _key(methods: Sequence[str], across: int) -> str:
    parts = []
    for k, name in enumerate(methods):
        x, y = 4 + k % across * _KEY_WIDTH, 12 + k // across * _KEY_HEIGHT
        parts.append(f'<line x1="{x:g}" x2="{x + 22:g}" y1="{y:g}" y2="{y:g}" stroke-width="2.5" {style(k)}/>')
        parts.append(label(x + 28, y + 4, name, 12))
    return "".join(parts)


def _panel(measure: str, lines: Lines, methods: Sequence[str], corner: tuple[float, float]) -> str:
    """One pair of axes with its lines."""
    curves = {name: mean_curve(runs) for name, runs in lines.items() if runs}
    curves = {name: curve for name, curve in curves.items() if curve}
    everything = [point for curve in curves.values() for point in curve]
    if not everything:
        return ""
    low, high = min(p[2] for p in everything), max(p[3] for p in everything)
    room = (high - low or abs(high) or 1.0) * 0.05
    low, high, last = low - room, high + room, max(1.0, *(p[0] for p in everything))
    x0, x1 = corner[0] + _LEFT, corner[0] + PANEL[0] - _RIGHT
    y0, y1 = corner[1] + _TOP, corner[1] + PANEL[1] - _BOTTOM

    def at(x: float, y: float) -> str:
        return f"{x0 + x / last * (x1 - x0):.1f},{y1 - (y - low) / (high - low) * (y1 - y0):.1f}"

    parts = [label(x0, corner[1] + 15, measure, 12)]
    digits = min(3, digits_for(low, high))
    for value in ticks(low, high, 4):
        _, y = at(0, value).split(",")
        parts.append(f'<line x1="{x0:g}" x2="{x1:g}" y1="{y}" y2="{y}" stroke="#dfe3e8"/>')
        parts.append(label(x0 - 5, float(y) + 3.5, number(value, digits), 10, anchor="end"))
    for value in ticks(0, last, 4):
        x, _ = at(value, low).split(",")
        parts.append(label(float(x), y1 + 14, number(value, 3), 10, anchor="middle"))
    ordered = [(methods.index(name), curve) for name, curve in curves.items()]
    for k, curve in ordered:
        if any(p[2] < p[3] for p in curve):
            band = [at(p[0], p[3]) for p in curve] + [at(p[0], p[2]) for p in reversed(curve)]
            parts.append(f'<polygon points="{" ".join(band)}" fill="{COLORS[k % len(COLORS)]}" opacity="0.1"/>')
    for k, curve in ordered:
        line = " ".join(at(p[0], p[1]) for p in curve)
        name = escape(methods[k])
        parts.append(
            f'<polyline points="{line}" fill="none" stroke-width="1.8" {style(k)}><title>{name}</title></polyline>'
        )
    return "".join(parts)


def label(x: float, y: float, text: str, size: int, anchor: str = "start", weight: int = 400) -> str:
    """Escaped text of an SVG at a place; `anchor` is start, middle or end."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="#3a424d">'
        f"{escape(text)}</text>"
    )
