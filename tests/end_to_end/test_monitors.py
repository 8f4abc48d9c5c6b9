"""Monitors in a whole run: what they log, how they end it, and the checkpoint that they keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from t2irl.evaluation import rules
from tests.end_to_end.runs import PLUGINS, assert_same_run, metrics, train, two_processes

WATCH = ("--heldout_rewards.vivid.type=vividness", "--iterations=3", "--monitors.prompts=2", "--monitors.images=2")


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_every_evaluation_is_monitored(config: Path, run_dir: Path) -> None:
    assert train(config, *WATCH, "--monitors.best=export") == 0
    first, *_, last = metrics(run_dir)
    assert first["policy/kl_reference"] == 0 < last["policy/kl_reference"]
    assert first["diversity/ratio"] == 1 and first["hack/gap/vivid"] == 0
    assert {"hack/tau/vivid", "hack/starc/vivid", "monitor/total/std", "diversity/duplicates"} <= last.keys()
    values = {row["iteration"]: row["heldout/vivid"] for row in metrics(run_dir)[1:]}
    best = max(values, key=lambda iteration: values[iteration])
    assert summary(run_dir)["best"]["iteration"] == best and summary(run_dir)["stopped"] is None
    assert [p.name for p in (run_dir / "best").iterdir()] == [f"iteration_{best:06d}"]
    assert (run_dir / summary(run_dir)["best"]["export"]["file"]).is_file()
    assert "Reward against distance" in (run_dir / "report.html").read_text()


def test_a_rule_ends_the_run_and_the_end_is_final(
    config: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = ("heldout/{watched}", lambda seen, *_: "it fell" if seen[-1]["iteration"] >= 2 else None)
    monkeypatch.setitem(rules.RULES, "off_peak", judge)
    stop = "--monitors.stop=[off_peak]"
    assert train(config, *WATCH, stop, "--checkpoints.every=9") == 0
    out = capsys.readouterr().out
    assert "off_peak at iteration 2: it fell" in out and "stopping early at iteration 2" in out
    assert (summary(run_dir)["iterations"], summary(run_dir)["stopped"]) == (2, "off_peak")
    assert "off_peak, which ended the run, at iteration 2" in (run_dir / "report.html").read_text()
    assert train(config, *WATCH, stop) == 0
    assert "is complete (2 iterations)" in capsys.readouterr().out
    # Without the rule the run goes on, and becomes the one that was never stopped.
    assert train(config, *WATCH) == 0 and summary(run_dir)["stopped"] is None
    whole = run_dir.with_name("whole")
    assert train(config, *WATCH, f"--run_dir={whole}") == 0
    assert_same_run(run_dir, whole, 3)


@pytest.mark.parametrize("alone", [False, True], ids=["beside another", "alone"])
def test_a_reward_that_learns_takes_no_gap_away_but_its_own(config: Path, run_dir: Path, alone: bool) -> None:
    """The total is then of the rewards that do not; without any there is none."""
    weight = "--rewards.bright.weight=0" if alone else "--rewards.bright.weight=2"
    assert train(config, *WATCH[:1], *WATCH[2:], f"--rewards.moody.type={PLUGINS}:Moody", weight, "--iterations=1") == 0
    last = metrics(run_dir)[-1]
    assert ("hack/gap/vivid" in last) == ("monitor/total/mean" in last) == (not alone)
    assert last.get("monitor/total/mean", 0) == pytest.approx(0 if alone else 2 * last["monitor/bright/mean"])
    assert "hack/starc/vivid" in last and "monitor/moody/mean" in last


MONITORED = ("heldout/", "monitor/", "hack/", "diversity/", "policy/kl_reference")


@pytest.mark.slow
def test_two_processes_see_and_say_what_one_does(config: Path, run_dir: Path) -> None:
    """With odd numbers of pictures, groups across processes and scores that do not apply: every measure and alarm, the end that an
    alarm makes, and the best checkpoint."""
    options = (
        f"--heldout_rewards.dark.type={PLUGINS}:Darkness", "--heldout_rewards.vivid.type=vividness", "--iterations=4",
        "--evaluation.images=5", "--rollout.batch_size=4", "--monitors.prompts=3", "--monitors.images=3", "--monitors.patience=1",
        "--monitors.stop=[gap_opens]", "--optimizer.lr=5e-2",
    )  # fmt: skip
    code, out, err = two_processes(config, *options)
    assert code == 0, err
    assert out.count("stopping early at iteration 2: gap_opens") == 1
    two = run_dir.rename(run_dir.with_name("two"))
    assert train(config, *options) == 0
    assert [line["iteration"] for line in metrics(two)] == [0, 1, 2]
    for together, alone in zip(metrics(two), metrics(run_dir), strict=True):
        watched = {name: value for name, value in alone.items() if name.startswith(MONITORED)}
        assert {"hack/tau/dark", "hack/starc/vivid", "hack/gap/dark", "diversity/ratio"} <= watched.keys()
        assert {n: together[n] for n in together if n.startswith(MONITORED)} == pytest.approx(
            watched, rel=1e-3, abs=1e-5
        )
    ends = [summary(run) for run in (two, run_dir)]
    assert [warning.split()[0] for warning in ends[0]["warnings"]] == ["below_base", "off_peak", "gap_opens"]
    for key in ("warnings", "stopped", "best"):
        assert ends[0][key] == ends[1][key], key
