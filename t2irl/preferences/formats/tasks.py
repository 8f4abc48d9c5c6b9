"""What annotation platforms share: blind tasks for raters, and the key that says what is what, kept beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2irl.errors import DataError
from t2irl.preferences.formats.base import Pictures, inside, record_of, with_pictures
from t2irl.preferences.record import Preferences, Record, Side, digest, json_lines, write_records

KEY = "key.jsonl"
CHOICES = {"left": "Left is better", "right": "Right is better", "tie": "Equally good", "both_bad": "Both bad"}
GIVEN = ("id", "label", "annotator", "ms", "created_at")
"""What belongs to an answer; all else belongs to the task and stands in the key."""


@dataclass(frozen=True)
class Task:
    """A question with its sides: what raters may know, and what was answered."""

    id: str
    left: Side
    pictures: tuple[str, str]
    """Left and right, relative to the folder."""
    records: tuple[Record, ...]
    """All on this question with these sides; the first stands for what they share."""


def write_tasks(preferences: Preferences, folder: Path) -> list[Task]:
    """Copy pictures, write the key and return the tasks. The key is not for the platform: it names models and known answers."""
    found: dict[str, Task] = {}
    key = []
    for record, a, b in with_pictures(preferences, folder):
        left: Side = record.shown_left or "a"
        name = task_id(record)
        if name not in found:
            found[name] = Task(name, left, (a, b) if left == "a" else (b, a), ())
            changes = dict(image_a=a, image_b=b, id=name, label=None, annotator="", ms=None, created_at=None)
            key.append(record.model_copy(update=changes))
        task = found[name]
        found[name] = Task(name, left, task.pictures, (*task.records, record))
    write_records(key, folder / KEY)
    return list(found.values())


def read_key(file: Path, folder: Path) -> dict[str, Record]:
    """Tasks by id from the key beside a file of results, with pictures put into `folder`. Raises DataError."""
    path = file.parent / KEY
    if not path.is_file():
        raise DataError(
            f"{file}: the key {KEY} must stand beside it; the export wrote it, and only it knows what drew the pictures"
        )
    pictures, found = Pictures(folder), dict[str, Record]()
    for number, entry in json_lines(path):
        where = f"{path}, line {number}"
        record = record_of(where, **entry)
        (a, sha_a), (b, sha_b) = (
            pictures.copy(inside(path.parent, p, where), where) for p in (record.image_a, record.image_b)
        )
        found[record.id] = record.model_copy(update=dict(image_a=a, image_b=b, sha_a=sha_a, sha_b=sha_b))
    return found


def answered(task: Record, choice: Any, where: str, **given: Any) -> Record:
    """A record of an answer by side. Raises DataError for an unknown one."""
    if choice not in CHOICES:
        raise DataError(f"{where}: the answer {choice!r} is none of {', '.join(CHOICES)}")
    left: Side = task.shown_left or "a"
    label = {"left": left, "right": "b" if left == "a" else "a"}.get(choice, choice)
    return record_of(where, **{**task.model_dump(), "label": label, "shown_left": left, **given})


def choice_of(record: Record) -> str | None:
    """The answer by side."""
    if record.label in (None, "tie", "both_bad"):
        return record.label
    return "left" if record.label == (record.shown_left or "a") else "right"


def ready(records: Sequence[Record]) -> list[Record]:
    """Records as tasks know them: with a left side, picture a where it is not known; without counted votes; of those that wait
    for an answer one for each question that has none.
    """
    plain = dict(votes_a=None, votes_b=None, soft_label=None)
    sided = [r.model_copy(update={**plain, "shown_left": r.shown_left or "a"}) for r in records]
    judged = {task_id(r) for r in sided if r.label is not None}
    waiting = {name: r for r in sided if r.label is None and (name := task_id(r)) not in judged}
    blank = dict(annotator="", ms=None, created_at=None)
    return [r for r in sided if r.label is not None] + [
        r.model_copy(update={**blank, "id": name}) for name, r in waiting.items()
    ]


def task_id(record: Record) -> str:
    """Equal for records that differ in the answer alone; tells nothing."""
    shared = record.model_dump(mode="json", exclude={*GIVEN, "image_a", "image_b"})
    return digest(shared, record.sha_a or record.image_a, record.sha_b or record.image_b)
