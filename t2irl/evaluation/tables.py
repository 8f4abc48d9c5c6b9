"""The table of an evaluation as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from t2irl.evaluation.charts import number
from t2irl.evaluation.statistics import Interval
from t2irl.evaluation.summary import Measured, Row, Summary
from t2irl.utils.tracking import write_atomic

COLUMNS = (
    "method", "checkpoint", "sampler", "measure", "mean", "low", "high", "prompts", "difference", "difference_low",
    "difference_high", "p", "p_holm", "p_wilcoxon",
)  # fmt: skip
ALPHA = 0.05
"""A corrected p below this is marked."""


def write_tables(summary: Summary, about: dict[str, Any], out: Path) -> None:
    """Write images.jsonl, table.json, table.csv and table.md into `out`. `about`: what the table is of."""
    lines = "".join(f"{json.dumps(line, ensure_ascii=True)}\n" for line in summary.images)
    write_atomic(out / "images.jsonl", lines.encode())
    write_atomic(out / "table.json", json.dumps(about | as_dict(summary), indent=1).encode())
    write_atomic(out / "table.csv", _csv(summary).encode())
    write_atomic(out / "table.md", _markdown(summary, about).encode("utf-8", "replace"))


def as_dict(summary: Summary) -> dict[str, Any]:
    """The table as JSON has it: null for what is not known."""
    return {
        "baselines": {sampler: row.label for sampler, row in summary.baselines.items()},
        "measures": summary.names,
        "rows": [
            {
                "method": row.drawn.name, "checkpoint": row.drawn.checkpoint, "sampler": row.drawn.sampler,
                "iteration": row.drawn.iteration, "drawing": dict(row.drawn.drawing),
                "measures": {name: _measured(m) for name, m in row.measures.items()},
                "categories": {name: {t: _known(v) for t, v in tags.items()} for name, tags in row.tags.items()},
            }
            for row in summary.rows
        ],
    }  # fmt: skip


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(found: Interval) -> dict[str, Any]:
    return {"mean": _known(found.mean), "low": _known(found.low), "high": _known(found.high), "prompts": found.prompts}


def _measured(measured: Measured) -> dict[str, Any]:
    found = _interval(measured.interval)
    if measured.versus is not None:
        v = measured.versus
        found["difference"] = _interval(v.mean) | {
            "p": _known(v.p), "p_holm": _known(measured.p_holm), "p_wilcoxon": _known(v.wilcoxon)
        }  # fmt: skip
    return found


def _csv(summary: Summary) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in summary.rows:
        for name, m in row.measures.items():
            first = [row.drawn.name, row.drawn.checkpoint, row.drawn.sampler, name]
            values: list[float] = [m.interval.mean, m.interval.low, m.interval.high, m.interval.prompts]
            if m.versus is not None:
                d = m.versus.mean
                values += [d.mean, d.low, d.high, m.versus.p, m.p_holm, m.versus.wilcoxon]
            values += [math.nan] * (len(COLUMNS) - len(first) - len(values))
            writer.writerow([*first, *("" if math.isnan(v) else repr(v) for v in values)])
    return text.getvalue()


def shown(measured: Measured | None) -> str:
    """`0.512 [0.470, 0.550]`, with a star where it differs from the baseline; a dash where it was not measured."""
    starred = measured is not None and measured.p_holm < ALPHA
    return " ".join(part for part in (mean(measured), interval(measured), "*" * starred) if part)


def mean(measured: Measured | None) -> str:
    """The mean alone."""
    if measured is None or math.isnan(measured.interval.mean):
        return "-"
    return number(measured.interval.mean, 3)


def interval(measured: Measured | None) -> str:
    """The interval alone, empty where there is none."""
    if measured is None or math.isnan(measured.interval.low):
        return ""
    return f"[{number(measured.interval.low, 3)}, {number(measured.interval.high, 3)}]"


def _markdown(summary: Summary, about: dict[str, Any]) -> str:
    def cells(values: list[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|").replace("\n", " ") for value in values) + " |"

    head = ["measure", *(row.drawn.label for row in summary.rows)]
    lines = [cells(head), "|" + " --- |" * len(head)]
    lines += [cells([name, *(shown(row.measures.get(name)) for row in summary.rows)]) for name in summary.names]
    said = (
        f"{about['suite']}: {about['prompts']} prompts x {about['images']} pictures, seed {about['seed']}. Means over prompts with "
        f"{about['confidence']:.0%} bootstrap intervals. * differs from the baseline of its sampler (p < {ALPHA:g}, paired by prompt, "
        "Holm-corrected over the table)."
    )
    return "\n".join([*lines, "", said, ""])


def by_section(summary: Summary) -> dict[str, list[str]]:
    """Measures under the first part of their names: score, spread, set, diversity, drift, quality."""
    found: dict[str, list[str]] = {}
    for name in summary.names:
        found.setdefault(name.partition("/")[0], []).append(name)
    return found


def trend(row: Row, name: str, lower: bool) -> str:
    """better, worse or nothing: what a difference from the baseline that is beyond chance means."""
    measured = row.measures.get(name)
    if measured is None or measured.versus is None or not measured.p_holm < ALPHA:
        return ""
    return "better" if (measured.versus.mean.mean < 0) == lower else "worse"
