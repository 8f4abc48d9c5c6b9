"""DanceGRPO's reverse SDE (arXiv 2505.07818): the marginals of the flow with constant noise."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from t2irl.dynamics.base import Dynamics, euler, per_sample, predictions


class DanceSde(Dynamics):
    """std = eta sqrt(delta), mean = x - v delta - eta^2 delta / (2 t) (x + (1 - t) v).

    Stiff near the data: a step multiplies errors by 1 - eta^2 delta / (2 t^2), unstable beyond a gain of 2
    (see `gain`).
    """

    class Config(Dynamics.Config):
        """Settings."""

        type: Literal["dance_sde"] = "dance_sde"
        noise_level: float = Field(0.3, ge=0)
        """eta; 0 is the ODE. Published: 0.3 for FLUX at shift 3."""

    def mean_std(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        delta = t - t_next
        noise = predictions(x, v, t)[1]
        pull = self.config.noise_level**2 * delta / (2 * t)
        return euler(x, v, t, t_next) - per_sample(pull) * noise, per_sample(self.config.noise_level * delta.sqrt())

    def gain(self, t: Tensor, t_next: Tensor) -> Tensor:
        """eta^2 delta / (2 t^2): at 2 and above, errors off the data manifold grow."""
        return self.config.noise_level**2 * (t - t_next) / (2 * t**2)
