"""Weights and snapshots of the policy: invariants 27 (average), 33 (guidance) and 34 (reference), with real adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from t2irl.batches import updates
from t2irl.errors import ConfigError
from t2irl.launch import check_same
from t2irl.monitor import UpdateLog
from t2irl.policy import Policy
from t2irl.train import update_policy
from t2irl.types import MicroBatch
from tests.invariants.toy import a_batch, advantages_of, toy_parts, toy_rollout, toy_run, weights_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FULL = {"policy": {"tune": {"type": "full"}}}
WINDOW_3 = {"rollout": {"window": {"type": "fixed", "start": 0, "size": 3}}}


# 27. Running average.


def average_after(count: int, ema: Mapping[str, Any], device: str = "cpu") -> Tensor:
    """The average that starts at 0 after `count` updates at which the trained weights are 1."""
    policy = toy_parts(toy_run({"policy": {"ema": ema}}), device).policy
    assert policy.average is not None
    for name, p in policy.trained.items():
        p.data.fill_(1)
        policy.average[name].zero_()
    for n in range(count):
        policy.after_update(n)
    return torch.cat([tensor.flatten() for tensor in policy.average.values()])


@pytest.mark.parametrize("device", DEVICES)
def test_average_of_a_constant(device: str) -> None:
    """Invariant 27: e_n = theta + d^n (e_0 - theta); d = .9, n = 20 gives .878423."""
    found = average_after(20, {"decay": 0.9, "warmup": False}, device)
    torch.testing.assert_close(found, torch.full_like(found, 1 - 0.9**20))
    assert found[0].item() == pytest.approx(0.878423, abs=1e-6)


def test_average_with_warm_up() -> None:
    """The decay of update n is min((1 + n) / (10 + n), decay)."""
    expected = 1 - math.prod(min((1 + n) / (10 + n), 0.5) for n in range(12))
    assert average_after(12, {"decay": 0.5, "warmup": True})[0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [{}, FULL], ids=["lora", "full"])
def test_swapping_the_average_in_and_out_restores_every_bit(changes: Mapping[str, Any], device: str) -> None:
    """Invariant 27: inside the average draws, outside the trained weights are what they were, also after an error."""
    run = toy_run(changes)
    parts = toy_parts(run, device)
    policy, batch = parts.policy, a_batch(run, parts)
    assert policy.average is not None
    with torch.no_grad():
        for p in policy.trained.values():
            p.add_(0.1)
    before, storage = weights_of(policy), {n: p.data_ptr() for n, p in policy.trained.items()}
    own = velocity_of(policy, batch)
    with policy.averaged():
        assert all(torch.equal(p, policy.average[n]) for n, p in policy.trained.items())
        assert not torch.equal(velocity_of(policy, batch), own)
    with pytest.raises(ValueError, match="inside"), policy.averaged(), policy.reference():
        raise ValueError("inside")
    for name, p in policy.trained.items():
        assert torch.equal(p, before[name])
        assert p.data_ptr() == storage[name]
    assert torch.equal(velocity_of(policy, batch), own)


def test_fused_adapters_are_the_same_function_and_leave_no_trace() -> None:
    """Equal within rounding, also of the average, without the adapters' own layers; afterwards every bit is back."""
    run = toy_run()
    parts = toy_parts(run)
    policy, batch = parts.policy, a_batch(run, parts)
    with torch.no_grad():
        for p in policy.trained.values():
            p.add_(0.1)
    layers = [m for m in parts.family.denoiser.modules() if isinstance(m, LoraLinear)]
    plain = [m.get_base_layer().weight.clone() for m in layers]
    own, before = velocity_of(policy, batch), weights_of(policy)
    for weights in (nullcontext, policy.averaged):
        with weights():
            separate = velocity_of(policy, batch)
            with policy.fused():
                assert all(m.disable_adapters for m in layers)
                torch.testing.assert_close(velocity_of(policy, batch), separate, rtol=1e-5, atol=1e-6)
    with policy.reference():
        reference = velocity_of(policy, batch)
        assert not torch.equal(reference, own)
        with policy.fused():
            assert torch.equal(velocity_of(policy, batch), reference)
        assert torch.equal(velocity_of(policy, batch), reference)
    with pytest.raises(ValueError, match="inside"), policy.fused():
        raise ValueError("inside")
    assert all(torch.equal(m.get_base_layer().weight, w) for m, w in zip(layers, plain, strict=True))
    assert all(torch.equal(p, before[n]) for n, p in policy.trained.items())
    assert torch.equal(velocity_of(policy, batch), own)
    for layer in layers:  # in bf16 a small change would be rounded away
        layer.get_base_layer().to(torch.bfloat16)
    with policy.fused():
        assert not any(m.disable_adapters for m in layers)


