"""From scores to advantages: invariants 14-16 of the algorithms specification, the rules for NaN, and several rewards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2irl.advantages import constant_groups, group_advantages, normalise, total_score, within_group_std
from t2irl.config import Advantage
from t2irl.errors import RunError

NAN = float("nan")
GROUP = Advantage(std="group", eps=0, floor=0, clip=1e9)
GLOBAL = Advantage(std="global", eps=0, floor=0, clip=1e9)
PLAIN = Advantage(std="none", eps=0, floor=0, clip=1e9)
properties = settings(deadline=None, derandomize=True, max_examples=60)
"""The same examples in every run, and no limit on their time: the first call of a torch function is slow."""


def of(rewards: list[float], groups: list[int] | None = None, config: Advantage = GROUP) -> Tensor:
    """Advantages of one reward of weight 1."""
    ids = torch.tensor(groups or [0] * len(rewards))
    return group_advantages({"r": torch.tensor(rewards, dtype=torch.float64)}, {"r": 1.0}, ids, config)


@st.composite
def iterations(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores (N,) of two to six groups of two to eight images each, and group ids in any order."""
    sizes = draw(st.lists(st.integers(2, 8), min_size=2, max_size=6))
    ids = draw(st.permutations([7 * g + 3 for g, size in enumerate(sizes) for _ in range(size)]))
    values = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
    scores = draw(st.lists(values, min_size=len(ids), max_size=len(ids)))
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(ids)


def rows_of(groups: Tensor) -> list[Tensor]:
    """The rows of each group."""
    return [(groups == g).nonzero().flatten() for g in groups.unique()]


# 14. Group advantages.


def test_one_to_four() -> None:
    """Invariant 14: [1, 2, 3, 4] gives +-1.34164 and +-.44721, by the population's standard deviation."""
    expected = [-1.34164, -0.44721, 0.44721, 1.34164]
    assert of([1, 2, 3, 4]).tolist() == pytest.approx(expected, abs=5e-6)
    assert of([1, 2, 3, 4], config=PLAIN).tolist() == [-1.5, -0.5, 0.5, 1.5]
    with_eps = GROUP.model_copy(update={"eps": 0.5})
    assert of([1, 2, 3, 4], config=with_eps).tolist() == pytest.approx(
        [r / (math.sqrt(1.25) + 0.5) for r in (-1.5, -0.5, 0.5, 1.5)]
    )


@given(iterations())
@properties
def test_group_sums_and_deviations(iteration: tuple[Tensor, Tensor]) -> None:
    """Invariant 14: every group sums to 0; with eps = 0 its standard deviation is 1, or 0 if all its scores are equal."""
    scores, groups = iteration
    advantages = normalise(scores, groups, GROUP)
    for rows in rows_of(groups):
        part = advantages[rows]
        assert part.sum().item() == pytest.approx(0.0, abs=1e-7)
        constant = bool((scores[rows] == scores[rows][0]).all())
        assert part.std(correction=0).item() == pytest.approx(0.0 if constant else 1.0, abs=1e-6)
        assert constant == (not part.any())


@given(iterations(), st.floats(0.1, 50), st.floats(-50, 50))
@properties
def test_invariance_to_scale_and_offset(iteration: tuple[Tensor, Tensor], scale: float, offset: float) -> None:
    """Invariant 14: r -> a r + b changes nothing for a > 0 and eps = 0, and flips the sign for a < 0."""
    scores, groups = iteration
    config = GROUP.model_copy(
        update={"floor": 1e-9}
    )  # an offset can round equal scores apart by a few units in the last place
    before = normalise(scores, groups, config)
    torch.testing.assert_close(normalise(scale * scores + offset, groups, config), before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normalise(-scale * scores + offset, groups, config), -before, rtol=1e-6, atol=1e-6)


@given(iterations(), st.randoms(use_true_random=False), st.sampled_from([GROUP, GLOBAL, PLAIN]))
@properties
def test_order_does_not_matter(iteration: tuple[Tensor, Tensor], random, config: Advantage) -> None:
    """Permuting the images permutes the advantages, and group ids are only names."""
    scores, groups = iteration
    order = list(range(len(scores)))
    random.shuffle(order)
    before = normalise(scores, groups, config)
    torch.testing.assert_close(
        normalise(scores[order], 1000 - groups[order], config), before[order], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("config", [GROUP, GLOBAL, PLAIN, Advantage(eps=0), Advantage()])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.9, 1e8, -1 / 3])
def test_constant_groups_get_exactly_0(config: Advantage, value: float) -> None:
    """Invariant 14: no NaN and no rounding noise from 0 / 0, alone or beside a group with signal."""
    assert of([value] * 7, config=config).tolist() == [0.0] * 7
    mixed = of([value, value, value, 1.0, 2.0], [5, 5, 5, 2, 2], config)
    assert mixed[:3].tolist() == [0.0] * 3
    assert mixed[3] < 0 < mixed[4]


