"""Flow-GRPO's reverse SDE (arXiv 2505.05470): the marginals of the flow with noise that fades towards the data."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from t2irl.dynamics.base import Dynamics, euler, per_sample, predictions


class FlowSde(Dynamics):
    """sigma = a sqrt(t / (1 - t)), std = sigma sqrt(delta), drift v + sigma^2 / (2 t) (x + (1 - t) v).

    At t = 1 the denominator 1 - t is replaced by 1 - t_next, so the first step injects a standard deviation of exactly a
    whatever the number of steps.
    """

    class Config(Dynamics.Config):
        """Settings."""

        type: Literal["flow_sde"] = "flow_sde"
        noise_level: float = Field(0.7, ge=0)
        """a; 0 is the ODE. Published: 0.7 for SD3.5, 0.9 for FLUX."""

    def mean_std(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        delta = t - t_next
        # Schedules need not start at exactly 1, so the singularity is met by tolerance, not by equality.
        remaining = torch.where(t > 1 - 1e-6, 1 - t_next, 1 - t)
        variance = self.config.noise_level**2 * t / remaining
        noise = predictions(x, v, t)[1]
        mean = euler(x, v, t, t_next) - per_sample(variance * delta / (2 * t)) * noise
        return mean, per_sample((variance * delta).sqrt())
