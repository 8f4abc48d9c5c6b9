"""Runs whose pictures are scored while they are drawn, or are drawn in another process: the same run, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.test_dead_process import LIMIT, start
from tests.end_to_end.runs import PLUGINS, assert_equal, assert_same_run, base_config, measured, metrics, saved, train
from tests.judges import write_qwen

OVERLAP = "--rollout.overlap_scoring=true"
STATEFUL = (f"--rewards.moody.type={PLUGINS}:Moody", "--rollout.batch_size=5")
APART = "--rollout.engine.type=tests.engines:Apart"


def test_an_overlapped_run_is_the_same_run(config: Path, run_dir: Path) -> None:
    """With a reward that learns, counters included; stopped by a signal amid scoring, and continued without overlap."""
    whole = f"--run_dir={run_dir.with_name('whole')}"
    assert train(config, *STATEFUL, "--iterations=3", whole) == 0
    interrupting = f"--rewards.bright.type={PLUGINS}:Interrupting"
    calls = ["--rewards.bright.call=11", f"--rewards.bright.done={run_dir.parent}/done"]
    assert train(config, *STATEFUL, OVERLAP, interrupting, *calls, "--iterations=3", "--checkpoints.every=3") == 143
    assert (run_dir.parent / "done").exists()
    assert 1 < len(metrics(run_dir)) < 4
    assert train(config, *STATEFUL, "--iterations=3") == 0
    assert_same_run(run_dir, run_dir.with_name("whole"), 3)
    overlapped = metrics(run_dir)[1]
    assert overlapped["time/score_hidden_s"] > 0
    stages = ("rollout", "score", "adversary", "update")
    assert overlapped["time/iteration_s"] == pytest.approx(sum(overlapped[f"time/{stage}_s"] for stage in stages))
    assert not any("time/score_hidden_s" in line for line in metrics(run_dir.with_name("whole")))


def test_a_judge_of_pairs_trains_whatever_the_batches(config: Path, run_dir: Path, tmp_path: Path) -> None:
    """Batches cut groups, and some pictures of a group are scored by another reward before the last one is drawn. Evaluations
    and grids go on without a win rate.
    """
    judge = f"{{type: pairwise_judge, path: {write_qwen(tmp_path / 'qwen')}, precision: fp32, answer_mass: 0, opponents: 2}}"
    options = [f"--rewards.pair={judge}", "--rollout.batch_size=6", "--grids.every=1", OVERLAP]
    assert train(config, *options) == 0
    for line in metrics(run_dir)[1:]:
        assert line["reward/pair/mean"] == pytest.approx(0.5, abs=1e-6) and line["reward/pair/std_within_group"] > 0
        assert line["heldout/pair"] is None and line["heldout/bright"] > 0 and line["reward/pair/unanswered"] == 0
    assert saved(run_dir, 2).state["rewards"]["pair"]["iteration"] == 2
    assert (
        train(config, *options[:3], f"--run_dir={run_dir.with_name('whole')}", "--rollout.overlap_scoring=false") == 0
    )
    assert_same_run(run_dir, run_dir.with_name("whole"), 2)


@pytest.mark.slow
def test_a_rollout_in_another_process_is_the_same_run(config: Path, run_dir: Path) -> None:
    """It gets weights by the interface alone. All metrics are equal but for the work, which it does elsewhere."""
    assert train(config, APART, OVERLAP) == 0
    apart = run_dir.rename(run_dir.with_name("apart"))
    assert train(config) == 0
    for name in ("weights", "state", "clock"):
        assert_equal(getattr(saved(apart, 2), name), getattr(saved(run_dir, 2), name), name)
    for line, expected in zip(measured(apart), measured(run_dir), strict=True):
        assert line.pop("policy/engine_gap", 0.0) == 0.0
        assert line.keys() == expected.keys()
        for key, value in expected.items():
            assert line[key] == value or key.startswith("work/"), key
        if line["iteration"]:
            assert line["work/decoded_images"] == 0 and line["work/scored_images"] == expected["work/scored_images"]
    assert all("policy/engine_gap" in line for line in metrics(apart)[1:])


@pytest.mark.slow
def test_an_engine_that_is_gone_ends_the_run(config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its words and exit code 4; the checkpoint is good."""
    assert train(config, APART, "--rollout.engine.rollouts=1") == 4
    assert "error: the process that draws is gone" in capsys.readouterr().err
    assert saved(run_dir, 1).clock["iteration"] == 1


@pytest.mark.slow
def test_a_reward_that_fails_beside_the_rollout_ends_both_processes(
    tmp_path: Path, sd3_folder: Callable[..., Path]
) -> None:
    """It fails on the second of two processes, in the thread: both stop with its words."""
    processes = start(
        base_config(tmp_path, sd3_folder()),
        OVERLAP,
        "--rollout.batch_size=4",
        f"--rewards.bright.type={PLUGINS}:FailsOnOne",
    )
    try:
        said = [process.communicate(timeout=4 * LIMIT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [4, 4], said
    assert "error: process 1: the judge has gone home" in said[0]
    assert "error (process 1): the judge has gone home" in said[1]
    assert not any("Traceback" in text for text in said)