# 15. Global standard deviation.


@given(iterations())
@properties
def test_global_std_is_the_share_of_variance_within_groups(iteration: tuple[Tensor, Tensor]) -> None:
    """Invariant 15: mean A^2 = within-group variance / total variance, at most 1."""
    scores, groups = iteration
    variance = scores.var(correction=0).item()
    found = normalise(scores, groups, GLOBAL).square().mean().item()
    if variance == 0:
        assert found == 0
        return
    within = sum(((scores[rows] - scores[rows].mean()) ** 2).sum().item() for rows in rows_of(groups)) / len(scores)
    assert found == pytest.approx(within / variance, rel=1e-6, abs=1e-9)
    assert found <= 1 + 1e-9
    assert within_group_std(scores, groups) == pytest.approx(math.sqrt(within), rel=1e-6, abs=1e-9)


def test_global_std_in_numbers() -> None:
    """Groups (0, 2) and (10, 14): deviations 1 and 2 over a total deviation of sqrt(32.75)."""
    total = math.sqrt((6.5**2 + 4.5**2 + 3.5**2 + 7.5**2) / 4)
    expected = [-1 / total, 1 / total, -2 / total, 2 / total]
    assert of([0, 2, 10, 14], [0, 0, 1, 1], GLOBAL).tolist() == pytest.approx(expected)


# 16. eps and floor.


@pytest.mark.parametrize(("eps", "largest", "digits"), [(1e-8, 2.3, 0.35), (1e-6, 1.1, 0.2), (1e-4, 0.02, 0.005)])
def test_eps_and_float_noise(eps: float, largest: float, digits: float) -> None:
    """Invariant 16: rewards .9 +- 1e-6 of noise; a tiny eps turns it into advantages of full size."""
    noise = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-6
    rewards = (0.9 + noise).flatten()
    groups = torch.arange(2000).repeat_interleave(16)
    advantages = normalise(rewards, groups, Advantage(std="group", eps=eps, floor=0))
    found = advantages.view(2000, 16).abs().amax(1).mean().item()
    assert found == pytest.approx(largest, abs=digits)
    with_floor = normalise(rewards, groups, Advantage(std="group", eps=eps, floor=1e-4))
    assert not with_floor.any()


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_floor_is_on_the_span_of_a_groups_scores(std: str) -> None:
    """A span of exactly the floor carries no signal, a larger one does; the other group is not touched."""
    config = Advantage(std=std, eps=0, floor=0.25)
    scores = [1.0, 1.125, 1.25, 0.0, 0.25, 0.26]
    found = of(scores, [0, 0, 0, 1, 1, 1], config)
    assert found[:3].tolist() == [0.0] * 3
    assert bool((found[3:] != 0).all())
    assert (
        constant_groups(torch.tensor(scores, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1]), 0.25).tolist()
        == [True] * 3 + [False] * 3
    )


def test_clip_bounds_advantages_on_both_sides() -> None:
    """Clamped to +-clip after weighting."""
    rewards = [0.0] * 30 + [1.0, -1.0]
    found = of(rewards, config=Advantage(eps=0, clip=2.0))
    assert found.tolist() == [0.0] * 30 + [2.0, -2.0]


# NaN: a reward does not apply.


def test_an_image_that_a_reward_skips_gets_0_and_leaves_the_others_alone() -> None:
    """The group's mean and deviation are those of the images that the reward applies to."""
    for config in (GROUP, GLOBAL, PLAIN):
        found = normalise(
            torch.tensor([1.0, NAN, 2.0, 3.0, NAN, 4.0]).double(), torch.zeros(6, dtype=torch.long), config
        )
        alone = normalise(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.zeros(4, dtype=torch.long), config)
        assert found[[1, 4]].tolist() == [0.0, 0.0]
        torch.testing.assert_close(found[[0, 2, 3, 5]], alone)


