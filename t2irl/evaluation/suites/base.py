"""The interface of a suite, and how suites read files."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from t2irl.errors import DataError
from t2irl.strict import Strict

Results = dict[str, dict[tuple[int, int], float]]
"""Measure -> {(prompt id, image): score}."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of a suite. Its id is its place in the suite."""

    text: str
    tag: str = ""
    """Category by which means are shown as well; empty for none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the official scorer must be told."""


@dataclass(frozen=True)
class Picture:
    """A finished picture of one subject."""

    prompt_id: int
    image: int
    path: Path


class Suite:
    """Prompts and, for a published benchmark, the files that its own scorer reads and writes.

    Stands alone in `t2irl/evaluation/suites/<type>.py` and is built as `Suite(config)`. Imports no torch.
    """

    class Config(Strict):
        """Settings that every suite has."""

        type: str
        """File name in `t2irl/evaluation/suites/`, or `package.module:Class`."""
        path: Path
        """The prompts: the file or folder that the benchmark publishes."""
        images: PositiveInt = 4
        """Pictures of each prompt."""

    official = 'any scorer that writes lines such as {"prompt_id": 0, "image": 0, "scores": {"mine": 0.5}}'
    """What to call on the exported folder, and where it is."""

    def __init__(self, config: Any):
        self.config = config

    def prompts(self) -> list[Prompt]:
        """All prompts in the order of the file. Raises DataError for a file that is not what the benchmark publishes."""
        raise NotImplementedError

    def export(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], folder: Path) -> None:
        """Write the layout that the official scorer reads into an empty `folder`: here 00012_003.png and pictures.jsonl."""
        lines = []
        for picture in pictures:
            name = f"{picture.prompt_id:05d}_{picture.image:03d}.png"
            place_picture(picture.path, folder / name)
            about = {"prompt_id": picture.prompt_id, "image": picture.image, "file": name}
            lines.append(json.dumps(about | {"prompt": prompts[picture.prompt_id].text}))
        (folder / "pictures.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def results(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], path: Path) -> Results:
        """Read what the official scorer wrote. Raises DataError for a file that does not fit the pictures."""
        found: Results = {}
        for place, entry in read_objects(path, str(path), ("prompt_id", "image", "scores")):
            if not isinstance(entry["scores"], dict):
                raise DataError(f"{place}: scores is {entry['scores']!r}, expected a mapping of names and numbers")
            for name, value in entry["scores"].items():
                found.setdefault(str(name), {})[entry["prompt_id"], entry["image"]] = number(value, f"{place}: {name}")
        for scores in found.values():
            fits(scores, pictures, path)
        if not found:
            raise DataError(f"{path}: holds no scores")
        return found

    @property
    def where(self) -> str:
        """How messages name the suite's file."""
        return f"suite.path = {self.config.path}"


def read_text(path: Path, where: str) -> str:
    """A UTF-8 file. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error


def read_json(path: Path, where: str) -> Any:
    """A JSON file. Raises DataError."""
    try:
        return json.loads(read_text(path, where))
    except ValueError as error:
        raise DataError(f"{where}: is not JSON ({error})") from error


def read_objects(path: Path, where: str, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, object) of each line of a JSON Lines file. Raises DataError for one that lacks a key."""
    for number, line in enumerate(read_text(path, where).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: is not JSON ({error})") from error
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise DataError(f"{place}: lacks {', '.join(missing)}; expected an object with {', '.join(keys)}")
        yield place, entry


def read_table(path: Path, where: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a file of comma- or tab-separated values with a header. Raises DataError for one that lacks a column."""
    text = read_text(path, where)
    header = text.partition("\n")[0]
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if header.count("\t") > header.count(",") else ","))
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        raise DataError(f"{where}: lacks the column {missing[0]}; its first line is {header[:80]!r}")
    return rows


def place_picture(source: Path, target: Path) -> None:
    """The picture under another name: a second name for the same file where the disk can do that, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def number(value: Any, place: str) -> float:
    """A finite number or true/false, as a float. Raises DataError."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not abs(found) < float("inf"):
        raise DataError(f"{place}: {value!r} is no number")
    return found


def fits(found: Mapping[tuple[int, int], float], pictures: Sequence[Picture], path: Path) -> None:
    """Raise DataError unless every result belongs to a picture and every picture has one."""
    known = {(p.prompt_id, p.image) for p in pictures}
    if strange := sorted(found.keys() - known):
        raise DataError(
            f"{path}: result for prompt {strange[0][0]}, image {strange[0][1]}, of which there is no picture"
        )
    if missing := sorted(known - found.keys()):
        raise DataError(
            f"{path}: no result for {len(missing)} of {len(known)} pictures, for example prompt {missing[0][0]}, image "
            f"{missing[0][1]}. Score all of them, or leave them all out"
        )
