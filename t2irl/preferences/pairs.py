"""From folders of evaluations to a study: which pictures are compared, which sides, which checks of the raters."""

from __future__ import annotations

import hashlib
import itertools
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field, NonNegativeInt, ValidationError

from t2irl.errors import ConfigError, DataError
from t2irl.preferences.record import AXES, Axis, Side, first_fault, json_lines, new_folder
from t2irl.preferences.study import IMAGES, Item, Settings, Study
from t2irl.strict import Strict

INDEX = "images.jsonl"
TILES = 8
"""The worse picture of a gold pair is the better one cut into 8 x 8 tiles that are dealt anew."""
VISIBLE = 6.0
"""Mean change in grey levels that this must make, so that nobody can miss it."""
DRAWS = {"pairs": 1, "sides": 2, "gold": 3, "repeat": 4, "names": 5}
"""Streams of the seed, so that more gold pairs do not change which others there are."""


class Drawn(Strict):
    """A line of an evaluation's images.jsonl; other keys are passed over."""

    model_config = {"extra": "ignore", "allow_inf_nan": True}
    prompt: str
    """What it was to show."""
    prompt_id: NonNegativeInt
    """Of the suite."""
    image: NonNegativeInt
    """Its number of that prompt."""
    path: str = Field(min_length=1)
    """File, relative to the folder."""
    method: str = Field(min_length=1)
    """What drew it."""
    checkpoint: str = ""
    """And which state of it."""
    seed: str | int | None = None
    """Of the noise."""
    scores: dict[str, float | None] = {}
    """By rewards; null or NaN where one does not apply."""


@dataclass(frozen=True)
class Picture:
    """A line of an evaluation, with its file."""

    drawn: Drawn
    file: Path
    system: str
    """Name of what is compared: the method, with its checkpoint where there are several of one method."""


@dataclass(frozen=True)
class Plan:
    """What a study is to hold."""

    axes: tuple[Axis, ...] = ("overall",)
    """Questions on each pair."""
    pairs: int | None = None
    """Pairs of pictures without checks; None for all that there are."""
    against: str | None = None
    """Only pairs with this system."""
    gold: float = 0.1
    """Pairs with a known answer, as a share of the pairs."""
    repeat: float = 0.1
    """Pairs shown twice, as a share of the pairs."""
    seed: int = 0
    """Of every draw."""


def read_evaluations(folders: Sequence[Path]) -> list[Picture]:
    """Every picture of the folders. Raises DataError naming file and line."""
    found: list[tuple[Drawn, Path]] = []
    texts: dict[int, tuple[str, str]] = {}
    for folder in folders:
        index = folder / INDEX
        if not index.is_file():
            raise DataError(f"{folder}: not the folder of an evaluation, it lacks {INDEX}; `t2irl eval` writes one")
        for number, entry in json_lines(index):
            where = f"{index}, line {number}"
            try:
                drawn = Drawn.model_validate(entry)
            except ValidationError as error:
                raise DataError(f"{where}: {first_fault(error)}") from error
            text, before = texts.setdefault(drawn.prompt_id, (drawn.prompt, where))
            if text != drawn.prompt:
                raise DataError(
                    f"{where}: prompt_id {drawn.prompt_id} is {drawn.prompt[:60]!r} here and {text[:60]!r} in {before}; compare "
                    "evaluations of one suite"
                )
            found.append((drawn, folder / drawn.path))
    checkpoints: dict[str, set[str]] = {}
    for drawn, _ in found:
        checkpoints.setdefault(drawn.method, set()).add(drawn.checkpoint)
    pictures, places = [], {}
    for drawn, file in found:
        system = f"{drawn.method}@{drawn.checkpoint}" if len(checkpoints[drawn.method]) > 1 else drawn.method
        place = (system, drawn.prompt_id, drawn.image)
        before = places.setdefault(place, file)
        if before == file:
            pictures.append(Picture(drawn, file, system))
        elif not np.array_equal(pixels_of(before), pixels_of(file)):
            raise DataError(
                f"{before} and {file} are both image {drawn.image} of prompt {drawn.prompt_id} by {system}, and differ; give only one "
                "of the two folders, or evaluate both with the same seed and settings"
            )
    return pictures


