"""`t2irl hacklab probe` on a tiny model: with and without gold, and with rewards that cannot judge every picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t2irl import cli
from t2irl.evaluation.hacks import HACKS
from tests.end_to_end.runs import PLUGINS, base_config

SIZE = ("--prompts", "3", "--images", "4")


def probe(config: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What `t2irl hacklab probe` wrote: numbers and text."""
    out = config.parent / "probe"
    assert cli.main(["hacklab", "probe", str(config), *SIZE, "--out", str(out), *options]) == 0
    return json.loads((out / "probe.json").read_text()), (out / "probe.md").read_text()


@pytest.fixture
def config(tmp_path: Path, sd3_folder: Callable[..., Path]) -> Path:
    """Trained on brightness."""
    return base_config(tmp_path, sd3_folder())


def test_hacks_need_no_gold(config: Path) -> None:
    found, text = probe(config)
    assert found["gold"] is None and found["error_correlation"] == {} and "best_of_k" not in found["rewards"]["bright"]
    hacks = found["rewards"]["bright"]["hacks"]
    assert list(hacks) == list(HACKS)
    assert hacks["vignette"]["rise"] < 0 < hacks["grid_texture"]["rise"] and hacks["grid_texture"]["share"] == 1
    assert "they take a held-out reward as the truth, `--gold NAME`" in text and "of the best of k" not in text
    assert "bright likes planted hacks" in text and "grid_texture" in text
    bald, text = probe(config, "--rewards.bright.type", f"{PLUGINS}:Band")  # every plain picture scores 0
    assert bald["rewards"]["bright"]["hacks"]["pasted_prompt"] == {"share": 1.0, "rise": None, "left_out": 0}
    assert "| pasted_prompt | +inf (100%) |" in text


def test_pictures_that_a_reward_cannot_judge_are_left_out(config: Path) -> None:
    dark, more = f"{{type: '{PLUGINS}:Darkness'}}", ("--rewards.size.type", "jpeg_size")
    found, text = probe(config, "--heldout_rewards.gold", dark, *more)
    rewards = found["rewards"]
    assert found["gold"] == "gold" and list(rewards) == ["bright", "size", "gold", "total"]
    assert [r["left_out"] for r in rewards.values()] == [0, 0, 4, 0]  # one prompt of three
    assert "gold cannot judge 4 of 12 pictures; they are left out" in text
    bright, gold = rewards["bright"], rewards["gold"]
    assert bright["tau"] == pytest.approx(-1) and bright["starc"] == pytest.approx(1)
    assert gold["tau"] == pytest.approx(1) and gold["best_k"] == 4 and bright["best_k"] == 1
    assert bright["best_of_k"] == sorted(bright["best_of_k"], reverse=True)
    assert bright["best_of_k"][0] == pytest.approx(gold["mean"]) and len(gold["best_of_k"]) == 4
    assert "warning**: picking by bright lowers gold" in text
    errors = found["error_correlation"]
    assert list(errors) == list(errors["size"]) == ["bright", "size"] and errors["size"]["size"] == 1
    assert errors["bright"]["size"] == errors["size"]["bright"] and "### Correlation of errors" in text
    alike = found["correlation"]
    assert list(alike) == ["bright", "size", "gold", "total"] and alike["bright"]["gold"] == pytest.approx(-1)
    assert abs(alike["size"]["bright"]) < 1 and "### Correlation of rewards within prompts" in text
    assert all(
        hack["left_out"] == 0 and hack["rise"] is not None for r in rewards.values() for hack in r["hacks"].values()
    )
    named, _ = probe(config, "--heldout_rewards.gold", dark, *more, "--gold", "gold")
    assert named == found


def test_the_total_is_what_the_run_would_optimise(config: Path) -> None:
    """Of two rewards, one upside down: as `combine` makes one number of them, pictures changed by a hack included."""
    assert "total" not in probe(config)[0]["rewards"]
    more = ("--rewards.less.type", f"{PLUGINS}:Brightness", "--rewards.less.weight=-3")
    found, text = probe(config, *more)
    alike, rewards = found["correlation"], found["rewards"]
    assert alike["bright"]["less"] == pytest.approx(1) and alike["total"]["bright"] == pytest.approx(-1)
    assert rewards["total"]["mean"] == pytest.approx(-2 * rewards["bright"]["mean"], rel=1e-5)
    for hack, row in rewards["total"]["hacks"].items():
        assert row["rise"] == pytest.approx(-rewards["bright"]["hacks"][hack]["rise"], rel=1e-3, abs=1e-4)
    combine = "{rewards: {bright: {bound: {type: clip, quantile: 0.5}}}, aggregate: {type: mean}}"
    held = ("--heldout_rewards.gold.type", f"{PLUGINS}:Brightness")
    settings = ("--advantage.combine", "scores", "--rewards.size.type", "jpeg_size", *held)
    bounded, text = probe(config, "--combine", combine, *settings)
    hacks = bounded["rewards"]["total"]["hacks"]
    assert "total" in bounded["correlation"]["size"] and "| total |" in text
    plain, _ = probe(config, "--combine", "{aggregate: {type: mean}}", *settings)
    assert (
        hacks["grid_texture"]["rise"] < plain["rewards"]["total"]["hacks"]["grid_texture"]["rise"]
    )  # what is bounded rises less


def test_what_cannot_be_probed_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*options: str) -> str:
        assert cli.main(["hacklab", "probe", str(config), *SIZE, *options]) == 2
        return capsys.readouterr().err

    assert "--gold truth: not among heldout_rewards: none" in refused("--gold", "truth")
    whole = ("--heldout_rewards.all.type", f"{PLUGINS}:WholeSet")
    assert "--gold all: it measures whole sets" in refused("--gold", "all", *whole)
    (config.parent / "sky.txt").write_text("a sky\nblue sky\nsky\n")
    sky = ("--data.heldout", str(config.parent / "sky.txt"), "--rewards.dark.type", f"{PLUGINS}:Darkness")
    assert "dark: applies to none of the 12 pictures, so there is nothing to probe" in " ".join(refused(*sky).split())
