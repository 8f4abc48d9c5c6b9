"""The grammar of the shapes world: every caption, its meaning, and the held-out split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (240, 200, 40),
    "purple": (150, 60, 180),
    "orange": (245, 130, 30),
}
"""Object colours, RGB in 0..255."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
}
"""Background colours, RGB in 0..255."""

SHAPES = ("circle", "square", "triangle", "star")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {"two": 2, "three": 3}
KINDS = ("single", "count", "pair", "relation")

_OBJECT = rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_BACKGROUND = rf" on a ({'|'.join(BACKGROUNDS)}) background"
_PATTERNS = {
    "single": re.compile(_OBJECT + _BACKGROUND),
    "count": re.compile(rf"({'|'.join(COUNTS)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})s" + _BACKGROUND),
    "pair": re.compile(_OBJECT + " and " + _OBJECT + _BACKGROUND),
    "relation": re.compile(_OBJECT + rf" ({'|'.join(RELATIONS)}) " + _OBJECT + _BACKGROUND),
}


@dataclass(frozen=True)
class Caption:
    """What a caption asks for: `objects` are (colour, shape) in the order named, a count repeats its object."""

    kind: str
    background: str
    objects: tuple[tuple[str, str], ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        """The caption in words."""
        named = [f"{_article(c)} {c} {s}" for c, s in self.objects]
        if self.kind == "count":
            word = {n: w for w, n in COUNTS.items()}[len(self.objects)]
            what = f"{word} {self.objects[0][0]} {self.objects[0][1]}s"
        elif self.kind == "relation":
            what = f"{named[0]} {self.relation} {named[1]}"
        else:
            what = " and ".join(named)
        return f"{what} on a {self.background} background"


def _article(color: str) -> str:
    return "an" if color[0] in "aeiou" else "a"


@cache
def parse_caption(text: str) -> Caption:
    """Read a caption of the grammar. Raises ValueError, quoting the text, for anything else."""
    for kind, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(text):
            caption = _caption(kind, found.groups())
            if caption.text == text:  # the pattern takes "a orange" too, the grammar does not
                return caption
    raise ValueError(
        f"not a caption of the shapes world: {text!r}. Known forms: 'a red circle on a white background', "
        "'two red circles on ...', 'a red circle and a blue star on ...', 'a red circle left of a blue star on ...'."
    )


def _caption(kind: str, g: tuple[str, ...]) -> Caption:
    if kind == "single":
        return Caption(kind, g[2], ((g[0], g[1]),))
    if kind == "count":
        return Caption(kind, g[3], ((g[1], g[2]),) * COUNTS[g[0]])
    if kind == "pair":
        return Caption(kind, g[4], ((g[0], g[1]), (g[2], g[3])))
    return Caption(kind, g[5], ((g[0], g[1]), (g[3], g[4])), g[2])


def all_captions(kind: str) -> Iterator[Caption]:
    """Every caption of one kind, in a fixed order. Pairs and relations name two different objects."""
    things = [(c, s) for c in COLORS for s in SHAPES]
    for background in BACKGROUNDS:
        if kind == "single":
            yield from (Caption(kind, background, (thing,)) for thing in things)
        elif kind == "count":
            yield from (Caption(kind, background, (thing,) * n) for thing in things for n in COUNTS.values())
        elif kind == "pair":
            yield from (Caption(kind, background, pair) for pair in permutations(things, 2))
        elif kind == "relation":
            pairs = permutations(things, 2)
            yield from (Caption(kind, background, pair, relation) for pair in pairs for relation in RELATIONS)
        else:
            raise ValueError(f"unknown kind of caption {kind!r}; known: {', '.join(KINDS)}")


def is_heldout(text: str) -> bool:
    """True for the one caption in eight that no model is ever trained on: sha256(caption)[0] < 32."""
    return hashlib.sha256(text.encode()).digest()[0] < 32


@cache
def split(kind: str, heldout: bool) -> tuple[Caption, ...]:
    """The captions of one kind that are (or are not) held out."""
    return tuple(c for c in all_captions(kind) if is_heldout(c.text) == heldout)


def sample_captions(n: int, rng: np.random.Generator, heldout: bool = False) -> list[Caption]:
    """Draw `n` captions, the four kinds with equal chance, with replacement."""
    pools = [split(kind, heldout) for kind in KINDS]
    return [pools[k][rng.integers(len(pools[k]))] for k in rng.integers(len(KINDS), size=n)]
