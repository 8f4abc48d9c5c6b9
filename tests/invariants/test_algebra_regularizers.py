"""Regularisers of the reward algebra in real updates: chi-square, fine-tuning on reference images, log-determinant diversity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from t2irl.batches import micro_batches, updates
from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.monitor import UpdateLog
from t2irl.train import Parts, update_policy
from t2irl.types import Rollout
from tests.adversaries import write_references
from tests.invariants.toy import PROMPTS, toy_parts, toy_rollout, toy_run, weights_of

NAN = float("nan")


def with_regularizer(config: dict[str, Any], **changes: Any) -> tuple[Run, Parts]:
    """A toy run with one regulariser, its policy a little away from the reference policy."""
    run = toy_run(
        {"regularizers": {"mine": config}, "rollout": {"window": {"type": "fixed", "start": 0, "size": 3}}, **changes}
    )
    parts = toy_parts(run)
    with torch.no_grad():
        for k, p in enumerate(parts.policy.trained.values()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    return run, parts


def regularizer_gradient(run: Run, parts: Parts, batch: int, scores: Tensor | None = None) -> Tensor:
    """Gradient of the regulariser alone over an update of 16 images in micro-batches of `batch`."""
    mine, trajectory = parts.regularizers["mine"], toy_rollout(run, parts)
    scored = Rollout(
        trajectory,
        {"brightness": torch.rand(16) if scores is None else scores},
        torch.tensor(trajectory.groups.ids),
        0,
        0,
    )
    mine.shape(torch.zeros(16), scored)
    images = next(updates(trajectory, torch.ones(16), parts.geometry, run.seed, 0, skip=False))
    for part in micro_batches(images, trajectory.levels, parts.policy, PROMPTS, batch, 1 / (16 * 3)):
        term = mine.loss(parts.policy, parts.policy.predict(part), part)
        if term is not None:
            term.backward()
    mine.after_update(parts.policy, parts.clock)
    grads = [p.grad.flatten().clone() for p in parts.policy.trained.values() if p.grad is not None]
    for p in parts.policy.trained.values():
        p.grad = None
    return torch.cat(grads) if grads else torch.empty(0)


def test_chi_squares_tangent_has_the_gradient_of_the_root() -> None:
    """At the point where it touches, whatever the micro-batches; chi2 from log-densities by hand."""
    run, parts = with_regularizer({"type": "chi_square", "coefficient": 0.5, "logprob_reduction": "sum", "limit": 80})
    mine: Any = parts.regularizers["mine"]
    regularizer_gradient(run, parts, 16)
    found = regularizer_gradient(run, parts, 5)
    trajectory, policy = toy_rollout(run, parts), parts.policy
    images = next(updates(trajectory, torch.ones(16), parts.geometry, run.seed, 0, skip=False))
    batch = next(micro_batches(images, trajectory.levels, policy, PROMPTS, 16, 1 / 48))
    with torch.no_grad(), policy.reference():
        below = policy.predict(batch)
    above = policy.predict(batch)
    kl = ((batch.x_next - below.mean) ** 2 - (batch.x_next - above.mean) ** 2) / (2 * above.std**2)
    path = kl.flatten(1).sum(1).view(16, 3).sum(1)
    chi2 = (path.exp() + (-path).exp() - 2).mean()
    assert mine.last == pytest.approx(float(chi2.detach()), rel=1e-4) and mine.last > 1e-3
    (0.5 * chi2.sqrt()).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.trained.values() if p.grad is not None])
    assert (found - expected).norm() < 1e-3 * expected.norm()
    metrics = mine.metrics()
    assert metrics["far"] == 0 and metrics["chi2"] == pytest.approx(mine.last) and mine.metrics() == {}


def test_chi_square_needs_densities() -> None:
    with pytest.raises(ValueError, match=r"regularizers.mine needs the densities.*matching has not; use flow_sde"):
        toy_run({"regularizers": {"mine": {"type": "chi_square"}}, "rollout": {"dynamics": {"type": "matching"}}})


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Reference images of all prompts but one, and a toy model that encodes them."""
    from tests.invariants.toy import ToyFamily

    def encode_images(self: Any, images: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(images[:, :2], 2).clamp(0.01, 0.99)
        return (small / (1 - small)).log()

    monkeypatch.setattr(ToyFamily, "encode_images", encode_images)
    rng = np.random.default_rng(0)
    files = {t: [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(2)] for t in PROMPTS[1:]}
    return {"index": str(write_references(tmp_path / "references", files))}


def test_sft_does_not_depend_on_micro_batches_and_is_the_matching_loss(pictures: dict[str, Any]) -> None:
    config = {"type": "sft", "references": pictures, "missing": "skip", "images": 6, "coefficient": 0.3, "meter": 5}
    run, parts = with_regularizer(config)
    whole, parted = regularizer_gradient(run, parts, 16), regularizer_gradient(run, parts, 3)
    assert whole.abs().max() > 0 and torch.allclose(whole, parted, rtol=1e-4, atol=1e-7)
    mine: Any = parts.regularizers["mine"]
    trajectory = toy_rollout(run, parts)
    scored = Rollout(trajectory, {}, torch.tensor(trajectory.groups.ids), 0, 0)
    mine.shape(torch.zeros(16), scored)
    assert len(mine.chosen) == 6
    total = torch.zeros(())
    for number, seed in mine.chosen.items():
        prompt = PROMPTS[trajectory.groups.ids[number]]
        clean, noise, t = mine._draw(prompt, seed)
        assert clean.abs().max() < 5 and 0 < t < 1
        v = parts.policy.velocity(((1 - t) * clean + t * noise)[None], t[None], parts.policy.text([prompt]), 1.0)
        total = total + 0.3 * (v[0] - noise + clean).square().mean() / 6
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in parts.policy.trained.values() if p.grad is not None])
    assert torch.allclose(whole, expected, rtol=1e-4, atol=1e-7)


