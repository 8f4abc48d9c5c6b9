"""A run that is stopped goes on as if it had not been, and nothing that was saved is ever lost."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

from t2irl.loading import load_run
from t2irl.train import train as train_run
from tests.end_to_end.runs import (
    PLUGINS,
    assert_equal,
    assert_same_run,
    call,
    checkpoints,
    command,
    measured,
    metrics,
    saved,
    snapshot,
    spawn,
    train,
)  # fmt: skip

STATEFUL = (f"--rewards.moody.type={PLUGINS}:Moody", f"--regularizers.fading.type={PLUGINS}:Fading")


def elsewhere(run: Path) -> str:
    """Option for a run beside `run`, for comparison."""
    return f"--run_dir={run.with_name('whole')}"


# N + M iterations equal N, stop, resume, M.


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--policy.tune.type=full", "--regularizers.kl.type=kl"],
        ["--policy.ema=null", "--rollout.window.type=random", "--rollout.window.size=2"],
        [*STATEFUL],
        [
            "--rollout.window.type=sliding",
            "--rollout.window.size=1",
            "--rollout.window.dwell=1",
            "--optimizer.warmup_updates=5",
        ],
        ["--rollout.dynamics.type=matching", "--regularizers.slow.type=kl", "--regularizers.slow.anchor=average"],
    ],
    ids=["lora", "full", "random window", "stateful plugins", "sliding window", "matching"],
)
def test_stopped_and_continued_is_uninterrupted(config: Path, run_dir: Path, options: list[str]) -> None:
    """Weights, average, optimiser, state of plugins, clock and metrics: to the last bit."""
    assert train(config, *options, "--iterations=2") == 0
    assert train(config, *options, "--iterations=4") == 0
    assert train(config, *options, "--iterations=4", elsewhere(run_dir)) == 0
    assert_same_run(run_dir, run_dir.with_name("whole"), 4)
    assert [line["iteration"] for line in metrics(run_dir)] == [0, 1, 2, 3, 4]
    assert not run_dir.with_name("run-2").exists()


def test_state_of_plugins_is_saved(config: Path, run_dir: Path) -> None:
    """The comparison above would not see a state that is neither saved nor used."""
    assert train(config, *STATEFUL) == 0
    state = saved(run_dir, 2).state
    assert state["rewards"]["moody"]["updates"] == 2
    assert state["rewards"]["moody"]["seen"].mean() > 0
    assert state["regularizers"]["fading"]["factor"].item() == pytest.approx(0.9**4)
    assert [line["reward/moody/updates"] for line in metrics(run_dir)[1:]] == [1, 2]


def test_a_complete_run_is_left_as_it_is(config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, "--tracking.trackers=[tensorboard]") == 0
    before = snapshot(run_dir.parent)
    assert train(config, "--tracking.trackers=[tensorboard]", "--resume=auto") == 0
    assert snapshot(run_dir.parent) == before
    assert f"{run_dir} is complete (2 iterations)" in capsys.readouterr().out


def test_never_starts_beside_what_is_there(config: Path, run_dir: Path) -> None:
    assert train(config) == 0
    before = snapshot(run_dir)
    for name in ("run-2", "run-3"):
        assert train(config, "--resume=never") == 0
        assert measured(run_dir.with_name(name)) == measured(run_dir)
    assert snapshot(run_dir) == before


@pytest.mark.parametrize("source", ["run", "run/checkpoints/iteration_000001"])
def test_continuing_in_a_new_folder(config: Path, run_dir: Path, source: str) -> None:
    """From a run or from one of its checkpoints; the old folder stays as it is, the new one is the whole run."""
    assert train(config) == 0
    before = snapshot(run_dir)
    assert train(config, "--iterations=3", f"--resume={run_dir.parent / source}") == 0
    assert snapshot(run_dir) == before
    assert train(config, "--iterations=3", elsewhere(run_dir)) == 0
    assert_same_run(run_dir.with_name("run-2"), run_dir.with_name("whole"), 3)


def test_a_killed_extension_is_finished(config: Path, run_dir: Path) -> None:
    """Checkpoint of iteration 3 there, summary still that of 2 iterations: the next command writes the summary anew."""
    assert train(config) == 0
    old = (run_dir / "summary.json").read_bytes()
    assert train(config, "--iterations=3") == 0
    (run_dir / "summary.json").write_bytes(old)
    shutil.rmtree(run_dir / "export")
    assert train(config, "--iterations=3") == 0
    assert yaml.safe_load((run_dir / "summary.json").read_text())["iterations"] == 3
    assert (run_dir / "export").is_dir()


# Changed settings.


@pytest.mark.parametrize(
    "option, named",
    [
        ("--rollout.guidance_scale=2", "rollout.guidance_scale: 1.0 -> 2.0"),
        ("--policy.tune.rank=8", "policy.tune.rank: 4 -> 8"),
        ("--policy.tune.type=full", "policy.tune.type: lora -> full"),
        ("--seed=1", "seed: 0 -> 1"),
        ("--model.path=assets/tiny-sd3", "model.path: "),
        ("--model.precision=bf16", "model.precision: fp32 -> bf16"),
    ],
)
def test_settings_that_cannot_change(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], option: str, named: str
) -> None:
    assert train(config, "--iterations=1") == 0
    before = snapshot(run_dir.parent)
    capsys.readouterr()
    for resume in ("auto", str(run_dir)):
        assert train(config, option, f"--resume={resume}") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and named in err and "--run_dir" in err
    assert snapshot(run_dir.parent) == before


def test_settings_that_may_change_are_listed(config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, "--iterations=1") == 0
    capsys.readouterr()
    assert train(config, "--iterations=2", "--optimizer.lr=0.125", "--optimizer.weight_decay=0") == 0
    out = capsys.readouterr().out
    assert (
        "optimizer.lr: 0.0002 -> 0.125" in out
        and "iterations: 1 -> 2" in out
        and "rollout" not in out.split("model ")[0]
    )
    assert [line["policy/lr"] for line in metrics(run_dir)[1:]] == [2e-4, 0.125]
    assert load_run([run_dir / "config.yaml"]).optimizer.lr == 0.125


# Damage.


def test_a_damaged_checkpoint_is_passed_over(config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, "--iterations=3", elsewhere(run_dir)) == 0
    assert train(config, "--iterations=3") == 0
    weights = run_dir / "checkpoints" / "iteration_000003" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7] + b"damaged")
    capsys.readouterr()
    assert train(config, "--iterations=3") == 0
    out = capsys.readouterr().out
    assert f"{weights.parent}: weights.safetensors is damaged" in out and "continuing from iteration 2" in out
    assert_same_run(run_dir, run_dir.with_name("whole"), 3)
    assert any("damaged" in text for text in yaml.safe_load((run_dir / "summary.json").read_text())["warnings"])


def test_nothing_but_damaged_checkpoints(config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config) == 0
    for file in run_dir.glob("checkpoints/*/state.pt"):
        file.write_bytes(b"")
    before = snapshot(run_dir.parent)
    assert train(config, "--iterations=3") == 3
    assert snapshot(run_dir.parent) == before
    err = capsys.readouterr().err
    assert f"none of the 2 checkpoints in {run_dir / 'checkpoints'} can be read" in err and "Traceback" not in err


def test_a_reward_that_the_checkpoint_does_not_know(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """State of a reward that is gone is an error that names it, not a traceback."""
    assert train(config, "--iterations=1", *STATEFUL) == 0
    before = snapshot(run_dir.parent)
    assert train(config, "--iterations=2") == 3
    assert "'moody'" in capsys.readouterr().err
    assert snapshot(run_dir.parent) == before


# Signals.


@pytest.mark.parametrize("call_number, iteration", [(1, 0), (3, 0), (5, 1), (6, 1), (9, 2)])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_at_any_time(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], name: str, call_number: int, iteration: int
) -> None:
    """While the base model is evaluated (1), while a rollout is scored, between iterations (6), while the last one is
    scored: saved, said, and continued to the same bits. The learning rate depends on the length of the run.
    """
    interrupting = {"signal": name, "call": call_number, "done": run_dir.parent / "done"}
    options = [
        "--iterations=3", "--optimizer.schedule=linear", "--grids.prompts=1", f"--rewards.bright.type={PLUGINS}:Interrupting",
        *(f"--rewards.bright.{key}={value}" for key, value in interrupting.items()),
        "--monitors.prompts=0",  # which would score pictures as well
    ]  # fmt: skip
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert train(config, *options) == 128 + getattr(signal, name)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert checkpoints(run_dir)[-1] == f"iteration_{iteration:06d}"
    said = capsys.readouterr().err
    assert said.startswith(f"stopped: {name}: the run is saved in {run_dir}") and "same command again" in said
    assert train(config, *options) == 0
    assert train(config, *options, elsewhere(run_dir)) == 0
    assert_same_run(run_dir, run_dir.with_name("whole"), 3)
    assert [line["iteration"] for line in metrics(run_dir)] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_from_outside(config: Path, run_dir: Path, name: str) -> None:
    """A process of its own is stopped after two iterations, and goes on to the end of a shorter run."""
    process = spawn(*command(config, "--iterations=5000", "--evaluation.every=0", "--checkpoints.every=1000"))
    try:
        assert process.stdout is not None
        while "iteration 2/" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 128 + getattr(signal, name), err
    assert f"{name}: saving at the next safe place" in out
    found = re.search(r"stopped: .* is saved in (\S+); give the same command again", err)
    assert found and "Traceback" not in err
    assert checkpoints(run_dir) == [Path(found[1]).name]
    done = int(found[1][-6:])
    total = [f"--iterations={done + 2}", "--evaluation.every=0"]
    assert train(config, *total) == 0
    assert train(config, *total, elsewhere(run_dir)) == 0
    assert_same_run(run_dir, run_dir.with_name("whole"), done + 2)


def test_the_next_free_folder_says_how_to_continue(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command would start a third run, so another one is named."""
    assert train(config, "--iterations=1") == 0
    options = [
        f"--rewards.bright.type={PLUGINS}:Interrupting", "--rewards.bright.call=3", f"--rewards.bright.done={run_dir.parent}/done",
    ]  # fmt: skip
    assert train(config, *options, "--resume=never") == 143
    other = run_dir.with_name("run-2")
    assert f"use --resume auto --run_dir {other} to continue" in capsys.readouterr().err
    assert train(config, *options, "--resume", "auto", "--run_dir", str(other)) == 0
    assert_equal(metrics(other)[-1]["iteration"], 2)


