"""Densities, ratios and the clipped objective: invariants 6-10 and 17 of the algorithms specification.

Expectations are exact, by the normal moment-generating function. Invariant 7 (RatioNorm) is tested as an identity of
`mean_std` and `log_prob`: the library's GRPO uses the plain ratio.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from t2irl.advantages import group_advantages
from t2irl.algorithms.grpo import Grpo
from t2irl.config import Advantage
from t2irl.dynamics.base import Dynamics, Reduction
from t2irl.types import MicroBatch, Prediction, TextEmbeds
from tests.invariants.gaussian import grpo_loss, make

# 6 and 7. The ratio's distribution.


def log_ratio_law(reduction: Reduction, count: int, shift: float, s: float) -> tuple[float, float]:
    """Mean and standard deviation of log p_new(x) - log p_old(x) for x ~ p_old; means are `shift` apart in every element.

    x = mean + s z makes the log-ratio affine in z, so value and gradient at one z say everything.
    """
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1, count, 1, 1, generator=generator, dtype=torch.float64)
    new, std = old + shift, torch.full((1, 1, 1, 1), s, dtype=torch.float64)
    dynamics = make("flow_sde")

    def log_ratio(z: Tensor) -> Tensor:
        x = dynamics.sample(old, std, z)
        return (dynamics.log_prob(x, new, std, reduction) - dynamics.log_prob(x, old, std, reduction)).squeeze()

    z = torch.zeros_like(old, requires_grad=True)
    value = log_ratio(z)
    (slope,) = torch.autograd.grad(value, z)
    other = torch.randn(old.shape, generator=generator, dtype=torch.float64)
    assert log_ratio(other).item() == pytest.approx((value + (slope * other).sum()).item(), rel=1e-8)
    return value.item(), slope.norm().item()


def mean_of_exp(mean: float, std: float) -> float:
    """E[exp(y)] for y ~ N(mean, std^2)."""
    return math.exp(mean + std**2 / 2)


@pytest.mark.parametrize(("count", "shift", "s"), [(4096, 0.02, 0.3), (64, 0.1, 0.5), (16, 0.3, 0.2)])
def test_mean_of_the_ratio(count: int, shift: float, s: float) -> None:
    """Invariant 6: exp(-(d^2/2s^2)(1 - 1/D)) for the mean over elements, 1 for the sum."""
    average = log_ratio_law("mean", count, shift, s)
    total = log_ratio_law("sum", count, shift, s)
    assert mean_of_exp(*average) == pytest.approx(math.exp(-(shift**2) / (2 * s**2) * (1 - 1 / count)), rel=1e-9)
    assert mean_of_exp(*total) == pytest.approx(1.0, rel=1e-9)
    assert average[1] == pytest.approx(shift / (s * math.sqrt(count)), rel=1e-9)


def test_mean_of_the_ratio_in_numbers() -> None:
    """Invariant 6: D = 4096, d = .02, s = .3 gives .99778 with a standard deviation of 1.0417e-3."""
    law = log_ratio_law("mean", 4096, 0.02, 0.3)
    assert mean_of_exp(*law) == pytest.approx(0.99778, abs=5e-6)
    assert law[1] == pytest.approx(1.0417e-3, abs=5e-8)


@pytest.mark.parametrize("s", [0.05, 0.3, 1.0])
def test_ratio_norm_makes_the_width_independent_of_the_noise(s: float) -> None:
    """Invariant 7: s log(ratio) + d^2 / (2 s) ~ N(0, d^2 / D); 3.125e-4 for D = 4096, d = .02."""
    count, shift = 4096, 0.02
    mean, std = log_ratio_law("mean", count, shift, s)
    normed = s * mean + shift**2 / (2 * s), s * std
    assert normed[0] == pytest.approx(0.0, abs=1e-12)
    assert normed[1] == pytest.approx(3.125e-4, rel=1e-9)
    assert mean_of_exp(*normed) == pytest.approx(math.exp(shift**2 / (2 * count)), rel=1e-12)


# 8. Sum and mean.


def transition(dynamics: Dynamics, count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x_next (drawn), mean and std of float64 transitions with 2 x 4 x 4 latents."""
    generator = torch.Generator().manual_seed(seed)
    x, v, noise = torch.randn(3, count, 2, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)[:count]
    mean, std = dynamics.mean_std(x, v, t, t - 0.1)
    return dynamics.sample(mean, std, noise), mean, std


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_log_prob_is_the_gaussian_log_density(kind: str) -> None:
    """Invariant 8: against torch's normal distribution; the sum is D times the mean."""
    dynamics = make(kind)
    x, mean, std = transition(dynamics)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1)
    torch.testing.assert_close(dynamics.log_prob(x, mean, std, "mean"), expected.mean(1))
    torch.testing.assert_close(dynamics.log_prob(x, mean, std, "sum"), expected.sum(1))
    moved = mean + 0.01
    log_ratios = {r: dynamics.log_prob(x, moved, std, r) - dynamics.log_prob(x, mean, std, r) for r in ("mean", "sum")}
    torch.testing.assert_close(log_ratios["sum"].exp(), log_ratios["mean"].exp() ** 32)


def test_cps_squared_error_is_the_density_times_twice_the_variance() -> None:
    """The released code's density: equal to 2 s^2 log p up to a constant, so its gradient is a step's, weighted by 2 s^2."""
    gaussian, squared = make("cps"), make("cps", density="squared_error")
    x, mean, std = transition(gaussian)
    mean.requires_grad_()
    for reduction in ("mean", "sum"):
        (true,) = torch.autograd.grad(gaussian.log_prob(x, mean, std, reduction).sum(), mean)
        (weighted,) = torch.autograd.grad(squared.log_prob(x, mean, std, reduction).sum(), mean)
        torch.testing.assert_close(weighted, 2 * std**2 * true)


