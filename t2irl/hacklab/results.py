"""What a grid found: curves of every run, a table with the spread over seeds, `results.json` and `table.md`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from t2irl.errors import ConfigError
from t2irl.evaluation.overoptimization import fit
from t2irl.hacklab.curves import Curve, area, at_level, crossing, value_at
from t2irl.hacklab.grid import Cell, Grid, settings
from t2irl.hacklab.runner import finished
from t2irl.launch import read_metrics, write_json
from t2irl.loading import load_run
from t2irl.utils.inputs import recorded_inputs

LEVEL = 0.5
"""Gold is compared at the proxy score that lies this far between the base model and the first method's best."""
ALSO = {"kl": "policy/kl_reference", "diversity": "diversity/ratio", "duplicates": "diversity/duplicates"}
"""Metrics of an evaluation besides the held-out means, by their short names."""
SHOWN = (
    ("proxy_final", "proxy"), ("gold_final", "gold"), ("gold_gain", "gain on the base model"), ("gold_peak", "peak gold"), ("gold_drop", "drop from peak"),
    ("gold_area", "area under gold"), ("gold_at_level", "gold at equal proxy"),
    ("fit_peak", "fitted peak, sqrt(kl)"), ("fit_peak_proxy", "proxy at fitted peak"),
)  # fmt: skip
"""Columns of the table, and their headings."""


@dataclass(frozen=True)
class Record:
    """What one run measured on held-out prompts, by iteration."""

    cell: Cell
    complete: bool
    curves: Mapping[str, Curve]
    """proxy, gold and whatever else was measured."""
    seconds: float
    """Time that the run took so far."""
    settings: str | None
    """Digest of what it was started with, see `grid.settings`; None for a config that this version cannot read."""
    inputs: Mapping[str, str]
    """Digests of the files that it read, by path (`t2irl.utils.inputs`); empty where they were not recorded."""

    @property
    def gold(self) -> Curve:
        """The true reward."""
        return self.curves["gold"]


def read_record(cell: Cell, grid: Grid) -> Record | None:
    """The record of a run; None if it has measured nothing yet."""
    rows = read_metrics(cell.run.run_dir)
    evaluated = [row for row in rows if row.get(f"heldout/{grid.gold}") is not None]
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in evaluated:
        values = {"gold": row[f"heldout/{grid.gold}"], "proxy": _proxy(row, cell.trained)}
        values |= {name: row.get(f"heldout/{name}") for name in grid.also if name != grid.gold}
        values |= {name: row.get(metric) for name, metric in ALSO.items()}
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                curves.setdefault(name, []).append((row["iteration"], value))
    if not {"gold", "proxy"} <= curves.keys():
        return None
    seconds = sum(
        v
        for row in rows
        for k, v in row.items()
        if k.startswith("time/") and k not in ("time/iteration_s", "time/score_hidden_s") and v
    )
    return Record(cell, finished(cell), curves, seconds, _started_with(cell), recorded_inputs(cell.run.run_dir))


def _started_with(cell: Cell) -> str | None:
    # Not what the grid says now: a run outside of the part that was asked for may be older than a change of the grid.
    try:
        return settings(load_run([cell.run.run_dir / "config.yaml"]), cell.trained)
    except ConfigError:
        return None


def _proxy(row: Mapping[str, float], trained: Mapping[str, float]) -> float | None:
    """The weighted sum of the proxy's rewards on held-out prompts."""
    values = [(row.get(f"heldout/{name}"), weight) for name, weight in trained.items()]
    known = [value * weight for value, weight in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def measures(record: Record, level: float) -> dict[str, float | None]:
    """The numbers of a run that are compared. `level`: the proxy score at which gold is read."""
    found: dict[str, float | None] = {}
    for name, curve in record.curves.items():
        found |= {f"{name}_base": curve[0][1], f"{name}_final": curve[-1][1]}
    peak = max(value for _, value in record.gold)
    found |= {
        "gold_gain": record.gold[-1][1] - record.gold[0][1],
        "gold_peak": peak,
        "gold_peak_iteration": next(at for at, value in record.gold if value == peak),
        "gold_drop": peak - record.gold[-1][1],
        "gold_area": area(record.gold),
        "gold_at_level": at_level(record.curves["proxy"], record.gold, level),
        "level_iteration": crossing(record.curves["proxy"], level),
    }
    return found


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample; None for one value) and number of the values that are there."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def levels(records: Sequence[Record]) -> dict[str, float]:
    """For each proxy, the score at which gold is compared: `LEVEL` of the way from the base model to the best that the
    first method reaches on the mean of its seeds.
    """
    found: dict[str, float] = {}
    for record in records:
        proxy = record.cell.proxy
        if proxy not in found:
            same = [r for r in records if (r.cell.proxy, r.cell.method) == (proxy, record.cell.method)]
            base = statistics.fmean(r.curves["proxy"][0][1] for r in same)
            best = statistics.fmean(max(v for _, v in r.curves["proxy"]) for r in same)
            found[proxy] = base + LEVEL * (best - base)
    return found


