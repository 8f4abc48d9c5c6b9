"""Label Studio: tasks.json to import there, config.xml for the project, and its JSON export to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from t2irl.errors import DataError
from t2irl.preferences.formats.base import Format, json_list, source_file, taken, write_json
from t2irl.preferences.formats.tasks import CHOICES, answered, choice_of, read_key, ready, write_tasks
from t2irl.preferences.record import QUESTIONS, Preferences, Record, digest, timestamp, write_text

URL = "/data/local-files/?d="
"""How Label Studio serves files of its machine; LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT is then the exported folder."""
ANSWER = "answer"


class LabelStudio(Format):
    """See the module. Choices rather than the Pairwise tag, which knows no ties; answers by that tag are read as well."""

    carries = frozenset(Record.model_fields) - {"image_a", "image_b", "votes_a", "votes_b", "soft_label"}
    loses = "Votes that were counted and soft labels. Needs key.jsonl beside the results."
    one_axis, shows_waiting = False, True

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """All of them; of those that wait one for each question."""
        return ready(records)

    def write(self, preferences: Preferences, folder: Path) -> None:
        """tasks.json, config.xml, images/ for the platform; key.jsonl for reading the results."""
        tasks = []
        for task in write_tasks(preferences, folder):
            first, (left, right) = task.records[0], task.pictures
            data = {
                "task": task.id,
                "question": QUESTIONS[first.axis],
                "prompt": first.prompt,
                "left": URL + left,
                "right": URL + right,
            }
            given = [_annotation(r, choice) for r in task.records if (choice := choice_of(r))]
            tasks.append({"data": data, "annotations": given})
        write_json(folder / "tasks.json", tasks)
        write_text(folder / "config.xml", config())

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """A JSON export of the project, beside its key; skipped annotations are passed over."""
        file = source_file(source, "tasks.json")
        key = read_key(file, folder)
        for number, task in enumerate(json_list(file)):
            where = f"{file}, task {number}"
            name = taken(taken(task, "data", dict, where), "task", str, where)
            if name not in key:
                raise DataError(f"{where}: task {name!r} is not in the key; it belongs to another export")
            given = [a for a in task.get("annotations") or [] if not a.get("was_cancelled")]
            for k, annotation in enumerate(given):
                yield _record(key[name], annotation, f"{name}/{k}", where)
            if not given:
                yield key[name]


def config() -> str:
    """The labelling interface."""
    choices = "".join(
        f"\n    <Choice value={quoteattr(value)} html={quoteattr(text)} hotkey={quoteattr(str(k))}/>"
        for k, (value, text) in enumerate(CHOICES.items(), 1)
    )
    return f"""<View>
  <Header value="$question"/>
  <Text name="prompt" value="$prompt"/>
  <View style="display: flex; gap: 16px">
    <Image name="left" value="$left"/>
    <Image name="right" value="$right"/>
  </View>
  <Choices name="{ANSWER}" toName="left" choice="single-radio" showInline="true" required="true">{choices}
  </Choices>
</View>
"""


def _annotation(record: Record, choice: str) -> dict[str, Any]:
    name = digest(record.id)[:10]
    result = {
        "id": name, "from_name": ANSWER, "to_name": "left", "type": "choices", "value": {"choices": [choice]},
        # Label Studio knows its own users alone; who answered here stands in the region's notes.
        "meta": {"text": [record.id, record.annotator]},
    }  # fmt: skip
    entry: dict[str, Any] = {"result": [result], "was_cancelled": False}
    if record.ms is not None:
        entry["lead_time"] = record.ms / 1000
    if record.created_at is not None:
        entry["created_at"] = timestamp(record.created_at)
    return entry


def _record(task: Record, annotation: dict[str, Any], name: str, where: str) -> Record:
    results = [r for r in taken(annotation, "result", list, where) if r.get("type") in ("choices", "pairwise")]
    if len(results) != 1:
        raise DataError(f"{where}: an annotation with {len(results)} answers; expected one")
    value = taken(results[0], "value", dict, where)
    choice = value.get("selected") or (value.get("choices") or [None])[0]
    notes = (results[0].get("meta") or {}).get("text") or []
    by = annotation.get("completed_by", "")
    rater = notes[1] if len(notes) == 2 else str(by.get("email", by.get("id", "")) if isinstance(by, dict) else by)
    lead = annotation.get("lead_time")
    return answered(
        task, choice, where, id=notes[0] if len(notes) == 2 else name, annotator=rater,
        ms=None if lead is None else round(lead * 1000), created_at=annotation.get("created_at"),
    )  # fmt: skip
