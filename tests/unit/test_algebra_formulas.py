"""Formulas of the reward algebra against numbers worked out by hand, limits, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2irl.algebra import config as c
from t2irl.algebra import ensembles, gates, heads
from t2irl.algebra.constraints import Multipliers
from t2irl.algebra.diversity import kernel, leave_one_out_gains, logdet_credit, median_distance
from t2irl.algebra.filters import filter_factors, keep_weights
from t2irl.errors import RunError
from t2irl.regularizers.chi_square import chi_square, soft_exp

NAN = float("nan")
ONE_GROUP = torch.zeros(4, dtype=torch.long)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


# Transforms (E1).


def test_log_sigmoid_is_the_log_probability_of_beating_the_anchor() -> None:
    how = c.LogSigmoid(at=1.0, temperature=2.0)
    x = heads.transform(how, f64(1, 3, NAN), None)
    assert close(x, f64(math.log(0.5), -math.log(1 + math.exp(-1)), NAN))
    two = heads.log_sigmoid(f64(2), f64(0)) + heads.log_sigmoid(f64(-1), f64(0))
    assert close(two.exp(), f64(1 / (1 + math.exp(-2)) / (1 + math.exp(1))))  # the chance that both hold


def test_a_satisfied_reward_stops_pulling() -> None:
    x = f64(-3, 0, 3).requires_grad_()
    heads.log_sigmoid(x, f64(0, 0, 0)).sum().backward()
    assert x.grad is not None and close(x.grad, 1 - x.detach().sigmoid())


def test_the_anchor_is_a_quantile_of_the_base_model_or_each_prompts_own() -> None:
    base = torch.arange(101, dtype=torch.float64)
    assert close(heads.transform(c.LogSigmoid(), f64(85.0), base), f64(math.log(0.5)))
    own = heads.transform(c.LogSigmoid(per_prompt=4), f64(2, 2), base, f64(2, 1))
    assert close(own, f64(math.log(0.5), math.log(1 / (1 + math.exp(-1)))))


def test_other_transforms() -> None:
    base = f64(0, 2, 4)  # mean 2, deviation sqrt(8 / 3)
    s = math.sqrt(8 / 3)
    assert close(heads.transform(c.Standardise(), f64(2, 2 + s, NAN), base), f64(0, 1, NAN))
    assert close(heads.transform(c.Standardise(limit=1.5), f64(-100, 100), base), f64(-1.5, 1.5))
    assert close(heads.transform(c.Tanh(), f64(2 + s), base), f64(math.tanh(1)))
    assert close(heads.transform(c.Unit(low=0.25, high=0.75), f64(0, 1, 2, 3, 5), base), f64(0, 0, 0.5, 1, 2))
    assert close(heads.transform(c.LogProbability(floor=0.1), f64(0, 0.5), None), f64(0.1, 0.5).log())
    assert close(heads.transform(c.CentredSigmoid(), f64(2), base), f64(0.5))  # symmetric about its base
    assert close(heads.transform(None, f64(1, NAN), None), f64(1, NAN))


def test_a_base_model_without_spread_gives_no_scale() -> None:
    for how in (
        c.Standardise(),
        c.Tanh(),
        c.Unit(),
        c.LogSigmoid(unit="deviation"),
        c.CentredSigmoid(unit="deviation"),
    ):
        with pytest.raises(RunError, match=r"combine.rewards.mine.transform.*all score 0.5.*log_sigmoid"):
            heads.check_base("mine", how, f64(0.5, 0.5))
    heads.check_base("mine", c.CentredSigmoid(), f64(0.5, 0.5))
    with pytest.raises(RunError, match="applies to 1 of the base model's images"):
        heads.check_base("mine", None, f64(0.5))


# Bounds (E8, E13).


def test_clip_earns_nothing_above_the_threshold() -> None:
    x = f64(-1, 0.5, 2, NAN)
    assert close(heads.clip(x, 0.5), f64(-1, 0.5, 0.5, NAN))
    paper = (x - 0.5).clamp_max(0)
    assert close(heads.clip(x, 0.5) - 0.5, paper)
    assert close(heads.clip(x, f64(-2, torch.inf, 1, 0)), f64(-2, 0.5, 1, NAN))
    assert heads.level(c.Clip(quantile=0.5), f64(0, 1, 5)) == 1 and heads.level(c.Clip(at=7), None) == 7


def test_tiers_count_the_edges_reached() -> None:
    base = torch.arange(101, dtype=torch.float64)
    edges = heads.quantiles(base, [0.25, 0.5, 0.75, 0.95])
    found = heads.tiers(f64(-9, 24.9, 25, 74, 75, 95, 1e9, NAN), edges)
    assert close(found, f64(0, 0, 0.25, 0.5, 0.75, 1, 1, NAN))


# Aggregation (E2, E11).

TABLE = torch.tensor([[1.0, 2.0, -1.0, 0.0], [3.0, 2.0, 1.0, NAN], [2.0, -4.0, NAN, NAN]], dtype=torch.float64)
EQUAL = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    "how, expected",
    [
        (c.Sum(), (6, 0, 0, 0)),
        (c.Mean(), (2, 0, 0, 0)),
        (c.Median(), (2, 2, 0, 0)),
        (c.Wco(), (1, -4, -1, 0)),
        (c.Uwo(coefficient=0.5), (2 - 1 / 3, -4, -0.5, 0)),
        (c.Uwo(coefficient=0.5, ddof=1), (2 - 0.5, -6, -1, 0)),
        (c.MeanMinusStd(coefficient=1), (2 - math.sqrt(2 / 3), -math.sqrt(8), -1, 0)),
        (c.Softmin(temperature=1e-3), (1, -4, -1, 0)),
        (c.KlDro(temperature=1e-3), (1 + 1e-3 * math.log(3), -4 + 1e-3 * math.log(3), -1 + 1e-3 * math.log(2), 0)),
    ],
    ids=lambda x: getattr(x, "type", ""),
)
def test_aggregates(how: c.Aggregate, expected: tuple[float, ...]) -> None:
    """By hand, over the rewards that apply: all three, all three, two, one."""
    assert close(ensembles.aggregate(how, TABLE, EQUAL, ONE_GROUP), f64(*expected), 1e-9)


def test_softmin_by_hand_and_pures_example() -> None:
    n = f64(0.9, 0.8, -0.7, 0.95)[:, None]
    assert float(ensembles.softmin(n, 0.1)) == pytest.approx(-0.70, abs=5e-3)
    weights = (-f64(0, 1)).exp() / (-f64(0, 1)).exp().sum()
    assert close(ensembles.softmin(f64(0, 1)[:, None], 1.0), (weights * f64(0, 1)).sum()[None])


def test_limits_of_the_ensembles() -> None:
    full = TABLE[:, :2]
    assert close(ensembles.softmin(full, 1e6), full.mean(0), 1e-5)
    assert close(ensembles.kl_dro(full, 1e6), full.mean(0), 1e-5)
    t = 1e3  # to second order the mean less variance / (2 T), which is UWO
    uwo = ensembles.aggregate(c.Uwo(coefficient=1 / (2 * t)), full, EQUAL, ONE_GROUP)
    assert close(ensembles.kl_dro(full, t), uwo, 1e-5) and not close(full.mean(0), uwo, 1e-5)
    assert close(ensembles.weighted_mean(full, f64(1, 0, 3)), (full[0] + 3 * full[2]) / 4)


@given(st.permutations(range(3)), st.floats(-3, 3))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_ensembles_forget_the_order_of_rewards_and_follow_a_shift(order: list[int], shift: float) -> None:
    hows = (c.Mean(), c.Median(), c.Wco(), c.Uwo(), c.MeanMinusStd(), c.Softmin(), c.KlDro())
    for how in hows:
        found = ensembles.aggregate(how, TABLE, EQUAL, ONE_GROUP)
        assert close(ensembles.aggregate(how, TABLE[order], EQUAL, ONE_GROUP), found, 1e-9)
        assert close(ensembles.aggregate(how, TABLE + shift, EQUAL, ONE_GROUP), found + shift, 1e-9)


# Win rate (E15).


def test_win_rate_by_hand() -> None:
    x = f64(3, 1, 1, 0)[None]
    assert close(ensembles.win_rate(x, f64(1), ONE_GROUP, 0.0), f64(1, 0.5, 0.5, 0))
    soft = ensembles.win_rate(f64(0, 1)[None], f64(1), ONE_GROUP[:2], 2.0)
    assert close(soft, f64(1 - 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-0.5))))


def test_win_rates_of_a_group_have_mean_one_half_whatever_does_not_apply() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    table[0, :5] = table[1, 3] = NAN
    groups = torch.tensor([0, 1, 2] * 4)
    for temperature in (0.0, 0.7):
        found = ensembles.win_rate(table, f64(1, 2, 0.5), groups, temperature)
        assert found.min() >= 0 and found.max() <= 1
        for group in range(3):
            assert float(found[groups == group].mean()) == pytest.approx(0.5)
    hard = ensembles.win_rate(table, f64(1, 2, 0.5), groups, 0.0)
    assert close(ensembles.win_rate(7 * table + 3, f64(1, 2, 0.5), groups, 0.0), hard)  # only ranks count
    assert close(ensembles.win_rate(f64(1, NAN)[None], f64(1), torch.tensor([4, 4]), 1.0), f64(0.5, 0.5))


# Gates and penalties (E7, E14).


def test_gates() -> None:
    primary = f64(0.2, 0.5, 0.8, NAN)
    assert close(gates.hard_gate(primary, 0.5), f64(0, 0, 1, 1))
    assert close(gates.ramp_gate(primary, 0.5, 0.1), f64(1 / (1 + math.exp(3)), 0.5, 1 / (1 + math.exp(-3)), 1))
    assert close(gates.ramp_gate(primary, 0.4, 1e-3), gates.hard_gate(primary, 0.4), 1e-9)
    assert close(gates.product(f64(0, 2), f64(9, 1), 0.5), f64(0, 3))


def test_penalties_multiply() -> None:
    factors = torch.tensor([[1.0, 0.5, 0.0, NAN], [1.0, 0.5, 1.0, 0.1]], dtype=torch.float64)
    assert close(gates.penalised(f64(2, 2, 2, 2), factors), f64(2, 0.5, 0, 0.2))
    assert close(gates.penalised(f64(2, 2, 2, 2), factors, 0.2, 3.0), f64(2, 0.5, -3, -2.8))
    with pytest.raises(RunError, match=r"reward 'nsfw' gave 1.5, but as a factor it must be in \[0, 1\]; use this"):
        gates.check_range("nsfw", f64(1, 1.5), 0, 1, "as a factor", ["this"])
    gates.check_range("nsfw", f64(1, NAN, 0), 0, 1, "as a factor", ["this"])


# Filters (E6).


@pytest.mark.parametrize(
    "how, expected",
    [
        (c.Best(), (0, 1, 0, 0, 0)),
        (c.Best(count=2), (0, 1, 0, 1, 0)),
        (c.BestRandom(), (0.15, 0.4, 0.15, 0.15, 0.15)),
        (c.BestWorst(), (0, 1, 1, 0, 0)),
        (c.Power(), (1, 25, 9, 16, 0.25)),
    ],
    ids=lambda x: getattr(x, "type", ""),
)
def test_filters(how: c.Best, expected: tuple[float, ...]) -> None:
    assert close(keep_weights(how, f64(1, 5, -3, 4, 0.5)), f64(*expected))


def test_equal_scores_share_and_order_does_not_matter() -> None:
    assert close(keep_weights(c.Best(), f64(2, 1, 2, 2)), f64(1, 0, 1, 1) / 3)
    assert close(keep_weights(c.BestWorst(), f64(0, 0, 0, 0)), f64(1, 1, 1, 1) / 2)


def test_filters_look_at_each_prompt_by_itself() -> None:
    """Two prompts with disjoint ranges: the best of the whole batch would leave the second with nothing."""
    scores, groups = f64(10, 11, 12, 1, 2, 3), torch.tensor([0, 0, 0, 7, 7, 7])
    assert close(filter_factors(c.BestWorst(), scores, groups), f64(1.5, 0, 1.5, 1.5, 0, 1.5))
    terms = f64(1, 2, 3, 4, 5, 6)  # a mean over all images becomes a mean over those kept
    f = f64(1, 0, 1, 1, 0, 1)
    assert close((filter_factors(c.BestWorst(), scores, groups) * terms).mean(), (f * terms).sum() / f.sum())
    assert close(filter_factors(c.Power(), f64(0, 0), torch.tensor([0, 0])), f64(1, 1))


# Constraints (E3).


def test_multipliers_fall_above_the_limit_and_rise_below() -> None:
    for kind in ("squashed", "free"):
        duals = Multipliers(c.Constraints(multipliers=kind, average=0, initial=0.5), {"a": "at_least", "b": "at_most"})
        _, before = duals.weights()
        duals.step({"a": 0.9, "b": 0.9}, {"a": 0.5, "b": 0.5})  # a is kept, the cost b is too high
        _, after = duals.weights()
        assert duals.table["a"].value < 0.5 < duals.table["b"].value
        assert after["a"] < before["a"] and after["b"] < before["b"] < 0  # a cost is pushed down harder
        gaps = duals.gaps({"a": 0.5, "b": 0.5})
        assert gaps["a"] == pytest.approx(0.4) and gaps["b"] == pytest.approx(-0.4)


def test_a_step_by_hand() -> None:
    """J = sigmoid(m) (E - limit): gradient 1/4 x 0.4 at 0; then momentum 0.5 of it and the new one."""
    duals = Multipliers(c.Constraints(rate=2, momentum=0.5, average=0), {"a": "at_least"})
    assert duals.weights() == (0.5, {"a": 0.5})
    duals.step({"a": 0.9}, {"a": 0.5})
    assert duals.table["a"].value == pytest.approx(-0.2)
    w = 1 / (1 + math.exp(0.2))
    duals.step({"a": 0.7}, {"a": 0.5})
    assert duals.table["a"].value == pytest.approx(-0.2 - 2 * (0.5 * 0.1 + w * (1 - w) * 0.2))


def test_an_overshoot_of_an_equality_is_pulled_back_but_pressure_of_a_limit_only_fades() -> None:
    fast = c.Constraints(rate=1, average=0)
    duals = Multipliers(fast, {"least": "at_least", "equal": "equal"})
    for _ in range(200):
        duals.step({"least": 2.0, "equal": 2.0}, {"least": 1.0, "equal": 1.0})
    objective, weights = duals.weights()
    assert 0 < weights["least"] < 0.05 and weights["equal"] < -0.4
    assert objective == pytest.approx((2 - 2 * weights["least"] - 2 * weights["equal"]) / 2)


def test_free_multipliers_stay_at_or_above_zero_and_keep_the_scale() -> None:
    duals = Multipliers(c.Constraints(multipliers="free", rate=10, average=0), {"a": "at_least"})
    duals.step({"a": 1.0}, {"a": 0.0})
    assert duals.weights() == (1.0, {"a": 0.0})
    for _ in range(3):
        duals.step({"a": -1.0}, {"a": 0.0})
    objective, weights = duals.weights()
    assert objective + weights["a"] == pytest.approx(1) and weights["a"] > objective
    assert weights["a"] / objective == pytest.approx(duals.table["a"].value)


def test_running_mean_warmup_clipping_and_missing_scores() -> None:
    duals = Multipliers(c.Constraints(average=0.9, warmup=2, max_grad_norm=0.01, momentum=0), {"a": "at_least"})
    for value in (1.0, 2.0):
        duals.step({"a": value}, {"a": 0.0})
    assert duals.table["a"].value == 0  # resting
    assert duals.table["a"].average == pytest.approx((0.9 * 1 + 2) / 1.9)  # corrected for its start at 0
    duals.step({"a": NAN}, {"a": 0.0})
    assert duals.table["a"].average == pytest.approx((0.9 * 1 + 2) / 1.9)
    assert duals.table["a"].value == pytest.approx(-0.1 * 0.01)
    again = Multipliers(duals.config, duals.senses)
    again.load_state_dict(duals.state_dict())
    assert again == duals


# Log-determinant diversity (E12).


def test_gains_are_what_the_determinant_loses_without_the_image() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = kernel(x, 0.5)
    eye = torch.eye(5, dtype=torch.float64)
    whole = torch.logdet(eye + table)
    gains = leave_one_out_gains(table)
    for i in range(5):
        rest = [k for k in range(5) if k != i]
        assert float(gains[i]) == pytest.approx(float(whole - torch.logdet((eye + table)[rest][:, rest])))


def test_copies_gain_least_and_failures_neither_get_nor_give() -> None:
    features = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]
    table, groups = kernel(features, 0.1), torch.zeros(4, dtype=torch.long)
    gains, z = logdet_credit(table, torch.ones(4, dtype=torch.float64), groups)
    assert gains[0] == pytest.approx(float(gains[1])) and gains[0] < gains[2]
    assert float(gains[2]) == pytest.approx(math.log(2), abs=1e-3)  # nothing like it: log(1 + q^2)
    assert float(gains[0]) == pytest.approx(math.log(3 / 2), abs=1e-3)  # a pair: log 3 - log 2
    assert float(z.sum()) == pytest.approx(0, abs=1e-9) and float(z.square().mean()) == pytest.approx(1)
    failed, z = logdet_credit(table, f64(1, 0, 1, 1), groups)
    assert failed[1] == 0 and z[1] == 0 and float(failed[0]) == pytest.approx(math.log(2), abs=1e-3)
    two = torch.tensor([0, 1, 0, 1])
    apart, _ = logdet_credit(table, torch.ones(4, dtype=torch.float64), two)
    assert close(apart, torch.full((4,), math.log(2), dtype=torch.float64), 1e-3)  # copies in other groups do not count
    assert logdet_credit(table, torch.zeros(4, dtype=torch.float64), groups)[1].abs().sum() == 0


def test_bandwidth_is_the_median_distance_within_prompts() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    assert median_distance(features, torch.tensor([0, 0, 1, 1])) in (1.0, 2.0)
    assert median_distance(features[[0, 0]], torch.tensor([0, 0])) == 1e-6


# Chi-square (E4).


def test_chi_square_is_unbiased_and_never_negative() -> None:
    """Of two Gaussians a distance m apart (in deviations): chi2 = exp(m^2) - 1, by 200,000 draws."""
    m = 0.5
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + m
    path = m * x - m**2 / 2
    summands = chi_square(path, 10.0)
    assert summands.min() >= 0
    assert float(summands.mean()) == pytest.approx(math.exp(m**2) - 1, rel=0.02)


def test_the_exponential_goes_on_as_its_tangent() -> None:
    x = f64(-50, 1.9, 2, 3).requires_grad_()
    y = soft_exp(x, 2.0)
    assert close(y.detach(), f64(math.exp(-50), math.exp(1.9), math.exp(2), 2 * math.exp(2)))
    y.sum().backward()
    assert x.grad is not None and close(x.grad, f64(math.exp(-50), math.exp(1.9), math.exp(2), math.exp(2)))
