"""Which pictures of an evaluation to look at: a fixed list, the worst, and those whose proxy rose while held-out scores fell."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2irl.errors import ConfigError, DataError
from t2irl.registry import did_you_mean

Key = tuple[int, int]
"""(prompt id, image)."""
REQUIRED = ("prompt", "prompt_id", "image", "path", "method", "checkpoint", "seed", "scores")
"""What every line of images.jsonl has."""


@dataclass(frozen=True)
class Cell:
    """One picture with its scores."""

    path: Path
    prompt: str
    seed: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Pictures:
    """The pictures of one or several evaluations, by column and key."""

    cells: dict[str, dict[Key, Cell]]
    """Column -> pictures, columns in the order of the files."""
    prompts: dict[int, str]

    @property
    def columns(self) -> list[str]:
        """Labels of the rows of the table: method and checkpoint."""
        return list(self.cells)

    @property
    def scores(self) -> list[str]:
        """Names of all scores."""
        return list(dict.fromkeys(n for column in self.cells.values() for c in column.values() for n in c.scores))

    def shared(self, columns: Sequence[str]) -> list[Key]:
        """Keys that all of some columns have, in order."""
        sets = [self.cells[column].keys() for column in columns]
        return sorted(set(sets[0]).intersection(*sets[1:]))


def read_pictures(folders: Sequence[Path]) -> Pictures:
    """What images.jsonl of evaluation folders say. Raises DataError for a damaged file, or where prompts of one id differ."""
    cells: dict[str, dict[Key, Cell]] = {}
    prompts: dict[int, str] = {}
    for folder in folders:
        own: dict[str, dict[Key, Cell]] = {}
        for place, line in _lines(folder):
            known = prompts.setdefault(line["prompt_id"], line["prompt"])
            if known != line["prompt"]:
                raise DataError(
                    f"{place}: prompt {line['prompt_id']} is {line['prompt']!r}, elsewhere {known!r}: another suite"
                )
            label = (
                line["method"] if line["method"] == line["checkpoint"] else f"{line['method']}, {line['checkpoint']}"
            )
            column = own.setdefault(label, {})
            key = (line["prompt_id"], line["image"])
            if key in column:
                raise DataError(f"{place}: a second picture of prompt {key[0]}, image {key[1]} by {label}")
            column[key] = Cell(folder / line["path"], line["prompt"], line["seed"], line["scores"])
        for label, column in own.items():
            if label not in cells:
                cells[label] = column
            elif any(
                cell.path.resolve() != cells[label][key].path.resolve()
                for key, cell in column.items()
                if key in cells[label]
            ):
                cells[f"{label} ({folder})"] = column
    return Pictures(cells, prompts)


def label_of(line: Mapping[str, Any]) -> str:
    """Method and checkpoint of a line, as columns are called."""
    base = line["checkpoint"] == line["method"].partition(" (")[0]
    return line["method"] if base else f"{line['method']}, {line['checkpoint']}"


def _lines(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    file = folder / "images.jsonl"
    if not file.is_file():
        raise DataError(
            f"{folder} holds no finished evaluation: images.jsonl is missing. Give the --out of `t2irl eval`"
        )
    found = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{file}, line {number}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise DataError(f"{place}: is not JSON ({error})") from error
        if not isinstance(line, dict) or (missing := [key for key in REQUIRED if key not in line]):
            raise DataError(f"{place}: lacks {', '.join(missing) if isinstance(line, dict) else 'an object'}")
        found.append((place, line))
    return found


def chosen(pictures: Pictures, columns: Sequence[str], option: str) -> list[str]:
    """Columns by their label or the beginning of it. Raises ConfigError for one that is unknown or not one alone."""
    found = []
    for word in columns:
        fitting = [c for c in pictures.columns if c == word] or [c for c in pictures.columns if c.startswith(word)]
        if not fitting:
            hint = did_you_mean(word, pictures.columns)
            raise ConfigError(f"{option} {word}: there is no such column.{hint} Columns: {'; '.join(pictures.columns)}")
        found += fitting
    return list(dict.fromkeys(found))


def check_score(pictures: Pictures, name: str, option: str) -> str:
    """`name`, if it is a score. Raises ConfigError."""
    if name not in pictures.scores:
        hint = did_you_mean(name, pictures.scores)
        raise ConfigError(
            f"{option} {name}: there is no such score.{hint} Scores: {', '.join(pictures.scores) or 'none'}"
        )
    return name


def fixed(pictures: Pictures, columns: Sequence[str], count: int) -> list[Key]:
    """The first image of the first prompts: no choice, so no cherry-picking."""
    return [key for key in pictures.shared(columns) if key[1] == 0][:count]


def worst(pictures: Pictures, column: str, score: str, columns: Sequence[str], count: int) -> list[Key]:
    """The pictures of a column with the lowest score, at most one of each prompt."""
    cells = pictures.cells[column]
    known = [key for key in pictures.shared(columns) if score in cells[key].scores]
    return _one_a_prompt(sorted(known, key=lambda key: (cells[key].scores[score], key)), count)


def hacked(
    pictures: Pictures, column: str, base: str, proxy: str, heldout: str, columns: Sequence[str], count: int
) -> list[Key]:
    """Pictures whose proxy score rose and whose held-out score fell against the same noise in `base`, the worst first.

    Ranked by rise plus fall, each in standard deviations of the base's scores; pictures that only rose or only fell are none.
    """
    spread = {
        name: _std([c.scores[name] for c in pictures.cells[base].values() if name in c.scores])
        for name in (proxy, heldout)
    }
    found = []
    for key in pictures.shared([*columns, base, column]):
        before, after = pictures.cells[base][key].scores, pictures.cells[column][key].scores
        if any(name not in s for name in (proxy, heldout) for s in (before, after)):
            continue
        rise, fall = after[proxy] - before[proxy], before[heldout] - after[heldout]
        if rise > 0 and fall > 0:
            found.append((rise / spread[proxy] + fall / spread[heldout], key))
    return _one_a_prompt([key for _, key in sorted(found, key=lambda pair: (-pair[0], pair[1]))], count)


def _std(values: Sequence[float]) -> float:
    spread = statistics.pstdev(values) if values else 0.0
    return spread if spread > 0 and math.isfinite(spread) else 1.0


def _one_a_prompt(keys: Sequence[Key], count: int) -> list[Key]:
    first: dict[int, Key] = {}
    for key in keys:
        first.setdefault(key[0], key)
    return list(first.values())[:count]
