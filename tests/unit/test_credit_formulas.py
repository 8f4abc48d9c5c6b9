"""Advantages from uncertain rewards: zero sums, invariances, limits, and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2irl.advantages import normalise
from t2irl.config import Advantage
from t2irl.guards.credit import (
    Groups,
    controlled,
    effective_share,
    exponential_weights,
    most_uncertain,
    noise_and_signal,
    normalised,
    reliability,
    spread,
    weighted_advantages,
    wiener_weights,
)

properties = settings(deadline=None, derandomize=True, max_examples=60)
IDS = torch.tensor([4, 4, 4, 9, 9, 9, 9, 4])
SCALES = ("group", "global", "none")


def t(values: list[float]) -> Tensor:
    """As float64."""
    return torch.tensor(values, dtype=torch.float64)


def groups_of(ids: Tensor = IDS, skipped: tuple[int, ...] = ()) -> Groups:
    """All images apply but `skipped`."""
    applies = torch.ones(len(ids), dtype=torch.bool)
    applies[list(skipped)] = False
    return Groups.of(ids, applies)


@st.composite
def weighted(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Values and weights of eight images in the groups of IDS."""
    values = draw(st.lists(st.floats(-50, 50).map(lambda v: round(v, 3)), min_size=8, max_size=8))
    weights = draw(st.lists(st.floats(0.01, 1), min_size=8, max_size=8))
    return t(values), t(weights)


