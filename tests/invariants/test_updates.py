"""From a rollout to a gradient: invariants 9 (ratio 1), 10 (scored as stored) and 31 (accumulation, skipping)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from t2irl.batches import micro_batches, updates
from t2irl.monitor import UpdateLog
from t2irl.rollout import Noise
from t2irl.train import Parts, update_policy
from tests.invariants.toy import PROMPTS, advantages_of, toy_parts, toy_rollout, toy_run, weights_of

CPU = torch.device("cpu")
FULL = {"policy": {"tune": {"type": "full"}}}
WINDOW_3 = {"rollout": {"window": {"type": "fixed", "start": 0, "size": 3}}}


def first_gradient(
    changes: Mapping[str, Any], advantages: Tensor | None = None, moved: bool = False
) -> tuple[Tensor, Parts]:
    """The gradient (one vector) of the first update of a run, through `update_policy` itself; `moved` disturbs the weights
    after the rollout, since a fresh policy is its own reference and a KL term then has no gradient.

    AdamW's first moment after one step is (1 - beta_1) times the gradient, since the norm is not clipped here.
    """
    run = toy_run(changes)
    parts = toy_parts(run)
    trajectory = toy_rollout(run, parts)
    if advantages is None:
        advantages = advantages_of(trajectory, parts, run)
    images = next(updates(trajectory, advantages, parts.geometry, run.seed, 0, run.update.skip_zero_advantage))
    generator = torch.Generator().manual_seed(0)
    for p in parts.policy.trained.values() if moved else ():
        p.data.add_(0.02 * torch.randn(p.shape, generator=generator))
    parts.family.work.clear()
    update_policy(run, parts, images, trajectory.levels, UpdateLog(CPU))
    moments = [parts.optimizer.adamw.state[p]["exp_avg"] for p in parts.policy.trained.values()]
    return torch.cat([m.flatten() for m in moments]) / (1 - run.optimizer.betas[0]), parts


# 9. The first ratio.


@pytest.mark.parametrize("dynamics", ["cps", "flow_sde", "dance_sde"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        FULL,
        {"model": {"type": "tests.invariants.toy:ToyFamily", "precision": "bf16"}},
        {"rollout": {"guidance_scale": 3.0, "negative_prompt": "a blur"}},
        {"algorithm": {"type": "grpo", "logprob_reduction": "sum"}},
        {"rollout": {"window": {"type": "fixed", "start": 2, "size": 1}}, "optimizer": {"lr": 1e-3}},
    ],
    ids=["lora", "full", "bf16", "guidance", "sum", "window 2"],
)
def test_first_ratios_are_exactly_1(dynamics: str, changes: Mapping[str, Any]) -> None:
    """Invariant 9, V2: micro-batch = rollout batch, one timestep: every log-ratio is 0.0, nothing is clipped."""
    run = toy_run({**changes, "rollout": {**changes.get("rollout", {}), "dynamics": {"type": dynamics}}})
    parts = toy_parts(run)
    trajectory = toy_rollout(run, parts)
    log = UpdateLog(CPU)
    for images in updates(trajectory, advantages_of(trajectory, parts, run), parts.geometry, run.seed, 0, skip=False):
        update_policy(run, parts, images, trajectory.levels, log)
    metrics = log.metrics()
    assert metrics["policy/log_ratio_first"] == 0.0
    assert metrics["policy/ratio_first"] == 1.0
    assert metrics["policy/approx_kl"] == 0.0
    assert metrics["policy/clip_fraction_high"] == metrics["policy/clip_fraction_low"] == 0.0
    assert metrics["policy/grad_norm"] > 0
    # The same images after the update: now the ratios have moved.
    log = UpdateLog(CPU)
    update_policy(run, parts, images, trajectory.levels, log)
    assert log.metrics()["policy/log_ratio_first"] > 0


def test_first_ratios_of_several_timesteps_in_one_call_are_1_within_rounding() -> None:
    """All timesteps in one forward pass change the batch's shape, so only the last bits may differ: far below the clip."""
    run = toy_run({"rollout": {"window": {"type": "fixed", "start": 0, "size": 3}}, "update": {"batch_size": 5}})
    parts = toy_parts(run)
    trajectory = toy_rollout(run, parts)
    log = UpdateLog(CPU)
    images = next(updates(trajectory, advantages_of(trajectory, parts, run), parts.geometry, run.seed, 0, skip=False))
    update_policy(run, parts, images, trajectory.levels, log)
    assert log.metrics()["policy/log_ratio_first"] < 0.01 * run.algorithm.clip_range


def test_recorded_states_are_float32_and_stored_as_scored() -> None:
    """Invariant 10 in the rollout: under bf16 the recorded x_next is the very tensor that was scored."""
    run = toy_run({"model": {"precision": "bf16"}, "rollout": {"window": {"type": "fixed", "start": 1, "size": 3}}})
    parts = toy_parts(run)
    trajectory = toy_rollout(run, parts)
    assert trajectory.latents.dtype == trajectory.log_probs.dtype == torch.float32
    assert trajectory.latents.shape == (16, 4, 2, 4, 4)
    torch.testing.assert_close(trajectory.levels, torch.tensor([0.8, 0.6, 0.4, 0.2]))
    text = parts.policy.text(trajectory.groups.prompts)[list(trajectory.groups.index)]
    for k in range(3):
        x, t, t_next = trajectory.latents[:, k], trajectory.levels[k].expand(16), trajectory.levels[k + 1].expand(16)
        with torch.no_grad():
            mean, std = parts.policy.dynamics.mean_std(x, parts.policy.velocity(x, t, text), t, t_next)
        again = parts.policy.dynamics.log_prob(trajectory.latents[:, k + 1], mean, std)
        assert torch.equal(again, trajectory.log_probs[:, k])


