"""TRL preference data for a vision-language judge: `images`, `prompt`, `chosen`, `rejected`, conversational, in parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t2irl.errors import DataError
from t2irl.preferences.formats.base import Format, Pictures, arrow, judged, read_parquet, record_of, write_parquet
from t2irl.preferences.record import QUESTIONS, Preferences, Record

COLUMNS = ("images", "prompt", "chosen", "rejected")
END = "\n\nAnswer with A for the first picture or B for the second."
ANSWERS = {"a": "A", "b": "B"}


class TRL(Format):
    """See the module. The judge sees both pictures and the question that raters saw; `chosen` is their answer."""

    carries = frozenset({"prompt", "sha_a", "sha_b", "label", "axis"})
    loses = (
        "Ties and both bad have no rejected answer and are left out. Models, raters, times, sides and checks are lost."
    )
    one_axis = False

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """Decided judgements."""
        return judged(records, "a", "b")

    def write(self, preferences: Preferences, folder: Path) -> None:
        """train.parquet, whose pictures `datasets` decodes by itself."""
        pa, _ = arrow()
        part = pa.struct([("type", pa.string()), ("text", pa.string())])
        messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
        images = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        text = {"dtype": "string", "_type": "Value"}
        message = [{"role": text, "content": [{"type": text, "text": text}]}]
        features = {"images": [{"_type": "Image"}], **dict.fromkeys(COLUMNS[1:], message)}
        schema = pa.schema([("images", images), *((name, messages) for name in COLUMNS[1:])]).with_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        write_parquet(folder / "train.parquet", schema, (_row(preferences, r) for r in preferences.records))

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """A file as `write` leaves it, or all of a folder."""
        pictures = Pictures(folder)
        for number, (where, row) in enumerate(read_parquet(source, COLUMNS)):
            text, chosen = _text(row["prompt"]), _text(row["chosen"])
            found = [
                (axis, f"{question}\n\n") for axis, question in QUESTIONS.items() if text.startswith(f"{question}\n\n")
            ]
            label = {answer: side for side, answer in ANSWERS.items()}.get(chosen)
            if not found or not text.endswith(END) or label is None or len(row["images"]) != 2:
                raise DataError(
                    f"{where}: not a question on two pictures with the answer A or B, as `t2irl prefs export` writes it"
                )
            (a, sha_a), (b, sha_b) = (pictures.keep(image["bytes"], where) for image in row["images"])
            axis, start = found[0]
            yield record_of(
                where, id=str(number), prompt=text[len(start) : -len(END)], image_a=a, image_b=b, sha_a=sha_a, sha_b=sha_b, axis=axis, label=label
            )  # fmt: skip


def _row(preferences: Preferences, r: Record) -> dict[str, Any]:
    answers = [ANSWERS["a"], ANSWERS["b"]] if r.label == "a" else [ANSWERS["b"], ANSWERS["a"]]
    picture = {"type": "image", "text": None}
    question = {"type": "text", "text": f"{QUESTIONS[r.axis]}\n\n{r.prompt}{END}"}
    chosen, rejected = ([{"role": "assistant", "content": [{"type": "text", "text": x}]}] for x in answers)
    return {
        "images": [{"bytes": preferences.picture(r, side).read_bytes(), "path": None} for side in ("a", "b")],
        "prompt": [{"role": "user", "content": [picture, picture, question]}], "chosen": chosen, "rejected": rejected,
    }  # fmt: skip


def _text(messages: Any) -> str:
    """The last piece of text."""
    pieces = [p["text"] for m in messages or [] for p in m["content"] or [] if p["type"] == "text"]
    return pieces[-1] if pieces else ""
