"""What the members of an ensemble disagree about, what a factor may multiply, and what a hinge charges for."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2irl.algebra import config as c
from t2irl.algebra import ensembles, gates
from tests.unit.test_algebra_formulas import NAN, TABLE, close, f64


@pytest.mark.parametrize(
    "measure, expected",
    [
        ("std", (math.sqrt(2 / 3), math.sqrt(8), 1, 0)),
        ("variance", (2 / 3, 8, 1, 0)),
        ("max_pairwise", (2, 6, 2, 0)),
        ("leave_one_out", (1.5, 6, 2, 0)),
    ],
)
def test_disagreement_by_hand(measure: str, expected: tuple[float, ...]) -> None:
    assert close(ensembles.disagreement(TABLE, measure), f64(*expected), 1e-12)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.sampled_from([0, 1]))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_uwo_of_numbers_in_0_1_is_at_least_0_up_to_the_coefficient_that_a_factor_may_have(
    rewards: list[float], ddof: Literal[0, 1]
) -> None:
    """Var <= mean - mean^2 there, so mean - coefficient Var >= 0 for coefficients up to 1 - ddof / K; a little above it is not."""
    most, count = 1 - ddof / len(rewards), len(rewards)
    column, group = torch.tensor(rewards, dtype=torch.float64)[:, None], torch.zeros(1, dtype=torch.int64)
    weights = torch.ones(count, dtype=torch.float64)
    assert float(ensembles.aggregate(c.Uwo(coefficient=most, ddof=ddof), column, weights, group)) >= -1e-12
    worst = torch.tensor([1.0] + [0.0] * (count - 1), dtype=torch.float64)[:, None]
    beyond = c.Uwo(coefficient=most * count / (count - 1) + 0.01, ddof=ddof)
    assert float(ensembles.aggregate(beyond, worst, weights, group)) < 0


def test_a_hinge_charges_for_what_is_missing() -> None:
    assert close(gates.shortfall(f64(0, 1, 3, NAN), 1.0), f64(1, 0, 0, 0))
    assert close(gates.shortfall(f64(0, 1, 3, 3), f64(2, -torch.inf, 4, NAN)), f64(2, 0, 1, 0))
