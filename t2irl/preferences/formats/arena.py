"""Arena battles: JSON Lines with `model_a`, `model_b` and `winner`, as rating tools read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from t2irl.errors import DataError
from t2irl.preferences.formats.base import (
    Format,
    Pictures,
    inside,
    judged,
    record_of,
    source_file,
    taken,
    with_pictures,
)
from t2irl.preferences.record import Preferences, Record, json_lines, write_text

WINNERS = {"a": "model_a", "b": "model_b", "tie": "tie", "both_bad": "both_bad"}
ALSO = {"tie (bothbad)": "both_bad", "bothbad": "both_bad"}
"""Other spellings that are read."""
NAMES = {"annotator": "judge", "item": "question_id"}
"""Fields that battles have another name for; the rest stand under their own."""


class Arena(Format):
    """See the module. Fields that battles do not know stand beside them, where other tools pass over them."""

    carries = frozenset(Record.model_fields) - {"image_a", "image_b"}
    loses = "Nothing that was judged."
    one_axis = False

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """Every judgement."""
        return judged(records)

    def write(self, preferences: Preferences, folder: Path) -> None:
        """battles.jsonl and images/."""
        lines = []
        for record, a, b in with_pictures(preferences, folder):
            entry: dict[str, Any] = {
                "model_a": record.model_a,
                "model_b": record.model_b,
                "winner": WINNERS[record.label or "tie"],
            }
            if record.created_at is not None:
                entry["tstamp"] = record.created_at.timestamp()
            rest = record.model_dump(
                mode="json", exclude_defaults=True, exclude={"model_a", "model_b", "label", "created_at"}
            )
            entry |= {NAMES.get(key, key): value for key, value in rest.items()} | {"image_a": a, "image_b": b}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        write_text(folder / "battles.jsonl", "".join(lines))

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """A folder with battles.jsonl, or any such file whose entries name two pictures."""
        file, pictures = source_file(source, "battles.jsonl"), Pictures(folder)
        labels = {word: label for label, word in WINNERS.items()} | ALSO
        own = {name: key for key, name in NAMES.items()}
        for number, entry in json_lines(file):
            where = f"{file}, line {number}"
            winner = taken(entry, "winner", str, where)
            if winner not in labels:
                raise DataError(f"{where}: winner = {winner!r}; expected {', '.join(WINNERS.values())}")
            kept = [
                pictures.copy(inside(file.parent, taken(entry, key, str, where), where), where)
                for key in ("image_a", "image_b")
            ]
            fields = {own.get(key, key): value for key, value in entry.items() if key not in ("winner", "tstamp")}
            known = {key: value for key, value in fields.items() if key in Record.model_fields}
            if "tstamp" in entry:
                time = taken(entry, "tstamp", (int, float), where)
                known["created_at"] = datetime.fromtimestamp(time, timezone.utc)
            given = dict(
                image_a=kept[0][0], image_b=kept[1][0], sha_a=kept[0][1], sha_b=kept[1][1], label=labels[winner]
            )
            yield record_of(where, **{"id": str(number), "prompt": "", **known, **given})
