"""The ranking of a grid: a row for each method, a panel for each proxy, what gold became since the base model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from t2irl.evaluation.charts import digits_for, number, ticks
from t2irl.hacklab.figure import COLORS, document, label

Row = Mapping[str, Any]
"""A row of `results.table`."""
_NAME, _PANEL, _LINE, _HEAD, _FOOT, _ROOM = 150.0, 250.0, 20.0, 26.0, 24.0, 88.0


def ranked(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Method -> proxy -> its row, best first: by the mean over proxies of what gold gained on the base model.

    Methods that were measured on fewer proxies follow those that were measured on more.
    """
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["proxy"]] = row
    order = sorted(found, key=lambda m: (-len(found[m]), -mean_gain(found[m])))
    return {method: found[method] for method in order}


def mean_gain(by_proxy: Mapping[str, Row]) -> float:
    """Mean over proxies of what gold gained on the base model."""
    return statistics.fmean(row["stats"]["gold_gain"]["mean"] for row in by_proxy.values())


def ranking(rows: Sequence[Row], methods: Sequence[str]) -> Markup:
    """Draw a stand-alone SVG: means, with bars of one standard deviation over seeds; `methods` fixes the colours."""
    order, proxies = ranked(rows), list(dict.fromkeys(row["proxy"] for row in rows))
    width, bottom = _NAME + _PANEL * len(proxies), _HEAD + _LINE * len(order)
    parts = []
    for place, proxy in enumerate(proxies):
        mine = {m: by_proxy[proxy] for m, by_proxy in order.items() if proxy in by_proxy}
        parts.append(_panel(proxy, mine, list(order), methods, _NAME + _PANEL * place))
    for k, (method, by_proxy) in enumerate(order.items()):
        lacking = len(proxies) - len(by_proxy)
        parts.append(label(4, _HEAD + _LINE * (k + 0.5) + 4, method + (" *" if lacking else ""), 12))
    words = "gold gained on the base model, mean and standard deviation over seeds"
    words += "; *: not on all proxies" if any(len(x) < len(proxies) for x in order.values()) else ""
    parts.append(label(4, bottom + _FOOT + 14, words, 11))
    return document(width, bottom + _FOOT + 22, f"ranking of {len(order)} methods", parts)


def _panel(proxy: str, mine: Mapping[str, Row], order: Sequence[str], methods: Sequence[str], left: float) -> str:
    """One proxy: a dot and a bar for each method."""
    stats = {method: row["stats"]["gold_gain"] for method, row in mine.items()}
    ends = [s["mean"] + side * (s["std"] or 0) for s in stats.values() for side in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    if low == high:
        low, high = -1.0, 1.0
    x0, x1 = left + 10, left + _PANEL - _ROOM
    top, bottom = _HEAD, _HEAD + _LINE * len(order)

    def at(value: float) -> float:
        return x0 + (value - low) / (high - low) * (x1 - x0)

    parts = [label(x0, 15, f"trained on {proxy}", 13, weight=600)]
    for value in ticks(low, high, 4):
        parts.append(_line(at(value), top, at(value), bottom, "#dfe3e8"))
        parts.append(label(at(value), bottom + 14, number(value, min(3, digits_for(low, high))), 10, anchor="middle"))
    parts.append(_line(at(0), top, at(0), bottom, "#5b6573"))
    for method, stat in stats.items():
        y, color = top + _LINE * (order.index(method) + 0.5), COLORS[methods.index(method) % len(COLORS)]
        if stat["std"]:
            parts.append(_line(at(stat["mean"] - stat["std"]), y, at(stat["mean"] + stat["std"]), y, color, 2))
        parts.append(f'<circle cx="{at(stat["mean"]):.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
        text = f"{stat['mean']:+.3f}" + ("" if stat["n"] > 1 else " (1)")
        parts.append(label(left + _PANEL - 8, y + 4, text, 11, anchor="end"))
    return "".join(parts)


def _line(x0: float, y0: float, x1: float, y1: float, color: str, width: float = 1) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{color}" stroke-width="{width:g}"/>'