def make_study(
    folders: Sequence[Path], out: Path, plan: Plan, name: str | None = None, licence: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> Study:  # fmt: skip
    """Choose pairs, copy their pictures and write the study. Raises ConfigError or DataError."""
    rows = _choose(read_evaluations(folders), plan)
    settings = Settings(
        name=name or out.name, axes=plan.axes, seed=plan.seed, salt=secrets.token_hex(16), licence=licence,
        created_at=datetime.now(timezone.utc),
    )  # fmt: skip
    with new_folder(out) as part:
        Study(part, settings, tuple(_items(rows, plan, _Copier(part), say))).save()
    return Study.load(out)


def _items(
    rows: Sequence[tuple[Picture, Picture]], plan: Plan, copy: _Copier, say: Callable[[str], None]
) -> list[Item]:
    """Every question, with its pictures copied."""
    chosen = []
    for a, b in rows:
        names = copy.keep(a.file), copy.keep(b.file)
        if names[0] != names[1]:
            chosen.append((a, b, *names))
    if not chosen:
        raise DataError("every pair consists of two equal pictures; there is nothing to judge")
    if len(chosen) < len(rows):
        say(f"{len(rows) - len(chosen)} pairs of equal pictures left out")
    items = [*_plain(chosen, plan)]
    items += [*_gold([row[:2] for row in chosen], plan, copy)]
    items += [*_repeats(items, plan)]
    return items


def _choose(pictures: Sequence[Picture], plan: Plan) -> list[tuple[Picture, Picture]]:
    """Pairs of pictures from the same noise, spread evenly over pairs of systems, then over prompts."""
    systems = sorted({p.system for p in pictures})
    if plan.against is not None and plan.against not in systems:
        raise ConfigError(f"--against = {plan.against!r}: no such method; there are {', '.join(systems)}")
    table = {(p.system, p.drawn.prompt_id, p.drawn.image): p for p in pictures}
    places = sorted({(p.drawn.prompt_id, p.drawn.image) for p in pictures})
    rng = np.random.default_rng([plan.seed, DRAWS["pairs"]])
    columns = []
    for a, b in itertools.combinations(systems, 2):
        if plan.against in (None, a, b):
            both = [place for place in places if (a, *place) in table and (b, *place) in table]
            shuffled = [both[k] for k in rng.permutation(len(both))]
            rank = _rank_in_prompt(shuffled)
            columns.append([(table[(a, *p)], table[(b, *p)]) for p in sorted(shuffled, key=lambda p: rank[p])])
    rows = [row for turn in itertools.zip_longest(*columns) for row in turn if row is not None]
    if not rows:
        raise DataError(
            f"no two methods have a picture of the same prompt and number; methods found: {', '.join(systems)}. Two are needed"
        )
    if plan.pairs is not None and plan.pairs > len(rows):
        raise ConfigError(
            f"--pairs = {plan.pairs}: there are only {len(rows)} pairs; use at most that, or leave it out"
        )
    return rows[: plan.pairs]


def _rank_in_prompt(places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """How many pictures of its prompt come before each: in this order the first of every prompt precedes all second ones."""
    seen: dict[int, int] = {}
    rank = {}
    for place in places:
        rank[place] = seen.get(place[0], 0)
        seen[place[0]] = rank[place] + 1
    return rank


def _plain(rows: Sequence[tuple[Picture, Picture, str, str]], plan: Plan) -> Iterator[Item]:
    """Each pair on each axis. Of every pair of systems, either is on the left in half of the pairs."""
    rng, names = np.random.default_rng([plan.seed, DRAWS["sides"]]), _Names(plan.seed, "pair")
    count: dict[tuple[str, str], int] = {}
    for a, b, image_a, image_b in rows:
        systems = (a.system, b.system)
        turn = count[systems] = count.get(systems, int(rng.integers(2))) + 1
        pair = names.next()
        for axis in plan.axes:
            yield _item(names.next(), pair, axis, a, b, (image_a, image_b), "ab"[turn % 2])


def _gold(rows: Sequence[tuple[Picture, Picture]], plan: Plan, copy: _Copier) -> Iterator[Item]:
    """Pairs of a picture and its own tiles dealt anew: worse on every axis."""
    rng, names = np.random.default_rng([plan.seed, DRAWS["gold"]]), _Names(plan.seed, "gold")
    wanted = _checks(plan.gold, len(rows))
    pictures = [p for row in rows for p in row]
    made = 0
    for k in rng.permutation(len(pictures)):
        if made == wanted:
            break
        picture = pictures[k]
        whole = pixels_of(picture.file)
        broken = scrambled(whole, rng)
        if np.abs(whole.astype(np.float64) - broken).mean() < VISIBLE:
            continue
        made += 1
        good: Side = "a" if rng.integers(2) else "b"  # which of the two names the better picture has tells nothing
        images = (copy.keep(picture.file), copy.write(broken))
        pair = names.next()
        for axis in plan.axes:
            images_ab = images if good == "a" else images[::-1]
            yield _item(names.next(), pair, axis, picture, picture, images_ab, "ab"[made % 2], gold=good)
    if made < wanted:
        raise DataError(f"only {made} of {wanted} gold pairs can be made: most pictures are too plain; lower --gold")


def _checks(share: float, pairs: int) -> int:
    """How many; at least one, where any are wanted."""
    return max(round(share * pairs), 1 if share else 0)


def _repeats(items: Sequence[Item], plan: Plan) -> Iterator[Item]:
    """Some pairs again, with sides swapped."""
    rng, names = np.random.default_rng([plan.seed, DRAWS["repeat"]]), _Names(plan.seed, "repeat")
    plain = [item for item in items if item.gold is None]
    pairs = sorted({item.pair for item in plain})
    chosen = {pairs[k]: names.next() for k in rng.permutation(len(pairs))[: _checks(plan.repeat, len(pairs))]}
    for item in plain:
        if item.pair in chosen:
            other: Side = "b" if item.left == "a" else "a"
            changes = dict(id=names.next(), pair=chosen[item.pair], left=other, repeat_of=item.id)
            yield item.model_copy(update=changes)


def _item(
    name: str, pair: str, axis: Axis, a: Picture, b: Picture, images: Sequence[str], left: str, gold: Side | None = None
) -> Item:
    drawn, seed = a.drawn, "" if a.drawn.seed is None else str(a.drawn.seed)
    return Item.model_validate(
        dict(
            id=name, pair=pair, axis=axis, prompt=drawn.prompt, prompt_id=str(drawn.prompt_id), image=drawn.image,
            seed=seed if a.drawn.seed == b.drawn.seed else "", image_a=images[0], image_b=images[1], model_a=a.system,
            model_b=b.system, checkpoint_a=a.drawn.checkpoint, checkpoint_b=b.drawn.checkpoint, left=left, gold=gold,
            scores_a={} if gold else _numbers(a), scores_b={} if gold else _numbers(b),
        )
    )  # fmt: skip


def _numbers(picture: Picture) -> dict[str, float]:
    return {name: score for name, score in picture.drawn.scores.items() if score is not None and math.isfinite(score)}


def scrambled(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture (H, W, 3) with its tiles in another order; a rest at the right and at the bottom stays."""
    height, width = (n // TILES * TILES for n in pixels.shape[:2])
    h, w = height // TILES, width // TILES
    tiles = pixels[:height, :width].reshape(TILES, h, TILES, w, 3).swapaxes(1, 2).reshape(-1, h, w, 3)
    dealt = tiles[rng.permutation(len(tiles))].reshape(TILES, TILES, h, w, 3).swapaxes(1, 2)
    result = pixels.copy()
    result[:height, :width] = dealt.reshape(height, width, 3)
    return result


def pixels_of(file: Path) -> np.ndarray:
    """(H, W, 3) uint8. Raises DataError."""
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file}: cannot be read as a picture: {error}") from error


class _Names:
    """Names without meaning, the same for the same seed."""

    def __init__(self, seed: int, kind: str):
        self._start, self._count = f"{seed}/{DRAWS['names']}/{kind}", 0

    def next(self) -> str:
        self._count += 1
        return hashlib.blake2b(f"{self._start}/{self._count}".encode(), digest_size=8).hexdigest()


class _Copier:
    """Puts pictures into the study under the hash of their pixels: equal ones once, and no metadata that names a method."""

    def __init__(self, out: Path):
        self.folder, self._known = out / IMAGES, dict[Path, str]()
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, file: Path) -> str:
        """Copy a picture; returns its path in the study."""
        if file not in self._known:
            self._known[file] = self.write(pixels_of(file))
        return self._known[file]

    def write(self, pixels: np.ndarray) -> str:
        """Write a picture; returns its path in the study."""
        head = f"{pixels.shape}".encode()
        name = f"{hashlib.blake2b(head + pixels.tobytes(), digest_size=12).hexdigest()}.png"
        if not (self.folder / name).exists():
            Image.fromarray(pixels).save(self.folder / name)
        return f"{IMAGES}/{name}"


def axes_from(text: str, option: str = "--axes", most: int = len(AXES)) -> tuple[Axis, ...]:
    """Axes from `overall,alignment`, at most so many. Raises ConfigError that names the option."""
    names = [word.strip() for word in text.split(",")]
    if len(names) > most or len(set(names)) < len(names) or not set(names) <= set(AXES):
        wanted = "one" if most == 1 else "some"
        raise ConfigError(
            f"{option} = {text}: expected {wanted} of {','.join(AXES)}" + (", each once" if most > 1 else "")
        )
    return tuple(axis for axis in AXES if axis in names)
