"""Our own format: records.jsonl with every field, and a folder of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from t2irl.preferences.formats.base import Format, Pictures, source_file, with_pictures
from t2irl.preferences.record import Preferences, Record, read_records, write_records


class Records(Format):
    """See the module."""

    carries = frozenset(Record.model_fields) - {"image_a", "image_b"}
    loses = "Nothing."
    one_axis, shows_waiting = False, True

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """All of them."""
        return list(records)

    def write(self, preferences: Preferences, folder: Path) -> None:
        """records.jsonl and images/."""
        rows = with_pictures(preferences, folder)
        write_records([r.model_copy(update={"image_a": a, "image_b": b}) for r, a, b in rows], folder / "records.jsonl")

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """The file, or the folder that holds it."""
        file = source_file(source, "records.jsonl")
        found, pictures = read_records(file), Pictures(folder)
        for record in found.records:
            (a, sha_a), (b, sha_b) = (
                pictures.copy(found.picture(record, s), f"{file}, {record.id}") for s in ("a", "b")
            )
            yield record.model_copy(update=dict(image_a=a, image_b=b, sha_a=sha_a, sha_b=sha_b))
