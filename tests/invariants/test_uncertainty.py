"""Uncertain rewards in the real loop of a toy: evaluations, weights, zero sums, controls, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from t2irl.advantages import group_advantages
from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.guards.evaluations import drawn, drawn_again, perturb, perturbed
from t2irl.train import Parts, shaped
from t2irl.types import Rollout
from tests.end_to_end.plugins import Moody
from tests.invariants.test_gardo import GATE, MATCHING, RECORDED, REWARDS, SLOW, gardo_run, iterate, scored, take_over
from tests.invariants.toy import a_batch, toy_parts

ENSEMBLE = {"type": "uncertainty", "estimator": "ensemble", "members": ["red", "detail"]}
CROSS = {"type": "uncertainty", "estimator": "cross_reward", "members": ["red"], "weighting": "exponential"}


class Learner(Moody):
    """Learns from pictures of the toy's size."""


def unsure(settings: Mapping[str, Any] | None = None, **changes: Any) -> tuple[Run, Parts]:
    """A run with uncertain rewards."""
    run = gardo_run({"unsure": {"type": "uncertainty", **(settings or {})}}, **changes)
    return run, toy_parts(run)


def shape(run: Run, parts: Parts) -> tuple[Tensor, Rollout]:
    """Advantages of an iteration, as float64, and what they were made from."""
    advantages, rollout = scored(run, parts)
    return shaped(advantages, rollout, parts).double(), rollout


@pytest.mark.parametrize("rollout", [RECORDED, MATCHING], ids=["recorded", "matching"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weighting": "exponential", "temperature": 1},
        {"weighting": "none", "evaluations": 4},
        {"estimator": "steps", "evaluations": 3, "std": "group", "group_reliability": True},
        {"estimator": "tails", "control": "shuffled", "std": "none"},
        {"control": "inverse", "pessimism": 0.5, "drop": 0.1},
        ENSEMBLE,
        CROSS,
    ],
    ids=["default", "V1", "V0", "steps V3", "tails shuffled", "inverse V4 V6", "ensemble", "cross"],
)
def test_advantages_sum_to_zero_in_every_group(settings: Mapping[str, Any], rollout: Mapping[str, Any]) -> None:
    """Whatever the estimator and the weights; all are finite, and not what they were without."""
    run, parts = unsure(settings, rollout=rollout)
    found, scores = shape(run, parts)
    assert bool(found.isfinite().all()) and found.abs().max() <= run.advantage.clip
    for group in scores.ids.unique():
        assert float(found[scores.ids == group].sum()) == pytest.approx(0, abs=1e-5)
    plain = group_advantages(scores.scores, parts.rewards.weights, scores.ids, run.advantage)
    assert not torch.allclose(found, plain, atol=1e-3)
    metrics = parts.regularizers["unsure"].metrics()
    assert all(name.startswith("brightness/") and np.isfinite(value) for name, value in metrics.items())
    assert 0 < metrics["brightness/effective_share"] <= 1
    again, _ = shape(run, parts)  # all draws are seeded by the iteration
    if settings.get("weighting") != "exponential":  # whose scale has moved on
        assert torch.equal(again, found)


def test_a_reward_that_is_sure_of_everything_gives_the_ordinary_advantages() -> None:
    """No spread: an ensemble of one reward and itself."""
    run, parts = unsure({"estimator": "ensemble", "members": ["red"], "std": "group"})
    advantages, rollout = scored(run, parts)
    scores = {**rollout.scores, "red": rollout.scores["brightness"]}
    sure = Rollout(rollout.trajectory, scores, rollout.ids, 0, 0)
    torch.testing.assert_close(parts.regularizers["unsure"].shape(advantages, sure), advantages)


def test_uncertain_images_count_less() -> None:
    """Of two equally good images the one on which judges differ gets the smaller weight, by the Wiener formula."""
    run, parts = unsure({"estimator": "ensemble", "members": ["red"], "std": "none"})
    advantages, rollout = scored(run, parts)
    own = torch.tensor([0.0, 1.0, 4.0, 5.0] * 6)
    other = own.clone()
    other[3], own[3] = 6.0, 4.0  # mean 5, spread sqrt 2
    scores = {"brightness": own, "red": other, "detail": own}
    found = parts.regularizers["unsure"].shape(advantages, Rollout(rollout.trajectory, scores, rollout.ids, 0, 0))
    mean, noise = np.array([0.0, 1, 4, 5]), 2 / 4 / 2
    signal = mean.var(ddof=1) - noise
    w = np.array([1, 1, 1, signal / (signal + 2 / 2)])
    w /= w.mean()
    expected = w * (mean - (w * mean).sum() / w.sum())
    assert found[:4].tolist() == pytest.approx(expected.clip(-5, 5).tolist(), rel=1e-5)
    assert found[4:8].tolist() == pytest.approx([-2.5, -1.5, 1.5, 2.5])


