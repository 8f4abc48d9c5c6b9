"""Metrics, trackers and the files that describe a run."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2irl.config import Run
from t2irl.errors import ConfigError, RunError
from t2irl.utils import inputs, tracking
from t2irl.utils.inputs import digest
from t2irl.utils.tracking import Tracker, accelerator_arguments, environment, flatten, write_atomic, write_run_files


def make_run(folder: Path, *trackers: str) -> Run:
    return Run.model_validate(
        {
            "run_dir": str(folder),
            "model": {"type": "sd3", "path": "model"},
            "data": {"prompts": "a.txt", "heldout": "b.txt"},
            "rewards": {"shapes": {"type": "shapes"}},
            "tracking": {"trackers": trackers},
        }
    )


def make_tracker(folder: Path, *trackers: str) -> Tracker:
    run = make_run(folder, *trackers)
    return Tracker(folder, Accelerator(cpu=True, **accelerator_arguments(run, folder)), run)


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def curves(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "trackers" / "t2irl"), size_guidance={"scalars": 0, "images": 0})
    return accumulator.Reload()


def test_one_line_an_iteration_in_plain_json(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    tracker.log({"reward/a/mean": 0.5, "work/decoded_images": 128}, 1)
    tracker.log({"reward/a/mean": float("nan"), "policy/grad_norm": float("inf")}, 2)
    tracker.close()
    first, second = lines(tmp_path)
    assert first.pop("time") <= second.pop("time")
    assert first == {"iteration": 1, "reward/a/mean": 0.5, "work/decoded_images": 128}
    assert second == {"iteration": 2, "reward/a/mean": None, "policy/grad_norm": None}


def test_rewind_drops_later_lines_and_what_a_crash_cut_off(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    for iteration in range(5):
        tracker.log({"x": iteration, "name\u2028": 1}, iteration)
    with tracker.path.open("a") as file:
        file.write('{"iteration": 1, "x": 0.')
    tracker.rewind(3)
    tracker.log({"x": 30}, 3)
    assert [(row["iteration"], row["x"]) for row in lines(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert not list(tmp_path.glob(".*.part"))


def test_rewind_of_a_fresh_run_does_nothing(tmp_path: Path) -> None:
    make_tracker(tmp_path).rewind(0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_shows_scalars_and_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "grid.png")
    tracker = make_tracker(tmp_path, "tensorboard")
    tracker.log({"reward/a/mean": 0.25}, 7)
    tracker.image("grid", tmp_path / "grid.png", 7)
    tracker.close()
    seen = curves(tmp_path)
    assert [(e.step, e.value) for e in seen.Scalars("reward/a/mean")] == [(7, 0.25)]
    (picture,) = seen.Images("grid")
    assert (picture.step, picture.width, picture.height) == (7, 6, 4)


def test_tensorboard_forgets_what_is_done_again(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path, "tensorboard")
    for iteration in range(5):
        tracker.log({"x": float(iteration)}, iteration)
    tracker.close()
    tracker = make_tracker(tmp_path, "tensorboard")
    tracker.rewind(3)
    tracker.log({"x": 30.0}, 3)
    tracker.close()
    assert [(e.step, e.value) for e in curves(tmp_path).Scalars("x")] == [(0, 0), (1, 1), (2, 2), (3, 30)]


class Numbers(GeneralTracker):
    """A tracker that accelerate accepts and that has no pictures."""

    name = "numbers"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.finished = 0

    @property
    def tracker(self) -> None:
        """There is nothing behind it."""

    def start(self) -> None:
        """Nothing to start."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the config."""
        self.config = values

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Keep the values."""
        self.logged.append((values, step))

    def finish(self) -> None:
        """Count the calls."""
        self.finished += 1


def test_a_tracker_without_pictures_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = Numbers()
    tracker = Tracker(tmp_path, Accelerator(cpu=True, log_with=[other]), make_run(tmp_path))
    Image.new("RGB", (2, 2)).save(tmp_path / "grid.png")
    with caplog.at_level(logging.WARNING):
        for iteration in range(3):
            tracker.log({"x": 1.5}, iteration)
            tracker.image("grid", tmp_path / "grid.png", iteration)
    tracker.close()
    assert len(caplog.records) == 1 and "numbers" in caplog.text
    assert other.logged == [({"x": 1.5}, 0), ({"x": 1.5}, 1), ({"x": 1.5}, 2)] and other.finished == 1
    assert other.config["policy/tune/rank"] == 32 and other.config["rollout/window/size"] == "null"


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    missing = next(n for n in ("comet_ml", "clearml", "dvclive", "aim") if n not in map(str, get_available_trackers()))
    with pytest.raises(ConfigError, match=r"tracking\.trackers.*pip install " + missing.replace("_", "-")):
        accelerator_arguments(make_run(tmp_path, "tensorboard", missing), tmp_path)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 9}\n')
    tracker = Tracker(tmp_path, SimpleNamespace(is_main_process=False), make_run(tmp_path))  # type: ignore[arg-type]
    tracker.log({"x": 1.0}, 1)
    tracker.rewind(0)
    tracker.image("grid", tmp_path / "none.png", 1)
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 9}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: No space left"):
        tracker.log({"x": 1.0}, 1)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as a full disk: the write fails half way
    try:
        with pytest.raises(RunError, match=r"summary\.json"):
            write_atomic(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_run_files_describe_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "a"
    run = make_run(folder, "tensorboard")
    monkeypatch.setattr(tracking.sys, "argv", ["/somewhere/bin/t2irl", "train", "a b.yaml"])
    write_run_files(folder, run)
    write_run_files(folder, run)
    assert Run.model_validate(yaml.safe_load((folder / "config.yaml").read_text())) == run
    assert (folder / "command.txt").read_text() == "t2irl train 'a b.yaml'\n" * 2
    known = json.loads((folder / "environment.json").read_text())
    assert known["command"] == "t2irl train 'a b.yaml'"


def test_files_that_a_run_reads_are_recorded_and_a_change_is_told(tmp_path: Path) -> None:
    folder, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    run = make_run(folder, "tensorboard")
    run = run.model_copy(update={"data": run.data.model_copy(update={"prompts": prompts})})

    def recorded() -> str:
        return json.loads((folder / "environment.json").read_text())["inputs"][str(prompts)]

    assert write_run_files(folder, run) == []
    first = recorded()
    prompts.write_text("a dog\n")
    assert write_run_files(folder, run) == [str(prompts)]
    assert recorded().startswith(f"{first}, then ") and recorded() != f"{first}, then {first}"
    both = recorded()
    assert write_run_files(folder, run) == [] and recorded() == both


def test_digests_are_of_content_and_leave_cards_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    (model / "part").mkdir(parents=True)
    (model / "part" / "a.safetensors").write_bytes(b"0123456789" * 10)
    first = digest(model)
    (model / "README.md").write_text("a card")
    assert digest(model) == first
    (model / "part" / "b.json").write_text("{}")
    assert digest(model) != first
    # Of a large file both ends count.
    monkeypatch.setattr(inputs, "WHOLE", 50)
    monkeypatch.setattr(inputs, "PART", 4)
    file = model / "part" / "a.safetensors"
    found = [digest(file)]
    for content in (b"x" + b"0123456789" * 10, b"0123456789" * 9 + b"012345678x"):
        file.write_bytes(content)
        found.append(digest(file))
    assert len(set(found)) == 3


def test_environment_names_versions_and_hardware() -> None:
    known = json.loads(json.dumps(environment()))
    assert known["packages"]["torch"] and known["python"].startswith("3.") and known["cpu"] and known["cpu_count"] >= 1
    assert isinstance(known["gpus"], list)
    assert known["git"] is None or (len(known["git"]["revision"]) == 40 and isinstance(known["git"]["dirty"], bool))


def test_flatten_joins_keys_and_keeps_scalars() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": True, "g": "x"}
    assert flatten(nested) == {"a/b": 1, "a/c/d": "null", "e": "[1, 2]", "f": True, "g": "x"}
