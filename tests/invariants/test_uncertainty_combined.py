"""`uncertainty` beside `combine`: it judges the one score that is made of all rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from t2irl.config import Run
from t2irl.guards.evaluations import perturbed
from t2irl.rewards.base import Reward
from t2irl.train import shaped
from t2irl.types import PromptGroups
from tests.invariants.test_gardo import REWARDS, gardo_run, scored
from tests.invariants.toy import Brightness, toy_parts

HERE = "tests.invariants.test_uncertainty_combined"
TWO = {"brightness": REWARDS["brightness"], "red": {**REWARDS["red"], "weight": 0.5}}
HELD = {"held": {"type": "tests.invariants.toy:Brightness"}}
BOTH_GOOD = {"rewards": {name: {"transform": {"type": "log_probability"}} for name in TWO}}
"""Sum of logarithms."""


class Both(Reward):
    """What the sum of two rewards is, as one."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Brightness and half the redness."""
        return Brightness.score(self, images, groups) + 0.5 * images[:, 0].mean((1, 2))  # type: ignore[arg-type]


def run_of(unsure: Mapping[str, Any], combine: Mapping[str, Any] | None, **changes: Any) -> Run:
    """Two rewards and what is made of them."""
    sections = {"rewards": TWO, "heldout_rewards": HELD, **({} if combine is None else {"combine": combine}), **changes}
    return gardo_run({"unsure": {"type": "uncertainty", **unsure}}, **sections)


@pytest.mark.parametrize(
    "unsure", [{}, {"weighting": "exponential", "temperature": 1}, {"evaluations": 3, "drop": 0.2}]
)
def test_a_sum_of_rewards_is_judged_as_one_reward_that_is_the_sum(unsure: dict[str, Any]) -> None:
    found = []
    for run in (
        run_of(unsure, {"aggregate": {"type": "sum"}}),
        run_of(unsure, None, rewards={"brightness": {"type": f"{HERE}:Both"}}),
    ):
        parts = toy_parts(run)
        advantages, rollout = scored(run, parts)
        found.append(shaped(advantages, rollout, parts).double())
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)
    assert found[0].abs().max() > 0.1


def test_the_one_score_is_made_anew_of_every_version() -> None:
    """Without weights: the mean over versions of the logarithms, centred in groups; not the logarithm of the mean."""
    run = run_of({"weighting": "none", "std": "none"}, BOTH_GOOD, advantage={"std": "global"})
    parts = toy_parts(run)
    advantages, rollout = scored(run, parts)
    own = shaped(advantages, rollout, parts).double()
    images, groups = rollout.trajectory.images, rollout.trajectory.groups
    settings = run.regularizers["unsure"]
    again = perturbed(images, groups, settings.perturbations, run.seed, rollout.iteration, 1)
    both = [parts.rewards.score(x, groups) for x in (images, again)]
    totals = torch.stack([parts.pipeline.total(scores, rollout.ids, {}) for scores in both])
    for line in rollout.ids.unique():
        rows = rollout.ids == line
        expected = totals.mean(0)[rows] - totals.mean(0)[rows].mean()
        torch.testing.assert_close(own[rows], expected, atol=1e-6, rtol=1e-5)
    assert set(parts.regularizers["unsure"].metrics()) >= {"total/scale", "total/effective_share"}


@pytest.mark.parametrize(
    ("unsure", "combine", "changes", "message"),
    [
        ({"rewards": ["red"]}, BOTH_GOOD, {"advantage": {"std": "global"}}, r"has rewards: \['red'\], but with combine it is for the one score"),
        ({"estimator": "ensemble", "members": ["detail"]}, BOTH_GOOD, {"advantage": {"std": "global"}}, "has estimator ensemble, the judges of one reward"),
        ({}, {"aggregate": {"type": "sum"}}, {"advantage": {"combine": "advantages"}}, "normalise each reward by itself"),
        (
            {}, {"aggregate": {"type": "constraints"}, "rewards": {"red": {"constraint": {"at": 0.5}}}}, {},
            "normalise each reward by itself",
        ),
    ],
)  # fmt: skip
def test_where_there_is_no_one_score_it_is_refused(
    unsure: dict[str, Any], combine: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        run_of(unsure, combine, **changes)
