"""Whether uncertainty foretells error: the measure, uncertainty outside training, and what a probe says of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.guards.evaluations import perturbed
from t2irl.guards.validity import errors, foretells, uncertain
from t2irl.hacklab import uncertainty
from t2irl.hacklab.probe import Samples
from t2irl.rewards.base import Reward
from t2irl.rewards.combine import RewardSet
from t2irl.types import PromptGroups
from tests.invariants.test_gardo import REWARDS, gardo_run

CPU = torch.device("cpu")
PROMPTS, IMAGES = 12, 8
IDS = torch.arange(PROMPTS * IMAGES) % PROMPTS  # one picture of each prompt at a time, as in a probe
GROUPS = PromptGroups.of([f"thing {k}" for k in range(PROMPTS)], IDS.tolist(), [k // PROMPTS for k in range(len(IDS))])
PANEL = {"type": "tests.invariants.test_uncertainty_shared:Panel"}


class Shaken(Reward):
    """Brightness of one row of pixels: a small shift changes it where the picture is not smooth."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """In [0, 1]."""
        return images[:, :, 4].mean((1, 2))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_error_is_the_distance_of_standardised_scores() -> None:
    ids = torch.tensor([7, 7, 9, 9, 9])
    scores = torch.tensor([1.0, 3.0, 5.0, 7.0, math.nan])  # apart from their prompts' means: -1, 1, -1, 1
    gold = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])  # 0, 0, 0.5, -0.5: the last picture has no score
    found = errors(scores, gold, ids)
    deep = math.sqrt(0.125)
    assert found[:4].tolist() == pytest.approx([1, 1, 1 + 0.5 / deep, 1 + 0.5 / deep]) and math.isnan(found[4])
    torch.testing.assert_close(errors(40 * scores + 10 * ids, gold - 3, ids), found, equal_nan=True)
    assert errors(gold, gold, ids).tolist() == pytest.approx([0] * 5)
    assert errors(torch.ones(5), torch.ones(5), ids).tolist() == [0] * 5


def test_uncertainty_that_is_the_size_of_the_noise_foretells_the_error() -> None:
    gold, size = draw(len(IDS)), draw(len(IDS), seed=1).exp()
    scores = gold + size * draw(len(IDS), seed=2)
    assert foretells(size, scores, gold, IDS) > 0.2
    assert foretells(size**3, scores, gold, IDS) == foretells(size, scores, gold, IDS)
    assert foretells(-size, scores, gold, IDS) == pytest.approx(-foretells(size, scores, gold, IDS))
    assert abs(foretells(draw(len(IDS), seed=3).exp(), scores, gold, IDS)) < 0.15
    assert foretells(torch.ones(len(IDS)), scores, gold, IDS) == 0
    gaps = size.clone()
    gaps[:5] = math.nan
    assert foretells(gaps, scores, gold, IDS) == pytest.approx(foretells(size, scores, gold, IDS), abs=0.05)


def test_knowing_which_prompts_are_hard_is_no_foresight() -> None:
    """Weights act among the pictures of a prompt."""
    gold, hard = draw(len(IDS)), torch.arange(PROMPTS).double()[IDS] + 0.1
    scores = gold + hard * draw(len(IDS), seed=2)
    assert foretells(hard, scores, gold, IDS) == 0
    assert abs(foretells(hard + draw(len(IDS), seed=3) * 1e-3, scores, gold, IDS)) < 0.2


def settings(**changes: Any) -> tuple[Run, Any]:
    """A run of several rewards, and its regulariser's settings."""
    rewards = {**REWARDS, "panel": {**PANEL, "weight": -0.5}, "shaken": {"type": f"{__name__}:Shaken"}}
    run = gardo_run({"unsure": {"type": "uncertainty", **changes}}, rewards=rewards)
    return run, run.regularizers["unsure"]


def pictures(run: Run) -> tuple[RewardSet, Tensor]:
    """The rewards, and random pictures, the later ones of a prompt rougher."""
    rough = torch.linspace(0, 60, IMAGES).repeat_interleave(PROMPTS).view(-1, 1, 1, 1)
    images = 128 + rough * draw(len(IDS), 3, 8, 8, seed=4).clamp(-2, 2) + 5 * draw(len(IDS), 3, 1, 1, seed=5)
    return RewardSet(run.rewards, CPU, 16, Counter()), images.to(torch.uint8)


