"""`ranking.svg`, `figure.svg` and `hacklab.html`: one self-contained page on a grid, without a script and without anything fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from t2irl.hacklab.figure import COLORS, Lines, figure
from t2irl.hacklab.grid import Cell, Grid
from t2irl.hacklab.ranking import ranking
from t2irl.hacklab.results import ALSO, SHOWN, Record, shown
from t2irl.utils.tracking import write_atomic


def write_page(
    grid: Grid,
    cells: Sequence[Cell],
    records: Sequence[Record],
    rows: Sequence[Mapping[str, Any]],
    command: str,
    out: Path,
) -> Path:
    """Write the figures and the page into `out`; returns the page's path. Unfinished runs are drawn as far as they are."""
    methods = list(grid.methods)
    drawn = figure(panels(grid, records), methods)
    order = ranking(rows, methods) if rows else ""
    write_atomic(out / "figure.svg", f"{drawn}\n".encode())
    if order:
        write_atomic(out / "ranking.svg", f"{order}\n".encode())
    files = resources.files("t2irl.hacklab")
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"yaml": lambda v: yaml.safe_dump(v, sort_keys=False, allow_unicode=True, width=110), "shown": shown}
    also = [name for name in (*grid.also, *ALSO) if any(f"{name}_final" in row["stats"] for row in rows)]
    page = env.from_string(files.joinpath("hacklab.html.j2").read_text(encoding="utf-8")).render(
        title=grid.title or "Reward hacking laboratory",
        grid=grid,
        figure=drawn,
        ranking=order,
        rows=rows,
        columns=[*SHOWN, *((f"{name}_final", name) for name in also)],
        colors={method: COLORS[k % len(COLORS)] for k, method in enumerate(methods)},
        best=best(rows),
        done=sum(record.complete for record in records),
        total=len(cells),
        hours=sum(record.seconds for record in records) / 3600,
        command=command,
    )
    path = out / "hacklab.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def panels(grid: Grid, records: Sequence[Record]) -> dict[str, dict[str, Lines]]:
    """Curves by proxy, measure and method; a column that no run measured is left out."""
    found: dict[str, dict[str, Lines]] = {}
    for proxy in grid.proxies:
        mine = [record for record in records if record.cell.proxy == proxy]
        if mine:
            found[proxy] = {
                name: lines
                for name in ("proxy", "gold", *(n for n in grid.also if n != grid.gold), *ALSO)
                if (lines := _lines(grid, mine, name))
            }
    return found


def _lines(grid: Grid, records: Sequence[Record], name: str) -> Lines:
    lines = {m: [r.curves[name] for r in records if r.cell.method == m and name in r.curves] for m in grid.methods}
    return {method: curves for method, curves in lines.items() if curves}


def best(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each proxy, the method that ends with the most gold."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        kept = found.get(row["proxy"])
        if kept is None or row["stats"]["gold_final"]["mean"] > kept["stats"]["gold_final"]["mean"]:
            found[row["proxy"]] = row
    return {proxy: row["method"] for proxy, row in found.items()}
