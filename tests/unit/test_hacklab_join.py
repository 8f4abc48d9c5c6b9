"""Runs of a grid that another machine made: joined by their results.json, refused where they are not the same runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from t2irl.errors import ConfigError
from t2irl.hacklab.command import hacklab
from t2irl.hacklab.grid import settings
from t2irl.loading import dump_run, load_run
from t2irl.utils.inputs import digest
from tests.conftest import ROOT
from tests.unit.test_hacklab import GRID, cells_of, write_run

HERE, THERE = "vivid/grpo/seed3", "vivid/kl/seed3"
UNFINISHED = "count/kl/seed3"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """results.json of another machine, which has two finished runs and one that goes on; one of them is here as well."""
    by_name = {cell.name: cell for cell in cells_of(tmp_path)}
    write_run(by_name[HERE], [0.4, 0.3], [0.0, 1.0])
    write_run(by_name[THERE], [0.4, 0.5], [0.0, 0.25])
    write_run(by_name[UNFINISHED], [0.4], [0.0], complete=False)
    out = tmp_path / "out"
    assert hacklab([str(tmp_path / "grid.yaml"), "--out", str(out), "--report-only"]) == 0
    file = tmp_path / "there.json"
    shutil.copyfile(out / "results.json", file)
    shutil.rmtree(out)
    write_run(by_name[HERE], [0.4, 0.1], [0.0, 1.0])
    return file


def words(there: Path, *more: str) -> list[str]:
    return [str(there.with_name("grid.yaml")), "--out", str(there.with_name("out")), "--join", str(there), *more]


def changed(there: Path, name: str, change: Any) -> Path:
    """A copy of the file whose run of that name is changed."""
    content = json.loads(there.read_text())
    for run in content["runs"]:
        if f"{run['proxy']}/{run['method']}/seed{run['seed']}" == name:
            change(run)
    file = there.with_name("other.json")
    file.write_text(json.dumps(content))
    return file


def test_a_joined_run_is_in_the_results_and_ones_own_come_first(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hacklab(words(there, "--report-only")) == 0
    said = capsys.readouterr().out
    assert f"1 runs joined from {there}; left out: 1 unfinished, 1 there already" in said
    assert "2 of 8 runs are finished, 1 of them joined" in said
    content = json.loads((there.parent / "out/results.json").read_text())
    finals = {row["method"]: row["stats"]["gold_final"]["mean"] for row in content["table"]}
    assert finals == {"grpo": 0.1, "kl": 0.5}
    # What was joined can be joined again, as it was.
    theirs = {run["method"]: run for run in json.loads(there.read_text())["runs"] if run["complete"]}
    assert theirs["kl"] == content["runs"][1] and theirs["grpo"]["settings"] == content["runs"][0]["settings"]
    assert "2 of 8 runs" in (there.parent / "out/hacklab.html").read_text()


def test_joined_runs_are_not_run(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hacklab(words(there, "--list", "--seeds", "3")) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines == [f"done   {HERE}", f"joined {THERE}", "open   count/grpo/seed3", f"open   {UNFINISHED}"]
    part = ["--seeds", "3", "--proxies", "vivid"]
    assert hacklab(words(there, *part)) == 0
    assert "1 of 1 runs are there already" in capsys.readouterr().out and not (there.parent / "out" / THERE).exists()
    with pytest.raises(ConfigError, match=r"vivid/kl/seed3: settings \w{12}, the grid says"):
        hacklab(words(there, *part, "--iterations", "21"))


def test_runs_made_with_other_files_are_refused(there: Path) -> None:
    prompts = str(cells_of(there.parent)[0].run.data.prompts)
    same = changed(there, THERE, lambda run: run.update(inputs={prompts: digest(Path(prompts))}))
    assert hacklab([*words(same), "--report-only"]) == 0
    other = changed(there, THERE, lambda run: run.update(inputs={prompts: "0123456789ab", "not/here": "0"}))
    with pytest.raises(
        ConfigError, match=rf"{THERE}: read {prompts} with the content 0123456789ab, here it is \w{{12}}"
    ):
        hacklab([*words(other), "--report-only"])


def test_the_first_of_two_files_gives_a_run(there: Path) -> None:
    other = changed(there, THERE, lambda run: run["curves"].update(gold=[[0, 0.4], [10, 0.9]]))
    for files, expected in (((there, other), 0.5), ((other, there), 0.9)):
        assert hacklab([*words(files[0]), "--join", str(files[1]), "--report-only"]) == 0
        content = json.loads((there.parent / "out/results.json").read_text())
        assert content["runs"][1]["curves"]["gold"][-1] == [10, expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.pop("settings"), rf"(?s)1 of its runs were not made.*\n{THERE}: settings not recorded, the grid"),
        (lambda run: run.update(settings="0" * 12), rf"(?s)leave the file out.*\n{THERE}: settings 000000000000, the grid"),
        (lambda run: run.pop("seconds"), r"no results.json of t2irl hacklab: runs.1.seconds = .*Field required"),
        (lambda run: run["curves"].pop("gold"), r"runs.1.curves = .*no curve of gold"),
        (lambda run: run["curves"].update(gold=[]), r"runs.1.curves.gold = .*at least 1 item"),
    ],
    ids=("not recorded", "other settings", "no seconds", "no gold", "empty gold"),
)  # fmt: skip
def test_a_run_that_is_not_the_same_is_refused(there: Path, change: Any, message: str) -> None:
    other = changed(there, THERE, change)
    with pytest.raises(ConfigError, match=message) as raised:
        hacklab([*words(other), "--list"])
    assert str(raised.value).startswith(f"--join {other}")


def test_what_is_not_needed_is_not_looked_at(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One's own run has another one's place; a run that the grid lacks, or that goes on, is counted."""
    other = changed(there, HERE, lambda run: run.update(settings=None))
    assert hacklab([*words(other), "--list"]) == 0
    other = changed(there, THERE, lambda run: run.update(method="gone"))
    assert hacklab([*words(other), "--list"]) == 0
    assert "0 runs joined" in (said := capsys.readouterr().out) and "1 not in the grid" in said


