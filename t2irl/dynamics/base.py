"""The interface of dynamics: a Gaussian transition between two noise levels.

Notation: noise level t in [0, 1] (1 is pure noise), x_t = (1 - t) x0 + t x1, velocity v = x1 - x0; a transition goes from
t to t_next < t and delta = t - t_next. `x` and `v` are (B, C, h, w) float32, `t` and `t_next` (B,) float32.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from t2irl.config import Strict

KLKind = Literal["exact", "no_dt", "mean_mse", "v_mse"]
Reduction = Literal["mean", "sum"]


class Dynamics:
    """Built as `Dynamics(config)`; pure functions of tensors."""

    class Config(Strict):
        """Settings that all dynamics have."""

        type: str
        """File name in `t2irl/dynamics/`, or `package.module:Class`."""

    stochastic = True
    """Whether transitions have a density to train with."""

    recorded = True
    """Whether the rollout's own transitions are trained on. If not, the window is a number of noise levels: `levels` draws them
    and `rows` noises the finished pictures again."""

    guided = True
    """Whether the rollout's guidance is part of the policy that an update scores: it is for recorded transitions."""

    last_step_has_density = True
    """Whether the step to noise level 0 can be stochastic."""

    def __init__(self, config: Any):
        self.config = config

    def levels(self, uniform: Tensor) -> Tensor:
        """Noise levels (K + 1,) to train at, from K uniform numbers; only where transitions are not recorded."""
        raise NotImplementedError

    def rows(self, states: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is scored of each image: x, x_next (n W, C, h, w), t, t_next (n W,).

        `states`: (n, W + 1, C, h, w), from noisy to clean; `levels`: (W + 1,). Here these are the recorded transitions.
        """
        before, after = (x.flatten(0, 1) for x in (states[:, :-1], states[:, 1:]))
        return before, after, levels[:-1].repeat(len(states)), levels[1:].repeat(len(states))

    def mean_std(self, x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, h, w) and standard deviation (B, 1, 1, 1) of x_next given x and v."""
        raise NotImplementedError

    def sample(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """x_next from standard normal `noise`."""
        return mean + std * noise

    def log_prob(self, x_next: Tensor, mean: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Gaussian log-density of `x_next` in float32, (B,): the mean or the sum over latent elements.

        The mean is what the published trainers use: the ratio of two such densities is the likelihood ratio to the power
        1/D, D latent elements.
        """
        return reduce(-0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi), reduction)


def per_sample(t: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return t.view(-1, 1, 1, 1)


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean or sum over all but the first dimension."""
    flat = values.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def kl(kind: KLKind, mean: Tensor, mean_ref: Tensor, std: Tensor, delta: Tensor, v: Tensor, v_ref: Tensor) -> Tensor:
    """Divergence of two transitions of equal `std` from the same state, per sample (B,), averaged over elements.

    exact: ||mean - mean_ref||^2 / (2 std^2), the Kullback-Leibler divergence.
    no_dt: exact times delta, the form of Flow-GRPO's released code (late, large steps weigh more).
    mean_mse: ||mean - mean_ref||^2. v_mse: ||v - v_ref||^2, independent of the dynamics.
    """
    if kind == "v_mse":
        return reduce((v - v_ref) ** 2, "mean")
    squared = (mean - mean_ref) ** 2
    if kind == "mean_mse":
        return reduce(squared, "mean")
    if kind not in ("exact", "no_dt"):
        raise ValueError(f"unknown kind of KL {kind!r}; known: exact, no_dt, mean_mse, v_mse")
    exact = reduce(squared / (2 * std**2), "mean")
    return exact if kind == "exact" else exact * delta


def predictions(x: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The clean latent x0 and the noise x1 that a velocity implies."""
    t = per_sample(t)
    return x - t * v, x + (1 - t) * v


def euler(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One step of the probability-flow ODE, x - v delta; what FlowMatchEulerDiscreteScheduler does."""
    return x - v * per_sample(t - t_next)


def zero_std(t: Tensor) -> Tensor:
    """Standard deviation of a deterministic transition."""
    return torch.zeros_like(per_sample(t))
