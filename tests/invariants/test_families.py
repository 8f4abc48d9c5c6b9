"""Ratio 1 at the first update, reference policy and gradients for every model family, on its tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from t2irl.errors import ConfigError
from tests.families import CASES
from tests.invariants.test_sd3 import error, one_update
from tests.invariants.toy import toy_parts, toy_run

Folder = Callable[..., Path]
NEW = [name for name in CASES if name != "sd3"]
DYNAMICS: dict[str, dict[str, Any]] = {
    "flow_sde": {"type": "flow_sde", "noise_level": 0.7},
    "dance_sde": {"type": "dance_sde"},
    "cps": {"type": "cps"},
    "ddim": {"type": "ddim"},
}
PAIRS = [(name, kind) for k, name in enumerate(NEW) for kind in ("ddim", ("flow_sde", "dance_sde", "cps")[k % 3])]
"""Every family with ddim and one more, each kind with several families."""


def changes(folder: Path, name: str, guidance: float, **others: Any) -> dict[str, Any]:
    """8 images of 2 prompts, 4 timesteps of which 3 are trained."""
    rollout = {
        "prompts": 2, "group_size": 4, "steps": 4, "batch_size": 8, "guidance_scale": guidance, "negative_prompt": "a blur",
        "window": {"type": "fixed", "start": 0, "size": 3},
    }  # fmt: skip
    return {"model": {**CASES[name].model, "path": folder}, "rollout": rollout | others.pop("rollout", {}), **others}


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_first_ratios_are_exactly_1(tiny_folder: Folder, name: str, kind: str) -> None:
    """Invariant 9 in float32 with equal batch composition, guided."""
    dynamics = {"dynamics": DYNAMICS[kind]}
    window = {"window": {"type": "fixed", "start": 0, "size": 1}}  # a batch of the update is one of the rollout
    gradient, metrics, _ = one_update(changes(tiny_folder(name), name, 2.0, rollout=dynamics | window))
    assert metrics["policy/log_ratio_first"] == 0.0
    assert metrics["policy/ratio_first"] == 1.0
    assert metrics["policy/approx_kl"] == 0.0
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


@pytest.mark.parametrize("name", NEW)
def test_gradient_checkpointing_and_micro_batches_change_no_gradient(tiny_folder: Folder, name: str) -> None:
    """Less memory, the same numbers; several timesteps of a picture in one call, texts of different lengths."""
    folder = tiny_folder(name)
    plain, metrics, _ = one_update(changes(folder, name, 1.0))
    assert abs(metrics["policy/log_ratio_first"]) < 1e-5
    model = {**CASES[name].model, "path": folder, "gradient_checkpointing": True}
    frugal, _, parts = one_update(changes(folder, name, 1.0) | {"model": model, "update": {"batch_size": 3}})
    assert parts.policy.family.denoiser.is_gradient_checkpointing
    assert error(frugal, plain) < 1e-3


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_matching_stays_within_the_noise_that_the_model_knows(tiny_folder: Folder, name: str) -> None:
    """Levels above the last timestep's are refused; up to it the loss is finite and there is a gradient."""
    matching = {"type": "matching", "range": [0.5, 1.0]}
    rollout = {"prompts": 2, "group_size": 4, "steps": 4, "batch_size": 8}
    tree = {"model": {**CASES[name].model, "path": tiny_folder(name)}, "rollout": {**rollout, "dynamics": matching}}
    tree["rollout"]["window"] = {"type": "fixed"}
    with pytest.raises(ConfigError, match=r"rollout\.dynamics\.range ends at noise level 1.* use a range up to 0\.93"):
        toy_parts(toy_run(tree))
    tree["rollout"]["dynamics"] = {"type": "matching", "range": [0.5, 0.93]}
    gradient, _, _ = one_update(tree, advantages=torch.tensor([1.0, -1.0] * 4))
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())