@pytest.mark.parametrize("size", [16, 4, 1])
def test_the_average_moves_once_per_update_whatever_the_accumulation(size: int) -> None:
    """Invariant 27: one, four or sixteen micro-batches, one step of the average."""
    run = toy_run({"update": {"batch_size": size}, "policy": {"ema": {"decay": 0.9, "warmup": False}}})
    parts = toy_parts(run)
    average = parts.policy.average
    assert average is not None
    for tensor in average.values():
        tensor.zero_()  # apart from the weights, so that a step too many shows
    trajectory = toy_rollout(run, parts)
    images = next(updates(trajectory, advantages_of(trajectory, parts, run), parts.geometry, run.seed, 0, skip=False))
    update_policy(run, parts, images, trajectory.levels, UpdateLog(parts.family.device))
    for name, p in parts.policy.trained.items():
        torch.testing.assert_close(average[name], 0.1 * p.detach())


def test_evaluation_weights_do_not_leak_into_training() -> None:
    """Without an average, `averaged` draws with the trained weights."""
    run = toy_run({"policy": {"ema": None}})
    parts = toy_parts(run)
    batch = a_batch(run, parts)
    own = velocity_of(parts.policy, batch)
    with parts.policy.averaged():
        assert torch.equal(velocity_of(parts.policy, batch), own)


def velocity_of(policy: Policy, batch: MicroBatch) -> Tensor:
    """The policy's velocity, without gradient."""
    with torch.no_grad():
        return policy.predict(batch).velocity


# 33. Guidance.


def test_guidance_1_skips_the_negative_branch() -> None:
    """Invariant 33: one denoiser row per image, the negative prompt is not even encoded, bit for bit the conditional."""
    run = toy_run({"rollout": {"negative_prompt": "a blur"}})
    parts = toy_parts(run)
    trajectory = toy_rollout(run, parts)
    work = parts.family.work
    assert work["denoiser_forward_images"] == 16 * 5
    assert work["denoiser_forward_calls"] == 5
    assert work["encoded_prompts"] == len(trajectory.groups.prompts) == 4
    x, t = trajectory.latents[:, 0], torch.full((16,), 0.7)
    text = parts.policy.text(trajectory.groups.texts)
    with torch.no_grad():
        assert torch.equal(parts.policy.velocity(x, t, text), parts.family.denoise(x, t, text))


def test_guidance_is_the_same_in_both_phases() -> None:
    """Invariant 33: v_null + w (v - v_null) in rollout and update; another w would change every ratio."""
    run = toy_run({"rollout": {"guidance_scale": 3.0, "negative_prompt": "a blur"}})
    parts = toy_parts(run)
    batch = a_batch(run, parts)
    work = parts.family.work
    assert work["denoiser_forward_images"] == 2 * 16 * 5
    assert work["encoded_prompts"] == 5
    policy = parts.policy
    with torch.no_grad():
        null = policy.text(["a blur"])[[0] * 16]
        v_null, v = parts.family.denoise(batch.x, batch.t, null), parts.family.denoise(batch.x, batch.t, batch.text)
        torch.testing.assert_close(policy.predict(batch).velocity, v_null + 3.0 * (v - v_null))
        assert torch.equal(policy.predict(batch).log_prob, batch.log_prob)
        policy.guidance_scale = 2.0
        assert not torch.equal(policy.predict(batch).log_prob, batch.log_prob)
    work.clear()
    policy.predict(batch).velocity.sum().backward()
    assert work["denoiser_backward_images"] == 2 * 16


