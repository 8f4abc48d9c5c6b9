"""One judgement of one pair of pictures, and files of them: JSON Lines, our own format."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import AwareDatetime, Field, NonNegativeInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from t2irl.errors import ConfigError, DataError, RunError
from t2irl.strict import Strict

Axis = Literal["overall", "alignment", "quality", "artifact"]
Side = Literal["a", "b"]
Label = Literal["a", "b", "tie", "both_bad"]
AXES: tuple[Axis, ...] = get_args(Axis)
QUESTIONS: dict[Axis, str] = {
    "overall": "Which picture is better, all in all?",
    "alignment": "Which picture shows better what the text says?",
    "quality": "Which picture looks better, whatever the text says?",
    "artifact": "Which picture has fewer defects?",
}
"""What raters are asked. The answer is always the better picture, for `artifact` the one with fewer defects."""


class Record(Strict):
    """A judgement, or, where `label` is null, a pair that waits for one. `a` and `b` have nothing to do with sides."""

    id: str = Field(min_length=1)
    """Unique within a file."""
    item: str = ""
    """The question that was judged, a pair on an axis: equal for the answers of several raters."""
    prompt: str
    """What the pictures were to show."""
    prompt_id: str = ""
    """The prompt's name where it comes from."""
    image_a: str
    """File of one picture, relative to the folder of the file that the record stands in."""
    image_b: str
    """File of the other."""
    sha_a: str = ""
    """SHA-256 of that file, in hexadecimal: pictures are the same where it is equal."""
    sha_b: str = ""
    """The same of the other."""
    model_a: str = ""
    """What drew picture a; empty where it is not known."""
    model_b: str = ""
    """What drew picture b."""
    checkpoint_a: str = ""
    """The checkpoint that drew picture a."""
    checkpoint_b: str = ""
    """The checkpoint that drew picture b."""
    seed: str = ""
    """Of the noise that both pictures were drawn from, if it was the same."""
    axis: Axis = "overall"
    """What was asked, see `QUESTIONS`."""
    label: Label | None = None
    """The better picture, or that they are equally good, or both bad. Null: not judged yet."""
    votes_a: NonNegativeInt | None = None
    """Where the record sums up several raters: how many were for a."""
    votes_b: NonNegativeInt | None = None
    """How many were for b."""
    soft_label: float | None = Field(None, ge=0, le=1)
    """Probability that a is better, where the source gives one."""
    annotator: str = ""
    """Who judged: a name without meaning outside, see `Study.rater`."""
    shown_left: Side | None = None
    """Which picture was on the left."""
    ms: NonNegativeInt | None = None
    """Milliseconds from showing the pictures to the answer."""
    gold: Side | None = None
    """The answer, where it was known beforehand: a check of the rater, no datum on models."""
    repeat_of: str | None = None
    """The `item` of which this is the second showing, sides swapped: a check of the rater as well."""
    batch: str = ""
    """The study that it comes from."""
    licence: str = ""
    """Licence of the pictures and judgements; kept when files are put together."""
    created_at: AwareDatetime | None = None
    """When it was given."""

    @model_validator(mode="after")
    def _votes_together(self) -> Record:
        if (self.votes_a is None) != (self.votes_b is None):
            raise PydanticCustomError("votes", "votes_a and votes_b stand together or not at all")
        return self

    @property
    def preference(self) -> float | None:
        """Probability that a is better: soft label, votes or label, ties as a half. None for what was not judged."""
        if self.soft_label is not None:
            return self.soft_label
        if self.votes_a is not None and self.votes_b is not None and self.votes_a + self.votes_b:
            return self.votes_a / (self.votes_a + self.votes_b)
        return None if self.label is None else {"a": 1.0, "b": 0.0}.get(self.label, 0.5)

    @property
    def is_check(self) -> bool:
        """Whether it tells of the rater rather than of the pictures."""
        return self.gold is not None or self.repeat_of is not None

    def swapped(self) -> Record:
        """The same with the names a and b exchanged."""
        turn: dict[Any, Any] = {"a": "b", "b": "a"}
        changes: dict[str, Any] = {
            f"{name}_{side}": self.__dict__[f"{name}_{turn[side]}"]
            for name in ("image", "sha", "model", "checkpoint", "votes")
            for side in ("a", "b")
        }
        changes |= {name: turn.get(value := self.__dict__[name], value) for name in ("label", "shown_left", "gold")}
        changes["soft_label"] = None if self.soft_label is None else 1 - self.soft_label
        return self.model_copy(update=changes)


@dataclass(frozen=True)
class Preferences:
    """Records and the folder that their picture paths start from."""

    records: tuple[Record, ...]
    """In the source's order."""
    root: Path
    """Folder of the file that they stand in."""

    def picture(self, record: Record, side: Side) -> Path:
        """File of a picture."""
        return self.root / (record.image_a if side == "a" else record.image_b)

    def with_records(self, records: Iterable[Record]) -> Preferences:
        """Other records of the same folder."""
        return Preferences(tuple(records), self.root)


def file_sha(path: Path) -> str:
    """SHA-256 of a file. Raises DataError for one that cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def digest(*parts: object) -> str:
    """A short name for something, the same on every machine."""
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=8).hexdigest()


def read_records(path: Path) -> Preferences:
    """Read a file of records. Raises DataError that names the line and the key."""
    records: list[Record] = []
    seen: dict[str, int] = {}
    for number, entry in json_lines(path):
        where = f"{path}, line {number}"
        try:
            record = Record.model_validate(entry)
        except ValidationError as error:
            raise DataError(f"{where}: {first_fault(error)}") from error
        if record.id in seen:
            raise DataError(f"{where}: id = {record.id!r} stands in line {seen[record.id]} already; ids are unique")
        seen[record.id] = number
        records.append(record)
    return Preferences(tuple(records), path.parent)


def write_records(records: Sequence[Record], path: Path) -> None:
    """Write records whose picture paths start at the file's folder. What is at its default is left out."""
    lines = [record.model_dump_json(exclude_defaults=True) + "\n" for record in records]
    write_text(path, "".join(lines))


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all. Raises RunError."""
    from t2irl.utils.tracking import write_atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {path.parent}: {error.strerror or error}") from error
    write_atomic(path, text.encode())


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside its place, moved there once it is complete. Raises ConfigError where something is already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out = {out}: there is something already; choose a new folder")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def json_lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON Lines file; blank lines are passed over. Raises DataError."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json_object(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a JSON Lines file: {error}") from error


def json_object(text: str, where: str) -> dict[str, Any]:
    """An object. Raises DataError that starts with `where` for anything else."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where}: holds {type(entry).__name__}, expected an object")
    return entry


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic complains of, with its key and value."""
    fault = error.errors()[0]
    key = ".".join(map(str, fault["loc"])) or "the entry"
    more = f" ({error.error_count() - 1} more faults)" if error.error_count() > 1 else ""
    return f"{key} = {str(fault['input'])[:60]!r}: {fault['msg']}{more}"


def timestamp(value: datetime | None) -> str | None:
    """As text with its time zone."""
    return None if value is None else value.isoformat()