def test_every_transition_has_noise_of_its_own() -> None:
    """The noise that leads from one recorded state to the next is its image's draw of that timestep, and only that."""
    run = toy_run({"rollout": {"window": {"type": "fixed", "start": 1, "size": 3}}})
    parts = toy_parts(run)
    trajectory = toy_rollout(run, parts)
    draws = Noise(run.seed, 0).draw(trajectory.groups, 4, (2, 4, 4))
    text = parts.policy.text(trajectory.groups.texts)
    for k in range(3):
        x, t, t_next = trajectory.latents[:, k], trajectory.levels[k].expand(16), trajectory.levels[k + 1].expand(16)
        with torch.no_grad():
            mean, std = parts.policy.dynamics.mean_std(x, parts.policy.velocity(x, t, text), t, t_next)
        torch.testing.assert_close((trajectory.latents[:, k + 1] - mean) / std, draws[:, k + 1], rtol=1e-4, atol=1e-4)
    flat = draws.flatten(0, 1).flatten(1)
    similar = torch.corrcoef(flat) - torch.eye(len(flat))
    assert similar.abs().max() < 0.8  # 64 vectors of 32 entries: a repeated one would correlate fully
    again = Noise(run.seed, 1).draw(trajectory.groups, 4, (2, 4, 4))
    assert not (again == draws).any()


# 31. Accumulation and skipping.


def assert_same_gradient(found: Tensor, expected: Tensor) -> None:
    """V4 in float32: cosine at least 0.999999, relative error at most 1e-5."""
    found, expected = found.double(), expected.double()
    assert expected.norm() > 0
    assert torch.cosine_similarity(found, expected, dim=0).item() >= 0.999999
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-5


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("size", [8, 5, 1])
def test_gradient_does_not_depend_on_the_micro_batch(size: int, kl: bool) -> None:
    """Invariant 31: one pass of 16 images is the same update as several smaller ones, even ones or not."""
    term = {"regularizers": {"kl": {"type": "kl", "kind": "v_mse", "coefficient": 5.0}}} if kl else {}
    whole, _ = first_gradient({**WINDOW_3, **term, **FULL}, moved=kl)
    parted, _ = first_gradient({**WINDOW_3, **term, **FULL, "update": {"batch_size": size}}, moved=kl)
    assert_same_gradient(parted, whole)
    if kl:
        without, _ = first_gradient({**WINDOW_3, **FULL}, moved=kl)
        assert (whole - without).norm() > 0.1 * whole.norm()


@pytest.mark.parametrize("size", [16, 3])
def test_skipping_zero_advantages_leaves_the_gradient_exactly_what_it_was(size: int) -> None:
    """Invariant 31, V4: half of the images carry no signal; they cost no pass, and the survivors gain no weight."""
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(0))
    advantages[[0, 1, 2, 3, 6, 9, 10, 15]] = 0
    kept, all_images = first_gradient({**WINDOW_3, "update": {"skip_zero_advantage": False}}, advantages)
    skipped, survivors = first_gradient({**WINDOW_3, "update": {"batch_size": size}}, advantages)
    assert_same_gradient(skipped, kept)
    assert all_images.family.work["denoiser_backward_images"] == 16 * 3
    assert survivors.family.work["denoiser_backward_images"] == 8 * 3
    assert survivors.family.work["denoiser_forward_calls"] == -(-8 // size)


def test_an_update_without_any_signal_changes_nothing_but_counts() -> None:
    """All advantages 0: no pass, a gradient of 0, unmoved weights, and still one update on every clock."""
    start = weights_of(toy_parts(toy_run()).policy)
    gradient, parts = first_gradient({}, torch.zeros(16))
    assert not gradient.any()
    assert parts.clock.update == 1
    assert parts.family.work["denoiser_forward_calls"] == 0
    assert all(torch.equal(p, start[n]) for n, p in parts.policy.trained.items())


def test_updates_of_an_iteration_split_the_gradient_evenly() -> None:
    """Two updates of 8 images: each divides by 8, so the mean of their gradients is that of one update of 16."""
    run = toy_run(FULL)
    parts = toy_parts(run)
    trajectory = toy_rollout(run, parts)
    advantages = advantages_of(trajectory, parts, run)
    gradients = []
    for per_iteration in (1, 2):
        geometry = toy_parts(toy_run({**FULL, "update": {"per_iteration": per_iteration}})).geometry
        total = torch.zeros(sum(p.numel() for p in parts.policy.trained.values()))
        for images in updates(trajectory, advantages, geometry, run.seed, 0, skip=True):
            share = 1 / geometry.images_per_update
            for batch in micro_batches(images, trajectory.levels, parts.policy, PROMPTS, 16, share):
                loss = parts.algorithm.loss(parts.policy.predict(batch), batch).terms["policy"]
                grads = torch.autograd.grad(loss, list(parts.policy.trained.values()))
                total += torch.cat([g.flatten() for g in grads]) / per_iteration
        gradients.append(total)
    assert_same_gradient(gradients[1], gradients[0])
