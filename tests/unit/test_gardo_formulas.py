"""Win rates, uncertainty, gate, its share, the reset rule and diversity factors against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2irl.guards.diversity import distances, factors, nearest, pairwise
from t2irl.guards.gardo import GateShare, ResetRule, gate, statistic, uncertainty, win_rates

NAN = math.nan
properties = settings(deadline=None, derandomize=True, max_examples=60)
PROXY, FIRST, SECOND = [0.9, 0.1, 0.5, 0.7], [4.0, 6.0, 5.0, 5.5], [0.1, 1.0, 0.5, 0.7]
TIED = st.lists(st.integers(0, 4), min_size=2, max_size=24)


def t(values: list[float]) -> Tensor:
    """As float64."""
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ win rates
def test_win_rates_by_hand() -> None:
    """Three others each; ties count half, or, strictly, not at all, and then out of all four."""
    assert win_rates(t(PROXY)).tolist() == pytest.approx([1, 0, 1 / 3, 2 / 3])
    assert win_rates(t(PROXY), ties="strict").tolist() == pytest.approx([3 / 4, 0, 1 / 4, 2 / 4])
    tied = t([1, 1, 1, 0])
    assert win_rates(tied).tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0])
    assert win_rates(tied, ties="strict").tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 4, 0])


def test_groups_and_missing_values() -> None:
    """Rivals are those of the same group that have a value."""
    groups = torch.tensor([0, 1, 0, 1, 2, 0])
    found = win_rates(t([5, 1, 4, 2, 9, NAN]), groups)
    assert found[:5].tolist() == [1, 0, 0, 1, 0.5] and found[5].isnan()


@given(TIED)
@properties
def test_mid_ranks_are_a_half_on_the_mean(values: list[int]) -> None:
    """However many tie, so that uncertainties sum to 0."""
    rates = win_rates(t(values))
    assert float(rates.mean()) == pytest.approx(0.5)
    found = uncertainty(t(values), [t(values[::-1]), t([v % 2 for v in values])])
    assert float(found.sum()) == pytest.approx(0, abs=1e-9)
    assert float(found.abs().max()) <= 1


def test_uncertainty_of_the_paper_by_hand() -> None:
    """Eq. 7: the image that only the proxy likes is the most uncertain one, not the one that it alone dislikes."""
    assert uncertainty(t(PROXY), [t(FIRST), t(SECOND)], ties="strict").tolist() == pytest.approx([0.75, -0.75, 0, 0])
    assert uncertainty(t(PROXY), [t(FIRST), t(SECOND)]).tolist() == pytest.approx([1, -1, 0, 0])


@given(st.lists(st.floats(-3, 3).map(lambda v: round(v, 2)), min_size=3, max_size=20))
@properties
def test_only_the_order_of_scores_matters(values: list[float]) -> None:
    """Any strictly increasing transform of any scorer changes nothing, and images may come in any order."""
    proxy, other = t(values), t([(7 * v) % 3 for v in values])
    found = uncertainty(proxy, [other])
    assert torch.equal(uncertainty((2 * proxy).exp(), [other**3 + 5 * other]), found)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(len(values)))
    assert torch.equal(uncertainty(proxy[order], [other[order]]), found[order])


def test_auxiliaries_that_do_not_apply() -> None:
    """They are left out of the mean; without any, or without the proxy, nothing is known."""
    found = uncertainty(t([1, 2, 3, NAN]), [t([1, NAN, 0, 4]), t([0, NAN, 1, 9])])
    assert found.isnan().tolist() == [False, True, False, True]
    assert found[0].item() == pytest.approx(0 - (1 / 2 + 0) / 2)
    assert found[2].item() == pytest.approx(1 - (0 + 1 / 2) / 2)


# ----------------------------------------------------------------------------------------------------------------- gate
@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("count", [11, 48, 128, 1152])
def test_the_gate_lets_its_share_through(share: float, count: int) -> None:
    """Without ties, within one image, and these are the most uncertain ones."""
    found = torch.randn(count, generator=torch.Generator().manual_seed(count)).double()
    chosen = gate(found, share)
    assert abs(int(chosen.sum()) - share * count) <= 1
    assert found[chosen].min() > found[~chosen].max()


def test_population_of_the_released_code() -> None:
    """A quantile of the positive half lets half as many through."""
    found = torch.arange(-500, 501).double() / 500
    assert int(gate(found, 0.1).sum()) == 101
    assert int(gate(found, 0.1, "positive").sum()) == 51


def test_a_gate_needs_an_excess() -> None:
    """Nobody is chosen where no proxy rank is above the others', nor where nothing is known."""
    assert not gate(t([0, 0, 0, 0]), 0.5).any()
    assert not gate(t([NAN, NAN]), 0.5).any()
    assert gate(t([NAN, -0.5, 0.5]), 0.5).tolist() == [False, False, True]


def test_saturated_proxy() -> None:
    """Nine in ten images have the best proxy score: mid ranks still choose a tenth, all of them among those."""
    generator = torch.Generator().manual_seed(0)
    proxy = (torch.rand(1152, generator=generator) < 0.9).double()
    found = uncertainty(proxy, [torch.randn(1152, generator=generator), torch.randn(1152, generator=generator)])
    chosen = gate(found, 0.1)
    assert abs(float(chosen.double().mean()) - 0.1) < 0.002 and bool(proxy[chosen].all())


