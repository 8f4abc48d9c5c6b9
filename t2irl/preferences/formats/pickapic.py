"""Pick-a-Pic v2: parquet with the pictures inside, one row a judgement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from t2irl.errors import DataError
from t2irl.preferences.formats.base import (
    Format,
    Pictures,
    arrow,
    number_of,
    read_parquet,
    record_of,
    ties_alike,
    write_parquet,
)
from t2irl.preferences.record import Preferences, Record

LABEL_0 = {"a": 1.0, "b": 0.0, "tie": 0.5}
NEEDED = ("caption", "jpg_0", "jpg_1", "label_0")
OPTIONAL = ("created_at", "has_label", "model_0", "model_1", "ranking_id", "user_id")
TEXT = ("best_image_uid", "caption", "image_0_uid", "image_0_url", "image_1_uid", "image_1_url", "model_0", "model_1")
NUMBERS = ("ranking_id", "user_id", "num_example_per_prompt")


class PickAPic(Format):
    """See the module. `jpg_0` is picture a; its bytes are the file's own, PNG if that is what it is."""

    carries = frozenset({"prompt", "sha_a", "sha_b", "model_a", "model_b", "label", "created_at"})
    loses = (
        "Both bad becomes a tie, raters become numbers (decimal names stay), times are kept to the microsecond. Sides, answering "
        "times, checkpoints, checks and the axis are lost."
    )

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """Every judgement; both bad is a tie."""
        return ties_alike(records)

    def write(self, preferences: Preferences, folder: Path) -> None:
        """train.parquet, with the columns of the data set."""
        pa, _ = arrow()
        kinds: dict[str, Any] = {**dict.fromkeys(TEXT, pa.string()), **dict.fromkeys(NUMBERS, pa.int64())}
        kinds |= {"are_different": pa.bool_(), "has_label": pa.bool_(), "jpg_0": pa.binary(), "jpg_1": pa.binary()}
        kinds |= {"label_0": pa.float64(), "label_1": pa.float64(), "created_at": pa.timestamp("us", "UTC")}
        count = Counter(r.prompt for r in preferences.records)
        rows = (_row(preferences, r, count[r.prompt]) for r in preferences.records)
        write_parquet(folder / "train.parquet", pa.schema([(name, kinds[name]) for name in sorted(kinds)]), rows)

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """A file, or all of a folder. Rows without a label are passed over."""
        yield from rows_to_records(source, folder)


def _row(preferences: Preferences, r: Record, count: int) -> dict[str, Any]:
    first = LABEL_0[r.label or "tie"]
    return {
        "are_different": r.sha_a != r.sha_b, "best_image_uid": {1.0: r.sha_a, 0.0: r.sha_b}.get(first, "tie"), "caption": r.prompt,
        "created_at": r.created_at, "has_label": True, "image_0_uid": r.sha_a, "image_0_url": "", "image_1_uid": r.sha_b,
        "image_1_url": "", "jpg_0": preferences.picture(r, "a").read_bytes(), "jpg_1": preferences.picture(r, "b").read_bytes(),
        "label_0": first, "label_1": 1 - first, "model_0": r.model_a, "model_1": r.model_b, "ranking_id": number_of(r.item or r.id),
        "user_id": number_of(r.annotator), "num_example_per_prompt": count,
    }  # fmt: skip


def rows_to_records(source: Path, folder: Path) -> Iterator[Record]:
    """Of any parquet that has `NEEDED` columns; the others are taken where they are."""
    pictures = Pictures(folder)
    labels = {value: label for label, value in LABEL_0.items()}
    for number, (where, row) in enumerate(read_parquet(source, NEEDED, OPTIONAL)):
        if row.get("has_label") is False:
            continue
        if row["label_0"] not in labels:
            raise DataError(f"{where}: label_0 = {row['label_0']!r}; expected 1, 0 or 0.5")
        (a, sha_a), (b, sha_b) = (pictures.keep(row[f"jpg_{k}"], f"{where}: jpg_{k}") for k in "01")
        given = {key: str(row[key]) for key in OPTIONAL if row.get(key) is not None}
        time = row.get("created_at")
        if isinstance(time, datetime) and time.tzinfo is None:
            time = time.replace(tzinfo=timezone.utc)
        yield record_of(
            where, id=f"{number}", item=given.get("ranking_id", ""), prompt=row["caption"], image_a=a, image_b=b, sha_a=sha_a, sha_b=sha_b,
            model_a=given.get("model_0", ""), model_b=given.get("model_1", ""), label=labels[row["label_0"]],
            annotator=given.get("user_id", ""), created_at=time,
        )  # fmt: skip