def test_sfts_meter_is_fixed_and_falls_as_it_is_trained_on(pictures: dict[str, Any]) -> None:
    config = {"type": "sft", "references": pictures, "missing": "skip", "images": 16, "coefficient": 100.0}
    run, parts = with_regularizer(config, optimizer={"lr": 3e-3})
    mine: Any = parts.regularizers["mine"]
    trajectory = toy_rollout(run, parts)
    scored = Rollout(trajectory, {}, torch.tensor(trajectory.groups.ids), 0, 0)
    mine.shape(torch.zeros(16), scored)
    before = mine.metrics()["meter"]
    assert mine.metrics()["meter"] == before
    weights = weights_of(parts.policy)
    for iteration in range(8):
        mine.shape(torch.zeros(16), Rollout(trajectory, {}, scored.ids, 0, iteration))
        images = next(updates(trajectory, torch.zeros(16), parts.geometry, run.seed, iteration, skip=False))
        update_policy(run, parts, images, trajectory.levels, UpdateLog(torch.device("cpu")))
    assert mine.metrics()["meter"] < before
    assert any(not torch.equal(weights[n], p) for n, p in parts.policy.trained.items())


def test_sft_on_own_images_takes_those_that_pass() -> None:
    """Without reference images and an image encoder; x_0 are the rollout's own clean latents, whatever the micro-batches."""
    config = {"type": "sft", "passed": {"reward": "brightness", "at": 0.4}, "images": 5, "coefficient": 0.3}
    run, parts = with_regularizer(config)
    scores = torch.rand(16, generator=torch.Generator().manual_seed(4))
    scores[2] = NAN
    mine: Any = parts.regularizers["mine"]
    whole, parted = regularizer_gradient(run, parts, 16, scores), regularizer_gradient(run, parts, 3, scores)
    assert whole.abs().max() > 0 and torch.allclose(whole, parted, rtol=1e-4, atol=1e-7)
    assert mine.metrics() == {"passed": float((scores > 0.4).double().mean())}
    trajectory = toy_rollout(run, parts)
    mine.shape(torch.zeros(16), Rollout(trajectory, {"brightness": scores}, torch.tensor(trajectory.groups.ids), 0, 0))
    assert len(mine.chosen) == 5 and all(scores[n] > 0.4 for n in mine.chosen)
    total = torch.zeros(())
    for number, seed in mine.chosen.items():
        clean, noise, t = mine._draw("", seed, trajectory.final[number])
        text = parts.policy.text([PROMPTS[trajectory.groups.ids[number]]])
        v = parts.policy.velocity(((1 - t) * clean + t * noise)[None], t[None], text, 1.0)
        total = total + 0.3 * (v[0] - noise + clean).square().mean() / 5
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in parts.policy.trained.values() if p.grad is not None])
    assert torch.allclose(whole, expected, rtol=1e-4, atol=1e-7)
    for p in parts.policy.trained.values():
        p.grad = None
    assert regularizer_gradient(run, parts, 16, torch.zeros(16)).numel() == 0  # nothing passes: nothing is learned
    for wrong, said in (
        ({"passed": None}, "neither given"), ({"passed": {"reward": "brightnes", "at": 0}}, "Did you mean 'brightness'"),
        ({"references": {"folder": "x"}}, "both given"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            with_regularizer({**config, **wrong})


def test_sft_refuses_what_it_cannot_do(pictures: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"regularizers.mine has images = 17, but an update has 16 images"):
        with_regularizer({"type": "sft", "references": pictures, "images": 17})
    from t2irl.models.base import ModelFamily
    from tests.invariants.toy import ToyFamily

    monkeypatch.setattr(ToyFamily, "encode_images", ModelFamily.encode_images)
    with pytest.raises(ConfigError, match=r"regularizers.mine: models of type .*do not encode pictures"):
        with_regularizer({"type": "sft", "references": pictures, "missing": "skip"})


DIVERSE = {"type": "diversity_logdet", "path": None, "passed": {"reward": "brightness", "at": 0.4}, "weight": 0.5}


def test_diversity_changes_only_images_that_pass_and_sums_to_zero() -> None:
    run, parts = with_regularizer(DIVERSE)
    trajectory = toy_rollout(run, parts)
    ids, scores = torch.tensor(trajectory.groups.ids), torch.rand(16, generator=torch.Generator().manual_seed(1))
    scores[3] = NAN
    before = torch.randn(16, generator=torch.Generator().manual_seed(2))
    mine: Any = parts.regularizers["mine"]
    after = mine.shape(before, Rollout(trajectory, {"brightness": scores}, ids, 0, 0))
    good = scores > 0.4
    assert torch.equal(after[~good], before[~good]) and not torch.equal(after[good], before[good])
    for group in ids.unique():
        assert float((after - before)[ids == group].sum()) == pytest.approx(0, abs=1e-5)
    assert mine.metrics()["passed"] == float(good.double().mean()) and mine.bandwidth > 0
    again, state = toy_parts(run).regularizers["mine"], mine.state_dict()
    again.load_state_dict(state)
    assert torch.equal(again.shape(before, Rollout(trajectory, {"brightness": scores}, ids, 0, 0)), after)


def test_diversity_may_touch_positive_advantages_alone() -> None:
    run, parts = with_regularizer({**DIVERSE, "only": "positive", "bandwidth": 0.01, "quality": "advantage"})
    trajectory = toy_rollout(run, parts)
    before = torch.randn(16, generator=torch.Generator().manual_seed(2))
    scored = Rollout(trajectory, {"brightness": torch.ones(16)}, torch.tensor(trajectory.groups.ids), 0, 0)
    after = parts.regularizers["mine"].shape(before, scored)
    assert torch.equal(after[before <= 0], before[before <= 0]) and (after[before > 0] >= 0).all()
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"passed": None}, "odd failures are the most diverse"),
        ({"allow_on_failures": True}, "keep one of them"),
        ({"passed": {"reward": "brightnes", "at": 0}}, "brightnes"),
    ],
)
def test_diversity_needs_a_gate_or_leave_to_do_without(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_regularizer({**DIVERSE, **changes})