def test_shifting_scores_changes_nothing_and_penalties_are_turned_round() -> None:
    """Three judges of the same pictures; a reward of negative weight gives the negative advantages, pessimism included."""
    run, parts = unsure({**ENSEMBLE, "pessimism": 0.3})
    found, rollout = shape(run, parts)
    shifted = Rollout(rollout.trajectory, {n: v + 7 for n, v in rollout.scores.items()}, rollout.ids, 0, 0)
    moved = parts.regularizers["unsure"].shape(found.float(), shifted).double()
    torch.testing.assert_close(moved, found, atol=1e-3, rtol=1e-3)  # scores are float32
    penalty = parts.regularizers["unsure"]
    penalty.weights = {**penalty.weights, "brightness": -1.0}
    opposite = Rollout(rollout.trajectory, {n: -v for n, v in rollout.scores.items()}, rollout.ids, 0, 0)
    torch.testing.assert_close(penalty.shape(found.float(), opposite).double(), found, atol=1e-5, rtol=1e-5)


def test_rewards_that_are_not_named_enter_without_weights() -> None:
    """Each reward has its own advantages; the sum is weighted as the rewards are."""
    both = {**REWARDS, "red": {**REWARDS["red"], "weight": 0.5}}
    settings = {"rewards": ["brightness"], "weighting": "none", "estimator": "ensemble", "members": ["detail"]}
    run = gardo_run({"unsure": {"type": "uncertainty", "std": "none", **settings}}, rewards=both)
    parts = toy_parts(run)
    found, rollout = shape(run, parts)
    one = (rollout.scores["brightness"] + rollout.scores["detail"]).double() / 2
    expected = sum(
        weight * (v - torch.stack([v[rollout.ids == g].mean() for g in rollout.ids]))
        for weight, v in ((1, one), (0.5, rollout.scores["red"].double()))
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_trust_region_holds_uncertain_images_closer() -> None:
    """coefficient (1 + slope min(u, 3)) per image; images without advantage are kept for it."""
    run, parts = unsure({"trust": {"coefficient": 2, "slope": 0.5, "kind": "v_mse"}}, update={"per_iteration": 1})
    regularizer = parts.regularizers["unsure"]
    assert regularizer.needs_all_images
    for p in parts.policy.trained.values():
        p.data.add_(0.1)
    shape(run, parts)
    batch = a_batch(run, parts)
    prediction = parts.policy.predict(batch)
    with torch.no_grad(), parts.policy.reference():
        base = parts.policy.predict(batch).velocity
    each = (prediction.velocity - base).square().mean((1, 2, 3))
    factor = 1 + 0.5 * regularizer.uncertain.clamp_max(3)
    expected = 2 * (factor.float()[batch.image] * each).sum() * batch.share
    torch.testing.assert_close(regularizer.loss(parts.policy, prediction, batch), expected)
    assert float(factor.max()) > float(factor.min())
    assert unsure()[1].regularizers["unsure"].loss(parts.policy, prediction, batch) is None


# ---------------------------------------------------------------------------------------------------------- evaluations
@pytest.mark.parametrize("kind", ["jpeg", "crop", "shift", "gain"])
def test_perturbations_are_small(kind: str) -> None:
    """A smooth picture stays nearly the same, and is not the same; shape and type stay."""
    ramp = torch.arange(48).float()
    image = torch.stack(
        [ramp[:, None] + ramp[None], 2 * ramp[:, None] + 0 * ramp, 200 - ramp[None] - 0 * ramp[:, None]]
    )
    image = (image + 40).to(torch.uint8)
    changed = 0
    for seed in range(6):
        found = perturb(image.clone(), kind, np.random.default_rng(seed))  # type: ignore[arg-type]
        assert found.shape == image.shape and found.dtype == torch.uint8
        assert float((found.float() - image.float()).abs().mean()) < 4
        changed += not torch.equal(found, image)
    assert changed >= 4


def test_versions_depend_on_the_image_and_not_on_the_batch() -> None:
    """So two processes draw what one does; another number or iteration draws anew."""
    run, parts = unsure()
    trajectory = scored(run, parts)[1].trajectory
    images, groups, kinds = trajectory.images, trajectory.groups, ("shift", "gain")
    whole = perturbed(images, groups, kinds, 0, 3, 1)
    assert torch.equal(perturbed(images[5:9], groups[5:9], kinds, 0, 3, 1), whole[5:9])
    assert not torch.equal(perturbed(images, groups, kinds, 0, 3, 2), whole)
    assert not torch.equal(perturbed(images, groups, kinds, 0, 4, 1), whole)
    noise = drawn(groups, (2, 4, 4), 0, "x")
    assert torch.equal(drawn(groups[5:9], (2, 4, 4), 0, "x"), noise[5:9])


def test_drawing_again_from_little_noise_gives_nearly_the_same_picture() -> None:
    """The lower the level the nearer, for one step and for several."""
    run, parts = unsure()
    trajectory = scored(run, parts)[1].trajectory
    noise = drawn(trajectory.groups, (2, 4, 4), 0, "x")
    for steps in (1, 3):
        far, near, nearest = (
            float(
                (drawn_again(parts.policy, trajectory, noise, level, steps, 7).float() - trajectory.images).abs().mean()
            )
            for level in (0.4, 0.1, 1e-4)
        )
        assert far > near > nearest and nearest < 0.5


# ------------------------------------------------------------------------------------------------------ state, refusals
def test_state_goes_round() -> None:
    """The running scale of the spread is kept, so that a continued run gives the same bits."""
    settings = {"type": "uncertainty", "weighting": "exponential"}
    run = gardo_run({"unsure": settings, "gate": GATE, "slow": SLOW})
    whole, first, second = (toy_parts(run) for _ in range(3))
    iterate(run, whole, 3)
    iterate(run, first, 1)
    take_over(first, second)
    iterate(run, second, 2)
    theirs = whole.policy.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in second.policy.state_dict().items())
    assert second.state_dict()["regularizers"] == whole.state_dict()["regularizers"]


