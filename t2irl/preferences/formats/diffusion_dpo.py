"""Diffusion-DPO: parquet with just the columns that its training scripts read, those of Pick-a-Pic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from t2irl.preferences.formats.base import Format, arrow, ties_alike, write_parquet
from t2irl.preferences.formats.pickapic import LABEL_0, rows_to_records
from t2irl.preferences.record import Preferences, Record


class DiffusionDPO(Format):
    """See the module. Ties are written as label 0.5, which the training scripts pass over."""

    carries = frozenset({"prompt", "sha_a", "sha_b", "label"})
    loses = "Both bad becomes a tie. Models, raters, times, sides, checks and the axis are lost."

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """Every judgement; both bad is a tie."""
        return ties_alike(records)

    def write(self, preferences: Preferences, folder: Path) -> None:
        """train.parquet."""
        pa, _ = arrow()
        schema = pa.schema([
            ("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()),
            ("label_1", pa.float64()),
        ])  # fmt: skip
        rows = (
            {
                "caption": r.prompt, "jpg_0": preferences.picture(r, "a").read_bytes(),
                "jpg_1": preferences.picture(r, "b").read_bytes(), "label_0": LABEL_0[r.label or "tie"],
                "label_1": 1 - LABEL_0[r.label or "tie"],
            }
            for r in preferences.records
        )  # fmt: skip
        write_parquet(folder / "train.parquet", schema, rows)

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """A file, or all of a folder."""
        yield from rows_to_records(source, folder)
