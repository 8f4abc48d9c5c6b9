"""Sampling and closed forms: invariants 1-5, 11 and 12 of the algorithms specification, in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from t2irl import registry
from t2irl.dynamics.base import Dynamics, kl, predictions
from tests.invariants.gaussian import affine_steps, make, moments, uniform

STOCHASTIC = ("flow_sde", "dance_sde", "cps")


def random_step(seed: int = 0, size: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, v (B, 2, 3, 3) and t > t_next (B,), float64, away from both ends; every eighth row starts at t = 1."""
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, size, 2, 3, 3, generator=generator, dtype=torch.float64)
    ends = torch.rand(size, 2, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    t, t_next = ends.amax(1), ends.amin(1)
    t[::8] = 1
    return x, v, t, t_next


# 1. Noise 0 is the ODE.


@pytest.mark.parametrize("kind", ["ode", "flow_sde", "dance_sde"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_0_is_eulers_step_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    """Invariant 1: the mean is x - v delta to the last bit and the standard deviation 0."""
    x, v, t, t_next = (tensor.to(dtype) for tensor in random_step())
    dynamics = make(kind) if kind == "ode" else make(kind, noise_level=0)
    mean, std = dynamics.mean_std(x, v, t, t_next)
    assert torch.equal(mean, x - v * (t - t_next).view(-1, 1, 1, 1))
    assert torch.equal(std, torch.zeros(len(t), 1, 1, 1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cps_without_noise_is_eulers_step(dtype: torch.dtype) -> None:
    """Invariant 1: (1 - t') x0 + t' x1 is x - v delta, in another order of operations."""
    x, v, t, t_next = (tensor.to(dtype) for tensor in random_step())
    mean, std = make("cps", noise_level=0).mean_std(x, v, t, t_next)
    torch.testing.assert_close(mean, x - v * (t - t_next).view(-1, 1, 1, 1), rtol=0, atol=2e-6)
    assert not std.any()


SIGMAS = (1.0000, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0)
"""Noise levels of ten timesteps of SD3.5-medium, as Adv-GRPO trains it."""


def test_cps_steps_of_adv_grpo() -> None:
    """The literals of that method's table: s of the two trained steps at eta 0.8, mu of them, and what is left of the noise."""
    dynamics, one = make("cps", noise_level=0.8), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    steps = [torch.tensor([level], dtype=torch.float64) for level in SIGMAS[:3]]
    for (t, t_next), s, clean, noise in zip(
        pairwise(steps), (0.913, 0.869), (0.0399, 0.0867), (0.2967, 0.2822), strict=True
    ):
        # x0 = 1 and x1 = 0, then the other way round
        means = [
            dynamics.mean_std((1 - t) * a * one + t * b * one, (b - a) * one, t, t_next) for a, b in ((1, 0), (0, 1))
        ]
        assert [float(std) for _, std in means] == [pytest.approx(s, abs=5e-4)] * 2
        assert [float(mean) for mean, _ in means] == pytest.approx([clean, noise], abs=1e-4)
        assert float(means[0][1]) ** 2 + float(means[1][0]) ** 2 == pytest.approx(float(t_next) ** 2)
        assert float(means[0][1]) ** 2 / float(t_next) ** 2 == pytest.approx(0.9045, abs=1e-4)  # drawn anew


def test_sampling_adds_the_noise() -> None:
    """x_next = mean + std z, so deterministic dynamics ignore z."""
    x, v, t, t_next = random_step()
    for kind in STOCHASTIC:
        dynamics = make(kind)
        mean, std = dynamics.mean_std(x, v, t, t_next)
        assert bool((std > 0).all())
        torch.testing.assert_close((dynamics.sample(mean, std, v) - mean) / std, v)
    ode = make("ode")
    assert torch.equal(ode.sample(*ode.mean_std(x, v, t, t_next), v), ode.mean_std(x, v, t, t_next)[0])


def test_the_ode_has_no_density() -> None:
    """Asking a deterministic transition for a log-density is an error, not a NaN."""
    x, v, t, t_next = random_step()
    with pytest.raises(ValueError, match="flow_sde, cps or dance_sde"):
        make("ode").log_prob(x, *make("ode").mean_std(x, v, t, t_next))


# 2. Marginals.

TERMINAL = {
    ("ode", None): {10: "0.4308", 100: "0.4926", 1000: "0.49926", 10000: "0.49993"},
    ("flow_sde", 0.7): {10: "0.4795", 100: "0.50039", 1000: "0.50092", 10000: "0.50037"},
    ("dance_sde", 0.3): {10: "0.4416", 100: "0.49376", 1000: "0.49937", 10000: "0.49994"},
    ("cps", 0.8): {10: "0.3518", 100: "0.3951", 1000: "0.4027", 10000: "0.4041"},
}
"""Standard deviation after N steps, to the digits of the specification."""


@pytest.mark.parametrize(("kind", "noise", "steps"), [(k, n, s) for (k, n), table in TERMINAL.items() for s in table])
def test_terminal_distribution_of_gaussian_data(kind: str, noise: float | None, steps: int) -> None:
    """Invariant 2: the mean is 2 for every N, the standard deviation as tabled."""
    dynamics = make(kind) if noise is None else make(kind, noise_level=noise)
    averages, deviations = moments(dynamics, uniform(steps))
    expected = TERMINAL[kind, noise][steps]
    assert averages[-1] == pytest.approx(2.0, abs=1e-9)
    assert f"{deviations[-1]:.{len(expected) - 2}f}" == expected


def test_only_cps_misses_the_data_marginal() -> None:
    """Invariant 2: at N = 10,000 three dynamics are within 1e-3 of 0.5, and CPS is not: it is documented to be biased."""
    error = {
        kind: abs(moments(make(kind) if noise is None else make(kind, noise_level=noise), uniform(10000))[1][-1] - 0.5)
        for kind, noise in TERMINAL
    }
    assert error["ode"] < 1e-3
    assert error["flow_sde"] < 1e-3
    assert error["dance_sde"] < 1e-3
    assert error["cps"] > 0.09
    assert "point-mass posteriors only" in (registry.find("dynamics", "cps").__doc__ or "")


# 3. Dance is Flow with constant noise.


def test_dance_and_flow_are_one_formula() -> None:
    """Invariant 3: at equal sigma the means agree, because (x - (1-t) x0) / t^2 = (x + (1-t) v) / t."""
    x, v, t, t_next = random_step()
    inner = t < 1
    x, v, t, t_next = x[inner], v[inner], t[inner], t_next[inner]
    clean, noise = predictions(x, v, t)
    column = t.view(-1, 1, 1, 1)
    torch.testing.assert_close((x - (1 - column) * clean) / column**2, noise / column, rtol=1e-9, atol=1e-9)
    for row in range(len(t)):
        part = slice(row, row + 1)
        sigma = 0.7 * math.sqrt(t[row] / (1 - t[row]))
        step = x[part], v[part], t[part], t_next[part]
        flow, dance = (
            make("flow_sde", noise_level=0.7).mean_std(*step),
            make("dance_sde", noise_level=sigma).mean_std(*step),
        )
        torch.testing.assert_close(flow, dance, rtol=1e-9, atol=1e-9)


# 4. Coefficients preserved.


def test_cps_keeps_the_noise_level_of_point_mass_data() -> None:
    """Invariant 4: the standard deviation at level t is t at every step, whatever eta."""
    for eta in (0.0, 0.3, 0.8, 1.0):
        levels = uniform(10)
        averages, deviations = moments(make("cps", noise_level=eta), levels, std=0.0)
        assert deviations == pytest.approx(levels[1:].tolist(), abs=1e-12)
        assert averages == pytest.approx([2 * (1 - t) for t in levels[1:].tolist()], abs=1e-12)


def test_flow_sde_carries_excess_noise_of_point_mass_data() -> None:
    """Invariant 4: the tabled standard deviations, and 0 at the end when the last step is deterministic."""
    levels = uniform(10)
    flow, ode = make("flow_sde", noise_level=0.7), make("ode")
    expected = [0.9587, 0.8891, 0.7797, 0.6691, 0.5594, 0.4508, 0.3435, 0.2381, 0.1381, 0.0828]
    deviations = moments(flow, levels, std=0.0)[1]
    assert deviations == pytest.approx(expected, abs=5.1e-5)
    factor = affine_steps(ode, levels, 2.0, 0.0)[0][-1]
    assert deviations[-2] * float(factor) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("steps", [4, 10, 25, 1000])
@pytest.mark.parametrize("start", [1.0, 1 - 1e-7])
def test_flow_sdes_first_step_injects_a_whatever_the_number_of_steps(steps: int, start: float) -> None:
    """Invariant 4: the standard deviation of the first step is a, also when the schedule starts just below 1."""
    t = torch.tensor([start], dtype=torch.float64)
    t_next = torch.tensor([1 - 1 / steps], dtype=torch.float64)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    mean, std = make("flow_sde", noise_level=0.7).mean_std(x, x, t, t_next)
    assert std.item() == pytest.approx(0.7, rel=1e-3)
    assert bool(mean.isfinite().all())


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_a_shifted_schedule_gives_finite_positive_noise(kind: str) -> None:
    """SD3's shift 3 (and t = 1 exactly): every step but CPS's last has a usable density."""
    raw = uniform(10)
    levels = 3 * raw / (1 + 2 * raw)
    x = torch.randn(10, 1, 2, 2, dtype=torch.float64)
    mean, std = make(kind).mean_std(x, x, levels[:-1], levels[1:])
    assert bool(mean.isfinite().all())
    assert bool((std.flatten()[:-1] > 0).all())
    assert (std[-1].item() == 0) == (kind == "cps")


# 5. Stability of Dance.


@pytest.mark.parametrize(("steps", "gain"), [(10, 0.45), (25, 1.125), (50, 2.25)])
def test_dances_last_gain(steps: int, gain: float) -> None:
    """Invariant 5: eta^2 delta / (2 t^2) is eta^2 / (2 t) at the last of N equal steps."""
    levels = uniform(steps)
    found = make("dance_sde", noise_level=0.3).gain(levels[:-1], levels[1:])
    assert found[-1].item() == pytest.approx(gain, rel=1e-9)
    assert found.argmax().item() == steps - 1


@pytest.mark.parametrize("steps", [20, 50, 1000])
def test_gain_is_how_dance_multiplies_errors(steps: int) -> None:
    """Invariant 5: for point-mass data a step's factor is the ODE's minus `gain` times t."""
    levels = uniform(steps)
    dance = make("dance_sde", noise_level=0.3)
    factor = affine_steps(dance, levels, 2.0, 0.0)[0]
    plain = affine_steps(make("ode"), levels, 2.0, 0.0)[0]
    # With x0 = m + e, noise x1 = e / t: the pull is eta^2 delta / (2 t) e / t = gain e.
    torch.testing.assert_close(plain - factor, dance.gain(levels[:-1], levels[1:]), rtol=1e-9, atol=1e-12)


def test_dance_is_stable_where_the_gain_is_small_and_blows_up_where_it_is_not() -> None:
    """Invariant 5: point-mass data, eta = 0.3: fine at N = 10, a standard deviation of 63.8 at N = 1000."""
    assert moments(make("dance_sde", noise_level=0.3), uniform(10), std=0.0)[1][-1] < 0.2
    assert moments(make("dance_sde", noise_level=0.3), uniform(1000), std=0.0)[1][-1] == pytest.approx(63.8, abs=0.05)


# 11. KL.


def test_kl_of_two_gaussians() -> None:
    """Invariant 11: (.3, -.2) against (.1, .4) at s = .3 is 2.2222, in a mean over elements half of it."""
    mean, reference = (
        torch.tensor(values, dtype=torch.float64).view(1, 2, 1, 1) for values in ([0.3, -0.2], [0.1, 0.4])
    )
    std, delta = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    v, v_ref = torch.ones_like(mean), torch.zeros_like(mean) - 0.5

    def found(kind: str) -> float:
        return kl(kind, mean, reference, std, delta, v, v_ref).item()

    normal = torch.distributions.Normal
    by_torch = torch.distributions.kl_divergence(normal(mean, std), normal(reference, std)).sum().item()
    assert found("exact") * 2 == pytest.approx(2.2222, abs=5e-5)
    assert found("exact") * 2 == pytest.approx(by_torch, rel=1e-12)
    assert found("no_dt") == pytest.approx(found("exact") * 0.25, rel=1e-12)
    assert found("mean_mse") == pytest.approx((0.2**2 + 0.6**2) / 2, rel=1e-12)
    assert found("v_mse") == pytest.approx(1.5**2, rel=1e-12)


def test_kl_is_per_sample_and_zero_for_equal_policies() -> None:
    """Rows do not mix, every kind is exactly 0 at equality, and an unknown kind is refused by name."""
    x, v, t, t_next = random_step()
    mean, std = make("cps").mean_std(x, v, t, t_next)
    moved = mean.clone()
    moved[3] += 0.1
    for kind in ("exact", "no_dt", "mean_mse"):
        divergence = kl(kind, moved, mean, std, t - t_next, v, v)
        assert divergence.shape == (len(t),)
        assert divergence.nonzero().flatten().tolist() == [3]
    assert not kl("v_mse", moved, mean, std, t - t_next, v, v).any()
    with pytest.raises(ValueError, match="exact, no_dt, mean_mse, v_mse"):
        kl("reverse", mean, mean, std, t - t_next, v, v)  # type: ignore[arg-type]


def test_kl_in_velocity_form() -> None:
    """Invariant 11: dv^2 delta (1-t) (1+a^2/2)^2 / (2 a^2 t) per element for Flow-SDE; 1.58166e-3 in the example."""
    a, t, delta, dv = 0.7, 0.5, 0.1, 0.1
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    levels = torch.tensor([t], dtype=torch.float64), torch.tensor([t - delta], dtype=torch.float64)
    flow = make("flow_sde", noise_level=a)
    mean, std = flow.mean_std(x, x + dv, *levels)
    reference, _ = flow.mean_std(x, x, *levels)
    found = kl("exact", mean, reference, std, levels[0] - levels[1], x + dv, x).item()
    assert found == pytest.approx(dv**2 * delta * (1 - t) * (1 + a**2 / 2) ** 2 / (2 * a**2 * t), rel=1e-9)
    assert found == pytest.approx(1.58166e-3, abs=5e-9)


# 12. Jacobians.


def slope(dynamics: Dynamics, t: float, t_next: float) -> float:
    """d mean / d v by autograd, the same for all elements of a step."""
    x, v = torch.randn(2, 1, 2, 3, 3, dtype=torch.float64)
    v.requires_grad_()
    levels = torch.tensor([t], dtype=torch.float64), torch.tensor([t_next], dtype=torch.float64)
    mean, std = dynamics.mean_std(x, v, *levels)
    assert not std.requires_grad  # the noise depends on the levels alone
    (gradient,) = torch.autograd.grad(mean.sum(), v)
    assert gradient.std().item() == pytest.approx(0.0, abs=1e-12)
    return gradient[0, 0, 0, 0].item()


@pytest.mark.parametrize(("t", "t_next"), [*pairwise((0.9, 0.8, 0.5, 0.1, 0.0)), (0.7, 0.05)])
def test_jacobians(t: float, t_next: float) -> None:
    """Invariant 12: d mean / d v of every dynamics."""
    delta, a, eta = t - t_next, 0.7, 0.3
    assert slope(make("ode"), t, t_next) == pytest.approx(-delta, rel=1e-12)
    assert slope(make("flow_sde", noise_level=a), t, t_next) == pytest.approx(-(1 + a**2 / 2) * delta, rel=1e-12)
    expected = -delta * (1 + eta**2 * (1 - t) / (2 * t))
    assert slope(make("dance_sde", noise_level=eta), t, t_next) == pytest.approx(expected, rel=1e-12)
    for level in (0.0, 0.8, 1.0):
        std = t_next * math.sin(level * math.pi / 2)
        expected = -t * (1 - t_next) + (1 - t) * math.sqrt(max(t_next**2 - std**2, 0.0))
        assert slope(make("cps", noise_level=level), t, t_next) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_jacobian_of_flow_sdes_first_step() -> None:
    """At t = 1 x1 = x whatever v, so only the Euler part remains."""
    assert slope(make("flow_sde", noise_level=0.7), 1.0, 0.9) == pytest.approx(-0.1, rel=1e-12)
