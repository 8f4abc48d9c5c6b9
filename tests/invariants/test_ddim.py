"""The ddim dynamics: against the scheduler of diffusers, its limits and its marginals."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from t2irl.pipelines.diffusion import level_of
from tests.invariants.gaussian import make, moments, uniform
from tests.invariants.test_dynamics import random_step


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_it_is_the_schedulers_step(eta: float, kind: str) -> None:
    """In the variance-preserving scale, x / sqrt(t^2 + (1 - t)^2), mean and noise are those of DDIMScheduler.step."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type=kind
    )  # fmt: skip
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(20)
    levels = level_of(torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1, dtype=torch.float64)]))
    generator = torch.Generator().manual_seed(3)
    clean, noise, fresh = torch.randn(3, 1, 2, 4, 4, generator=generator, dtype=torch.float64)
    for timestep, t, t_next in zip(scheduler.timesteps, levels[:-1], levels[1:], strict=True):
        x, scale, scale_next = (1 - t) * clean + t * noise, *((s**2 + (1 - s) ** 2).sqrt() for s in (t, t_next))
        a = scheduler.alphas_cumprod[timestep]
        told = noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean
        theirs = scheduler.step(told, timestep, x / scale, eta=eta, variance_noise=fresh).prev_sample
        mean, std = make("ddim", noise_level=eta).mean_std(x, noise - clean, t.view(1), t_next.view(1))
        torch.testing.assert_close((mean + std * fresh) / scale_next, theirs, rtol=1e-6, atol=1e-9)


def test_without_noise_it_is_eulers_step() -> None:
    x, v, t, t_next = random_step()
    mean, std = make("ddim", noise_level=0).mean_std(x, v, t, t_next)
    torch.testing.assert_close(mean, x - v * (t - t_next).view(-1, 1, 1, 1), rtol=0, atol=1e-12)
    assert not std.any()


def test_the_noise_level_is_exact_and_the_last_step_has_none() -> None:
    """mean's share of the old noise and std together are t_next; from pure noise all of it is new with eta 1."""
    x, v, t, t_next = random_step()
    dynamics = make("ddim", noise_level=0.7)
    # A change of the noise by 1 with the clean picture kept: x moves by t, v by 1.
    moved = dynamics.mean_std(x + t.view(-1, 1, 1, 1), v + 1, t, t_next)[0] - dynamics.mean_std(x, v, t, t_next)[0]
    std = dynamics.mean_std(x, v, t, t_next)[1]
    torch.testing.assert_close(
        (moved**2 + std**2).sqrt(), t_next.view(-1, 1, 1, 1).expand_as(moved), rtol=1e-9, atol=1e-12
    )
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert float(make("ddim").mean_std(x[:1], v[:1], one, one * 0.8)[1]) == pytest.approx(0.8)
    mean, std = make("ddim").mean_std(x[:1], v[:1], one * 0.3, zero)
    torch.testing.assert_close(mean, x[:1] - 0.3 * v[:1])
    assert not std.any()


def test_marginals_are_the_models_with_many_steps() -> None:
    """Gaussian data N(2, 0.5^2): the terminal moments tend to the data's, which those of cps do not."""
    averages, deviations = moments(make("ddim"), uniform(10_000))
    assert averages[-1] == pytest.approx(2.0, abs=1e-3)
    assert deviations[-1] == pytest.approx(0.5, abs=1e-3)


def test_it_gives_a_kl_and_a_jacobian() -> None:
    """d mean / d v = -t (1 - t_next) + (1 - t) sqrt(t_next^2 - std^2)."""
    x, v, t, t_next = random_step()
    v.requires_grad_()
    mean, std = make("ddim").mean_std(x, v, t, t_next)
    (slope,) = torch.autograd.grad(mean.sum(), v)
    t, t_next = t.view(-1, 1, 1, 1), t_next.view(-1, 1, 1, 1)
    expected = -t * (1 - t_next) + (1 - t) * (t_next**2 - std**2).sqrt()
    torch.testing.assert_close(slope, expected.expand_as(slope), rtol=1e-9, atol=1e-12)