def test_guidance_cannot_change_when_a_run_goes_on(tmp_path: Path) -> None:
    """Invariant 33: continuing with another guidance scale is refused, with both values."""
    run = toy_run({"rollout": {"guidance_scale": 3.0}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")), encoding="utf-8")
    check_same(tmp_path, run)
    with pytest.raises(ConfigError, match=r"rollout.guidance_scale: 3.0 -> 1.0"):
        check_same(tmp_path, toy_run())


# 34. Reference policy.


@pytest.mark.parametrize("kind", ["exact", "no_dt", "mean_mse", "v_mse"])
@pytest.mark.parametrize("changes", [{}, FULL], ids=["lora", "full"])
def test_a_fresh_policy_is_its_reference(changes: Mapping[str, Any], kind: str) -> None:
    """Invariant 34: KL 0 and v == v_ref to the last bit; after one update KL > 0 with a gradient that is not 0."""
    run = toy_run({**changes, "regularizers": {"kl": {"type": "kl", "kind": kind, "coefficient": 2.0}}})
    parts = toy_parts(run)
    policy, kl = parts.policy, parts.regularizers["kl"]
    batch = a_batch(run, parts)
    own = velocity_of(policy, batch)
    with policy.reference():
        reference = velocity_of(policy, batch)
    assert torch.equal(own, reference)
    term = kl.loss(policy, policy.predict(batch), batch)
    assert term is not None
    assert term.item() == 0.0
    parts.optimizer.backward(parts.algorithm.loss(policy.predict(batch), batch).terms["policy"])
    parts.optimizer.step(parts.clock)
    with policy.reference():
        assert torch.equal(velocity_of(policy, batch), reference)
    term = kl.loss(policy, policy.predict(batch), batch)
    assert term is not None
    assert term.item() > 0
    gradients = torch.autograd.grad(term, list(policy.trained.values()))
    assert all(bool(g.any()) for g in gradients)


@pytest.mark.parametrize("changes", [{}, FULL], ids=["lora", "full"])
def test_looking_at_the_reference_does_not_disturb_the_policys_gradient(changes: Mapping[str, Any]) -> None:
    """The reference is switched in between forward and backward: the policy's gradient is what it was."""
    run = toy_run({**changes, "regularizers": {"kl": {"type": "kl", "kind": "exact", "coefficient": 1.0}}})
    parts = toy_parts(run)
    policy, kl, batch = parts.policy, parts.regularizers["kl"], a_batch(run, parts)
    with torch.no_grad():
        for p in policy.trained.values():
            p.add_(0.01)
    weights = list(policy.trained.values())
    alone = torch.autograd.grad(policy.predict(batch).log_prob.sum(), weights)
    prediction = policy.predict(batch)
    term = kl.loss(policy, prediction, batch)
    assert term is not None
    (prediction.log_prob.sum() + 0 * term).backward()
    for gradient, p in zip(alone, weights, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("anchor", ["reference", "average"])
def test_kl_is_the_closed_form_times_the_coefficient(anchor: str) -> None:
    """Against torch's KL of two normal distributions, averaged over transitions and latent elements."""
    term = {"type": "kl", "kind": "exact", "coefficient": 0.3, "anchor": anchor}
    run = toy_run({**WINDOW_3, "regularizers": {"kl": term}})
    parts = toy_parts(run)
    policy, batch = parts.policy, a_batch(run, parts)
    with torch.no_grad():
        for p in policy.trained.values():
            p.add_(0.05)
        policy.after_update(1)  # now the average lies between the reference policy and the policy
        with policy.reference():
            reference = policy.predict(batch)
        with policy.averaged():
            average = policy.predict(batch)
        assert not torch.equal(average.mean, reference.mean)
        prediction, reference = policy.predict(batch), average if anchor == "average" else reference
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(
            normal(prediction.mean, prediction.std), normal(reference.mean, reference.std)
        )
        term = parts.regularizers["kl"].loss(policy, prediction, batch)
    assert term is not None
    assert term.item() == pytest.approx(0.3 * expected.mean().item(), rel=1e-5)
