"""Launchers: two processes over gloo are one run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.end_to_end.runs import (
    PLUGINS,
    assert_same_run,
    call,
    checkpoints,
    measured,
    metrics,
    saved,
    train,
    two_processes,
)

pytestmark = pytest.mark.slow
OPTIONS = (
    f"--rewards.bright.type={PLUGINS}:PartlyFlat",
    "--iterations=2",
    "--evaluation.images=5",
    "--rollout.batch_size=4",
)


def test_accelerate_launch_runs_the_module(config: Path, run_dir: Path) -> None:
    """One process: the same bits as without it."""
    words = [
        "--cpu",
        "--num_processes=1",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "-m",
        "t2irl",
    ]
    code, _, err = call(sys.executable, "-m", "accelerate.commands.launch", *words, "train", str(config))
    assert code == 0, err
    assert train(config, "--resume=never") == 0
    assert_same_run(run_dir, run_dir.with_name("run-2"), 2)


def test_two_processes_are_one_run(config: Path, run_dir: Path) -> None:
    """The same weights up to rounding, the same rewards and evaluations, the same work in sum, files written once."""
    code, out, err = two_processes(config, *OPTIONS)
    assert code == 0, err
    assert out.count("iteration 2/2") == 1
    assert "2 processes" in out
    two = run_dir.rename(run_dir.with_name("two"))
    assert train(config, *OPTIONS) == 0
    assert checkpoints(two) == checkpoints(run_dir)
    assert {p.name for p in two.iterdir()} == {p.name for p in run_dir.iterdir()}
    assert [line["iteration"] for line in metrics(two)] == [0, 1, 2]
    a, b = saved(two, 2), saved(run_dir, 2)
    assert a.clock == b.clock
    for name, weights in a.weights.items():
        torch.testing.assert_close(weights, b.weights[name], rtol=0, atol=2e-5, msg=name)
    assert any(".lora_B." in name and bool(weights.any()) for name, weights in a.weights.items())
    for x, y in zip(measured(two), measured(run_dir), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            if name.startswith(("work/", "data/", "iteration")) and name != "work/denoiser_forward_calls":
                assert x[name] == y[name], name
            elif name.startswith(("reward/", "heldout/", "advantage/zero")):
                assert x[name] == pytest.approx(y[name], abs=1e-3), name
            elif name == "policy/grad_norm":
                assert x[name] == pytest.approx(y[name], rel=0.02), name


def test_two_processes_continue_what_one_began(config: Path, run_dir: Path) -> None:
    """The number of processes may change."""
    assert train(config, *OPTIONS, "--iterations=1") == 0
    code, out, err = two_processes(config, *OPTIONS)
    assert code == 0, err
    assert "continuing from iteration 1" in out
    assert [line["iteration"] for line in metrics(run_dir)] == [0, 1, 2]


@pytest.mark.parametrize(
    "options, word",
    [
        (["--rollout.group_size=3", "--rollout.prompts=3"], "over 2 processes"),
        (["--model.path=tests"], "model_index.json"),
    ],
)
def test_a_config_error_ends_both(config: Path, run_dir: Path, options: list[str], word: str) -> None:
    """At once, said once, with nothing written."""
    code, _, err = two_processes(config, *options, "--update.per_iteration=1")
    assert code != 0
    assert err.count(word) == 1, err
    assert not run_dir.exists()
