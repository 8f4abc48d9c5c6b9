"""The interface of a format, and what formats share: pictures by content, JSON, parquet."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError
from scipy import special

from t2irl.errors import ConfigError, DataError
from t2irl.preferences.record import Preferences, Record, Side, digest, first_fault, write_text
from t2irl.preferences.summary import canonical, unit

IMAGES = "images"
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
ROWS = 64
"""Rows of a parquet file in memory at a time: pictures are large."""


class Format:
    """A layout of files in a folder. Subclasses stand alone in their file, whose name is the format's."""

    carries: ClassVar[frozenset[str]]
    """Fields of a record that come back as they went; of pictures the content, not the file name."""
    loses: ClassVar[str]
    """What else becomes of the records, in words."""
    one_axis = True
    """Whether a file says nothing of the axis, so that only one may be written."""
    shows_waiting = False
    """Whether pairs that nobody has judged can be written."""

    def prepared(self, records: Sequence[Record]) -> list[Record]:
        """The records as far as the format can say them: fewer, or with other labels."""
        raise NotImplementedError

    def write(self, preferences: Preferences, folder: Path) -> None:
        """Write records that `prepared` gave."""
        raise NotImplementedError

    def read(self, source: Path, folder: Path) -> Iterator[Record]:
        """Records of a file or folder, whose pictures are put into `folder`. Raises DataError."""
        raise NotImplementedError


def judged(records: Sequence[Record], *labels: str) -> list[Record]:
    """Records with one of some labels, all of them by default."""
    return [r for r in records if r.label is not None and (not labels or r.label in labels)]


def ties_alike(records: Sequence[Record]) -> list[Record]:
    """Judged records in which both bad is a tie as well, for formats that know only one."""
    return [r.model_copy(update={"label": "tie"}) if r.label == "both_bad" else r for r in judged(records)]


def sum_up(records: Sequence[Record]) -> list[Record]:
    """One record for each question, with the votes for a and b. Ties count for neither; undecided questions are left out.

    a is the picture that more preferred.
    """
    votes: dict[str, list[Record]] = {}
    for record in map(canonical, judged(records)):
        votes.setdefault(unit(record), []).append(record)
    found = []
    for name, answers in votes.items():
        given = {side: sum(_votes(r, side) for r in answers) for side in ("a", "b")}
        if given["a"] != given["b"]:
            same = dict(
                votes_a=given["a"], votes_b=given["b"], label="a" if given["a"] > given["b"] else "b", soft_label=None
            )
            blank = dict.fromkeys(("annotator", "item"), "") | dict.fromkeys(("shown_left", "ms", "created_at"))
            record = answers[0].model_copy(update={**same, **blank, "id": name})
            found.append(record if record.label == "a" else record.swapped())
    return found


def _votes(record: Record, side: Side) -> int:
    count = record.votes_a if side == "a" else record.votes_b
    return int(record.label == side) if count is None else count


def confidence(more: int, fewer: int) -> float:
    """Probability that most raters are with the majority, after these votes: that a share of Beta(1 + more, 1 + fewer) is above 1/2."""
    return float(special.betainc(1 + fewer, 1 + more, 0.5))


