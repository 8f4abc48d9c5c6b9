"""Every published reward has an entry and a card, and every example in them is a config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reward_models.manifest import load_manifest, markdown
from t2irl import registry

OWN = {
    "adversarial_clip", "adversarial_dino", "artifact", "artifact_adaptive", "artifact_judge", "color_coverage",
    "object_count", "posthoc_discriminator", "preference", "remote", "shapes", "shapes_style", "tiny_clip",
    "vividness",
}  # fmt: skip
"""Rewards of this package that are documented elsewhere: they learn, belong to the shapes world, or stand for others."""


def test_every_published_reward_has_an_entry() -> None:
    """A new reward is either a published one, with a card, or one of ours."""
    carded = {card.config["type"] for card in load_manifest().values()}
    assert carded | OWN == set(registry.names("rewards")) and not carded & OWN


@pytest.mark.parametrize("name", load_manifest())
def test_examples_are_configs(name: str) -> None:
    card = load_manifest()[name]
    config = registry.find("rewards", card.config["type"]).Config.model_validate(card.config)
    assert config.type == card.config["type"]
    empty = [key for key, value in vars(card).items() if key not in ("tokens", "revision") and not value]
    assert not empty


def test_the_page_is_written_from_the_manifest() -> None:
    page = Path("docs/reward_cards.md").read_text(encoding="utf-8")
    assert page == markdown(load_manifest()), "run: python -m reward_models.manifest > docs/reward_cards.md"


def test_an_incomplete_entry_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "manifest.yaml"
    file.write_text("x: {title: X}\n")
    with pytest.raises(ValueError, match="x: better, checked, config"):
        load_manifest(file)


def test_a_card_says_whether_its_weights_are_pinned() -> None:
    card = load_manifest()["ocr"]
    assert f"| revision | {card.revision} |" in markdown({"ocr": card})
    assert "| revision | not pinned |" in markdown({"ocr": replace(card, revision=None)})
