"""Denoising diffusion implicit models (arXiv 2010.02502) with noise: the transition of DDPO (arXiv 2305.13301)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from t2irl.dynamics.base import Dynamics, per_sample, predictions


class Ddim(Dynamics):
    """std = eta t_next sqrt(1 - q^2), mean = (1 - t_next) x0 + sqrt(t_next^2 - std^2) x1, q = (1 - t) t_next / (t (1 - t_next)).

    q^2 is the ratio of the two noise-to-signal ratios. In the variance-preserving scale, where a state is divided by
    sqrt(t^2 + (1 - t)^2), this is DDIM's own rule: sigma = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a'), a the cumulative
    alpha. It holds for flow models just as well. The noise level after a step is exact, and with many steps the marginals are
    those of the model; the step to t_next = 0 is deterministic by itself.
    """

    class Config(Dynamics.Config):
        """Settings."""

        type: Literal["ddim"] = "ddim"
        noise_level: float = Field(1.0, ge=0, le=1)
        """eta: 0 is the ODE (deterministic DDIM), 1 the ancestral sampler of DDPM. Published: 1 for Stable Diffusion 1.4."""

    last_step_has_density = False

    def mean_std(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        clean, noise = predictions(x, v, t)
        old_share = (1 - t) * t_next / (t * (1 - t_next))
        new = self.config.noise_level**2 * (1 - old_share**2)
        mean = per_sample(1 - t_next) * clean + per_sample(t_next * (1 - new).sqrt()) * noise
        return mean, per_sample(t_next * new.sqrt())
