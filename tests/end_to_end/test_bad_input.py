"""Whatever is wrong: a documented exit code, what and where and what would be right, no traceback, nothing written over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.runs import call, command, snapshot, train

TOY = "tests.invariants.toy"


def refused(
    config: Path, capsys: pytest.CaptureFixture[str], code: int, words: list[str], *options: str, resume: str = "auto"
) -> None:
    """The command gives `code`, says `words` on standard error alone, and leaves every file as it was."""
    before = snapshot(config.parent)
    capsys.readouterr()
    assert train(config, *options, f"--resume={resume}") == code
    err = capsys.readouterr().err
    message = err[err.index("error: ") :]
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert "Traceback" not in err
    assert snapshot(config.parent) == before


@pytest.mark.parametrize(
    "option, words",
    [
        ("--rollout.promts=4", ["rollout.promts", "prompts"]),
        ("--rolout.prompts=4", ["rolout", "Did you mean rollout?"]),
        ("--rollout.prompts=many", ["rollout.prompts", "many", "integer"]),
        ("--rollout.prompts=4.5", ["rollout.prompts", "4.5"]),
        ("--optimizer.lr=true", ["optimizer.lr", "true"]),
        ("--optimizer.lr=nan", ["optimizer.lr", "nan"]),
        ("--optimizer.lr=-1", ["optimizer.lr", "-1", "greater than 0"]),
        ("--rollout.group_size=1", ["rollout.group_size", "1", "greater than or equal to 2"]),
        ("--update.per_iteration=3", ["update.per_iteration = 3", "16 images", "Use 1, 2, 4, 8 or 16 updates"]),
        ("--rollout.window.size=4", ["rollout.window.size = 4", "at most 3"]),
        (
            "--rollout.dynamics.type=ode",
            ["rollout.dynamics.type = ode", "use cps, dance_sde, ddim, flow_sde or matching"],
        ),
        ("--rollout.dynamics.type=sde", ["'sde'", "Known: cps, dance_sde, ddim, flow_sde, matching, ode"]),
        ("--rollout.dynamics.noise_level=0", ["rollout.dynamics.noise_level = 0"]),
        ("--rollout.last_step_stochastic=true", ["rollout.last_step_stochastic", "cps", "flow_sde"]),
        ("--rewards.bright.type=shape", ["rewards.bright", "'shape'", "Did you mean 'shapes'"]),
        ("--rewards.bright.type=no.such.module:Class", ["no.such.module", "package.module:Class"]),
        ("--rewards.bright.type=tests.end_to_end.plugins:Fading", ["is not a subclass", "Reward"]),
        ("--rewards.bright=null", ["rewards"]),
        ("--tracking.trackers=[aim]", ["tracking.trackers", "'aim' is not installed", "metrics.jsonl"]),
        ("--tracking.trackers=[tensorbord]", ["tracking.trackers", "tensorbord", "tensorboard"]),
        ("--policy.tune.targets=[attn.to_qq]", ["policy.tune.targets", "'attn.to_qq'", "Did you mean 'attn.to_q'"]),
        ("--rollout.prompts=16", ["rollout.prompts = 16", "only 12 prompts"]),
        ("--data.prompts=none.txt", ["data.prompts = none.txt", "no such file"]),
        ("--data.heldout=configs", ["data.heldout = configs", "cannot be read"]),
        ("--model.path=tests", ["model.path = tests", "model_index.json"]),
        ("--model.path=nowhere", ["model.path = nowhere", "no such folder"]),
        ("--model.resolution=13", ["model.resolution = 13", "multiple of 4", "use 12"]),
        ("--iterations=0", ["iterations", "greater than 0"]),
    ],
)
def test_wrong_settings(config: Path, capsys: pytest.CaptureFixture[str], option: str, words: list[str]) -> None:
    """Exit code 2, and no run folder: the mended command starts in the folder that was asked for."""
    refused(config, capsys, 2, words, option)


@pytest.mark.parametrize(
    "option", ["--rollout.group_size=1", "--data.prompts=none.txt", "--model.path=tests", "--update.per_iteration=3"]
)
def test_wrong_settings_of_a_run_that_is_there(config: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    """The run, its config and its curves stay as they are."""
    assert train(config) == 0
    refused(config, capsys, 2, [option.removeprefix("--").partition("=")[0]], option, "--iterations=9", resume="auto")
    refused(config, capsys, 2, [option.removeprefix("--").partition("=")[0]], option, resume="never")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("odd.txt", b"", ["is empty", "one prompt a line"]),
        ("odd.txt", b"a circle\n\na square\n", ["line 2", "the prompt is empty"]),
        ("odd.txt", b"a circle\n \xe2\x80\x8b \nb\nc\nd\n", ["line 2", "the prompt is empty"]),
        ("odd.txt", "a café\n".encode("latin-1"), ["line 1", "0xe9", "not UTF-8", "save the file as UTF-8"]),
        ("odd.txt", "a circle\n".encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
        ("odd.txt", "a circle\n".encode("utf-16-le"), ["NUL byte"]),
        ("odd.txt", b'{"prompt": "a circle"}\n', ["JSON Lines", ".jsonl"]),
        ("odd.jsonl", b'{"prompt": "a circle"}\n{"text": "b"}\n', ["line 2", "`prompt` is missing", "'text'"]),
        ("odd.jsonl", b'{"prompt": "a circle"}\n{"prompt": 3}\n', ["line 2", "expected text in quotes"]),
        ("odd.jsonl", b'{"prompt": "a circle"\n', ["line 1", "is not JSON"]),
    ],
)
def test_bad_prompt_files(
    config: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, words: list[str]
) -> None:
    path = config.parent / name
    path.write_bytes(content)
    for key in ("prompts", "heldout"):
        refused(config, capsys, 2, [f"data.{key} = {path}", *words], f"--data.{key}={path}")


def test_odd_prompts_that_are_fine(config: Path, run_dir: Path) -> None:
    """A byte order mark, Windows line ends, letters of any script, emoji, a prompt longer than the encoder's context."""
    lines = ["\ufeffa circle", "ein grüner Kreis", "圆形", "🟢 مربع", "a very " + "long " * 300 + "prompt"]
    (config.parent / "train.txt").write_bytes("\r\n".join(lines).encode())
    assert train(config, "--iterations=2") == 0
    assert (run_dir / "summary.json").is_file()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"rollout: {prompts: 4\n", ["extra.yaml", "not valid YAML"]),
        (b"rollout:\n  prompts: 4\n  prompts: 5\n", ["extra.yaml:3", "prompts"]),
        (b"", ["extra.yaml", "is empty"]),
        (b"- 1\n", ["extra.yaml", "expected lines such as"]),
        (b"seed: \xff\n", ["extra.yaml:1", "not UTF-8"]),
        (b"seeds: 1\n", ["extra.yaml:1", "seeds", "Did you mean seed?"]),
    ],
)
def test_bad_config_files(config: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: list[str]) -> None:
    extra = config.parent / "extra.yaml"
    extra.write_bytes(content)
    refused(config, capsys, 2, words, str(extra))


