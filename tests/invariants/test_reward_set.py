"""Scores on their way from rewards to advantages: invariant 35 of the algorithms specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from t2irl.errors import RunError
from t2irl.rewards.combine import RewardSet
from t2irl.types import PromptGroups
from tests.invariants.toy import PROMPTS, toy_parts, toy_run

CPU = torch.device("cpu")


def groups_of(ids: list[int]) -> PromptGroups:
    """One image for each prompt id."""
    return PromptGroups.of(PROMPTS, ids, list(range(len(ids))))


def rewards_of(batch_size: int = 3, **entries: Mapping[str, Any]) -> RewardSet:
    """A reward set from config entries."""
    run = toy_run({"rewards": entries})
    parts = toy_parts(run)
    return RewardSet({name: run.rewards[name] for name in entries}, CPU, batch_size, parts.family.work)


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_permuting_images_permutes_scores(batch_size: int) -> None:
    """Invariant 35: a score belongs to its image and prompt, whatever else is in the batch."""
    rewards = rewards_of(batch_size, brightness={"type": "tests.invariants.toy:Brightness"})
    images = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ids = [0, 0, 5, 23, 2, 5, 9, 10, 11, 1, 0, 7]
    scores = rewards.score(images, groups_of(ids))["brightness"]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    moved = rewards.score(images[order], groups_of([ids[i] for i in order]))["brightness"]
    assert torch.equal(moved, scores[order])
    assert rewards.work["scored_images"] == 24
    assert rewards.work["reward_calls"] == 2 * -(-12 // batch_size)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_bad_scores_are_rejected_with_the_prompt_named(value: str) -> None:
    """Invariant 35: a score that is not finite stops the run, with the reward's name, the score and the prompt."""
    bad = PROMPTS[7]
    rewards = rewards_of(mine={"type": "tests.invariants.toy:Broken", "value": value, "prompt": bad})
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    assert rewards.score(images, groups_of([0, 1, 2, 3, 4, 5]))["mine"].tolist() == [0.0] * 6
    with pytest.raises(RunError, match=rf"'mine' gave {value} for the prompt '{bad}'") as error:
        rewards.score(images, groups_of([0, 1, 2, 3, 7, 5]))
    assert error.value.exit_code == 4


def test_a_reward_may_skip_images_only_if_it_says_so() -> None:
    """NaN passes for `may_skip`; infinity never does."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    choosy = {"type": "tests.invariants.toy:Choosy", "prompt": PROMPTS[1]}
    scores = rewards_of(mine=choosy).score(images, groups_of([0, 1]))["mine"]
    assert scores.isnan().tolist() == [False, True]
    with pytest.raises(RunError, match="inf"):
        rewards_of(mine={**choosy, "value": "inf"}).score(images, groups_of([0, 1]))


def test_a_score_per_image_is_demanded() -> None:
    """A reward that returns one number for the whole batch is refused by shape."""
    rewards = rewards_of(mine={"type": "tests.invariants.toy:Scalar"})
    with pytest.raises(RunError, match=r"shape \(\) for 3 images; expected \(3,\)"):
        rewards.score(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), groups_of([0, 1, 2, 3, 4, 5]))
