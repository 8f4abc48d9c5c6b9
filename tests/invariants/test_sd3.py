"""The same with a genuine pipeline folder: invariants 9, 31, 33 and 34 on a tiny random StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2irl.batches import updates
from t2irl.launch import launch
from t2irl.monitor import UpdateLog, iteration_metrics
from t2irl.train import Parts, build, update_policy
from t2irl.types import Trajectory
from tests.invariants.toy import PROMPTS, a_batch, advantages_of, toy_parts, toy_rollout, toy_run
from tests.tiny import make_sd3

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with all three text encoders."""
    return make_sd3(tmp_path_factory.mktemp("models") / "sd3", t5=True)


def changes_for(folder: Path, model: Mapping[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    """The toy run's settings with this pipeline as its model; 8 images of 2 prompts."""
    family = {"type": "sd3", "path": folder, "max_sequence_length": 0, **(model or {})}
    rollout = {"prompts": 2, "group_size": 4, "steps": 4, "batch_size": 8, **others.pop("rollout", {})}
    return {"model": family, "rollout": rollout, **others}


def one_update(
    changes: Mapping[str, Any], skip: bool = True, advantages: Tensor | None = None
) -> tuple[Tensor, dict[str, float], Parts]:
    """Gradient (one vector), metrics and parts of the first update."""
    run = toy_run(changes)
    parts = toy_parts(run)
    trajectory: Trajectory = toy_rollout(run, parts)
    if advantages is None:
        advantages = advantages_of(trajectory, parts, run)
    parts.family.work.clear()
    log = UpdateLog(CPU)
    for images in updates(trajectory, advantages, parts.geometry, run.seed, 0, skip):
        update_policy(run, parts, images, trajectory.levels, log)
    moments = [parts.optimizer.adamw.state[p]["exp_avg"] / (1 - 0.9) for p in parts.policy.trained.values()]
    return torch.cat([m.flatten() for m in moments]), log.metrics(), parts


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, of a vector that is not 0."""
    assert expected.norm() > 0
    return ((found - expected).double().norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("model", "others"),
    [
        ({}, {}),
        ({"max_sequence_length": 12}, {}),
        ({"gradient_checkpointing": True}, {}),
        ({"precision": "bf16"}, {}),
        ({}, {"policy": {"tune": {"type": "full"}}}),
        ({}, {"rollout": {"guidance_scale": 4.0, "negative_prompt": "a blur"}}),
    ],
    ids=["lora", "t5", "checkpointing", "bf16", "full", "guidance"],
)
def test_first_ratios_are_exactly_1(folder: Path, model: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Invariant 9, V2: every log-ratio is 0.0 with equal batch composition."""
    gradient, metrics, _ = one_update(changes_for(folder, model, **others))
    assert metrics["policy/log_ratio_first"] == 0.0
    assert metrics["policy/ratio_first"] == 1.0
    assert metrics["policy/approx_kl"] == 0.0
    assert metrics["policy/clip_fraction_high"] == metrics["policy/clip_fraction_low"] == 0.0
    assert bool(gradient.any())


def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    """Less memory, the same numbers."""
    plain, _, _ = one_update(changes_for(folder))
    frugal, _, parts = one_update(changes_for(folder, {"gradient_checkpointing": True}))
    assert parts.policy.family.denoiser.gradient_checkpointing
    assert error(frugal, plain) < 1e-6


def test_accumulation_and_skipping_change_no_gradient(folder: Path) -> None:
    """Invariant 31, V4, three timesteps a pass: micro-batches of 3 and zero-advantage images left out, or neither."""
    window = {"window": {"type": "fixed", "start": 0, "size": 3}}
    advantages = torch.tensor([1.0, 0, -2, 0, 0.5, 0, 0, 1.5])
    whole, _, everything = one_update(changes_for(folder, rollout=window), skip=False, advantages=advantages)
    parted, _, survivors = one_update(
        changes_for(folder, rollout=window, update={"batch_size": 3}), advantages=advantages
    )
    # A random network of this depth amplifies rounding; a wrong share or a lost image would be an error of order 1.
    assert error(parted, whole) < 1e-3
    assert torch.cosine_similarity(parted, whole, dim=0).item() >= 0.999999
    assert everything.family.work["denoiser_backward_images"] == 8 * 3
    assert survivors.family.work["denoiser_backward_images"] == 4 * 3


def test_a_fresh_policy_is_its_reference(folder: Path) -> None:
    """Invariant 34: adapters with B = 0 add nothing to the last bit; after an update they do, and the reference stays."""
    run = toy_run(changes_for(folder, regularizers={"kl": {"type": "kl", "coefficient": 1.0}}))
    parts = toy_parts(run)
    policy, kl, batch = parts.policy, parts.regularizers["kl"], a_batch(run, parts)
    with torch.no_grad():
        own = policy.predict(batch).velocity
        with policy.reference():
            reference = policy.predict(batch).velocity
    assert torch.equal(own, reference)
    first = kl.loss(policy, policy.predict(batch), batch)
    assert first is not None
    assert first.item() == 0.0
    parts.optimizer.backward(parts.algorithm.loss(policy.predict(batch), batch).terms["policy"])
    parts.optimizer.step(parts.clock)
    with torch.no_grad(), policy.reference():
        assert torch.equal(policy.predict(batch).velocity, reference)
    after = kl.loss(policy, policy.predict(batch), batch)
    assert after is not None
    assert after.item() > 0
    assert any(bool(g.any()) for g in torch.autograd.grad(after, list(policy.trained.values())))


def test_only_adapters_move(folder: Path) -> None:
    """Freezing really freezes: no weight of the pipeline changes in an update, every adapter does."""
    run = toy_run(changes_for(folder))
    parts = toy_parts(run)
    before = {n: p.detach().clone() for n, p in parts.family.denoiser.named_parameters()}
    trajectory = toy_rollout(run, parts)
    log = UpdateLog(CPU)
    for _ in range(2):  # the A matrices get a gradient once the B matrices are not 0
        for images in updates(
            trajectory, advantages_of(trajectory, parts, run), parts.geometry, run.seed, 0, skip=True
        ):
            update_policy(run, parts, images, trajectory.levels, log)
    still = {n for n, p in parts.family.denoiser.named_parameters() if torch.equal(p, before[n])}
    # The last block drops the text's output, so its adapter there has nothing to learn from.
    moved = set(parts.policy.trained) - still
    assert still.isdisjoint(moved)
    assert still | set(parts.policy.trained) == set(before)
    assert len(moved) >= 0.9 * len(parts.policy.trained)


def test_guidance_1_skips_the_negative_branch(folder: Path) -> None:
    """Invariant 33: half the rows, the negative prompt not encoded, and the conditional velocity bit for bit."""
    work = {}
    for scale in (1.0, 4.0):
        run = toy_run(changes_for(folder, rollout={"guidance_scale": scale, "negative_prompt": "a blur"}))
        parts = toy_parts(run)
        trajectory = toy_rollout(run, parts)
        work[scale] = parts.family.work["denoiser_forward_images"], parts.family.work["encoded_prompts"]
        x, t, text = trajectory.latents[:, 0], torch.full((8,), 0.7), parts.policy.text(trajectory.groups.texts)
        with torch.no_grad():
            conditional = parts.family.denoise(x, t, text)
            assert torch.equal(parts.policy.velocity(x, t, text), conditional) == (scale == 1)
    assert work == {1.0: (8 * 4, 2), 4.0: (2 * 8 * 4, 3)}


def test_an_iteration_reports_its_omitted_share_and_its_work(folder: Path, tmp_path: Path) -> None:
    """Invariant 13 (what is not trained is said) and V8: every forward, backward, decode, encode and reward call is due."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    data = {"prompts": tmp_path / "prompts.txt", "heldout": tmp_path / "prompts.txt"}
    window = {"window": {"type": "fixed", "start": 0, "size": 2}}
    others = {
        "update": {"per_iteration": 2, "batch_size": 3},
        "run_dir": tmp_path / "run",
        "tracking": {"trackers": ()},
    }
    run = toy_run(changes_for(folder, rollout=window, data=data, **others))
    with launch(run, "never") as ctx:
        parts = build(run, ctx)
        trajectory = toy_rollout(run, parts)
        scores = parts.rewards.score(trajectory.images, trajectory.groups)
        advantages = torch.tensor([1.0, -1.0] * 4)
        log = UpdateLog(CPU)
        for images in updates(trajectory, advantages, parts.geometry, run.seed, 0, skip=True):
            update_policy(run, parts, images, trajectory.levels, log)
        metrics = iteration_metrics(ctx, parts, scores, torch.tensor(trajectory.groups.ids), advantages, log)
    assert metrics["policy/omitted_timesteps"] == pytest.approx(1 - 2 / 4)
    work = {name.removeprefix("work/"): value for name, value in metrics.items() if name.startswith("work/")}
    assert work == {
        "denoiser_forward_calls": 4 + 2 * 2, "denoiser_forward_images": 8 * 4 + 8 * 2, "denoiser_backward_images": 8 * 2,
        "decoded_images": 8, "encoded_prompts": 2, "reward_calls": 1, "scored_images": 8, "moved_parts": 0,
    }  # fmt: skip