# Rewards.


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_reward_that_is_no_number(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    """Exit code 4, with the reward and the prompt; the first checkpoint is good and the mended run continues."""
    assert train(config, "--iterations=1") == 0
    good = snapshot(run_dir / "checkpoints")
    bad = [
        f"--rewards.bad.{key}={v}"
        for key, v in (("type", f"{TOY}:Broken"), ("value", value), ("prompt", "a flat circle"))
    ]
    capsys.readouterr()
    assert train(config, "--iterations=9", *bad) == 4
    err = capsys.readouterr().err
    assert f"reward 'bad' gave {value} for the prompt 'a flat circle'" in err and "Traceback" not in err
    assert "may_skip" in err
    assert set(good) & set(snapshot(run_dir / "checkpoints"))
    assert train(config, "--iterations=5") == 0
    assert json.loads((run_dir / "summary.json").read_text())["iterations"] == 5


def test_a_reward_of_the_wrong_shape(config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, f"--rewards.bright.type={TOY}:Scalar") == 4
    err = capsys.readouterr().err
    assert "reward 'bright' gave shape () for 4 images; expected (4,)" in err and "Traceback" not in err


def test_a_reward_that_never_applies(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [f"--rewards.bright.{key}={v}" for key, v in (("type", f"{TOY}:Choosy"), ("prompt", "a red circle"))]
    assert train(config, "--iterations=3", *bad) == 4
    assert "no reward applies to image" in capsys.readouterr().err


# Checkpoints.


@pytest.mark.parametrize("what", ["missing.folder", "tests", "t2irl/cli.py"])
def test_nothing_to_resume_from(config: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    refused(
        config, capsys, 3, [f"--resume {what}", "use auto, never, a run folder or one of its checkpoints"], resume=what
    )


@pytest.mark.parametrize("damage", ["gone", "cut", "swapped", "manifest"])
def test_nothing_but_corrupt_checkpoints(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    assert train(config) == 0
    harm: dict[str, Callable[[Path], object]] = {
        "gone": lambda p: (p / "weights.safetensors").unlink(),
        "cut": lambda p: (p / "state.pt").write_bytes((p / "state.pt").read_bytes()[:100]),
        "swapped": lambda p: (p / "weights.safetensors").write_bytes((p / "state.pt").read_bytes()),
        "manifest": lambda p: (p / "manifest.json").write_text("{"),
    }
    folders = list((run_dir / "checkpoints").iterdir())
    for folder in folders:
        harm[damage](folder)
    refused(config, capsys, 3, ["none of the 2 checkpoints", "can be read", "--run_dir"], "--iterations=3")
    if damage != "manifest":
        refused(config, capsys, 3, [f"checkpoint {folders[0]}"], "--iterations=3", resume=str(folders[0]))


def test_an_empty_folder_of_checkpoints(config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was stopped before its first checkpoint cannot be continued by its path; `auto` starts beside it."""
    assert train(config) == 0
    for folder in (run_dir / "checkpoints").iterdir():
        folder.rename(run_dir / folder.name)
    refused(config, capsys, 3, [f"--resume {run_dir}", "no checkpoint"], resume=str(run_dir))
    before = snapshot(run_dir)
    assert train(config) == 0
    assert snapshot(run_dir) == before
    assert (run_dir.with_name("run-2") / "summary.json").is_file()


def test_a_run_folder_that_cannot_be_written(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file is in the way."""
    (config.parent / "file").write_text("mine")
    before = snapshot(config.parent)
    assert train(config, f"--run_dir={config.parent}/file/run") == 4
    err = capsys.readouterr().err
    assert f"cannot write {config.parent}/file/run: Not a directory" in err and "Traceback" not in err
    assert snapshot(config.parent) == before


# As a command: the process's own exit code and streams.


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, code, word",
    [
        (["--rollout.group_size=1"], 2, "rollout.group_size"),
        (["--resume=missing.folder"], 3, "missing.folder"),
        ([f"--rewards.bright.type={TOY}:Scalar"], 4, "shape ()"),
    ],
)
def test_exit_codes_of_the_command(config: Path, options: list[str], code: int, word: str) -> None:
    found, _, err = call(*command(config, *options))
    assert found == code, err
    assert "error: " in err and word in err and "Traceback" not in err
