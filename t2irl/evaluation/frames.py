"""The grids of a run as small pictures for its report."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

MAX_FRAMES = 40
MAX_TILE = 256
"""Largest side of a picture in the report, in pixels."""
BUDGET = 12_000_000
"""Bytes that all pictures of a report may have together; base64 makes a third more of them."""
_LOSSLESS_UP_TO = 128


@dataclass(frozen=True)
class Frame:
    """One grid: its pictures on one sheet, `across` in a row, and their scores."""

    iteration: int
    prompts: list[str]
    scores: dict[str, list[float | None]]
    sheet: str
    """data: URI of a WebP picture."""
    across: int
    size: tuple[int, int]
    """Width and height of one picture."""


@dataclass(frozen=True)
class _Grid:
    iteration: int
    sidecar: dict[str, Any]
    pictures: list[Image.Image]


def load_frames(folder: Path) -> tuple[list[Frame], list[str]]:
    """The grids in a folder, in order of iterations, and a note on each that could not be read.

    At most `MAX_FRAMES`, first and last among them. Only grids with the newest one's prompts are kept: others cannot be
    compared. Pictures are made smaller until all fit `BUDGET`.
    """
    paths = _spread(sorted(folder.glob("iteration_*.png")))
    grids, notes = [], []
    for path in paths:
        try:
            grids.append(_read(path))
        except (OSError, ValueError, KeyError) as error:  # cut off by a crash, or no sidecar
            notes.append(f"The grid {path.name} cannot be read ({type(error).__name__}: {error}).")
    same = [grid for grid in grids if grid.sidecar["prompts"] == grids[-1].sidecar["prompts"]]
    side = MAX_TILE
    while True:
        encoded = [_sheet(grid.pictures, side) for grid in same]
        if sum(len(data) for data, _, _ in encoded) <= BUDGET or side <= 32:
            break
        side //= 2
    return [
        Frame(
            grid.iteration,
            grid.sidecar["prompts"],
            grid.sidecar["scores"],
            "data:image/webp;base64," + base64.b64encode(data).decode(),
            across,
            size,
        )
        for grid, (data, across, size) in zip(same, encoded, strict=True)
    ], notes


def _spread(paths: list[Path]) -> list[Path]:
    """At most `MAX_FRAMES` of them, evenly, ends included."""
    if len(paths) <= MAX_FRAMES:
        return paths
    return [paths[round(k * (len(paths) - 1) / (MAX_FRAMES - 1))] for k in range(MAX_FRAMES)]


def _read(path: Path) -> _Grid:
    """Cut a grid's PNG into its pictures, at most `MAX_TILE` large and at most as large as they were drawn from."""
    sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    height, width = sidecar["picture"]
    with Image.open(path) as page:
        page.load()
        cut = [page.crop(box).convert("RGB") for box in sidecar["boxes"]]
    if len(cut) != len(sidecar["prompts"]) or not cut:
        raise ValueError(f"{len(cut)} pictures but {len(sidecar['prompts'])} prompts")
    if cut[0].width > width:  # enlarged without smoothing, so this gives the very pixels back
        cut = [picture.resize((width, height), Image.Resampling.NEAREST) for picture in cut]
    for picture in cut:
        picture.thumbnail((MAX_TILE, MAX_TILE), Image.Resampling.LANCZOS)
    return _Grid(int(path.stem.removeprefix("iteration_")), sidecar, cut)


def _sheet(pictures: list[Image.Image], side: int) -> tuple[bytes, int, tuple[int, int]]:
    """Pictures side by side, none larger than `side`: (WebP bytes, pictures in a row, size of one)."""
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = small[0].size
    across = math.ceil(math.sqrt(len(small)))
    sheet = Image.new("RGB", (across * width, math.ceil(len(small) / across) * height))
    for k, picture in enumerate(small):
        sheet.paste(picture, (k % across * width, k // across * height))
    data = io.BytesIO()
    sheet.save(data, "WEBP", lossless=max(width, height) <= _LOSSLESS_UP_TO, quality=80, method=4)
    return data.getvalue(), across, (width, height)