def test_versions_of_pictures_are_scored_as_in_training() -> None:
    run, c = settings(rewards=["brightness", "shaken"], evaluations=3, perturbations=["shift"])
    rewards, images = pictures(run)
    found = uncertain(c, ("brightness", "shaken"), rewards, images, GROUPS, seed=5)
    versions = [images, *(perturbed(images, GROUPS, ("shift",), 5, 0, k) for k in (1, 2))]
    table = torch.stack([rewards.score(x, GROUPS)["shaken"] for x in versions], 1).double()
    torch.testing.assert_close(found["shaken"], table.std(1) / (table.std(1).median() + 1e-8))
    assert set(found) == {"brightness", "shaken"}
    late = found["shaken"].view(IMAGES, PROMPTS)
    assert late[-2:].mean() > 3 * late[:2].mean()  # the rough ones


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": ["panel"], "estimator": "ensemble"},
        {"rewards": ["panel"], "estimator": "cross_reward", "members": ["detail"], "weighting": "exponential"},
        {"rewards": ["panel"], "weighting": "exponential", "doubt": {"reward": "red", "factor": 3}},
    ],
    ids=["judges", "ranks", "doubt"],
)
def test_other_estimators_need_no_policy_either(changes: Mapping[str, Any]) -> None:
    run, c = settings(**changes)
    rewards, images = pictures(run)
    found = uncertain(c, ("panel",), rewards, images, GROUPS)["panel"]
    scores = rewards.score(images, GROUPS)
    assert found.shape == IDS.shape and bool((found >= 0).all())
    if changes.get("estimator") == "ensemble":
        spread = rewards.each["panel"].std(0)
        torch.testing.assert_close(found, spread / spread.median(), rtol=1e-5, atol=1e-5)
    elif "doubt" in changes:
        plain = uncertain(settings(rewards=["panel"])[1], ("panel",), rewards, images, GROUPS)["panel"]
        torch.testing.assert_close(found - plain, 3 * (1 - scores["red"].double()))
    else:  # of a reward of negative weight: it is liked where it is low
        excess = found > 0
        assert scores["panel"][excess].mean() < scores["panel"][~excess].mean()


def test_a_probe_says_which_uncertainty_foretells_error() -> None:
    """A reward that looks at one row of pixels errs where a shift changes it; judges of colours do not tell of their errors."""
    rewards = {
        "brightness": {"type": f"{__name__}:Shaken"},
        "panel": {**PANEL, "weight": 0.5},
        "red": {"type": "tests.invariants.test_gardo:Redness"},
    }
    entries = {
        "noise": {"type": "uncertainty", "rewards": ["brightness"], "perturbations": ["shift"], "evaluations": 4},
        "judges": {"type": "uncertainty", "rewards": ["panel"], "estimator": "ensemble"},
        "again": {"type": "uncertainty", "rewards": ["red"], "estimator": "tails"},
        "kl": {"type": "kl", "coefficient": 1},
    }
    run = gardo_run(entries, rewards=rewards)
    sets, images = pictures(run)
    scores = sets.score(images, GROUPS)
    gold = images.double().mean((1, 2, 3)) / 255
    rows = uncertainty.check(run, Samples(GROUPS, images, {"rewards": sets}, {**scores, "gold": gold}), "gold")
    assert [(row["regularizer"], row["reward"]) for row in rows] == [
        ("noise", "brightness"),
        ("judges", "panel"),
        ("again", "red"),
    ]
    assert rows[0]["correlation"] > 0.2 and rows[1]["correlation"] < 0.15 and rows[2]["correlation"] is None
    text = "\n".join(uncertainty.section(rows, "gold"))
    assert f"| noise | brightness | augment | {rows[0]['correlation']:.3f} | above 0.15 |" in text
    assert "| judges | panel | ensemble | " in text and "not above 0.15: do not weigh by it" in text
    assert "| again | red | tails | - | not measured: it needs the policy |" in text
    assert uncertainty.section([], "gold") == []


def test_a_probe_does_not_speak_of_single_rewards_beside_combine() -> None:
    """What is weighed there is the one score."""
    run = gardo_run(
        {"unsure": {"type": "uncertainty"}},
        combine={"aggregate": {"type": "sum"}},
        heldout_rewards={"held": {"type": "tests.invariants.toy:Brightness"}},
    )
    sets, images = pictures(run)
    samples = Samples(GROUPS, images, {"rewards": sets}, sets.score(images, GROUPS))
    (row,) = uncertainty.check(run, samples, "red")
    assert row["reward"] == "total" and row["correlation"] is None
    assert "| unsure | total | augment | - | not measured: it is of the one score that combine makes |" in "\n".join(
        uncertainty.section([row], "red")
    )


def test_what_training_refuses_a_probe_refuses() -> None:
    rewards = {"brightness": {"type": "tests.invariants.test_uncertainty_shared:One"}}
    run = gardo_run({"unsure": {"type": "uncertainty", "estimator": "ensemble"}}, rewards=rewards)
    sets, images = pictures(run)
    samples = Samples(GROUPS, images, {"rewards": sets}, sets.score(images, GROUPS))
    with pytest.raises(ConfigError, match="is one judge alone"):
        uncertainty.check(run, samples, "brightness")
    with pytest.raises(ValueError, match="estimator steps draws pictures anew, which takes the policy"):
        uncertain(settings(estimator="steps")[1], ("panel",), sets, images, GROUPS)