def test_files_that_are_no_results(there: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.json: cannot be read: No such file"):
        hacklab([*words(there.with_name("none.json")), "--list"])
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory; did you mean .*out/results.json\?"):
        hacklab([*words(there.with_name("out")), "--list"])
    with pytest.raises(ConfigError, match=r"grid.yaml: is no results.json of t2irl hacklab: .*Invalid JSON"):
        hacklab([*words(there.with_name("grid.yaml"))[:3], "--join", str(there.with_name("grid.yaml")), "--list"])
    content = json.loads(there.read_text()) | {"gold": "correct"}
    there.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="its gold is 'correct', that of the grid 'gold'"):
        hacklab(words(there, "--list"))


def test_settings_are_those_of_the_run(tmp_path: Path) -> None:
    """The same in another folder and after a round trip; another with any setting, weight of the proxy or type."""
    (cell, *_) = cells_of(tmp_path)
    before = settings(cell.run, cell.trained)
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_run(cell.run))
    assert settings(load_run([saved]).model_copy(update={"run_dir": tmp_path}), cell.trained) == before
    others = [settings(cell.run, {"vividness": 1.0})]
    full = {"policy": {"tune": {"type": "full"}}}
    for changes in ({"iterations": 21}, {"rollout": {"dynamics": {"type": "flow_sde"}}}, full):
        (other, *_) = cells_of(tmp_path, fixed=GRID["fixed"] | changes)
        others.append(settings(other.run, other.trained))
    assert len({before, *others}) == 5


def test_what_is_at_its_default_does_not_count(tmp_path: Path) -> None:
    """So that a new option of a later version changes no digest."""
    (cell, *_) = cells_of(tmp_path)
    (same, *_) = cells_of(tmp_path, overrides=("--rollout.same_noise", "false", "--speed.tf32", "null"))
    assert settings(same.run, same.trained) == settings(cell.run, cell.trained)


def test_the_command_of_the_results_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    cells_of(tmp_path)
    prompts = ROOT / "assets/prompts/shapes_train.txt"
    out = tmp_path / "out"
    assert hacklab([str(tmp_path / "grid.yaml"), "--out", str(out), "--report-only", f"--data.prompts={prompts}"]) == 0
    command = json.loads((out / "results.json").read_text())["command"]
    assert command.endswith(f"--out {out} --report-only --data.prompts=assets/prompts/shapes_train.txt")