@given(iterations(), st.data())
@properties
def test_advantages_are_finite_whatever_is_nan(iteration: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    """Whole groups, single images or everything may be skipped: no NaN, no infinity, sums of 0."""
    scores, groups = iteration
    skipped = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    scores = scores.masked_fill(skipped, NAN)
    for config in (GROUP, GLOBAL, PLAIN):
        found = normalise(scores, groups, config)
        assert bool(found.isfinite().all())
        assert not found[skipped].any()
        for rows in rows_of(groups):
            assert found[rows].sum().item() == pytest.approx(0.0, abs=1e-6)


def test_total_score_is_the_weighted_sum_of_what_applies() -> None:
    """NaN adds nothing; an image that no reward applies to stops the run, named by its number."""
    scores = {"a": torch.tensor([1.0, NAN, 3.0]), "b": torch.tensor([10.0, 20.0, NAN])}
    assert total_score(scores, {"a": 2.0, "b": 0.5}).tolist() == [7.0, 10.0, 6.0]
    with pytest.raises(RunError, match="image 2 "):
        total_score({"a": torch.tensor([1.0, NAN, NAN]), "b": torch.tensor([1.0, 0.0, NAN])}, {"a": 1.0, "b": 1.0})


@pytest.mark.parametrize("combine", ["scores", "advantages"])
def test_an_image_without_any_reward_is_refused_however_rewards_are_combined(combine: str) -> None:
    """Otherwise the image would silently count as average."""
    scores = {"a": torch.tensor([1.0, NAN, 2.0]), "b": torch.tensor([1.0, NAN, NAN])}
    with pytest.raises(RunError, match="image 1 "):
        group_advantages(scores, {"a": 1.0, "b": 1.0}, torch.zeros(3, dtype=torch.long), Advantage(combine=combine))


# Several rewards.


def test_combining_scores_lets_the_wider_reward_rule_and_combining_advantages_does_not() -> None:
    """Rewards of unequal scale that disagree: the sum follows the wide one, normalised advantages cancel."""
    wide, narrow = torch.tensor([0.0, 100.0]), torch.tensor([1.0, 0.0])
    scores, weights, ids = (
        {"wide": wide, "narrow": narrow},
        {"wide": 1.0, "narrow": 1.0},
        torch.zeros(2, dtype=torch.long),
    )
    by_score = group_advantages(scores, weights, ids, GROUP)
    assert by_score.tolist() == pytest.approx([-1.0, 1.0])
    by_advantage = group_advantages(scores, weights, ids, GROUP.model_copy(update={"combine": "advantages"}))
    assert by_advantage.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    tipped = group_advantages(
        scores, {"wide": 1.0, "narrow": 3.0}, ids, GROUP.model_copy(update={"combine": "advantages"})
    )
    assert tipped.tolist() == pytest.approx([2.0, -2.0])


def test_combining_one_reward_is_the_same_either_way() -> None:
    """For a single reward of weight 1 the two ways agree."""
    scores, groups = torch.randn(24, generator=torch.Generator().manual_seed(0)), torch.arange(24) // 6
    for config in (GROUP, GLOBAL, PLAIN, Advantage()):
        both = [
            group_advantages({"r": scores}, {"r": 1.0}, groups, config.model_copy(update={"combine": c}))
            for c in ("scores", "advantages")
        ]
        assert torch.equal(*both)


@pytest.mark.parametrize("combine", ["scores", "advantages"])
def test_a_reward_of_weight_0_has_no_part_in_anything(combine: str) -> None:
    """Whatever it scored: advantages are the same bits, and an image that it alone applies to is refused all the same."""
    config = Advantage(std="global", combine=combine)
    scores, ids = {"r": torch.tensor([1.0, 2.0, 4.0, 4.5])}, torch.tensor([0, 0, 1, 1])
    auxiliary = scores | {"x": torch.tensor([NAN, 1e9, -3.0, 0.0])}
    weights = {"r": 0.5, "x": 0.0}
    expected = group_advantages(scores, weights, ids, config)
    assert torch.equal(group_advantages(auxiliary, weights, ids, config), expected)
    assert torch.equal(total_score(auxiliary, weights), total_score(scores, weights))
    with pytest.raises(RunError, match="image 2 "):
        group_advantages(auxiliary | {"r": torch.tensor([1.0, 2.0, NAN, 4.0])}, weights, ids, config)


def test_negative_weights_turn_a_reward_round() -> None:
    """A penalty is a reward of negative weight."""
    ids = torch.zeros(3, dtype=torch.long)
    for combine in ("scores", "advantages"):
        config = Advantage(combine=combine)
        plus = group_advantages({"r": torch.tensor([1.0, 2.0, 4.0])}, {"r": 0.5}, ids, config)
        minus = group_advantages({"r": torch.tensor([1.0, 2.0, 4.0])}, {"r": -0.5}, ids, config)
        torch.testing.assert_close(plus, -minus)
        assert plus[0] < 0 < plus[2]


def test_advantages_are_computed_in_float64() -> None:
    """Float32 scores near 1 that differ in their last bits: centring in float32 would lose what distinguishes them."""
    base = torch.tensor(1000.0)
    scores = torch.stack([base + k * 2.0**-13 for k in range(4)])
    found = group_advantages({"r": scores}, {"r": 1.0}, torch.zeros(4, dtype=torch.long), GROUP)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(of([1, 2, 3, 4]).tolist(), rel=1e-9)
