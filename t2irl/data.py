"""Prompt files, and which prompts and which noise an iteration gets: pure functions of the seed and the iteration."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from t2irl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from t2irl.config import Data

PROMPT_STREAM = 0x70
"""Keeps the permutations of prompts apart from other draws that start from the same seed."""
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
BOM = "\ufeff"


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file."""

    texts: tuple[str, ...]
    """In the file's order. A prompt's id is its place here; one that stands there twice is drawn twice as often."""
    notes: tuple[str, ...]
    """What the user should know about the file, one sentence each."""

    def __len__(self) -> int:
        return len(self.texts)


def load_prompts(path: Path, key: str) -> Prompts:
    """Read a prompt file: JSON Lines with a `prompt` key if its name ends in .jsonl, otherwise one prompt a line.

    UTF-8, with or without a byte order mark, any line ends. Prompts are stripped of surrounding blanks. `key` is the
    config key that names the file, for messages. Raises DataError for anything that is not a clean list of prompts.
    """
    where = f"{key} = {path}"
    lines = _lines(path, where)
    read = _json_lines if path.suffix.lower() == ".jsonl" else _text_lines
    texts: list[str] = []
    for number, text in read(lines, where):
        text = text.replace(BOM, "").strip()
        _check(text, f"{where}, line {number}")
        texts.append(text)
    different = len(set(texts))
    notes = []
    if different < len(texts):
        notes.append(f"{where}: {len(texts)} prompts, {different} different; repeated ones are drawn more often")
    return Prompts(tuple(texts), tuple(notes))


def load_both(data: Data) -> tuple[Prompts, Prompts]:
    """The prompts of a run: to train on, and held out. Raises DataError as `load_prompts` does."""
    return load_prompts(data.prompts, "data.prompts"), load_prompts(data.heldout, "data.heldout")


def _lines(path: Path, where: str) -> list[str]:
    """The file's lines without blank ones at its end."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{where}: no such file (relative to {Path.cwd()})") from error
    except OSError as error:
        raise DataError(
            f"{where}: cannot be read: {error.strerror or error}. Expected a text file of prompts"
        ) from error
    if raw.startswith(UTF16):
        raise DataError(f"{where}, line 1: the file is UTF-16; save it as UTF-8")
    if b"\0" in raw:
        line = raw[: raw.index(b"\0")].count(b"\n") + 1
        raise DataError(
            f"{where}, line {line}: a NUL byte; this is not a text file of prompts (or UTF-16 without a mark)"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        near = raw[max(error.start - 20, 0) : error.start + 20].decode("latin-1")
        near = " ".join(near.split())
        raise DataError(
            f"{where}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8 (near {near!r}, read as Latin-1); save the file as UTF-8"
        ) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{where}: the file is empty; expected one prompt a line, or JSON Lines with a `prompt` key")
    return lines


def _text_lines(lines: Sequence[str], where: str) -> Iterator[tuple[int, str]]:
    if lines[0].lstrip(BOM + " \t").startswith('{"'):
        raise DataError(f"{where}, line 1: looks like JSON Lines; give the file a name that ends in .jsonl")
    yield from enumerate(lines, 1)


def _json_lines(lines: Sequence[str], where: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        place = f"{where}, line {number}"
        if not line.strip():
            raise DataError(f'{place}: is blank; each line is a JSON object such as {{"prompt": "a red circle"}}')
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{place}: is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise DataError(
                f'{place}: holds {type(entry).__name__}, expected an object such as {{"prompt": "a red circle"}}'
            )
        if "prompt" not in entry:
            raise DataError(
                f"{place}: the key `prompt` is missing; keys there: {', '.join(map(repr, entry)) or 'none'}"
            )
        if not isinstance(entry["prompt"], str):
            raise DataError(f"{place}: `prompt` is {json.dumps(entry['prompt'])[:60]}, expected text in quotes")
        yield number, entry["prompt"]


def _check(text: str, place: str) -> None:
    """Raise DataError for a prompt with nothing to see or with characters that no tokenizer takes."""
    if not any(c.isprintable() and not c.isspace() for c in text):
        raise DataError(f"{place}: the prompt is empty; delete the line or write a prompt")
    if "\0" in text:
        raise DataError(f"{place}: the prompt holds a NUL character")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(f"{place}: the prompt holds half a surrogate pair (\\ud800 to \\udfff), which is no character")


def overlap(train: Prompts, heldout: Prompts) -> tuple[str, ...]:
    """Prompts that are in both files: what is measured on them is not held out."""
    known = set(train.texts)
    return tuple(text for text in heldout.texts if text in known)


def prompt_ids(iteration: int, n_prompts: int, per_iteration: int, seed: int) -> np.ndarray:
    """The prompts of an iteration, (per_iteration,) int64, no line twice; equal on all processes.

    The list is passed over again and again, each time in a fresh order seeded by (seed, pass). A pass holds as many
    iterations as fit; the prompts left over at its end are met in the next one. Raises ConfigError if `per_iteration`
    exceeds the number of prompts.
    """
    if per_iteration > n_prompts:
        raise ConfigError(
            f"rollout.prompts = {per_iteration}: data.prompts holds only {n_prompts} prompts; use at most {n_prompts}, "
            "or a longer file"
        )
    turn, place = divmod(iteration, n_prompts // per_iteration)
    order = np.random.default_rng([seed, PROMPT_STREAM, turn]).permutation(n_prompts)
    return order[place * per_iteration : (place + 1) * per_iteration].astype(np.int64)


def images_of(ids: np.ndarray, group_size: int, world_size: int, rank: int) -> tuple[list[int], list[int]]:
    """Prompt id and member number (0 to group_size - 1) of each image that a process samples.

    All images of an iteration, group by group, are cut into `world_size` equal parts, so a group lies on one process where
    it fits. The number of images must divide by `world_size` (`Geometry.of` sees to it).
    """
    share = len(ids) * group_size // world_size
    mine = range(rank * share, (rank + 1) * share)
    return [int(ids[i // group_size]) for i in mine], [i % group_size for i in mine]


def noise_seed(seed: int, stream: int | str, prompt_id: int, member: int) -> int:
    """A 63-bit seed for the noise of one image, the same on every machine.

    `stream` is the iteration, or a name for pictures outside training.
    """
    name = repr(stream) if isinstance(stream, str) else int(stream)
    text = f"{seed}/{name}/{prompt_id}/{member}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