# A full disk.

FULL = """
import resource, sys
from t2irl import checkpoint, cli

def full(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        return save(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

save, checkpoint.save = checkpoint.save, full
sys.exit(cli.main(sys.argv[1:]))
"""
"""The trainer in a process whose files cannot grow beyond 4 KiB while it saves."""


@pytest.mark.slow
def test_a_full_disk_loses_nothing(config: Path, run_dir: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert train(config, "--iterations=2", "--checkpoints.every=2") == 0
    good = snapshot(run_dir / "checkpoints")
    code, _, err = call(sys.executable, "-c", FULL, "train", str(config), "--iterations=4")
    assert code == 3, err
    assert "cannot save" in err and "make room" in err and "iteration_000002" in err and "Traceback" not in err
    assert snapshot(run_dir / "checkpoints") == good
    assert train(config, "--iterations=4") == 0
    assert train(config, "--iterations=4", elsewhere(run_dir)) == 0
    assert_same_run(run_dir, run_dir.with_name("whole"), 4)


def test_train_returns_the_folder(config: Path, run_dir: Path) -> None:
    """As a function: the folder, also when there is nothing left to do."""
    run = load_run([config], ["--iterations=1"])
    assert train_run(run) == run_dir
    assert train_run(run) == run_dir
    assert train_run(run, resume="never") == run_dir.with_name("run-2")
    assert os.listdir(run_dir.parent).count("run-3") == 0
