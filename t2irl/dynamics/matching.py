"""Advantage-weighted matching (AWM, arXiv 2509.25050): finished pictures, noised again, instead of recorded transitions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from t2irl.dynamics.base import Dynamics, Reduction, per_sample, reduce


class Matching(Dynamics):
    """x_t = (1 - t) x0 + t noise, scored by -w(t) ||v - (noise - x0)||^2, the bound on log p(x0) that flow matching trains.

    Pictures are sampled by the ODE. As a transition this is a Gaussian over the velocity: mean v, variance 1 / (2 w). Compared
    with recorded transitions the estimate of the policy gradient averages over all paths that lead to a picture, so it is
    far less noisy; it is a bound's gradient, not the density's. The images of a group share noise and levels: what they have in
    common drops out, since their advantages sum to 0. The density under the sampling weights is not stored, so ratios are
    1 and nothing is clipped, as in the published on-policy form.
    """

    class Config(Dynamics.Config):
        """Settings."""

        type: Literal["matching"] = "matching"
        noise_levels: PositiveInt = 3
        """Noised copies of an image in an update, one in each of as many equal parts of `range`; published: 6."""
        range: tuple[float, float] = (0.5, 1.0)
        """Noise levels [low, high] that are trained, 0 the picture and 1 pure noise."""
        weighting: Literal["uniform", "t", "t2"] = "uniform"
        """w(t): 1, t or t^2. Published as uniform, t * mse and t^2 * mse."""
        guided: bool = False
        """With guidance in the rollout: score the guided velocity. false, as published: the conditional one alone, which
        halves an update's cost."""

        @model_validator(mode="after")
        def _range_is_ordered(self) -> Matching.Config:
            low, high = self.range
            if not 0 <= low < high <= 1:
                raise PydanticCustomError(
                    "range",
                    "range should be [low, high] with 0 <= low < high <= 1, not {found}",
                    {"found": [low, high]},
                )
            return self

    recorded = False
    last_step_has_density = False

    def __init__(self, config: Any):
        super().__init__(config)
        self.guided = config.guided

    def levels(self, uniform: Tensor) -> Tensor:
        """Noise levels (K + 1,) from K uniform numbers: one in each part of `range`, from noisy to clean, then 0."""
        low, high = self.config.range
        parts = torch.arange(len(uniform) - 1, -1, -1, device=uniform.device)
        return torch.cat([low + (high - low) * (parts + uniform) / len(uniform), uniform.new_zeros(1)])

    def rows(self, states: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From the noise of each level and the clean latents (n, K + 1, ...): noised latents, target velocity, t, 0."""
        noise, clean = states[:, :-1], states[:, -1:]
        t = levels[:-1].view(1, -1, 1, 1, 1)
        x = (1 - t) * clean + t * noise
        rows = len(states) * (len(levels) - 1)
        target = (noise - clean).flatten(0, 1)
        return x.flatten(0, 1), target, levels[:-1].repeat(len(states)), levels[-1:].expand(rows)

    def mean_std(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity and 1 / sqrt(2 w)."""
        power = {"uniform": 0, "t": 1, "t2": 2}[self.config.weighting]
        return v, per_sample((2 * t**power) ** -0.5)

    def log_prob(self, x_next: Tensor, mean: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
        """-w ||x_next - mean||^2, without the constants of the Gaussian."""
        return reduce(-(((x_next - mean) / std) ** 2) / 2, reduction)
