"""Several regularisers `uncertainty` share the rewards, a reward of several judges is its own ensemble, and another one casts doubt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from t2irl.config import Run
from t2irl.errors import ConfigError, RunError
from t2irl.rewards.base import Reward
from t2irl.train import Parts, shaped
from t2irl.types import PromptGroups, Rollout
from tests.invariants.test_gardo import REWARDS, gardo_run, scored
from tests.invariants.toy import toy_parts

HERE = "tests.invariants.test_uncertainty_shared"
OWN = {"type": "uncertainty", "estimator": "ensemble"}
PANEL = {"brightness": {"type": f"{HERE}:Panel"}}
THREE = {
    "brightness": {"type": "tests.invariants.toy:Brightness"},
    "panel": {"type": f"{HERE}:Panel", "weight": 0.5},
    "red": {**REWARDS["red"], "weight": -0.3},
    "detail": REWARDS["detail"],
}
MAIN = {"type": "uncertainty", "rewards": ["brightness"], "weighting": "exponential", "temperature": 1}
SIDE = {**OWN, "rewards": ["panel"]}


class Channel(Reward):
    """Mean of one colour."""

    channel = 0

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """In [0, 1]."""
        return images[:, self.channel].mean((1, 2))


class Green(Channel):
    """The second one."""

    channel = 1


class Blue(Channel):
    """The third one."""

    channel = 2


class Panel(Reward):
    """All three colours, each a judge."""

    @property
    def judges(self) -> int:
        """One for each colour."""
        return 3

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Their mean."""
        return self.each(images, groups).mean(0)

    def each(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """One by one."""
        return images.mean((2, 3)).T


class One(Panel):
    """Could have several judges, but has one."""

    @property
    def judges(self) -> int:
        """Only the red one, say."""
        return 1


def shape(run: Run, parts: Parts) -> tuple[Tensor, Rollout]:
    """Advantages of an iteration, as float64, and what they were made from."""
    advantages, rollout = scored(run, parts)
    return shaped(advantages, rollout, parts).double(), rollout


def test_the_judges_of_a_reward_count_as_if_they_were_rewards() -> None:
    """One reward with three judges against three rewards, on the same pictures; it is scored no more often than without."""
    run = gardo_run({"unsure": OWN}, rewards=PANEL)
    parts = toy_parts(run)
    own, _ = shape(run, parts)
    assert parts.family.work["scored_images"] == 24 * len(parts.rewards.weights)
    apart = {
        "brightness": {"type": f"{HERE}:Channel"},
        "red": {"type": f"{HERE}:Green", "weight": 0},
        "detail": {"type": f"{HERE}:Blue", "weight": 0},
    }
    run = gardo_run({"unsure": {**OWN, "members": ["red", "detail"]}}, rewards=apart)
    other, _ = shape(run, toy_parts(run))
    torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    run = gardo_run({"unsure": {**OWN, "weighting": "none"}}, rewards=PANEL)
    assert not torch.allclose(own, shape(run, toy_parts(run))[0], atol=1e-2)


def test_each_reward_has_the_estimator_of_the_one_that_names_it() -> None:
    """The sum of what each gives alone, weighted as the rewards are, clipped once; it is 0 in every group, in either order."""
    found = []
    for entries in ({"main": MAIN, "side": SIDE}, {"side": SIDE, "main": MAIN}):
        run = gardo_run(entries, rewards=THREE)
        parts = toy_parts(run)
        advantages, rollout = shape(run, parts)
        found.append(advantages)
        # Four rewards once, and one of them on another version of the pictures.
        assert parts.family.work["scored_images"] == 24 * 5
    assert torch.equal(*found)
    red = rollout.scores["red"].double()
    centred = red - torch.stack([red[rollout.ids == g].mean() for g in rollout.ids])
    expected = -0.3 * centred / (red.std(correction=0) + run.advantage.eps)
    for name, weight, settings in (("brightness", 1.0, MAIN), ("panel", 0.5, SIDE)):
        alone = gardo_run({"it": settings}, rewards=THREE)
        expected += weight * toy_own(alone, rollout)[name]
    torch.testing.assert_close(found[0], expected.clamp(-5, 5), atol=1e-5, rtol=1e-5)
    assert float(found[0].abs().max()) < 5  # nothing was clipped
    for group in rollout.ids.unique():
        assert float(found[0][rollout.ids == group].sum()) == pytest.approx(0, abs=1e-5)
    metrics = {name: set(r.metrics()) for name, r in parts.regularizers.items()}
    assert {key.split("/")[0] for key in metrics["main"]} == {"brightness"}
    assert {key.split("/")[0] for key in metrics["side"]} == {"panel"}


def toy_own(run: Run, rollout: Rollout) -> dict[str, Tensor]:
    """Advantages of the only regulariser of a run, by reward and before weights."""
    parts = toy_parts(run)
    parts.rewards.score(rollout.trajectory.images, rollout.trajectory.groups)
    regularizer = parts.regularizers["it"]
    return regularizer.own(rollout)  # type: ignore[attr-defined]


def test_their_states_are_kept_apart() -> None:
    """Each has the scale of its own rewards."""
    run = gardo_run({"main": MAIN, "side": SIDE}, rewards=THREE)
    parts = toy_parts(run)
    shape(run, parts)
    state = parts.state_dict()["regularizers"]
    assert set(state["main"]["scales"]) == {"brightness"} and set(state["side"]["scales"]) == {"panel"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": MAIN, "b": {"type": "uncertainty"}}, "a shares the type uncertainty with b: each must say in rewards"),
        ({"a": MAIN, "b": {**MAIN, "estimator": "tails"}}, "a and b both have rewards: 'brightness', but a reward has one"),
        ({"a": {**OWN, "rewards": ["brightness"]}}, "a needs members: .* that judge as brightness does, which is one judge alone"),
        ({"a": {**OWN, "members": ["detail"]}}, "has estimator ensemble for 3 rewards: name the one"),
        ({"a": {"type": "uncertainty", "doubt": {"reward": "panel"}}}, "doubt acts on weighting: exponential, but .* wiener"),
        ({"a": {**MAIN, "doubt": {"reward": "brightness"}}}, "doubt.reward: 'brightness', one of the rewards that it judges"),
        ({"a": {**MAIN, "doubt": {"reward": "painel"}}}, "doubt.reward: 'painel', which is not .*Did you mean 'panel'"),
        ({"a": {**MAIN, "doubt": {"reward": "panel", "factor": 0}}}, "greater than 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(entries: Mapping[str, Any], message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ValidationError, match=message):
        gardo_run(entries, rewards=THREE)


def test_a_panel_of_one_is_refused_when_it_is_there() -> None:
    """Only the reward itself knows how many judges it has."""
    with pytest.raises(
        ConfigError, match=r"regularizers\.unsure: estimator ensemble: the reward 'brightness' is one judge"
    ):
        toy_parts(gardo_run({"unsure": OWN}, rewards={"brightness": {"type": f"{HERE}:One"}}))


def test_doubt_adds_to_the_uncertainty_where_another_reward_sees_a_fault() -> None:
    """w = exp(-(u + factor (1 - R))) for judges that agree, so that u = 0; a score outside [0, 1] has no such meaning."""
    settings = {**OWN, "weighting": "exponential", "temperature": 1, "std": "none", "doubt": {"reward": "red"}}
    run = gardo_run({"unsure": settings}, rewards={**PANEL, "red": REWARDS["red"]})
    parts = toy_parts(run)
    advantages, rollout = scored(run, parts)
    own = torch.tensor([0.1, 0.2, 0.4, 0.8] * 6)
    parts.rewards.each = {**parts.rewards.each, "brightness": own.double().expand(3, -1)}
    clean = torch.tensor([1.0, 1.0, 1.0, 0.0] * 6)
    scores = {**rollout.scores, "brightness": own, "red": clean}
    given = Rollout(rollout.trajectory, scores, rollout.ids, 0, 0)
    found = parts.regularizers["unsure"].shape(advantages, given)
    w = torch.tensor([1.0, 1, 1, math.exp(-0.5)]).double()
    w /= w.mean()
    values = own[:4].double()
    expected = w * (values - (w * values).sum() / w.sum())
    torch.testing.assert_close(found[:4].double(), expected, atol=1e-6, rtol=1e-5)
    bad = Rollout(rollout.trajectory, {**scores, "red": clean + 1}, rollout.ids, 0, 0)
    with pytest.raises(RunError, match=r"doubt\.reward = red gave 2; expected a reward in \[0, 1\]"):
        parts.regularizers["unsure"].shape(advantages, bad)


def test_metrics_say_how_uncertain_and_whether_it_has_to_do_with_artifacts() -> None:
    """Quantiles in order, and the correlation with the first artifact reward, if there is one."""
    run = gardo_run({"unsure": OWN}, rewards={**PANEL, "clean": {"type": "artifact", "weight": 0}})
    parts = toy_parts(run)
    _, rollout = shape(run, parts)
    metrics = parts.regularizers["unsure"].metrics()
    quantiles = [metrics[f"brightness/uncertainty_p{k}"] for k in (10, 50, 90)]
    assert quantiles == sorted(quantiles) and quantiles[1] == pytest.approx(1, abs=0.1)
    assert metrics["brightness/weight_min"] <= metrics["brightness/weight_p10"] < metrics["brightness/weight_p90"]
    pair = torch.stack([parts.rewards.each["brightness"].std(0), rollout.scores["clean"].double()])
    assert metrics["brightness/artifact_correlation"] == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-5)
    run = gardo_run({"unsure": OWN}, rewards=PANEL)
    parts = toy_parts(run)
    shape(run, parts)
    assert "brightness/artifact_correlation" not in parts.regularizers["unsure"].metrics()
