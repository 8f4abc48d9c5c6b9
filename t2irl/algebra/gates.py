"""Rewards that decide what others are worth: gates and multiplicative penalties. Pure functions of (N,) scores in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from t2irl.errors import RunError


def hard_gate(primary: Tensor, threshold: float | Tensor) -> Tensor:
    """1[r > threshold], (N,): what other rewards are multiplied by (G-RA). An image that the primary reward does not apply to
    passes."""
    return ((primary > threshold) | primary.isnan()).double()


def ramp_gate(primary: Tensor, threshold: float | Tensor, width: float) -> Tensor:
    """sigmoid((r - threshold) / width) in (0, 1); 1 where the primary reward does not apply."""
    return ((primary - threshold) / width).sigmoid().nan_to_num(1.0)


def shortfall(primary: Tensor, threshold: float | Tensor) -> Tensor:
    """max(0, threshold - r), (N,): what a hinge charges for; 0 where the primary reward does not apply."""
    return (threshold - primary).clamp_min(0).nan_to_num(0.0)


def product(primary: Tensor, others: Tensor, strength: float) -> Tensor:
    """r (1 + strength x n), r >= 0: others count only through the primary reward (CRF). NaN of `others` counts as 0."""
    return primary * (1 + strength * others.nan_to_num(0.0))


def penalised(main: Tensor, factors: Tensor, violation_below: float | None = None, cost: float = 0.0) -> Tensor:
    """main x product of factors - cost x 1[any factor < violation_below] (CaRL, arXiv 2504.17838).

    `factors`: (M, N) in [0, 1], NaN where one does not apply, which then is 1. `main`: (N,), at least 0.
    """
    known = factors.nan_to_num(1.0)
    result = main * known.prod(0)
    if violation_below is not None:
        result = result - cost * violations(known, violation_below).double()
    return result


def violations(factors: Tensor, below: float) -> Tensor:
    """(N,) bool: images with a factor below the limit."""
    return (factors.nan_to_num(1.0) < below).any(0)


def check_range(name: str, scores: Tensor, low: float, high: float, why: str, remedy: Iterable[str]) -> None:
    """Raise RunError for a reward with a score outside [low, high]."""
    bad = scores[(scores < low) | (scores > high)]
    if len(bad):
        allowed = f"at least {low:g}" if high == torch.inf else f"in [{low:g}, {high:g}]"
        raise RunError(
            f"reward {name!r} gave {float(bad[0]):g}, but {why} it must be {allowed}; use {' or '.join(remedy)}"
        )
