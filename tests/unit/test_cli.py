"""The command line: dispatch, exit codes, who prints, and what `check` says of a model folder without loading it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from t2irl import cli
from t2irl.check import describe, read_folder, trained_size
from t2irl.config import Run
from t2irl.errors import CheckpointError, ConfigError, DataError, Interrupted, RunError
from t2irl.loading import load_run
from tests.few_layers import JOINT, LAYERS, POOLED, TOKENS, WIDTH, write_few_layers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A folder as StableDiffusion3Pipeline saves it, with weights of a few layers."""
    return write_few_layers(tmp_path / "pipe")


@pytest.fixture
def config(tmp_path: Path, pipeline: Path) -> Path:
    """A config file with its prompt files."""
    (tmp_path / "train.txt").write_text("\n".join(f"prompt {i}" for i in range(40)))
    (tmp_path / "heldout.txt").write_text("prompt 3\nsomething else\n")
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{type: sd3, path: {pipeline}, max_sequence_length: 0}}\n"
        f"data: {{prompts: {tmp_path}/train.txt, heldout: {tmp_path}/heldout.txt}}\nrewards: {{gold: {{type: shapes}}}}\n"
        "rollout: {prompts: 6, group_size: 4, window: {size: 3}}\n"
    )
    return path


def run_of(config: Path, *overrides: str) -> Run:
    return load_run([config], overrides)


