"""Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): the noise level after a step is exact."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from t2irl.dynamics.base import Dynamics, Reduction, per_sample, predictions, reduce


class Cps(Dynamics):
    """std = t_next sin(eta pi / 2), mean = (1 - t_next) x0 + sqrt(t_next^2 - std^2) x1.

    Images stay clean at high noise, but the marginals are those of the flow for point-mass posteriors only. The step to
    t_next = 0 is deterministic by itself.
    """

    class Config(Dynamics.Config):
        """Settings."""

        type: Literal["cps"] = "cps"
        noise_level: float = Field(0.8, ge=0, le=1)
        """eta in [0, 1]: 0 is the ODE, 1 draws all noise anew. Published: 0.8."""
        density: Literal["gaussian", "squared_error"] = "gaussian"
        """The transition's Gaussian log-density, or -||x_next - mean||^2 as in the released code, which weighs a step by
        2 std^2; clip ranges do not carry over between the two."""

    last_step_has_density = False

    def mean_std(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        clean, noise = predictions(x, v, t)
        angle = self.config.noise_level * math.pi / 2
        mean = per_sample(1 - t_next) * clean + per_sample(t_next * math.cos(angle)) * noise
        return mean, per_sample(t_next * math.sin(angle))

    def log_prob(self, x_next: Tensor, mean: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
        """As the base class, or the negative squared error."""
        if self.config.density == "squared_error":
            return reduce(-((x_next - mean) ** 2), reduction)
        return super().log_prob(x_next, mean, std, reduction)
