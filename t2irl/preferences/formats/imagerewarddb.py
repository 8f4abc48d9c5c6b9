"""ImageRewardDB: parquet metadata, one row a picture with its rank among those of its prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t2irl.errors import DataError
from t2irl.preferences.formats.base import (
    Format,
    Pictures,
    arrow,
    inside,
    read_parquet,
    record_of,
    ties_alike,
    with_pictures,
    write_parquet,
)
from t2irl.preferences.record import Preferences, Record

RATINGS = {"image_text_alignment_rating": "alignment", "fidelity_rating": "quality"}
"""Ratings that become pairs on an axis of their own when a file is read; the overall order is that of `rank`."""
NEEDED = ("image_path", "prompt_id", "prompt", "rank")


class ImageRewardDB(Format):
    """See the module. A judgement is written as a prompt of its own with two pictures; ratings stay empty, as none were given."""

    carries = frozenset({"id", "prompt", "sha_a", "sha_b", "label"})
    loses = "Both bad becomes a tie. Models, raters, times, sides, checks and the axis are lost."

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """Every judgement; both bad is a tie."""
        return ties_alike(records)

    def write(self, preferences: Preferences, folder: Path) -> None:
        """metadata-train.parquet and images/."""
        pa, _ = arrow()
        small = ("rank", "overall_rating", *RATINGS)
        schema = pa.schema([
            ("image_path", pa.string()), ("prompt_id", pa.string()), ("prompt", pa.string()), ("classification", pa.string()),
            ("image_amount_in_total", pa.int8()), *((name, pa.int8()) for name in small),
        ])  # fmt: skip
        rows = (
            {
                "image_path": path,
                "prompt_id": r.id,
                "prompt": r.prompt,
                "classification": "",
                "image_amount_in_total": 2,
                "rank": rank,
            }
            for r, a, b in with_pictures(preferences, folder)
            for path, rank in ((a, 2 if r.label == "b" else 1), (b, 2 if r.label == "a" else 1))
        )
        write_parquet(folder / "metadata-train.parquet", schema, rows)

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """A metadata file, or all of a folder; ratings give pairs on the axes alignment and quality."""
        pictures = Pictures(folder)
        root = source if source.is_dir() else source.parent
        rows = read_parquet(source, NEEDED, tuple(RATINGS))
        # The pictures of a prompt stand one below the other.
        for prompt_id, group in itertools.groupby(rows, key=lambda row: row[1]["prompt_id"]):
            yield from _pairs(str(prompt_id), list(group), root, pictures)


def _pairs(prompt_id: str, rows: list[tuple[str, dict[str, Any]]], root: Path, pictures: Pictures) -> Iterator[Record]:
    kept = [pictures.copy(inside(root, row["image_path"], where), where) for where, row in rows]
    for column, axis in {"rank": "overall", **RATINGS}.items():
        # Of ranks the smaller is better, of ratings the larger.
        values = [row.get(column) for _, row in rows]
        if column == "rank" and None in values:
            raise DataError(f"{rows[values.index(None)][0]}: rank is empty")
        for (i, x), (j, y) in itertools.combinations(enumerate(values), 2):
            if x is None or y is None:
                continue
            label = "tie" if x == y else "a" if (x < y) == (column == "rank") else "b"
            name = prompt_id if len(rows) == 2 and axis == "overall" else f"{prompt_id}/{i}-{j}/{axis}"
            yield record_of(
                rows[i][0], id=name, prompt_id=prompt_id, prompt=rows[i][1]["prompt"], image_a=kept[i][0], image_b=kept[j][0],
                sha_a=kept[i][1], sha_b=kept[j][1], axis=axis, label=label,
            )  # fmt: skip