def table(grid: Grid, records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each proxy and method, in the grid's order: measures with their spread over finished seeds."""
    done = [record for record in records if record.complete]
    at = levels(done)
    rows = []
    for proxy, method in dict.fromkeys((r.cell.proxy, r.cell.method) for r in done):
        mine = [r for r in done if (r.cell.proxy, r.cell.method) == (proxy, method)]
        found = [measures(record, at[proxy]) for record in mine]
        names = dict.fromkeys(name for measured in found for name in measured)
        stats = {name: spread([measured.get(name) for measured in found]) for name in names}
        peak = fitted_peak(mine)
        stats["fit_peak"] = spread([peak])
        stats["fit_peak_proxy"] = spread([peak if peak is None else proxy_at(record, peak) for record in mine])
        hacked = stats["gold_drop"]["mean"] >= grid.drop
        rows.append(
            {"proxy": proxy, "method": method, "seeds": len(mine), "level": at[proxy], "hacked": hacked, "stats": stats}
        )
    return rows


def fitted_peak(records: Sequence[Record]) -> float | None:
    """The root of the divergence at which gold is highest, by the curve of Gao et al. through all seeds of a method.

    None where the curve does not turn within twice the distance that was covered, or fewer than three points are there.
    """
    points = [
        (kl**0.5, value_at(record.gold, at) - record.gold[0][1])
        for record in records
        for at, kl in record.curves.get("kl", ())
        if kl > 0
    ]
    if len(points) < 3 or len({d for d, _ in points}) < 2:
        return None
    distance, gained = torch.tensor(points, dtype=torch.float64).T
    peak = fit(distance, gained, "rl").peak
    return peak if peak is not None and peak <= 2 * float(distance.max()) else None


def proxy_at(record: Record, distance: float) -> float | None:
    """A run's proxy, interpolated, where it first is this far (the root of the divergence) from the base model; None if it
    never is. At the fitted peak: the most that a constraint should ask for, the proxy point of constrained RLHF (2310.04373).
    """
    away = [(at, max(0.0, kl) ** 0.5) for at, kl in record.curves.get("kl", ())]
    place = crossing(away, distance) if away else None
    return None if place is None else value_at(record.curves["proxy"], place)


def write_results(
    grid: Grid, cells: Sequence[Cell], out: Path, command: str, joined: Mapping[str, Record] = MappingProxyType({})
) -> str:
    """Read all runs, write results.json, table.md, ranking.svg, figure.svg and hacklab.html into `out`; returns what to say.

    `joined`: runs that were made elsewhere, by name; they stand for those of `cells`.
    """
    from t2irl.hacklab.page import write_page

    records = [record for cell in cells if (record := joined.get(cell.name) or read_record(cell, grid))]
    rows = table(grid, records)
    text = markdown(grid, rows)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "title": grid.title, "note": grid.note, "command": command, "gold": grid.gold, "drop": grid.drop,
        "finished": sum(r.complete for r in records), "runs_of_grid": len(cells), "table": _rounded(rows),
        "runs": [_plain(record) for record in records],
    }  # fmt: skip
    write_json(out / "results.json", content)
    (out / "table.md").write_text(text, encoding="utf-8")
    page = write_page(grid, cells, records, rows, command, out)
    others = f", {len(joined)} of them joined" if joined else ""
    return f"{text}\n{content['finished']} of {len(cells)} runs are finished{others}. Results: {page}"


def _plain(record: Record) -> dict[str, Any]:
    cell = record.cell
    return {
        "proxy": cell.proxy, "method": cell.method, "seed": cell.seed, "complete": record.complete,
        "settings": record.settings, "seconds": round(record.seconds), "curves": _rounded(record.curves),
        "inputs": {path: known for path, known in record.inputs.items() if not Path(path).is_absolute()},
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    """Five significant digits: the file is meant to be committed."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def markdown(grid: Grid, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, one part for each proxy: mean and standard deviation over seeds."""
    also = [name for name in (*grid.also, *ALSO) if any(f"{name}_final" in row["stats"] for row in rows)]
    columns = [*SHOWN, *((f"{name}_final", name) for name in also)]
    parts = []
    for proxy in dict.fromkeys(row["proxy"] for row in rows):
        mine = [row for row in rows if row["proxy"] == proxy]
        stats = mine[0]["stats"]
        base = ", ".join(
            f"{name} {stats[f'{name}_base']['mean']:.3f}"
            for name in ("proxy", "gold", *also)
            if f"{name}_base" in stats
        )
        head = ["method", "seeds", *(heading for _, heading in columns)]
        lines = [f"### {proxy}", "", f"Base model: {base}. Gold is compared at a proxy of {mine[0]['level']:.3f}.", ""]
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for row in mine:
            cells = [shown(row["stats"].get(key)) for key, _ in columns]
            mark = " (hacked)" if row["hacked"] else ""
            lines.append(f"| {' | '.join([row['method'] + mark, str(row['seeds']), *cells])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" if parts else "No run of the grid is finished.\n"


def shown(stat: Mapping[str, Any] | None) -> str:
    """A measure for people: 0.123 ± 0.045, or with the seeds that have it where not all do."""
    if stat is None or stat["mean"] is None:
        return "-"
    return f"{stat['mean']:.3f}" + (f" ± {stat['std']:.3f}" if stat["std"] is not None else "")