# ---------------------------------------------------------------------------------------------------------- controllers
def test_share_on_a_scripted_sequence() -> None:
    """A new maximum raises it by a tenth, a new minimum lowers it by a tenth, anything between leaves it."""
    control = GateShare(0.1, window=3, warmup=1, bounds=(0.05, 0.115))
    values = [0.5, 0.6, 0.55, 0.4, 0.7, 0.8, 0.65, 0.1, 0.3]
    expected = [0.1, 0.11, 0.11, 0.099, 0.1089, 0.115, 0.115, 0.1035, 0.1035]
    assert [control.update(v) for v in values] == pytest.approx(expected)
    assert control.seen == values[-3:]


def test_share_waits_for_its_window() -> None:
    """The paper's rule: the first `warmup` values only fill it."""
    control = GateShare(0.1, window=4, warmup=4)
    assert [control.update(v) for v in (1, 2, 3, 4, 5)] == pytest.approx([0.1] * 4 + [0.11])
    again = GateShare(0.1, window=4, warmup=4)
    again.load_state_dict(control.state_dict())
    assert again == control and again.update(9) == control.update(9)


def test_statistics() -> None:
    """Mean of those at least 0, or of all."""
    assert statistic(t([0.5, -0.75, 0, 0.25, NAN])) == pytest.approx(0.25)
    assert statistic(t([0.5, -0.75, 0, 0.25]), "mean") == 0
    assert statistic(t([-1, NAN])) == 0


def test_reset_rule() -> None:
    """After the update that exceeds the threshold, or after so many updates; whichever is first, and then anew."""
    rule = ResetRule(threshold=0.5, every=3)
    due = []
    for divergence in (0.1, 0.5, None, 0.1, 0.6, 0.1, 0.2, 0.3, 0.4):
        rule.after_update(divergence)
        due.append(rule.due)
        if rule.due:
            rule.reset()
    assert due == [None, None, "age", None, "divergence", None, None, "age", None]
    assert rule.count == 3 and rule.age == 1
    again = ResetRule(threshold=0.5, every=3)
    again.load_state_dict(rule.state_dict())
    assert again == rule
    never = ResetRule(threshold=None, every=None)
    never.after_update(1e9)
    assert never.due is None


# ------------------------------------------------------------------------------------------------------------ diversity
FEATURES = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]])
ONE = torch.zeros(4, dtype=torch.long)
CENTRED = t([0.5, -0.5, 0.5, -0.5])


def test_diversity_by_hand() -> None:
    """Spec's numbers: distances .2 .2 .4 1; relative factors .2222 / .4444 on the two positive advantages."""
    d = nearest(FEATURES, ONE)
    assert d.tolist() == pytest.approx([0.2, 0.2, 0.4, 1.0], abs=1e-6)
    shaped = {
        k: (CENTRED * factors(d, ONE, CENTRED, k, 0.0)).tolist() for k in ("relative", "raw", "relative_positive")
    }
    assert shaped["relative"] == pytest.approx([0.2222, -0.5, 0.4444, -0.5], abs=1e-4)
    assert shaped["raw"] == pytest.approx([0.1, -0.5, 0.2, -0.5], abs=1e-6)
    assert shaped["relative_positive"] == pytest.approx([1 / 3, -0.5, 2 / 3, -0.5], abs=1e-6)
    assert pairwise(FEATURES, ONE) == pytest.approx((0.2 + 1 + 2 + 0.4 + 1.8 + 1) / 6, abs=1e-6)


def test_distances_stay_within_groups() -> None:
    """The same pictures in two groups, interleaved, give the same numbers twice; a picture alone has distance 0."""
    twice, groups = FEATURES.repeat_interleave(2, 0), torch.tensor([0, 1] * 4)
    assert torch.equal(nearest(twice, groups)[::2], nearest(FEATURES, ONE))
    assert pairwise(twice, groups) == pytest.approx(pairwise(FEATURES, ONE))
    assert nearest(FEATURES, torch.arange(4)).tolist() == [0] * 4 and pairwise(FEATURES, torch.arange(4)) == 0
    assert distances(FEATURES, "euclidean")[0, 3].item() == pytest.approx(2)


@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.sampled_from(["relative", "relative_positive", "raw"]))
@properties
def test_shaping_never_changes_a_sign_and_leaves_negatives_alone(values: list[float], kind: str) -> None:
    """To the last bit."""
    advantages = t(values)
    shaped = advantages * factors(nearest(FEATURES, ONE), ONE, advantages, kind)  # type: ignore[arg-type]
    assert bool((shaped * advantages >= 0).all())
    negative = advantages <= 0
    assert torch.equal(shaped[negative], advantages[negative])


def test_identical_images_are_not_punished() -> None:
    """A group without any diversity keeps its advantages."""
    same = torch.ones(4, 3)
    for eps in (0.0, 1e-6):
        assert factors(nearest(same, ONE), ONE, CENTRED, "relative", eps).tolist() == pytest.approx([1] * 4)