def test_it_replaces_what_others_then_shape() -> None:
    """Also when it stands behind them in the config."""
    wide = {"type": "diversity", "path": None}
    orders = ({"wide": wide, "unsure": {"type": "uncertainty"}}, {"unsure": {"type": "uncertainty"}, "wide": wide})
    found = [shape(run, toy_parts(run))[0] for run in map(gardo_run, orders)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "ensemble"}, "unsure needs members: names of rewards of weight 0"),
        ({"members": ["red"]}, "members has no meaning with estimator augment, only with ensemble and cross_reward"),
        ({"tail_steps": 3}, "tail_steps has no meaning with estimator augment, only with tails"),
        ({**CROSS, "weighting": "wiener"}, "weighting: wiener needs a spread .* use weighting: exponential"),
        ({**CROSS, "pessimism": 0.1}, "pessimism needs a spread"),
        ({"weighting": "none", "control": "shuffled"}, "control: shuffled needs weights, but weighting is none"),
        ({"group_reliability": True}, "group_reliability mends std: group, but std is global"),
        ({"rewards": []}, "rewards is empty"),
        ({"rewards": ["red"]}, "rewards: 'red', a reward of weight 0"),
        ({"rewards": ["bright"]}, "'bright', which is not among the rewards: .*Did you mean 'brightness'"),
        ({"trust": {"anchor": "average"}}, "needs the running average"),
        ({"evaluations": 1}, "greater than or equal to 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(settings: Mapping[str, Any], message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ValidationError, match=message):
        unsure(settings, policy={"ema": None})


def test_a_reward_that_learns_cannot_be_evaluated_twice() -> None:
    """Its own step would count as uncertainty; among the others it does no harm."""
    rewards = {**REWARDS, "mood": {"type": "tests.invariants.test_uncertainty:Learner"}}
    with pytest.raises(ConfigError, match=r"regularizers\.unsure: the reward 'mood' learns"):
        toy_parts(gardo_run({"unsure": {"type": "uncertainty"}}, rewards=rewards))
    toy_parts(gardo_run({"unsure": {"type": "uncertainty", "rewards": ["brightness"]}}, rewards=rewards))
