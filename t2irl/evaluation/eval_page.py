"""`report.html` of an evaluation: one self-contained page, without a script and without anything fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from t2irl.evaluation.charts import number
from t2irl.evaluation.glossary import lookup
from t2irl.evaluation.panels import Key, Pictures, fixed, hacked, read_pictures, worst
from t2irl.evaluation.settings import Evaluated
from t2irl.evaluation.summary import LOWER, Summary
from t2irl.evaluation.tables import ALPHA, by_section, interval, mean, trend
from t2irl.utils.tracking import write_atomic

PROMPTS, COLUMNS, TILE = 8, 6, 176
"""Prompts and columns of a panel, and the largest side of a picture in it."""
SECTIONS = {
    "score": "Scores", "set": "Measures of whole sets", "spread": "Spread within prompts", "diversity": "Diversity within prompts",
    "drift": "Drift from the base model", "quality": "Distance to the reference images",
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """Pictures under a heading: rows of keys, the same columns throughout."""

    title: str
    note: str
    columns: list[str]
    rows: list[tuple[str, list[dict[str, Any]]]]
    """(prompt, cells); a cell has `src` and `scores`."""


def write_page(summary: Summary, settings: Evaluated, about: dict[str, Any], out: Path) -> Path:
    """Write `out`/report.html; returns its path."""
    pictures = read_pictures([out])
    page = render(
        "eval.html.j2",
        title=out.resolve().name,
        about=about,
        summary=summary,
        sections=[(SECTIONS[key], names) for key, names in by_section(summary).items()],
        panels=_panels(pictures, settings),
        settings=settings.model_dump(mode="json"),
        alpha=ALPHA,
        mean=mean,
        interval=interval,
        trend=lambda row, name: (
            "" if name.startswith("spread/") else trend(row, name, name.rpartition("/")[2] in LOWER)
        ),
    )
    path = out / "report.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def render(template: str, **values: Any) -> str:
    """A page of this package. All text is escaped; it has the reports' style and no script."""
    files = resources.files("t2irl.evaluation")
    loader = FunctionLoader(lambda name: files.joinpath(name).read_text(encoding="utf-8"))
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = files.joinpath("report.css").read_text(encoding="utf-8")
    env.filters |= {"yaml": lambda v: yaml.safe_dump(v, sort_keys=False, allow_unicode=True, width=110)}
    env.filters |= {"number": lambda v: "n/a" if v is None else number(v, 3)}
    return env.get_template(template).render(style=Markup(style), lookup=lookup, **values)


def _panels(pictures: Pictures, settings: Evaluated) -> list[Panel]:
    columns = pictures.columns[:COLUMNS]
    found = [
        panel(
            pictures,
            "Fixed list",
            "The first prompts of the suite, the first image of each.",
            columns,
            fixed(pictures, columns, PROMPTS),
        )
    ]
    heldout = next((name for name in settings.rewards if name != settings.proxy and name in pictures.scores), None)
    if heldout is None:
        return found
    last = pictures.columns[-1]
    columns = list(dict.fromkeys([*columns[: COLUMNS - 1], last]))
    keys = worst(pictures, last, heldout, columns, PROMPTS)
    found.append(
        panel(pictures, f"Worst by {heldout}", f"The pictures of {last} with the lowest {heldout}.", columns, keys)
    )
    base = pictures.columns[0]
    if settings.proxy in pictures.scores and last != base:
        keys = hacked(pictures, last, base, str(settings.proxy), heldout, columns, PROMPTS)
        note = (
            f"Where {settings.proxy} rose most while {heldout} fell, from {base} to {last}: where to look for a hack."
        )
        found.append(panel(pictures, f"{settings.proxy} up, {heldout} down", note, columns, keys))
    return found


def panel(pictures: Pictures, title: str, note: str, columns: Sequence[str], keys: Sequence[Key]) -> Panel:
    """Pictures of some keys in some columns, small enough for a page."""
    rows = []
    for key in keys:
        cells = [pictures.cells[column][key] for column in columns]
        rows.append((pictures.prompts[key[0]], [{"src": thumbnail(c.path), "scores": c.scores} for c in cells]))
    return Panel(title, note, list(columns), rows)


def thumbnail(path: Path, side: int = TILE) -> str:
    """A picture as a data: URI, WebP, at most `side` large; a small one keeps its pixels."""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
    lossless = max(small.size) <= side
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "WEBP", lossless=lossless, quality=82, method=2)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