@given(weighted(), st.sampled_from(SCALES))
@properties
def test_advantages_sum_to_zero_and_follow_shift_scale_and_order(found: tuple[Tensor, Tensor], std: str) -> None:
    """In every group, whatever the weights; a shifted or scaled reward changes nothing (but the scale, without division)."""
    values, weights = found
    groups = groups_of()

    def advantages(v: Tensor, w: Tensor = weights, g: Groups = groups) -> Tensor:
        return weighted_advantages(v, w, g, std, 0.0, 1e-6)  # type: ignore[arg-type]

    first = advantages(values)
    for rows in (IDS == 4, IDS == 9):
        assert float(first[rows].sum()) == pytest.approx(0, abs=1e-8)
    torch.testing.assert_close(advantages(values + 3), first, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(advantages(4 * values), first * (4 if std == "none" else 1), rtol=1e-6, atol=1e-8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    moved = advantages(values[order], weights[order], groups_of(IDS[order]))
    torch.testing.assert_close(moved, first[order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("std", SCALES)
def test_equal_weights_are_the_ordinary_advantages(std: str) -> None:
    """One evaluation, or the same spread everywhere: plain GRPO."""
    values = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    groups = groups_of()
    mean, deviation = spread(values[:, None])
    assert torch.equal(mean, values) and not deviation.any()
    noise, signal = noise_and_signal(mean, deviation, 1, groups)
    assert not noise.any()
    weights = normalised(wiener_weights(deviation, 1, signal), groups)
    assert weights.tolist() == [1] * 8
    plain = normalise(values, IDS, Advantage(std=std, eps=1e-4))
    if std == "global":  # theirs is of the values, ours of the numerators
        plain = plain * (plain.square().mean().sqrt() ** -1)
        torch.testing.assert_close(weighted_advantages(values, weights, groups, std, 0.0), plain)
    else:
        torch.testing.assert_close(weighted_advantages(values, weights, groups, std, 1e-4), plain)
    alike = normalised(exponential_weights(torch.full((8,), 2.0).double(), 4, 0.1), groups)
    torch.testing.assert_close(alike, torch.ones(8).double())


def test_weighted_advantages_by_hand() -> None:
    """Values 0, 1, 3 with weights 2, 1, 1: mean 1, numerators -2, 0, 2; variance (2 + 0 + 4) / 4."""
    groups = groups_of(torch.zeros(3, dtype=torch.long))
    values, weights = t([0, 1, 3]), t([2, 1, 1])
    assert weighted_advantages(values, weights, groups, "none", 0).tolist() == [-2, 0, 2]
    scale = math.sqrt(8 / 3)
    assert weighted_advantages(values, weights, groups, "global", 0).tolist() == pytest.approx(
        [-2 / scale, 0, 2 / scale]
    )
    scale = math.sqrt(1.5) + 0.5
    assert weighted_advantages(values, weights, groups, "group", 0.5).tolist() == pytest.approx(
        [-2 / scale, 0, 2 / scale]
    )


def test_noise_and_signal_by_hand() -> None:
    """Means 0, 2, 4 (variance 4); deviations 1, 1, 2 of two evaluations: noise 1, signal 3. Loud noise leaves a tenth."""
    groups = groups_of(torch.zeros(3, dtype=torch.long))
    noise, signal = noise_and_signal(t([0, 2, 4]), t([1, 1, 2]), 2, groups)
    assert noise.tolist() == [1] * 3 and signal.tolist() == [3] * 3
    assert wiener_weights(t([1, 1, 2]), 2, signal).tolist() == pytest.approx([3 / 3.5, 3 / 3.5, 3 / 5])
    assert reliability(noise, signal).tolist() == [0.75] * 3
    assert noise_and_signal(t([0, 2, 4]), t([9, 9, 9]), 2, groups)[1].tolist() == pytest.approx([0.4] * 3)
    nothing = torch.zeros(3, dtype=torch.float64)
    assert wiener_weights(nothing, 2, nothing).tolist() == [1] * 3


def test_spread_of_two_is_their_difference_over_the_root_of_two() -> None:
    """And NaN where an evaluation is."""
    mean, deviation = spread(t([[1, 3], [2, 2], [math.nan, 1]]))
    assert mean[:2].tolist() == [2, 2] and deviation[:2].tolist() == pytest.approx([math.sqrt(2), 0])
    assert mean[2].isnan() and deviation[2].isnan()


def test_weights_fall_with_uncertainty() -> None:
    """V1 between its lowest value and 1; then 1 on the mean of each group."""
    u = t([0, 1, 4, 400, 1, 1, 1, 2])
    weights = exponential_weights(u, 4.0, 0.1)
    assert weights[:4].tolist() == pytest.approx([1, math.exp(-0.25), math.exp(-1), 0.1])
    groups = groups_of(skipped=(5,))
    scaled = normalised(weights, groups)
    assert scaled[5] == 0 and groups.mean(scaled).tolist() == pytest.approx([1] * 8)


def test_controls() -> None:
    """Shuffled: the same weights within each group, elsewhere, and the same for the same seed. Inverse: 1 / w."""
    weights, groups = t([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]), groups_of()
    found = controlled(weights, groups, "shuffled", [0, 1])
    for rows in (IDS == 4, IDS == 9):
        assert found[rows].sort().values.tolist() == weights[rows].tolist()
    assert not torch.equal(found, weights) and torch.equal(found, controlled(weights, groups, "shuffled", [0, 1]))
    assert any(not torch.equal(found, controlled(weights, groups, "shuffled", [0, k])) for k in (2, 3))
    assert controlled(weights, groups, "inverse", []).tolist() == pytest.approx([1 / w for w in weights.tolist()])
    assert controlled(weights, groups, "none", []) is weights


def test_images_that_do_not_apply_or_are_dropped() -> None:
    """No part in any mean, an advantage of 0, and no NaN."""
    values, weights = t([1, 2, math.nan, 4, 5, 7, 7, 0]), torch.ones(8, dtype=torch.float64)
    groups = groups_of(skipped=(2, 6))
    found = weighted_advantages(values, weights, groups, "none", 0)
    assert found[[2, 6]].tolist() == [0, 0] and bool(found.isfinite().all())
    assert found[[0, 1, 7]].tolist() == [0, 1, -1]
    dropped = most_uncertain(t([1, 2, 3, 4, 5, 6, 7, math.nan]), 0.3)
    assert dropped.tolist() == [False] * 5 + [True] * 2 + [False]
    assert not most_uncertain(t([1, 2]), 0).any()


def test_constant_groups_carry_no_signal() -> None:
    """Their spread is rounding."""
    values = t([1, 1, 1, 0, 1, 2, 3, 1 + 1e-9])
    found = weighted_advantages(values, torch.rand(8).double(), groups_of(), "group", 0, 1e-6)
    assert not found[IDS == 4].any() and found[IDS == 9].any()


def test_effective_share() -> None:
    """Equal weights count in full, one weight alone counts as one image of four."""
    groups = groups_of(torch.zeros(4, dtype=torch.long))
    assert effective_share(torch.ones(4), groups) == 1
    assert effective_share(t([3, 0, 0, 0]), groups) == pytest.approx(0.25)
