"""The reward rises, and skipping images without signal changes nothing but the time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.end_to_end.runs import PLUGINS, measured, metrics, saved, train

LEARNING = (
    "--evaluation.every=0", "--evaluation.images=24", "--checkpoints.every=100", "--rollout.group_size=8", "--rollout.batch_size=32",
    "--rollout.steps=5", "--rollout.window.size=3", "--update.batch_size=16", "--optimizer.lr=3e-3",
)  # fmt: skip


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_brightness_rises(config: Path, run_dir: Path, tune: str) -> None:
    """Of held-out prompts' pictures, by much more than the pictures of the base model differ from each other."""
    assert train(config, *LEARNING, f"--policy.tune.type={tune}", "--iterations=25") == 0
    lines = metrics(run_dir)
    before, after = lines[0]["heldout/bright"], lines[-1]["heldout/bright"]
    spread = lines[1]["reward/bright/std_within_group"]
    assert spread > 0
    assert after > before + 3 * spread


def test_a_negative_weight_lowers_it(config: Path, run_dir: Path) -> None:
    assert train(config, *LEARNING, "--rewards.bright.weight=-1", "--iterations=25") == 0
    lines = metrics(run_dir)
    assert lines[-1]["heldout/bright"] < lines[0]["heldout/bright"] - 1.5 * lines[1]["reward/bright/std_within_group"]


@pytest.mark.parametrize("batch_size", ["4", "7"])
def test_skipping_images_without_signal_changes_nothing(config: Path, run_dir: Path, batch_size: str) -> None:
    """Up to the rounding of sums in another order."""
    for skip in ("true", "false"):
        options = [f"--rewards.bright.type={PLUGINS}:PartlyFlat", "--iterations=3", f"--update.batch_size={batch_size}"]
        assert train(config, *options, f"--update.skip_zero_advantage={skip}", "--resume=never") == 0
    first, second = (saved(run_dir.with_name(name), 3).weights for name in ("run", "run-2"))
    started = saved(run_dir, 2).weights
    for name, weights in first.items():
        torch.testing.assert_close(weights, second[name], rtol=0, atol=2e-6, msg=name)
    assert max((w - started[name]).abs().max().item() for name, w in first.items()) > 1e-4
    for a, b in zip(measured(run_dir)[1:], measured(run_dir.with_name("run-2"))[1:], strict=True):
        assert a["policy/grad_norm"] == pytest.approx(b["policy/grad_norm"], rel=1e-3)
        assert a["reward/bright/mean"] == pytest.approx(b["reward/bright/mean"], abs=1e-3)