# ----------------------------------------------------------------------------------------------------------- pictures
class Pictures:
    """Pictures in `folder`/images, under the hash of their content: equal ones once."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)

    def keep(self, content: bytes | None, where: str) -> tuple[str, str]:
        """Path in the folder and SHA-256 of a picture. Raises DataError that starts with `where`."""
        try:
            with Image.open(io.BytesIO(content or b"")) as image:
                suffix = SUFFIXES[image.format or ""]
        except (OSError, UnidentifiedImageError, KeyError) as error:
            raise DataError(f"{where}: not a picture of a known kind ({', '.join(SUFFIXES)}): {error}") from error
        sha = hashlib.sha256(content or b"").hexdigest()
        name = f"{IMAGES}/{sha[:32]}{suffix}"
        if not (self.folder / name).exists():
            (self.folder / name).write_bytes(content or b"")
        return name, sha

    def copy(self, file: Path, where: str) -> tuple[str, str]:
        """The same of a file."""
        try:
            return self.keep(file.read_bytes(), where)
        except OSError as error:
            raise DataError(f"{where}: {file} cannot be read: {error.strerror or error}") from error


def with_pictures(preferences: Preferences, folder: Path) -> list[tuple[Record, str, str]]:
    """Records, and where in `folder` their pictures a and b were copied to."""
    pictures, known = Pictures(folder), dict[Path, str]()

    def place(file: Path) -> str:
        if file not in known:
            known[file] = pictures.copy(file, str(file))[0]
        return known[file]

    return [(r, place(preferences.picture(r, "a")), place(preferences.picture(r, "b"))) for r in preferences.records]


def record_of(where: str, **fields: Any) -> Record:
    """A record. Raises DataError that starts with `where` when fields do not fit."""
    try:
        return Record.model_validate(fields)
    except ValidationError as error:
        raise DataError(f"{where}: {first_fault(error)}") from error


def taken(entry: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A value of an entry. Raises DataError that names it."""
    if key not in entry:
        raise DataError(f"{where}: the key `{key}` is missing; keys there: {', '.join(map(str, entry)) or 'none'}")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: {key} = {str(value)[:60]!r} is of another type than expected")
    return value


def inside(root: Path, path: Any, where: str) -> Path:
    """A file below the data's folder. Raises DataError for a path that leads out of it."""
    if not isinstance(path, str) or not (root / path).resolve().is_relative_to(root.resolve()):
        raise DataError(f"{where}: {path!r} is no path below {root}")
    return root / path


# --------------------------------------------------------------------------------------------------------------- JSON
def source_file(source: Path, *candidates: str) -> Path:
    """A file as given, or the first of some names in a folder. Raises DataError."""
    found = (
        next((source / name for name in candidates if (source / name).is_file()), None) if source.is_dir() else source
    )
    if found is None or not found.is_file():
        raise DataError(f"{source}: expected a file, or a folder with {' or '.join(candidates)}")
    return found


def json_list(file: Path) -> list[dict[str, Any]]:
    """A JSON list of objects. Raises DataError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise DataError(f"{file}: expected a list of objects")
    return content


def write_json(file: Path, content: Any) -> None:
    """JSON with any script as it is."""
    write_text(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------ parquet
def arrow() -> tuple[Any, Any]:
    """pyarrow and its parquet module. Raises ConfigError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("parquet needs pyarrow, which is not installed: pip install 't2irl[formats]'") from error
    return pyarrow, pyarrow.parquet


def write_parquet(file: Path, schema: Any, rows: Iterable[dict[str, Any]]) -> None:
    """Rows, some at a time. The file is there whole or not at all."""
    pa, pq = arrow()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    batch: list[dict[str, Any]] = []
    with pq.ParquetWriter(part, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            batch.clear()

        for row in rows:
            batch.append(row)
            if len(batch) == ROWS:
                flush()
        flush()
    part.replace(file)


def read_parquet(
    source: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where, and the row, of a parquet file or of all in a folder; a few rows are in memory at a time. Raises DataError."""
    pa, pq = arrow()
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise DataError(f"{source}: no parquet file in this folder")
    for file in files:
        try:
            opened = pq.ParquetFile(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file}: cannot be read as parquet: {error}") from error
        names = opened.schema_arrow.names
        if missing := [name for name in needed if name not in names]:
            raise DataError(f"{file}: lacks the columns {', '.join(missing)}; it has {', '.join(names)}")
        columns = [name for name in (*needed, *optional) if name in names]
        number = 0
        for part in opened.iter_batches(batch_size=ROWS, columns=columns):
            for row in part.to_pylist():
                yield f"{file}, row {number}", row
                number += 1


def number_of(name: str) -> int:
    """A name as a whole number of 63 bits, for columns that take nothing else. Decimal numbers stay what they are."""
    plain = name.isascii() and name.isdigit() and str(int(name)) == name and int(name) < 2**63
    return int(name) if plain else int(digest(name), 16) >> 1
