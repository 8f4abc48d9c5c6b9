"""The probability-flow ODE by Euler's rule: deterministic, so it has no density and cannot be trained through."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from t2irl.dynamics.base import Dynamics, Reduction, euler, zero_std


class Ode(Dynamics):
    """x_next = x - v delta."""

    class Config(Dynamics.Config):
        """No settings."""

        type: Literal["ode"] = "ode"

    stochastic = False

    def mean_std(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """The Euler step and 0."""
        return euler(x, v, t, t_next), zero_std(t)

    def log_prob(self, x_next: Tensor, mean: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Always refused: a deterministic transition has no density."""
        raise ValueError("dynamics of type ode have no log-density; choose flow_sde, cps or dance_sde")
