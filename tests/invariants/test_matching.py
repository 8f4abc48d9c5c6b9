"""Advantage-weighted matching (invariant 23): finished pictures noised again, in place of recorded transitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from t2irl.batches import micro_batches, updates
from t2irl.errors import ConfigError
from t2irl.geometry import Geometry
from t2irl.train import Parts
from t2irl.types import Trajectory
from tests.invariants.test_updates import FULL, assert_same_gradient, first_gradient
from tests.invariants.toy import PROMPTS, a_batch, merged, toy_parts, toy_rollout, toy_run

DEFAULT_WINDOW = {"type": "fixed", "start": 0, "size": None}


def matching(**settings: Any) -> dict[str, Any]:
    """Changes that make a toy run train by matching."""
    return {"rollout": {"dynamics": {"type": "matching", **settings}, "window": DEFAULT_WINDOW}}


def flow_matching_gradient(
    parts: Parts, trajectory: Trajectory, weight: Tensor, power: int = 0, guidance: float | None = None
) -> Tensor:
    """Gradient of mean over images and levels of weight x t^power x mean (v - (noise - x0))^2, written out."""
    policy, levels = parts.policy, trajectory.levels[:-1]
    text = policy.text(trajectory.groups.prompts)[list(trajectory.groups.index)]
    total = torch.zeros(())
    for k, t in enumerate(levels):
        noise, clean = trajectory.latents[:, k], trajectory.final
        v = policy.velocity((1 - t) * clean + t * noise, t.expand(len(clean)), text, guidance)
        total = total + (weight * t**power * (v - (noise - clean)).square().flatten(1).mean(1)).mean() / len(levels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(policy.trained.values()))])


@pytest.mark.parametrize(("weighting", "power"), [("uniform", 0), ("t", 1), ("t2", 2)])
@pytest.mark.parametrize("size", [16, 5])
def test_the_gradient_is_flow_matching_weighted_by_advantages(weighting: str, power: int, size: int) -> None:
    """Advantage 1 minimises the error at the picture, -1 maximises it, 0 costs nothing."""
    changes = merged({**matching(weighting=weighting), **FULL}, {"update": {"batch_size": size}})
    run = toy_run(changes)
    parts = toy_parts(run)
    trajectory = toy_rollout(run, parts)
    for advantages in (torch.ones(16), torch.randn(16, generator=torch.Generator().manual_seed(3))):
        found, _ = first_gradient(changes, advantages)
        assert_same_gradient(found, flow_matching_gradient(parts, trajectory, advantages, power))
    nothing, idle = first_gradient(changes, torch.zeros(16))
    assert not nothing.any()
    assert idle.family.work["denoiser_forward_calls"] == 0


@pytest.mark.parametrize(("guided", "scored"), [(False, 1.0), (True, 3.0)])
def test_guidance_of_the_rollout_enters_the_update_on_request(guided: bool, scored: float) -> None:
    """By default the conditional branch alone is trained, on pictures sampled with guidance; and nothing else is called."""
    changes = merged({**matching(guided=guided), **FULL}, {"rollout": {"guidance_scale": 3.0}})
    run = toy_run(changes)
    parts = toy_parts(run)
    trajectory = toy_rollout(run, parts)
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(3))
    found, learner = first_gradient(changes, advantages)
    assert_same_gradient(found, flow_matching_gradient(parts, trajectory, advantages, guidance=scored))
    other = flow_matching_gradient(parts, trajectory, advantages, guidance=4.0 - scored)
    assert (found - other).norm() > 0.1 * found.norm()
    assert learner.family.work["denoiser_backward_images"] == 16 * len(trajectory.levels[:-1]) * (2 if guided else 1)


def test_pictures_are_those_of_the_ode() -> None:
    """No noise enters the rollout: the finished pictures are those of an empty window."""
    run = toy_run(matching())
    plain = toy_run()
    parts = toy_parts(run)
    trained = toy_rollout(run, parts)
    parts.geometry = Geometry.of(plain, 1)
    reference = toy_rollout(plain, toy_parts(plain))
    assert trained.latents.shape == (16, 4, 2, 4, 4)
    assert torch.equal(trained.latents[:, -1], trained.final)
    assert trained.log_probs.isnan().all()
    assert not torch.equal(trained.final, reference.final)  # which took a stochastic step


def test_a_group_shares_noise_and_levels_cover_the_range() -> None:
    """What the images of a group have in common drops out, since their advantages sum to 0."""
    run = toy_run(matching(noise_levels=4, range=[0.2, 0.8]))
    parts = toy_parts(run)
    seen = []
    for iteration in range(3):
        parts.clock.iteration = iteration
        trajectory = toy_rollout(run, parts)
        noise = trajectory.latents[:, :-1].view(4, 4, 4, 2, 4, 4)  # prompt, image, level
        assert torch.equal(noise, noise[:, :1].expand_as(noise))
        different = noise[:, 0].flatten(0, 1).flatten(1)
        assert len(different.unique(dim=0)) == 16
        levels = trajectory.levels
        assert levels[-1] == 0
        parts_of_range = ((levels[:-1] - 0.2) / 0.15).floor().tolist()
        assert parts_of_range == [3, 2, 1, 0]
        seen.append(levels)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_ratios_are_1_and_never_clipped() -> None:
    """The density under the sampling weights is not kept: the ratio compares the policy with itself."""
    run = toy_run(matching())
    parts = toy_parts(run)
    batch = a_batch(run, parts)
    assert batch.log_prob is None
    for p in parts.policy.trained.values():
        p.data.add_(0.05)
    loss = parts.algorithm.loss(parts.policy.predict(batch), batch)
    assert torch.equal(loss.metrics["ratio"], torch.ones(48))
    assert not loss.metrics["clip_fraction_low"].any() and not loss.metrics["clip_fraction_high"].any()
    (gradient,) = torch.autograd.grad(loss.terms["policy"], [next(iter(parts.policy.trained.values()))])
    assert gradient.any()


@pytest.mark.parametrize(("kind", "factor"), [("exact", 1.0), ("v_mse", 1.0), ("mean_mse", 1.0)])
def test_the_kl_is_the_distance_of_velocities(kind: str, factor: float) -> None:
    """Two Gaussians over the velocity of variance 1/2: their divergence is the squared distance of the means."""
    term = {"regularizers": {"kl": {"type": "kl", "kind": kind, "coefficient": 2.0}}}
    run = toy_run({**matching(), **term})
    parts = toy_parts(run)
    batch = a_batch(run, parts)
    for p in parts.policy.trained.values():
        p.data.add_(0.05)
    prediction = parts.policy.predict(batch)
    with parts.policy.reference(), torch.no_grad():
        reference = parts.policy.velocity(batch.x, batch.t, batch.text)
    expected = 2.0 * factor * (prediction.velocity - reference).square().mean()
    found = parts.regularizers["kl"].loss(parts.policy, prediction, batch)
    assert found is not None
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"window": {"type": "fixed", "start": 1}}, "rollout.window has no meaning"),
        ({"window": {"type": "random", "size": 2}}, "rollout.window has no meaning"),
        ({"window": DEFAULT_WINDOW, "last_step_stochastic": True}, "last_step_stochastic"),
    ],
)
def test_settings_of_recorded_transitions_are_refused(rollout: Mapping[str, Any], said: str) -> None:
    run = toy_run(merged(matching(), {"rollout": rollout}))
    with pytest.raises(ConfigError, match=said):
        Geometry.of(run, 1)


@pytest.mark.parametrize("bad", [[0.5, 0.5], [0.9, 0.1], [-0.1, 0.5], [0.5, 1.1]])
def test_a_range_must_be_one(bad: list[float]) -> None:
    with pytest.raises(ValidationError, match="low < high"):
        toy_run(matching(range=bad))


def test_updates_share_the_levels() -> None:
    """Two updates of an iteration see different images at the same noise levels."""
    run = toy_run(merged(matching(), {"update": {"per_iteration": 2}}))
    parts = toy_parts(run)
    trajectory = toy_rollout(run, parts)
    halves = list(updates(trajectory, torch.ones(16), parts.geometry, run.seed, 0, skip=False))
    assert [len(half) for half in halves] == [8, 8]
    for half in halves:
        batch = next(micro_batches(half, trajectory.levels, parts.policy, PROMPTS, 8, 1 / 24))
        assert torch.equal(batch.t, trajectory.levels[:-1].repeat(8))
