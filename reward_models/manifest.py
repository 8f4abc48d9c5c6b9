"""The published rewards that there are: one entry each in `manifest.yaml`, one card each in docs/reward_cards.md."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("manifest.yaml")
NOT_PINNED = "not pinned"
"""What a card says of weights whose revision is not known here."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a user should know of a reward before training on it."""

    title: str
    paper: str
    source: str
    """Where the weights are, by their names on the hub."""
    revision: str | None = None
    """The version that their reading was written for, where one is known."""
    licence: str
    input: str
    """What it sees of a picture."""
    tokens: int | str
    """Most tokens of the prompt that it reads; 0: it does not read the prompt."""
    range: str
    better: str
    role: str
    hacks: str
    checked: str
    """What the tests compare with."""
    config: dict[str, Any]
    """An entry of `rewards`."""


def load_manifest(file: Path = FILE) -> dict[str, Card]:
    """Cards by name. Raises ValueError naming an entry with other fields than a card has."""
    table = yaml.safe_load(file.read_text(encoding="utf-8"))
    wanted = {field.name for field in fields(Card)}
    for name, entry in table.items():
        if wrong := {"revision", *entry} ^ wanted:
            raise ValueError(f"{file.name}: {name}: {', '.join(sorted(wrong))} missing or unknown")
    return {name: Card(**entry) for name, entry in table.items()}


def markdown(cards: dict[str, Card]) -> str:
    """docs/reward_cards.md."""
    lines = [
        "# Cards of published rewards",
        "",
        "Written by `python -m reward_models.manifest > docs/reward_cards.md` from `reward_models/manifest.yaml`. "
        "How to choose and serve them: [rewards.md](rewards.md).",
        "",
        "Weights are read from a folder of yours; the reward server prints a hash of what it read. `revision` is the one that their reading was written for, where one is known.",
    ]
    for name, card in cards.items():
        settings = yaml.safe_dump({"rewards": {name: card.config}}, sort_keys=False).strip()
        lines += ["", f"## {card.title}", "", "```yaml", settings, "```", "", "| | |", "|---|---|"]
        rows = {f.name: getattr(card, f.name) for f in fields(Card) if f.name not in ("title", "config")}
        rows["revision"] = card.revision or NOT_PINNED
        lines += [f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(load_manifest()), end="")
