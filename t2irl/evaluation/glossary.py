"""What each metric means, read from `metrics.md` beside this file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Entry:
    """One metric, or all that fit a pattern such as `reward/<name>/mean`."""

    pattern: str
    section: str
    """Heading that it stands under."""
    meaning: str
    unit: str
    healthy: str
    """Range to expect, a starting value."""
    advice: str
    """What to do when it is off."""

    @property
    def anchor(self) -> str:
        """An id for links in a page."""
        return "m-" + re.sub(r"[^a-z0-9]+", "-", self.pattern.lower()).strip("-")


@cache
def glossary() -> dict[str, Entry]:
    """Every entry by its pattern, in the order of the file. Raises ValueError for an entry that lacks a part."""
    text = resources.files("t2irl.evaluation").joinpath("metrics.md").read_text(encoding="utf-8")
    entries = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, *blocks = re.split(r"^### ", section, flags=re.MULTILINE)
        for block in blocks:
            entry = _entry(heading.strip(), block)
            entries[entry.pattern] = entry
    return entries


def _entry(section: str, block: str) -> Entry:
    title, _, body = block.partition("\n")
    meaning, *points = re.split(r"^- (?=Unit:|Healthy:|If it is off:)", body, flags=re.MULTILINE)
    parts = {key: text.strip() for key, _, text in (point.partition(":") for point in points)}
    missing = [key for key in ("Unit", "Healthy", "If it is off") if not parts.get(key)]
    if missing or not meaning.strip():
        raise ValueError(f"metrics.md: the entry {title} lacks {', '.join(missing) or 'its meaning'}")
    return Entry(title.strip(" `"), section, meaning.strip(), parts["Unit"], parts["Healthy"], parts["If it is off"])


def lookup(metric: str) -> Entry | None:
    """The entry of a metric: its own, or that of a pattern it fits; None when the glossary does not know it."""
    known = glossary()
    if metric in known:
        return known[metric]
    return next(
        (entry for pattern, entry in known.items() if "<" in pattern and _regex(pattern).fullmatch(metric)), None
    )


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"<\w+>", "[^/]+", pattern))
