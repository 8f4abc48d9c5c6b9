"""GARDO and uncertain rewards through the command line: documented metrics, exact resume, refusals with the key named."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2irl.evaluation.glossary import lookup
from tests.end_to_end.runs import PLUGINS, assert_same_run, metrics, saved, train

AUXILIARIES = (
    f"--rewards.other.type={PLUGINS}:PartlyFlat", "--rewards.other.weight=0",
    "--rewards.vivid.type=vividness", "--rewards.vivid.weight=0",
)  # fmt: skip
GARDO = (
    *AUXILIARIES,
    "--regularizers.gate.type=gated_kl", "--regularizers.gate.auxiliaries=[other, vivid]", "--regularizers.gate.anchor=slow",
    "--regularizers.gate.kind=v_mse", "--regularizers.gate.share=0.2",
    "--regularizers.gate.adapt.window=1", "--regularizers.gate.adapt.warmup=1",
    "--regularizers.slow.type=adaptive_reference", "--regularizers.slow.every=3", "--regularizers.slow.threshold=null",
    "--regularizers.wide.type=diversity",
)  # fmt: skip
UNSURE = ("--regularizers.unsure.type=uncertainty", "--regularizers.unsure.weighting=exponential")
MATCHING = "--rollout.dynamics.type=matching"


@pytest.mark.parametrize(
    "options",
    [
        [*GARDO, MATCHING],
        [*GARDO, "--policy.tune.type=full"],
        [*GARDO, *UNSURE, "--regularizers.unsure.estimator=tails"],
    ],
    ids=["matching", "full", "with uncertain rewards"],
)
def test_stopped_and_continued_is_uninterrupted(config: Path, run_dir: Path, options: list[str]) -> None:
    """Across a renewal of the reference policy; every metric is in the glossary; auxiliaries are scored, not trained on."""
    whole = run_dir.with_name("whole")
    assert train(config, *options, "--iterations=2") == 0
    assert train(config, *options, "--iterations=4") == 0
    assert train(config, *options, "--iterations=4", f"--run_dir={whole}") == 0
    assert_same_run(run_dir, whole, 4)
    lines = metrics(run_dir)
    for line in lines:
        assert [name for name in line if name not in ("iteration", "time") and lookup(name) is None] == []
    assert [line["regularizer/slow/resets"] for line in lines[1:]] == [0, 0, 1, 1]
    assert all(0 < line["regularizer/gate/gate_fraction"] <= 0.5 for line in lines[1:])  # ties may add some
    assert all(line["reward/total/mean"] == pytest.approx(line["reward/bright/mean"]) for line in lines[1:])
    assert {"reward/vivid/mean", "heldout/vivid"} <= lines[4].keys()
    assert any(name.startswith("snapshot.slow.") for name in saved(run_dir, 4).weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*AUXILIARIES, "--regularizers.gate.type=gated_kl"], "regularizers.gate needs auxiliaries"),
        ([*GARDO, "--rewards.vivid.weight=1"], "regularizers.gate has auxiliaries: 'vivid', which is trained on"),
        ([*GARDO, MATCHING, "--regularizers.gate.kind=no_dt"], "regularizers.gate has kind no_dt"),
        ([*GARDO, "--regularizers.wide.path=assets/none"], "regularizers.wide: path = assets/none"),
        (["--rewards.bright.weight=0"], "all rewards have weight 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    """With one message and no traceback."""
    assert train(config, *options) != 0
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
