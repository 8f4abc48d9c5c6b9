"""Argilla 2: records.json and settings.json, as `Settings` and the records of a data set are written and read there."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t2irl.errors import DataError
from t2irl.preferences.formats.base import Format, json_list, source_file, taken, write_json
from t2irl.preferences.formats.tasks import CHOICES, answered, choice_of, read_key, ready, write_tasks
from t2irl.preferences.record import QUESTIONS, Preferences, Record

ANSWER = "answer"
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif", ".bmp": "image/bmp"}
SPACE = uuid.UUID("5d9d7f0e-3f0b-4b0e-8a55-7b1f8a2f6c11")
"""Raters' names become user ids in this name space."""


class Argilla(Format):
    """See the module. Pictures stand in the records, as data URLs."""

    carries = frozenset(Record.model_fields) - {
        "image_a", "image_b", "votes_a", "votes_b", "soft_label", "id", "annotator", "ms", "created_at",
    }  # fmt: skip
    loses = "Raters become UUIDs, equal for equal raters. Times, counted votes and soft labels are lost. Needs key.jsonl beside the results."
    one_axis, shows_waiting = False, True

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """All of them; of those that wait one for each question."""
        return ready(records)

    def write(self, preferences: Preferences, folder: Path) -> None:
        """records.json and settings.json for the platform; key.jsonl and images/ for reading the results."""
        records, most = [], 1
        for task in write_tasks(preferences, folder):
            first = task.records[0]
            left, right = (_data_url(folder / name) for name in task.pictures)
            given = [{"value": c, "user_id": _user(r.annotator)} for r in task.records if (c := choice_of(r))]
            most = max(most, len(given))
            fields = {"question": QUESTIONS[first.axis], "prompt": first.prompt, "left": left, "right": right}
            records.append({
                "id": task.id, "fields": fields, "metadata": {}, "suggestions": {}, "responses": {ANSWER: given} if given else {},
                "vectors": {}, "status": "completed" if given else "pending",
            })  # fmt: skip
        write_json(folder / "records.json", records)
        write_json(folder / "settings.json", settings(most))

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """A records.json of a data set, beside its key."""
        file = source_file(source, "records.json")
        key = read_key(file, folder)
        for number, entry in enumerate(json_list(file)):
            where = f"{file}, record {number}"
            name = taken(entry, "id", str, where)
            if name not in key:
                raise DataError(f"{where}: id = {name!r} is not in the key; it belongs to another export")
            given = (entry.get("responses") or {}).get(ANSWER) or []
            for k, response in enumerate(given):
                yield answered(
                    key[name],
                    response.get("value"),
                    where,
                    id=f"{name}/{k}",
                    annotator=str(response.get("user_id", "")),
                )
            if not given:
                yield key[name]


def settings(votes: int) -> dict[str, Any]:
    """Of the data set: fields, the question, and how many answers a record needs."""
    text = {"type": "text", "use_markdown": False}
    fields = [("question", text), ("prompt", text), ("left", {"type": "image"}), ("right", {"type": "image"})]
    options = [{"value": value, "text": words} for value, words in CHOICES.items()]
    question = {"type": "label_selection", "options": options, "visible_options": len(options)}
    return {
        "guidelines": "Compare the two pictures. What counts is your own first impression.",
        "questions": [{"name": ANSWER, "title": "Your answer", "required": True, "settings": question}],
        "fields": [{"name": name, "title": name.capitalize(), "required": True, "settings": kind} for name, kind in fields],
        "vectors": [], "metadata": [], "allow_extra_metadata": False,
        "distribution": {"strategy": "overlap", "min_submitted": votes}, "mapping": None,
    }  # fmt: skip


def _user(name: str) -> str:
    """A user id; names that are one stay as they are."""
    try:
        return str(uuid.UUID(name))
    except ValueError:
        return str(uuid.uuid5(SPACE, name))


def _data_url(file: Path) -> str:
    return f"data:{MIME[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"