def spoken(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_check_prints_the_plan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = spoken(capsys, "check", str(config), "--update.per_iteration", "3", "--processes=2")
    assert (code, err) == (0, "")
    for words in (
        "6 prompts x 4 images = 24 images an iteration on 2 processes (12 per process, 3 whole groups each)",
        "10 timesteps, trained 3 (0 to 2); cps, no guidance",
        "1 batch of at most 12 images -> 10 denoiser calls per process",
        "3 x 8 images; each 1 micro-batch of at most 4 images x 3 timesteps",
        "at most 3 denoiser calls forward and backward per process",
        "100 iterations = 300 updates, 2400 images",
        "gold 1 (shapes)    held out: none",
        "40 prompts to train on, 2 held out",
        "warning: 1 held-out prompts are trained on as well, for example 'prompt 3'",
        "warning: heldout_rewards is empty",
        "also possible, one at a time: 3 or 9 prompts; group size 3 or 5; processes 1, 3, 4, 6, 8 or 12",
    ):
        assert words in out, f"{words!r} is not in\n{out}"


def test_check_counts_weights_and_memory(config: Path, pipeline: Path) -> None:
    run, folder = run_of(config), read_folder(pipeline)
    layers = 3 * LAYERS
    assert folder.networks["transformer"].size == layers * WIDTH**2 + WIDTH * 16 + WIDTH
    assert trained_size(run, folder) == layers * 32 * 2 * WIDTH  # rank 32, inputs + outputs
    assert trained_size(run, folder, adapters=False) == layers * WIDTH**2
    assert trained_size(run_of(config, "--policy.tune.targets", "[pos_embed.proj]"), folder) == 32 * (WIDTH + 16)
    text = describe(run, 1)
    states = 24 * (4 * 4 * 16 * 16 * (3 + 2) + 4 * 3 + 3 * 64 * 64)
    cache = 41 * (TOKENS * JOINT + POOLED) * 4 + (TOKENS * JOINT + POOLED) * 4 * 2
    rows = 12 * 3 * (64 + TOKENS) * WIDTH * LAYERS * 56
    for name, size in (
        ("adapters, gradient, optimiser, average", layers * 32 * 2 * WIDTH * 20),
        ("stored trajectory", states),
        ("text cache, host memory (43 prompts)", cache),
        ("activations of 12 images, rough", rows),
    ):
        line = next(line for line in text.splitlines() if name in line)
        number, unit = line.split()[-2:]
        assert math.isclose(float(number), size / {"KiB": 2**10, "MiB": 2**20}[unit], abs_tol=0.051), (line, size)


def test_pictures_of_the_base_model_are_counted_where_a_reward_that_learns_scores_them_again(config: Path) -> None:
    growing, combine = "{type: 'tests.end_to_end.plugins:Growing'}", "{aggregate: {type: %s}, base_images: 100}"
    rewards, held = f"--rewards={{gold: {{type: shapes}}, more: {growing}}}", "--heldout_rewards={real: {type: shapes}}"
    text = describe(run_of(config, rewards, held, "--combine=" + combine % "wco"), 1)
    found = [line.split()[-2:] for line in text.splitlines() if "base model's" in line]
    assert found == [["1.2", "MiB"]]  # 100 x 3 x 64 x 64
    assert "base model's" not in describe(run_of(config, rewards, held, "--combine=" + combine % "sum"), 1)


def test_full_tuning_and_options_change_the_estimate(config: Path) -> None:
    full = describe(run_of(config, "--policy.tune.type=full", "--policy.ema=null"), 1)
    assert "reference copy of the denoiser" in full
    assert "trained weights, gradient, optimiser  " in full

    def activations(*overrides: str) -> float:
        line = next(line for line in describe(run_of(config, *overrides), 1).splitlines() if "activations" in line)
        return float(line.split()[-2]) * {"KiB": 1, "MiB": 1024}[line.split()[-1]]

    plain = activations()
    assert math.isclose(activations("--rollout.guidance_scale=3"), 2 * plain, rel_tol=0.02)
    assert math.isclose(activations("--update.batch_size=4"), plain / 3, rel_tol=0.02)
    assert activations("--model.gradient_checkpointing=true") < 0.6 * plain
    assert activations("--model.precision=bf16") < 0.8 * plain


def test_check_works_without_weights(config: Path, pipeline: Path) -> None:
    for file in pipeline.rglob("*.safetensors"):
        file.unlink()
    text = describe(run_of(config), 1)
    assert "unknown number of denoiser weights" in text
    assert "and the unknown parts" in text
    assert "stored trajectory" in text and "unknown until the first iteration" in text


def test_weights_in_parts_or_twice_are_counted_once(pipeline: Path) -> None:
    whole = read_folder(pipeline).networks["vae"].size
    vae = pipeline / "vae"
    save_file({"w": np.zeros(1000, np.float16)}, vae / "diffusion_pytorch_model.fp16.safetensors")
    assert read_folder(pipeline).networks["vae"].size == whole
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    assert read_folder(pipeline).networks["vae"].size == whole
    for i, size in ((1, 300), (2, 700)):
        save_file({f"w{i}": np.zeros(size, np.float16)}, vae / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    assert read_folder(pipeline).networks["vae"].size == whole


def test_folders_that_are_no_pipeline(pipeline: Path, tmp_path: Path) -> None:
    def refusal(path: Path = pipeline) -> str:
        with pytest.raises(DataError) as caught:
            read_folder(path)
        assert str(caught.value).startswith(f"model.path = {path}: ")
        return str(caught.value)

    assert "no such folder" in refusal(tmp_path / "none")
    assert "model_index.json is missing" in refusal(tmp_path)
    (pipeline / "vae/diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "vae/diffusion_pytorch_model.safetensors is no safetensors file" in refusal()
    (pipeline / "transformer/config.json").unlink()
    (pipeline / "scheduler").rmdir()
    assert refusal().endswith("missing: scheduler/, transformer/config.json")
    (pipeline / "transformer/config.json").write_text("[1]")
    (pipeline / "scheduler").mkdir()
    assert "transformer/config.json holds no JSON object" in refusal()
    (pipeline / "model_index.json").write_text('{"_class_name": "X"}')
    assert "missing: a transformer or unet" in refusal()
    (pipeline / "model_index.json").write_text("{")
    assert "model_index.json is not readable JSON" in refusal()


def test_a_target_that_names_no_layer(config: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"called 'attn.to_qq'. Did you mean 'attn.to_q'\? Layers: attn.to_k, attn.to_out.0"
    ):
        describe(run_of(config, "--policy.tune.targets=[attn.to_q, attn.to_qq]"), 1)


def test_print_config_can_be_loaded(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = spoken(capsys, "train", str(config), "--seed", "7", "--print-config", "--optimizer.lr=1e-9")
    assert (code, err) == (0, "")
    (tmp_path / "whole.yaml").write_text(out)
    assert load_run([tmp_path / "whole.yaml"]) == run_of(config, "--seed=7", "--optimizer.lr=1e-9")


def test_fields(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = spoken(capsys, "fields")
    assert code == 0 and "rollout.group_size  integer >= 2" in out


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "required: COMMAND"),
        (["chek"], "invalid choice: 'chek'"),
        (["train"], "required: CONFIG"),
        (["train", "CONFIG", "--resume"], "--resume: expected one argument"),
        (["check", "CONFIG", "--processes", "two"], "invalid int value: 'two'"),
        (["check", "CONFIG", "--processes", "0"], "0 processes"),
        (["check", "CONFIG", "--spread"], "one process has nothing to spread weights over; add --processes N"),
        (
            ["check", "CONFIG", "--spread", "--processes=2", "--speed.compile=true"],
            "speed.compile = true: blocks whose weights are spread",
        ),
        (
            ["check", "CONFIG", "--spread", "--processes=2", "--speed.fuse_lora=everywhere"],
            "speed.fuse_lora = everywhere: adapters stay apart where weights are spread",
        ),
        (
            ["check", "CONFIG", "--policy.tune.type=full", "--speed.fuse_lora=everywhere"],
            "speed.fuse_lora = everywhere: there are no adapters with policy.tune.type = full; leave it out",
        ),
        (["check", "CONFIG", "--speed.fuse_lora=all"], "speed.fuse_lora"),
        (["check", "CONFIG", "--seed"], "override --seed: the value is missing"),
        (["check", "CONFIG", "--seed", "1", "other.yaml"], "unexpected argument 'other.yaml'"),
        (["check", "CONFIG", "--proceses", "2"], "unknown key"),
        (["check", "CONFIG", "--rollout.prompts", "50", "--processes", "3"], "Use 48 or 51 prompts"),
        (["check", "CONFIG", "--rollout.prompts", "44"], "holds only 40 prompts"),
        (["check", "CONFIG", "--data.prompts", "missing.txt"], "data.prompts = missing.txt: no such file"),
        (["check", "CONFIG", "--model.path", "missing"], "model.path = missing: no such folder"),
        (["check", "missing.yaml"], "config file missing.yaml: no such file"),
        (["fields", "--x", "1"], "takes no options"),
    ],
)
def test_mistakes_are_errors_without_a_traceback(
    config: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    code, out, err = spoken(capsys, *(str(config) if word == "CONFIG" else word for word in argv))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and said in err and "Traceback" not in err
    assert all(line.startswith("  ") for line in err.splitlines()[1:])


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for the trainer, which unit tests do not start: notes its arguments, raises `error`."""
    import t2irl.train

    seen: dict[str, Any] = {"error": None}

    def train(run: Run, *, resume: str = "auto") -> Path:
        seen.update(run=run, resume=resume)
        if seen["error"] is not None:
            raise seen["error"]
        return run.run_dir

    monkeypatch.setattr(t2irl.train, "train", train)
    return seen


def test_train_gets_config_and_resume(
    config: Path, training: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert spoken(capsys, "train", str(config))[0] == 0
    assert training["resume"] == "auto" and training["run"] == run_of(config)
    for argv in (
        ["--seed", "3", "--resume", "never", "--optimizer.lr", "1e-5"],
        ["--resume=never", "--seed=3", "--optimizer.lr=1e-5"],
    ):
        assert spoken(capsys, "train", str(config), *argv)[0] == 0
        assert training["resume"] == "never" and training["run"] == run_of(config, "--seed=3", "--optimizer.lr=1e-5")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ConfigError("x\ny"), 2, "error: x\n  y\n"),
        (DataError("x"), 2, "error: x\n"),
        (CheckpointError("x"), 3, "error: x\n"),
        (RunError("x"), 4, "error: x\n"),
        (Interrupted("saved", 15), 143, "stopped: saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    config: Path,
    training: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    training["error"] = error
    assert spoken(capsys, "train", str(config)) == (code, "", said)


def test_a_bug_keeps_its_traceback(config: Path, training: dict[str, Any]) -> None:
    training["error"] = ZeroDivisionError("bug")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(config)])


def test_only_the_first_process_prints(
    config: Path, training: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert spoken(capsys, "check", str(config)) == (0, "", "")
    assert spoken(capsys, "check", str(config), "--sed", "1") == (2, "", "")
    training["error"] = RunError("only this process knows")
    assert spoken(capsys, "train", str(config)) == (4, "", "error (process 1): only this process knows\n")
    monkeypatch.setenv("RANK", "0")
    assert "on 2 processes" in spoken(capsys, "check", str(config))[1]


def test_help_and_check_load_little(config: Path) -> None:
    """`--help` needs no torch, `check` none of the model libraries; both as a module and in processes of their own."""
    for argv, banned in (
        (["train", "--help"], {"torch", "pydantic"}),
        (["check", str(config)], {"diffusers", "transformers", "accelerate"}),
    ):
        code = f"""
import runpy, sys
sys.argv = ["t2irl", *{argv!r}]
try:
    runpy.run_module("t2irl", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
assert not {banned!r} & set(sys.modules), {banned!r} & set(sys.modules)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(("usage: t2irl train", "model "))


def test_the_script_can_import_plugins_from_the_current_folder(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plugin_beside_me.py").write_text(
        "from t2irl.rewards.base import Reward\n\nclass Mine(Reward):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    code, out, err = spoken(capsys, "check", str(config), "--rewards.mine.type=plugin_beside_me:Mine")
    assert (code, err) == (0, "") and "mine 1 (plugin_beside_me:Mine)" in out
