"""A study: the folder that `prefs make` writes, `prefs serve` shows and raters fill.

study.json     name, axes, seed, salt of raters' names
pairs.jsonl    the key: which picture is whose, which answers are known. Not for raters' eyes
images/        pictures under names without meaning, without metadata
votes.db       what was answered (SQLite)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import AwareDatetime, ValidationError

from t2irl.errors import DataError
from t2irl.preferences.record import (
    Axis,
    Preferences,
    Record,
    Side,
    file_sha,
    first_fault,
    json_lines,
    json_object,
    read_records,
    write_text,
)
from t2irl.preferences.store import Answer, VoteStore
from t2irl.strict import Strict

SETTINGS, KEY, IMAGES, VOTES = "study.json", "pairs.jsonl", "images", "votes.db"
REPEAT_GAP = 10
"""At least so many other pairs stand between a pair and its repetition, if there are so many."""


class Settings(Strict):
    """What holds for a whole study."""

    name: str
    """Shown to nobody; becomes the `batch` of records."""
    axes: tuple[Axis, ...]
    """Questions on each pair, in this order."""
    seed: int
    """Of what was drawn when it was made, and of the order in which raters see it."""
    salt: str
    """Makes raters' names into ids that say nothing without it."""
    licence: str = ""
    """Of pictures and answers."""
    created_at: AwareDatetime
    """When it was made."""


class Item(Strict):
    """One question: a pair on an axis."""

    id: str
    """Without meaning; all that the page knows."""
    pair: str
    """Equal for the questions on one pair, which are asked one after the other."""
    axis: Axis
    """The question."""
    prompt: str
    """What the pictures were to show."""
    prompt_id: str
    """Of the evaluation."""
    image: int
    """The picture's number of that prompt, equal for both."""
    seed: str
    """Of the noise."""
    image_a: str
    """Picture, relative to the study."""
    image_b: str
    """The other."""
    model_a: str
    """What drew it."""
    model_b: str
    """What drew the other."""
    checkpoint_a: str
    """Its checkpoint."""
    checkpoint_b: str
    """The other's."""
    left: Side
    """Which is on the left for every other rater; the rest see the sides swapped."""
    gold: Side | None = None
    """The answer, where it is known."""
    repeat_of: str | None = None
    """The item shown a second time."""
    scores_a: dict[str, float] = {}
    """What the evaluation's rewards say of picture a."""
    scores_b: dict[str, float] = {}
    """And of b."""


@dataclass(frozen=True)
class Study:
    """A study's folder, settings and items."""

    folder: Path
    settings: Settings
    items: tuple[Item, ...]

    @classmethod
    def load(cls, folder: Path) -> Study:
        """Read a study. Raises DataError for a folder that is none."""
        if not (folder / SETTINGS).is_file():
            raise DataError(
                f"{folder}: not a study, it lacks {SETTINGS}; make one with `t2irl prefs make EVAL... --out {folder}`"
            )
        where = f"{folder / SETTINGS}"
        try:
            settings = Settings.model_validate(json_object((folder / SETTINGS).read_text(encoding="utf-8"), where))
        except ValidationError as error:
            raise DataError(f"{where}: {first_fault(error)}") from error
        items = []
        for number, entry in json_lines(folder / KEY):
            try:
                items.append(Item.model_validate(entry))
            except ValidationError as error:
                raise DataError(f"{folder / KEY}, line {number}: {first_fault(error)}") from error
        return cls(folder, settings, tuple(items))

    def save(self) -> None:
        """Write settings and key; pictures are there already."""
        lines = [item.model_dump_json(exclude_defaults=True) + "\n" for item in self.items]
        write_text(self.folder / KEY, "".join(lines))
        write_text(self.folder / SETTINGS, self.settings.model_dump_json(indent=1) + "\n")

    @cached_property
    def by_id(self) -> dict[str, Item]:
        """Items by id."""
        return {item.id: item for item in self.items}

    def store(self) -> VoteStore:
        """The votes, open for reading and writing."""
        return VoteStore(self.folder / VOTES)

    def rater(self, name: str) -> str:
        """The id that stands for a rater's name, whatever its case and blanks, in everything that is stored."""
        plain = " ".join(name.split()).casefold()
        return hashlib.blake2b(f"{self.settings.salt}/{plain}".encode(), digest_size=6).hexdigest()

    def left(self, item: Item, number: int) -> Side:
        """Which picture a rater sees on the left; `number` counts raters in the order in which they came."""
        return item.left if number % 2 == 0 else ("b" if item.left == "a" else "a")

    def order(self, number: int) -> list[Item]:
        """Items in the order in which a rater gets them: drawn anew for each, questions of a pair together, repeats late."""
        pairs: dict[str, list[Item]] = {}
        for item in self.items:
            pairs.setdefault(item.pair, []).append(item)
        rng = np.random.default_rng([self.settings.seed, number])
        first = [name for name, items in pairs.items() if items[0].repeat_of is None]
        place = {name: float(k) for name, k in zip(first, rng.permutation(len(first)), strict=True)}
        pair_of = {item.id: item.pair for item in self.items}
        last = len(first)
        for name, items in pairs.items():
            if items[0].repeat_of is not None:
                earliest = min(place[pair_of[items[0].repeat_of]] + REPEAT_GAP, last)
                place[name] = float(rng.uniform(earliest, last)) + 0.5
        return [item for name in sorted(place, key=lambda n: place[n]) for item in pairs[name]]

    def preferences(self, waiting: bool = False) -> Preferences:
        """Every vote that stands as a record; with `waiting` also each question that nobody has answered."""
        # A picture lies under the hash of its pixels, so each is read once.
        shas = {name: file_sha(self.folder / name) for item in self.items for name in (item.image_a, item.image_b)}
        answered: set[str] = set()
        records = []
        with self.store() as store:
            for vote in store.votes():
                item = self.by_id.get(vote.item)
                if item is None:
                    raise DataError(
                        f"{self.folder / VOTES}: a vote on {vote.item}, which {KEY} does not hold; they are of two studies"
                    )
                answered.add(item.id)
                given = dict(
                    id=vote.key, label=_label(vote.answer, vote.left), annotator=vote.rater, shown_left=vote.left,
                    ms=vote.ms, created_at=vote.created_at,
                )  # fmt: skip
                records.append(self._record(item, shas, given))
        if waiting:
            records += [
                self._record(i, shas, {"id": i.id, "shown_left": i.left}) for i in self.items if i.id not in answered
            ]
        return Preferences(tuple(records), self.folder)

    def _record(self, item: Item, shas: dict[str, str], given: Mapping[str, object]) -> Record:
        own = item.model_dump(exclude={"id", "pair", "image", "left", "scores_a", "scores_b"})
        known = dict(
            item=item.id, sha_a=shas[item.image_a], sha_b=shas[item.image_b], batch=self.settings.name,
            licence=self.settings.licence,
        )  # fmt: skip
        return Record.model_validate(own | known | dict(given))


def _label(answer: Answer, left: Side) -> str:
    return {"left": left, "right": "b" if left == "a" else "a"}.get(answer, answer)


def open_preferences(path: Path, waiting: bool = False) -> Preferences:
    """The judgements of a study's folder, or of a file of records. Raises DataError."""
    if path.is_dir():
        return Study.load(path).preferences(waiting)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file or folder; expected a study, or records as `t2irl prefs export` writes them"
        )
    return read_records(path)


def axes_of(records: Sequence[Record]) -> list[Axis]:
    """The axes that there are, in the order of `AXES`."""
    from t2irl.preferences.record import AXES

    return [axis for axis in AXES if any(r.axis == axis for r in records)]
