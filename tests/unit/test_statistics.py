"""Intervals, paired tests and Holm's correction against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2irl.evaluation.statistics import by_prompt, difference, holm, interval


def test_means_by_prompt_leave_out_what_does_not_apply() -> None:
    table = np.array([[1.0, 3.0], [2.0, math.nan], [math.nan, math.nan]])
    np.testing.assert_array_equal(by_prompt(table), [2.0, 2.0, math.nan])


def test_intervals_cover_at_their_level() -> None:
    """Of 200 samples of 40 skewed values, 95 % intervals hold the true mean in about 95 of 100 cases (BCa falls a little short)."""
    rng = np.random.default_rng(0)
    held = sum(
        found.low <= 1.0 <= found.high
        for found in (interval(rng.exponential(1.0, 40), 0.95, 499, seed) for seed in range(200))
    )
    assert 178 <= held <= 199  # 89 % to 99.5 %; a plain 80 % interval would hold 160


def test_an_interval_of_a_normal_sample_is_the_textbooks() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    found = interval(values, 0.95, 4999, 0)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.mean == pytest.approx(values.mean()) and found.prompts == 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_intervals_of_nothing_of_one_and_of_equal_values() -> None:
    assert interval(np.array([math.nan]), 0.95, 99, 0).prompts == 0
    one = interval(np.array([0.3, math.nan]), 0.95, 99, 0)
    assert (one.mean, one.prompts) == (0.3, 1) and math.isnan(one.low)
    same = interval(np.full(5, 0.25), 0.95, 99, 0)
    assert (same.low, same.mean, same.high) == (0.25, 0.25, 0.25)


def test_equal_seeds_give_equal_intervals() -> None:
    values = np.random.default_rng(2).random(30)
    assert interval(values, 0.9, 299, 7) == interval(values, 0.9, 299, 7)
    assert interval(values, 0.9, 299, 7).low != interval(values, 0.9, 299, 8).low


def test_the_paired_test_is_exact_for_few_prompts() -> None:
    """Five differences of one sign: of 32 sign changes two are as extreme, so p = 2 / 32."""
    first = np.array([0.1, 0.4, 0.2, 0.9, 0.5])
    found = difference(first, first + np.array([0.1, 0.2, 0.3, 0.4, 0.5]), 0.95, 9999, 0)
    assert found.p == pytest.approx(2 / 32)
    assert found.mean.mean == pytest.approx(0.3)


def test_the_paired_test_holds_its_level_and_finds_a_shift() -> None:
    rng = np.random.default_rng(3)
    null = [difference(x, x + rng.normal(0, 1, 25), 0.95, 199, s).p for s, x in enumerate(rng.random((120, 25)))]
    assert sum(p < 0.05 for p in null) <= 13  # 6 expected, standard deviation 2.4
    x = rng.random(25)
    assert difference(x, x + 0.5 + rng.normal(0, 0.5, 25), 0.95, 999, 0).p < 0.01


def test_pairs_with_a_missing_half_are_left_out() -> None:
    first, second = np.array([0.0, 1.0, math.nan, 2.0]), np.array([1.0, 2.0, 5.0, math.nan])
    found = difference(first, second, 0.95, 99, 0)
    assert (found.mean.mean, found.mean.prompts) == (1.0, 2)
    equal = difference(first, first, 0.95, 99, 0)
    assert (equal.p, equal.wilcoxon, equal.mean.mean) == (1.0, 1.0, 0.0)
    assert math.isnan(difference(first[:1], second[:1], 0.95, 99, 0).p)


def test_holms_correction_as_in_a_worked_example() -> None:
    """m = 4: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, none below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    nan = holm([0.02, math.nan, 0.03])
    assert nan[0] == 0.04 and math.isnan(nan[1]) and nan[2] == 0.04


@given(st.lists(st.floats(0, 1), max_size=12))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_holm_never_lowers_and_keeps_the_order(values: list[float]) -> None:
    found = holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, found, strict=True))
    order = np.argsort(values, kind="stable")
    assert all(a <= b for a, b in zip(np.array(found)[order], np.array(found)[order][1:], strict=False))
