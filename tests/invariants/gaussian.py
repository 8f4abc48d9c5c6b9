"""The exactly solvable case: Gaussian data N(m, S^2) in one dimension, in float64.

Its exact velocity is affine in x, so every step of every dynamics is affine too, and mean and variance of a whole
trajectory follow from three numbers a step, without sampling. Also GRPO's loss of bare log-densities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t2irl import registry
from t2irl.algorithms.grpo import Grpo
from t2irl.dynamics.base import Dynamics
from t2irl.types import MicroBatch, Prediction, TextEmbeds


def make(kind: str, **settings: float | str) -> Dynamics:
    """Dynamics by their file name."""
    return registry.build("dynamics", registry.find("dynamics", kind).Config(type=kind, **settings))


def velocity(x: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """The exact velocity E[x1 - x0 | x_t = x] for data N(mean, std^2)."""
    t = t.view(-1, 1, 1, 1)
    k = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
    return -mean + k * (x - (1 - t) * mean)


def uniform(steps: int) -> Tensor:
    """Noise levels 1, 1 - 1/N, ..., 0 in float64."""
    return torch.arange(steps, -1, -1, dtype=torch.float64) / steps


def affine_steps(dynamics: Dynamics, levels: Tensor, mean: float, std: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factor, offset and noise of every step: x_next = factor x + offset + noise z. All steps in one call."""
    t, t_next = levels[:-1], levels[1:]

    def step(x: float) -> tuple[Tensor, Tensor]:
        column = torch.full((len(t), 1, 1, 1), x, dtype=torch.float64)
        return dynamics.mean_std(column, velocity(column, t, mean, std), t, t_next)

    (at_0, noise), (at_1, _), (at_2, _) = step(0.0), step(1.0), step(2.0)
    # An oracle that is not affine would make the recursion below meaningless.
    torch.testing.assert_close(at_2 - at_1, at_1 - at_0, rtol=1e-9, atol=1e-9)
    return (at_1 - at_0).flatten(), at_0.flatten(), noise.flatten()


def moments(dynamics: Dynamics, levels: Tensor, mean: float = 2.0, std: float = 0.5) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of x after every step, from x_1 ~ N(0, 1)."""
    average, variance = 0.0, 1.0
    averages, deviations = [], []
    for factor, offset, noise in zip(*(c.tolist() for c in affine_steps(dynamics, levels, mean, std)), strict=True):
        average, variance = factor * average + offset, factor**2 * variance + noise**2
        averages.append(average)
        deviations.append(math.sqrt(variance))
    return averages, deviations


def grpo_loss(log_prob: Tensor, old: Tensor, advantage: Tensor, share: float, **settings: object) -> Tensor:
    """The library's GRPO loss of transitions given by their log-densities alone."""
    n = len(log_prob)
    nothing = torch.zeros(n, 1, 1, 1)
    batch = MicroBatch(
        nothing,
        nothing,
        torch.ones(n),
        torch.zeros(n),
        old,
        advantage,
        TextEmbeds(nothing[:, 0], nothing[:, 0, 0]),
        share,
        torch.arange(n),
    )
    return Grpo(Grpo.Config(**settings)).loss(Prediction(nothing, nothing, nothing, log_prob), batch).terms["policy"]