def test_a_clip_of_the_mean_is_d_times_as_many_nats() -> None:
    """Invariant 8: clipping at exp(+-e) of the mean and at exp(+-D e) of the sum stops the same transitions."""
    count, clip = 32, 1e-3
    nats = torch.linspace(-3, 3, 41, dtype=torch.float64) * count * clip
    active = {}
    for reduction, factor in (("mean", 1 / count), ("sum", 1.0)):
        edge = clip * count * factor
        bounds = 1 - math.exp(-edge), math.exp(edge) - 1
        log_prob = (nats * factor).requires_grad_()
        loss = grpo_loss(
            log_prob, torch.zeros(41, dtype=torch.float64), torch.ones(41, dtype=torch.float64), 1.0, clip_range=bounds
        )
        (gradient,) = torch.autograd.grad(loss, log_prob)
        active[reduction] = (gradient != 0).tolist()
    assert active["mean"] == active["sum"]
    assert active["sum"] == (nats < clip * count * (1 + 1e-9)).tolist()


# 9 and 10. Scored as stored.


def test_first_update_is_plain_policy_gradient() -> None:
    """Invariant 9: with unmoved weights every ratio is exactly 1 in float32 and the gradient is mean(-A grad log p)."""
    dynamics = make("cps")
    x, mean, std = (tensor.float() for tensor in transition(dynamics))
    mean.requires_grad_()
    stored = dynamics.log_prob(x, mean, std).detach()
    advantage = torch.tensor([0.5, -2.0, 1.5])
    log_prob = dynamics.log_prob(x, mean, std)
    assert torch.equal(log_prob, stored)
    (found,) = torch.autograd.grad(grpo_loss(log_prob, stored, advantage, 1 / 3), mean)
    (expected,) = torch.autograd.grad(-(advantage * dynamics.log_prob(x, mean, std)).mean(), mean)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("dtype", "s", "expected"),
    [
        (torch.bfloat16, 0.1, -1.4e-4),
        (torch.bfloat16, 0.02, -3.4e-3),
        (torch.float16, 0.1, -2.2e-6),
        (torch.float16, 0.02, -5.4e-5),
    ],
)
def test_scoring_before_rounding_shifts_the_ratio(dtype: torch.dtype, s: float, expected: float) -> None:
    """Invariant 10: a sample rounded after it was scored looks unlikely; rounded before, it scores the same bit for bit."""
    dynamics, generator = make("cps"), torch.Generator().manual_seed(0)
    mean, noise = torch.randn(2, 8, 16, 64, 64, generator=generator)
    std = torch.full((8, 1, 1, 1), s)
    x = dynamics.sample(mean, std, noise)
    late = dynamics.log_prob(x.to(dtype).float(), mean, std) - dynamics.log_prob(x, mean, std)
    assert late.mean().item() == pytest.approx(expected, rel=0.12)
    stored = x.to(dtype)
    early = dynamics.log_prob(stored.float(), mean, std) - dynamics.log_prob(stored.clone().float(), mean, std)
    assert not early.any()


# 17. PPO's mask.


@pytest.mark.parametrize(
    ("advantage", "ratio", "stopped"),
    [
        (1.0, 1.26, True), (1.0, 1.24, False), (1.0, 0.9, False), (1.0, 0.5, False),
        (-1.0, 0.79, True), (-1.0, 0.81, False), (-1.0, 1.1, False), (-1.0, 2.0, False),
        (0.0, 1.3, True), (0.0, 0.7, True),
    ],
)  # fmt: skip
def test_ppo_mask(advantage: float, ratio: float, stopped: bool) -> None:
    """Invariant 17: beyond the clip range in the advantage's direction there is no gradient, else it is -A ratio."""
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = grpo_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.25, clip_range=(0.2, 0.25))
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert gradient.item() == (0.0 if stopped else pytest.approx(-advantage * ratio * 0.25, rel=1e-12))


def test_clip_metrics_and_range() -> None:
    """The reported shares count exactly the stopped transitions, each side by itself; one number means both sides."""
    nothing = torch.zeros(4, 1, 1, 1)
    old = torch.zeros(4)
    log_prob = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    batch = MicroBatch(nothing, nothing, old, old, old, advantage, TextEmbeds(nothing, nothing), 1.0, old.long())
    algorithm = Grpo(Grpo.Config(clip_range=0.2))
    assert algorithm.clip_range == (0.2, 0.2)
    metrics = algorithm.loss(Prediction(nothing, nothing, nothing, log_prob), batch).metrics
    assert metrics["clip_fraction_high"].tolist() == [1, 0, 0, 0]
    assert metrics["clip_fraction_low"].tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(metrics["ratio"], torch.tensor([1.5, 1.5, 0.5, 0.5]))
    torch.testing.assert_close(metrics["approx_kl"], 0.5 * log_prob.detach() ** 2)
    assert not any(values.requires_grad for values in metrics.values())


def test_advantages_are_clamped_before_the_ratio_is_clipped() -> None:
    """Invariant 17: one reward far out; the loss sees the clamped advantage, at any ratio."""
    rewards = torch.tensor([0.0] * 63 + [1.0])
    config = Advantage(std="group", eps=0, clip=5)
    advantage = group_advantages({"r": rewards}, {"r": 1.0}, torch.zeros(64, dtype=torch.long), config)
    free = group_advantages({"r": rewards}, {"r": 1.0}, torch.zeros(64, dtype=torch.long), Advantage(eps=0, clip=100))
    assert free[-1].item() == pytest.approx(math.sqrt(63))
    assert advantage[-1].item() == 5
    assert torch.equal(advantage[:-1], free[:-1])
