"""Chi-square divergence of pictures by a discriminator: the formula, densities that are known, and what it does to advantages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from t2irl.regularizers.chi_square_image import penalties
from t2irl.types import Rollout
from tests.invariants.test_algebra_regularizers import with_regularizer
from tests.invariants.toy import toy_parts, toy_rollout, toy_run

IMAGES = {"type": "chi_square_image", "path": None, "coefficient": 0.5, "base_images": 2, "steps": 5}


def test_penalties_by_hand() -> None:
    ratio = torch.tensor([0.0, math.log(2), math.log(4), math.log(5) + 0.2], dtype=torch.float64)
    found, chi2 = penalties(ratio, limit=math.log(5))  # the last one is 5 x 1.2 on the tangent
    assert chi2 == pytest.approx((0 + 1 + 3 + 5) / 4)
    torch.testing.assert_close(found, torch.tensor([0.0, 1, 3, 5], dtype=torch.float64) / 1.5)
    many = torch.cat([torch.full((1,), 9.0), torch.full((198,), math.log(2)), torch.full((1,), -9.0)]).double()
    assert penalties(many, limit=80)[1] == pytest.approx(1, rel=1e-6)  # the outermost image on either side is left out
    found, chi2 = penalties(-ratio, limit=5)
    assert chi2 < 0 and torch.equal(found, (-ratio).exp() - 1)  # nothing to divide by


def test_the_head_finds_the_ratio_of_known_densities() -> None:
    """Two normal distributions half a deviation apart in each of two directions: d = a.x - |a|^2 / 2, chi2 = e^(|a|^2) - 1."""
    _, parts = with_regularizer({**IMAGES, "steps": 60, "hidden": 32, "lr": 1e-2})
    mine: Any = parts.regularizers["mine"]
    shift = torch.tensor([0.5, 0.5, 0, 0])
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2000, 4, generator=generator) + shift, torch.randn(2000, 4, generator=generator)
    head = mine._make(4)
    mine._learn(head, ours, theirs, 2000)
    fresh = torch.randn(2000, 4, generator=generator) + shift
    with torch.no_grad():
        found, exact = head(fresh).double(), fresh @ shift - 0.25
    assert torch.corrcoef(torch.stack([found, exact.double()]))[0, 1] > 0.95
    assert (found - exact).abs().mean() < 0.15
    assert penalties(found, 5.0)[1] == pytest.approx(math.exp(0.5) - 1, rel=0.2)


def scored(run: Any, parts: Any, iteration: int = 0) -> Rollout:
    """A rollout in which two images of each group of four are white on the left: no base model draws that."""
    parts.clock.iteration = iteration  # so that no picture comes twice
    trajectory = toy_rollout(run, parts)
    images = trajectory.images.clone()
    for row, member in enumerate(trajectory.groups.members):
        if member < 2:
            images[row, :, :, : images.shape[-1] // 2] = 255
    trajectory = replace(trajectory, images=images)
    return Rollout(trajectory, {}, torch.tensor(trajectory.groups.ids), 0, iteration)


def shaped(parts: Any, rollouts: list[Rollout]) -> Tensor:
    """What is left of advantages of 0 after the last of some rollouts."""
    for rollout in rollouts:
        found = parts.regularizers["mine"].shape(torch.zeros(16), rollout)
    return found


@pytest.mark.parametrize("dynamics", [{}, {"type": "matching"}], ids=["cps", "matching"])
def test_pictures_that_the_base_model_does_not_draw_lose(dynamics: dict[str, Any]) -> None:
    """In every group, whose sum stays 0; prompts are drawn by the base model once; a resumed run is the same run. A head that knows
    nothing costs nothing.
    """
    changes = {"dynamics": dynamics, "window": {"type": "fixed"}} if dynamics else {}
    run = toy_run({"regularizers": {"mine": IMAGES}, "rollout": changes})
    parts = toy_parts(run)  # but for the white, its policy is the base model
    mine: Any = parts.regularizers["mine"]
    rollouts = [scored(run, parts, k) for k in range(4)]
    first, _ = shaped(parts, rollouts[:1]), shaped(parts, rollouts[1:2])
    assert not first.any() and mine.metrics()["chi2"] > 0
    again, state = toy_parts(run), mine.state_dict()
    again.regularizers["mine"].load_state_dict(copied(state))
    last = shaped(parts, rollouts[2:])
    assert torch.equal(shaped(again, rollouts[2:]), last)
    assert set(mine.base) == {line for rollout in rollouts for line in rollout.ids.tolist()}
    assert all(features.shape[0] == 2 for features in mine.base.values())
    off = torch.tensor([member < 2 for member in rollouts[0].trajectory.groups.members])
    for group in rollouts[3].ids.unique():
        rows = rollouts[3].ids == group
        assert last[rows].sum() == pytest.approx(0, abs=1e-5)
        assert last[rows & off].mean() < 0
    work = parts.family.work.copy()
    shaped(parts, rollouts)
    assert parts.family.work == work and mine.metrics()["auc"] > 0.6


def copied(state: Any) -> Any:
    """As a checkpoint gives it back."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list) else state
