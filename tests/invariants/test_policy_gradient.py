"""Which gradient GRPO follows, and where it settles: invariants 13, 18 and 19 of the algorithms specification.

Expectations are exact wherever they can be: by autograd through affine recursions, or by Gauss-Hermite quadrature through
the library's own advantages, loss and KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from t2irl.advantages import group_advantages
from t2irl.config import Advantage
from t2irl.dynamics.base import kl
from tests.invariants.gaussian import grpo_loss, make, uniform, velocity

PLAIN = Advantage(std="none", floor=0, clip=1e9)
"""Advantages that are the group-centred scores and nothing else."""


# 13. The policy gradient of v = v* + b: data N(1, .25), Flow-SDE .7, ten steps, reward -(x_0 - 2)^2, last step deterministic.
# The specification's numbers are for a last step that takes Flow-SDE's mean without its noise; the library takes an ODE step
# there, whose path derivative is smaller by the factor 1 + a^2 / 2.

LAST_STEP = {"flow_sde": (-1.63352, -1.385, -0.249), "ode": (-1.60147, -1.4015, -0.2)}
"""Dynamics of the last step, without noise -> dJ/db over all steps, over steps 0 to 8, over the last one."""


def gradient_by_step(last: str) -> Tensor:
    """dJ / d b_k at b = 0 for a bias b_k at step k, (10,): exact, by autograd through the recursion of mean and variance."""
    levels, flow = uniform(10), make("flow_sde", noise_level=0.7)
    bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    mean, variance = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for k in range(10):
        t, t_next = levels[k : k + 1], levels[k + 1 : k + 2]
        dynamics = flow if k < 9 else make(last)
        there, std = dynamics.mean_std(mean, velocity(mean, t, 1.0, 0.5) + bias[k], t, t_next)
        beside, _ = dynamics.mean_std(mean + 1, velocity(mean + 1, t, 1.0, 0.5) + bias[k], t, t_next)
        mean, variance = there, (beside - there).squeeze() ** 2 * variance + (std.squeeze() ** 2 if k < 9 else 0)
    (gradient,) = torch.autograd.grad(-((mean.squeeze() - 2) ** 2 + variance), bias)
    return gradient


@pytest.mark.parametrize("last", list(LAST_STEP))
def test_exact_policy_gradient_and_the_share_of_the_last_step(last: str) -> None:
    """Invariant 13, exactly: the untrained last step holds an eighth to a sixth of dJ/db."""
    parts, (full, trained, omitted) = gradient_by_step(last), LAST_STEP[last]
    assert parts.sum().item() == pytest.approx(full, abs=5.1e-6)
    assert parts[:-1].sum().item() == pytest.approx(trained, abs=5.1e-4)
    assert parts[-1].item() == pytest.approx(omitted, abs=5.1e-4)


def test_grpo_estimates_the_policy_gradient_of_the_trained_steps() -> None:
    """Invariant 13: dynamics, advantages and loss of the library, 400,000 trajectories: -1.385 of -1.634, not all of it."""
    count = 400_000
    levels, flow = uniform(10), make("flow_sde", noise_level=0.7)
    generator = torch.Generator().manual_seed(0)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x = torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    log_probs = []
    for k in range(9):
        t, t_next = levels[k].expand(count), levels[k + 1].expand(count)
        mean, std = flow.mean_std(x, velocity(x, t, 1.0, 0.5) + bias, t, t_next)
        x = flow.sample(mean, std, torch.randn(x.shape, generator=generator, dtype=torch.float64)).detach()
        log_probs.append(flow.log_prob(x, mean, std))
    log_prob = torch.cat(log_probs)
    for last, (full, _, omitted) in LAST_STEP.items():
        t, t_next = levels[9].expand(count), levels[10].expand(count)
        final = make(last).mean_std(x, velocity(x, t, 1.0, 0.5), t, t_next)[0]
        reward = -((final.flatten() - 2) ** 2)
        advantage = group_advantages({"r": reward}, {"r": 1.0}, torch.zeros(count, dtype=torch.long), PLAIN)
        loss = grpo_loss(log_prob, log_prob.detach(), advantage.repeat(9), 1 / count)
        (gradient,) = torch.autograd.grad(loss, bias, retain_graph=True)
        # The standard error is 0.0045 (0.002 at 2e6 in the specification).
        assert -gradient.item() == pytest.approx(gradient_by_step(last)[:-1].sum().item(), abs=0.018)
        assert -gradient.item() + omitted == pytest.approx(full, abs=0.018)


# 18 and 19. Bandits: one transition x ~ N(theta, s^2).

S, BETA, START = 0.5, 2.0, 0.3


def log_density(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x), mean and std (n, 1, 1, 1) of the one-step policy: Dance from x = 0 at t = 1 to 0 with v = -theta."""
    dynamics = make("dance_sde", noise_level=S)
    column = torch.zeros(len(x), 1, 1, 1, dtype=torch.float64)
    one, zero = torch.ones(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    mean, std = dynamics.mean_std(column, column - theta, one, zero)
    return dynamics.log_prob(x.view(-1, 1, 1, 1), mean, std), mean, std


def reward_gradient(theta: float, x: Tensor, advantage: Tensor, share: float) -> float:
    """Gradient of the GRPO loss with respect to theta, weights already in the advantages."""
    parameter = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    log_prob = log_density(x, parameter)[0]
    (gradient,) = torch.autograd.grad(grpo_loss(log_prob, log_prob.detach(), advantage, share), parameter)
    return gradient.item()


def penalty_gradient(theta: float) -> float:
    """Gradient of BETA times the library's KL to the policy that starts at START."""
    parameter = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    point = torch.zeros(1, dtype=torch.float64)
    _, mean, std = log_density(point, parameter)
    _, reference, _ = log_density(point, torch.tensor(START, dtype=torch.float64))
    divergence = kl("exact", mean, reference, std, torch.ones(1), mean, reference)
    (gradient,) = torch.autograd.grad(BETA * divergence.sum(), parameter)
    return gradient.item()


def quadrature(group: int) -> tuple[Tensor, Tensor]:
    """Standard normal vectors (n, group) and their weights (n,): exact for polynomials of degree 7 in each entry."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    weights = weights / weights.sum()
    points = torch.tensor(list(product(nodes, repeat=group)), dtype=torch.float64)
    return points, torch.tensor([math.prod(w) for w in product(weights, repeat=group)], dtype=torch.float64)


def known_baseline(theta: float, reward: Callable[[Tensor], Tensor]) -> float:
    """Expected gradient of the loss with the true mean reward as baseline."""
    z, weight = quadrature(1)
    x = theta + S * z.flatten()
    return reward_gradient(theta, x, (reward(x) - (weight * reward(x)).sum()) * weight, 1.0)


def group_baseline(theta: float, reward: Callable[[Tensor], Tensor], group: int) -> float:
    """Expected gradient of the loss with the library's group-centred advantages."""
    z, weight = quadrature(group)
    x = theta + S * z
    ids = torch.arange(len(x)).repeat_interleave(group)
    advantage = group_advantages({"r": reward(x).flatten()}, {"r": 1.0}, ids, PLAIN)
    return reward_gradient(theta, x.flatten(), advantage * weight.repeat_interleave(group), 1 / group)


def fixed_point(gradient: Callable[[float], float]) -> float:
    """Where reward and penalty balance; their gradient is linear in theta, which is checked."""
    at = {theta: gradient(theta) + penalty_gradient(theta) for theta in (0.0, 1.0, 2.0)}
    assert at[2.0] - at[1.0] == pytest.approx(at[1.0] - at[0.0], rel=1e-9)
    return -at[0.0] / (at[1.0] - at[0.0])


LINEAR = 0.8
TARGET = 1.5


def linear(x: Tensor) -> Tensor:
    """r = c x."""
    return LINEAR * x


def quadratic(x: Tensor) -> Tensor:
    """r = -(x - x*)^2."""
    return -((x - TARGET) ** 2)


def test_bandit_with_a_known_baseline() -> None:
    """Invariant 18: theta_0 + c s^2 / beta for r = c x, (2 x* + beta theta_0 / s^2) / (2 + beta / s^2) for -(x - x*)^2."""
    assert fixed_point(lambda theta: known_baseline(theta, linear)) == pytest.approx(
        START + LINEAR * S**2 / BETA, rel=1e-9
    )
    pull = BETA / S**2
    expected = (2 * TARGET + pull * START) / (2 + pull)
    assert fixed_point(lambda theta: known_baseline(theta, quadratic)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_bandit_with_the_groups_mean_as_baseline(group: int) -> None:
    """Invariant 18: the same with the reward's gradient times (G - 1) / G."""
    shrink, pull = (group - 1) / group, BETA / S**2
    expected = START + LINEAR * S**2 * shrink / BETA
    assert fixed_point(lambda theta: group_baseline(theta, linear, group)) == pytest.approx(expected, rel=1e-9)
    expected = (2 * TARGET * shrink + pull * START) / (2 * shrink + pull)
    assert fixed_point(lambda theta: group_baseline(theta, quadratic, group)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bandit_with_normalised_advantages(sign: float) -> None:
    """Invariant 18: theta_0 + sign(c) s kappa_G / beta, whatever |c|; kappa_16 = .95225, so .23806 from theta_0 = 0."""
    group, count = 16, 20_000
    c4 = math.sqrt(2 / (group - 1)) * math.exp(math.lgamma(group / 2) - math.lgamma((group - 1) / 2))
    kappa = math.sqrt((group - 1) / group) * c4
    assert kappa == pytest.approx(0.95225, abs=5e-6)
    assert S * kappa / BETA == pytest.approx(0.23806, abs=5e-6)
    expected = START + sign * S * kappa / BETA
    x = expected + S * torch.randn(count * group, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.arange(count).repeat_interleave(group)
    config = Advantage(std="group", eps=0, clip=1e9)
    advantage = group_advantages({"r": sign * 7.0 * x}, {"r": 1.0}, ids, config)
    total = reward_gradient(expected, x, advantage, 1 / len(x)) + penalty_gradient(expected)
    # Relative standard error of the mean of 20,000 group deviations: 0.18 / sqrt(20,000) = 0.0013.
    assert total == pytest.approx(0.0, abs=4 * 0.0013 * kappa / S)


@pytest.mark.parametrize("group", [2, 3, 4])
@pytest.mark.parametrize("reward", [linear, quadratic])
def test_group_baseline_shrinks_the_gradient(group: int, reward: Callable[[Tensor], Tensor]) -> None:
    """Invariant 19: by (G - 1) / G exactly; leaving one's own reward out of the baseline restores it."""
    theta = 0.7
    true = known_baseline(theta, reward)
    assert group_baseline(theta, reward, group) == pytest.approx(true * (group - 1) / group, rel=1e-9)

    z, weight = quadrature(group)
    x = theta + S * z
    scores = reward(x)
    leave_one_out = scores - (scores.sum(1, keepdim=True) - scores) / (group - 1)
    ids = torch.arange(len(x)).repeat_interleave(group)
    ours = group_advantages({"r": scores.flatten()}, {"r": 1.0}, ids, PLAIN)
    torch.testing.assert_close(leave_one_out.flatten(), ours * group / (group - 1))
    restored = reward_gradient(theta, x.flatten(), leave_one_out.flatten() * weight.repeat_interleave(group), 1 / group)
    assert restored == pytest.approx(true, rel=1e-9)
