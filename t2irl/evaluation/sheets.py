"""A sheet of pictures: a row for each prompt, a column for each checkpoint or seed, scores under the pictures. Imports no torch."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, PngImagePlugin

from t2irl.errors import DataError
from t2irl.evaluation.text import clean, draw, ellipsise, length, right_to_left, wrap
from t2irl.utils.files import write_atomic

INK, QUIET, LINE, CARD, PAGE = "#1b1f24", "#667080", "#d8dde3", "#ffffff", "#f4f6f8"
UP, DOWN = "#14713d", "#b3261e"
MARGIN, GAP, LABEL = 20, 10, 210
TITLE, HEAD, BODY, SMALL = 20, 14, 14, 12
LINES, CHARACTERS = 6, 500


@dataclass(frozen=True)
class SheetCell:
    """One place of a sheet."""

    path: Path | None
    """The picture; None leaves the place empty."""
    scores: Mapping[str, float] = field(default_factory=dict)
    base: Mapping[str, float] = field(default_factory=dict)
    """Scores that differences are shown from; empty for none."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What goes into the file's metadata."""


@dataclass(frozen=True)
class SheetRow:
    """A row: what stands at its left, and its places."""

    label: str
    cells: Sequence[SheetCell]
    note: str = ""
    """A quiet line below the label."""


def draw_sheet(
    columns: Sequence[str],
    rows: Sequence[SheetRow],
    path: Path,
    title: str,
    notes: Mapping[str, Any],
    tile: int | None = None,
) -> None:
    """Write a sheet to `path` (PNG) with its prompts, seeds and scores as text in the file, and the same to a .json beside it.

    `tile`: side of a picture on the sheet; None: 160 pixels or a whole multiple of a smaller one, at most 320. `notes`: more for the
    metadata. Raises DataError for a picture that cannot be read.
    """
    pictures = [[None if c.path is None else _open(c.path) for c in row.cells] for row in rows]
    largest = max((max(p.size) for row in pictures for p in row if p is not None), default=160)
    side = tile or (min(largest, 320) if largest > 160 else largest * max(1, round(160 / largest)))
    names = list(dict.fromkeys(clean(name) for row in rows for cell in row.cells for name in cell.scores))
    heads = [wrap(clean(column), HEAD, side, 3, 120) for column in columns]
    head_height = max(len(head) for head in heads) * (HEAD + 4) + 6
    labels = [wrap(clean(row.label), BODY, LABEL - GAP, LINES, CHARACTERS) for row in rows]
    below = len(names) * (SMALL + 4) + 6
    heights = [
        max(side + below, (len(label) + bool(row.note)) * (BODY + 4)) + GAP
        for row, label in zip(rows, labels, strict=True)
    ]
    width = 2 * MARGIN + LABEL + len(columns) * (side + GAP) - GAP
    said = wrap(clean(title), TITLE, width - 2 * MARGIN, 3, 300) if title else []
    top = MARGIN + len(said) * (TITLE + 4) + (10 if said else 0)
    page = Image.new("RGB", (width, top + head_height + sum(heights) + MARGIN - GAP), PAGE)
    for k, line in enumerate(said):
        draw(page, (MARGIN, MARGIN - 4 + k * (TITLE + 4)), line, INK, TITLE)
    for place, head in enumerate(heads):
        for k, line in enumerate(head):
            draw(page, (_x(place, side), top + k * (HEAD + 4)), line, QUIET, HEAD)
    y, boxes = top + head_height, []
    for row, label, images, height in zip(rows, labels, pictures, heights, strict=True):
        _draw_label(page, row, label, y)
        for place, (cell, picture) in enumerate(zip(row.cells, images, strict=True)):
            boxes.append(_draw_cell(page, cell, picture, names, _x(place, side), y, side))
        y += height
    _save(page, path, columns, rows, boxes, {"title": clean(title), **notes})


def _x(place: int, side: int) -> int:
    return MARGIN + LABEL + place * (side + GAP)


def _draw_label(page: Image.Image, row: SheetRow, lines: Sequence[str], y: int) -> None:
    backwards = right_to_left(clean(row.label))
    for k, line in enumerate(lines):
        at = MARGIN + LABEL - GAP if backwards else MARGIN
        draw(page, (at, y + k * (BODY + 4)), line, INK, BODY, right=backwards)
    if row.note:
        draw(
            page,
            (MARGIN, y + len(lines) * (BODY + 4) + 2),
            ellipsise(clean(row.note), SMALL, LABEL - GAP),
            QUIET,
            SMALL,
        )


def _draw_cell(
    page: Image.Image, cell: SheetCell, picture: Image.Image | None, names: Sequence[str], x: int, y: int, side: int
) -> tuple[int, int, int, int]:
    """Picture and scores of a place; returns where the picture is."""
    pen = ImageDraw.Draw(page)
    box = (x, y, x + side, y + side)
    if picture is None:
        pen.rectangle((x, y, x + side - 1, y + side - 1), outline=LINE)
        return box
    shown = fit(picture, side)
    left, top = x + (side - shown.width) // 2, y + (side - shown.height) // 2
    page.paste(shown, (left, top))
    pen.rectangle((left - 1, top - 1, left + shown.width, top + shown.height), outline=LINE)
    scores = {clean(name): value for name, value in cell.scores.items()}
    base = {clean(name): value for name, value in cell.base.items()}
    for k, name in enumerate(names):
        if name not in scores:
            continue
        line, end = y + side + 4 + k * (SMALL + 4), x + side
        if name in base and math.isfinite(scores[name] - base[name]):
            change = scores[name] - base[name]
            text = f"{change:+.2f}".replace("-", "\N{MINUS SIGN}")
            draw(
                page, (end, line), text, UP if change > 0.005 else DOWN if change < -0.005 else QUIET, SMALL, right=True
            )
            end -= round(length(text, SMALL)) + 6
        number = f"{scores[name]:.2f}" if math.isfinite(scores[name]) else "n/a"
        draw(page, (end, line), number, INK, SMALL, right=True)
        draw(page, (x, line), ellipsise(name, SMALL, end - x - length(number, SMALL) - 6), QUIET, SMALL)
    return (left, top, left + shown.width, top + shown.height)


def fit(picture: Image.Image, side: int) -> Image.Image:
    """A picture within a square: enlarged by a whole factor without smoothing, or reduced."""
    factor = side // max(picture.size)
    if factor >= 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a picture: {error}") from error


def _save(
    page: Image.Image,
    path: Path,
    columns: Sequence[str],
    rows: Sequence[SheetRow],
    boxes: Sequence[Any],
    notes: Mapping[str, Any],
) -> None:
    places = [(row, column, cell) for row in rows for column, cell in zip(columns, row.cells, strict=True)]
    cells = [
        {
            "column": column,
            "prompt": row.label,
            **cell.about,
            "scores": {n: _known(v) for n, v in cell.scores.items()},
            "box": box,
        }
        for (row, column, cell), box in zip(places, boxes, strict=True)
        if cell.path is not None
    ]
    told = {**notes, "columns": list(columns), "prompts": [row.label for row in rows], "cells": cells}
    info = PngImagePlugin.PngInfo()
    for key, value in told.items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode() if isinstance(value, str) else json.dumps(value))
    data = io.BytesIO()
    page.save(data, "PNG", pnginfo=info, compress_level=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data.getvalue())
    write_atomic(path.with_suffix(".json"), json.dumps(told, indent=1).encode())


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
