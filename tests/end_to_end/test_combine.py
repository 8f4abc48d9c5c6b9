"""Runs with a `combine` section through the command line: stopped, continued, documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from t2irl.evaluation.glossary import lookup
from tests.adversaries import write_references
from tests.end_to_end.runs import PLUGINS, TRAIN, assert_same_run, metrics, saved, train

CASES: dict[str, dict[str, Any]] = {
    "constraints": {
        "aggregate": {"type": "constraints", "rate": 5},
        "rewards": {"flat": {"bound": {"type": "clip", "quantile": 0.9}, "constraint": {"quantile": 0.6}}},
        "filter": {"type": "best_worst"},
        "base_images": 10,
    },
    "and": {"rewards": {"flat": {"transform": {"type": "log_sigmoid", "temperature": 0.1, "per_prompt": 2}}}},
    "gate": {
        "rewards": {"flat": {"bound": {"type": "tiers"}}},
        "gate": {"type": "hard", "reward": "bright", "quantile": 0.2},
        "penalty": {"rewards": ["third"], "violation_below": 0.3},
        "base_images": 10,
    },
    "ensemble": {"aggregate": {"type": "uwo"}, "base_images": 10},
    "learning": {
        "aggregate": {"type": "mean"},
        "rewards": {"third": {"bound": {"type": "clip", "quantile": 0.7, "per_prompt": 2}}},
        "gate": {"type": "hinge", "reward": "flat", "quantile": 0.5, "per_prompt": 3},
        "disagreement": {"measure": "leave_one_out"},
        "base_images": 10,
    },
}
LEARNS = ("learning",)
"""Those in which the reward `third` learns."""


def write(config: Path, combine: dict[str, Any], regularizers: dict[str, Any], third: str = "Brightness") -> None:
    """Give a run three rewards, a held-out one, and these sections."""
    tree = yaml.safe_load(config.read_text())
    tree["rewards"] |= {"flat": {"type": f"{PLUGINS}:PartlyFlat"}, "third": {"type": f"{PLUGINS}:{third}"}}
    tree["heldout_rewards"] = {"gold": {"type": f"{PLUGINS}:Brightness"}}
    tree |= {"advantage": {"std": "global"}, "combine": combine, "regularizers": regularizers}
    config.write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_continued_is_uninterrupted(config: Path, run_dir: Path, tmp_path: Path, name: str) -> None:
    """Base-model scores, multipliers, what regularisers remember: to the last bit. Every number that is logged is explained."""
    rng = np.random.default_rng(0)
    files = {t: [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)] for t in TRAIN}
    references = {"index": str(write_references(tmp_path / "references", files))}
    regularizers = {
        "chi": {"type": "chi_square"},
        "own": {"type": "sft", "passed": {"reward": "third", "at": 0.5}, "images": 2},
        "seen": {"type": "chi_square_image", "path": None, "base_images": 1},
        "sft": {"type": "sft", "references": references, "images": 3, "meter": 2},
        "wide": {"type": "diversity_logdet", "path": None, "allow_on_failures": True, "base_prompts": 2},
    }
    third = "Growing" if name in LEARNS else "Brightness"
    unsure = {"unsure": {"type": "uncertainty", "weighting": "exponential"}}
    write(config, CASES[name], {"constraints": regularizers, "ensemble": unsure}.get(name, {}), third)
    assert train(config, "--iterations=1") == 0
    assert train(config, "--iterations=3") == 0
    assert train(config, "--iterations=3", f"--run_dir={run_dir.with_name('whole')}") == 0
    assert_same_run(run_dir, run_dir.with_name("whole"), 3)
    state = saved(run_dir, 3).state["combine"]
    own = name in ("and", "learning")
    assert bool(state["base"]["pooled"]) == (name != "and") and bool(state["base"]["by_prompt"]) == own
    if name in LEARNS:  # changed at the end of the second iteration, measured again at the start of the third
        assert state["base"]["versions"] == {"bright": 0, "flat": 0, "third": 1}
        assert {"combine/gate_open", "combine/disagreement_cost"} <= set(metrics(run_dir)[3])
    lines = metrics(run_dir)
    for line in lines:
        assert [key for key in line if key not in ("iteration", "time") and lookup(key) is None] == []
    if name == "constraints":
        assert state["multipliers"]["steps"] == 3 and "constraint/flat/gap" in lines[3]
        assert lines[1]["constraint/flat/weight"] != lines[3]["constraint/flat/weight"]
        assert {"regularizer/chi/chi2", "regularizer/sft/meter", "regularizer/wide/gain"} <= set(lines[3])
        assert {"regularizer/seen/chi2", "regularizer/seen/auc", "regularizer/own/passed"} <= set(lines[3])


def test_a_section_that_is_new_to_a_continued_run_starts_afresh(config: Path, run_dir: Path) -> None:
    assert train(config, "--iterations=1") == 0
    write(config, CASES["ensemble"], {})
    assert train(config, "--iterations=2") == 0
    assert len(saved(run_dir, 2).state["combine"]["base"]["pooled"]["flat"]) == 10


def test_what_is_wrong_is_said_before_anything_is_loaded(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(config, {"aggregate": {"type": "wco"}, "gate": {"type": "hard", "reward": "brihgt", "at": 0}}, {})
    assert train(config) == 2
    assert "combine.gate.reward: no reward is called 'brihgt'. Did you mean 'bright'?" in capsys.readouterr().err
    assert not run_dir.exists()
