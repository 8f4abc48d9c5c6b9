"""A run whose weights are spread over processes: the launcher's word, and full fine-tuning that changes hands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from t2irl import cli, sharding
from t2irl.errors import ConfigError
from t2irl.loading import load_run
from tests.end_to_end.runs import (
    PLUGINS,
    ROOT,
    assert_same_run,
    base_config,
    checkpoints,
    measured,
    metrics,
    saved,
    train,
    two_processes,
)

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
OPTIONS = (
    f"--rewards.bright.type={PLUGINS}:PartlyFlat", f"--heldout_rewards.gold.type={PLUGINS}:Brightness", "--evaluation.images=5",
    "--rollout.batch_size=4", "--policy.tune={type: full}", "--regularizers.kl.type=kl", "--monitors.best=export",
    "--monitors.prompts=2", "--monitors.images=3", "--optimizer.eps=1e-4",
)  # fmt: skip


def spread(config: Path, *options: str) -> tuple[int, str, str]:
    """Two processes on the CPU, each with a part of the weights."""
    return two_processes(config, *options, **FSDP)


def close(run: Path, expected: Path) -> None:
    """Two runs of two iterations are the same, up to rounding."""
    a, b = saved(run, 2), saved(expected, 2)
    assert a.clock == b.clock
    assert a.weights.keys() == b.weights.keys()
    for name, weights in b.weights.items():
        torch.testing.assert_close(a.weights[name], weights, rtol=0, atol=2e-5, msg=name)
    moments = [state.state["optimizer"]["adamw"]["state"] for state in (a, b)]
    assert moments[0].keys() == moments[1].keys()
    for place, values in moments[1].items():
        assert moments[0][place]["step"] == values["step"] == 4
        scale = float(values["exp_avg"].abs().max())
        torch.testing.assert_close(moments[0][place]["exp_avg"], values["exp_avg"], rtol=0, atol=0.05 * scale + 1e-6)
    for x, y in zip(measured(run), measured(expected), strict=True):
        assert x.keys() == y.keys()
        for name in y:
            if name.startswith(("reward/", "heldout/", "monitor/", "hack/", "diversity/", "advantage/zero")):
                assert x[name] == pytest.approx(y[name], abs=1e-3), name
            elif name in ("policy/grad_norm", "regularizer/kl", "policy/kl_reference"):
                assert x[name] == pytest.approx(y[name], rel=0.02, abs=1e-6), name
            elif name.startswith("work/") and name != "work/denoiser_forward_calls":
                assert x[name] == y[name], name


@pytest.mark.slow
def test_full_fine_tuning_changes_hands(tmp_path: Path, model: Path) -> None:
    """Begun by one process and continued by two with spread weights, or the other way round: one process's run. Evaluations of an odd
    number of pictures, grids, the best checkpoint and the proven export come on the way."""
    folders = [tmp_path / name for name in ("alone", "given", "taken")]
    for folder in folders:
        folder.mkdir()
    alone, given, taken = (base_config(folder, model) for folder in folders)
    assert train(alone, *OPTIONS) == 0
    assert train(given, *OPTIONS, "--iterations=1") == 0
    for config, iterations in ((given, 2), (taken, 1)):
        code, out, err = spread(config, *OPTIONS, f"--iterations={iterations}")
        assert code == 0, err
        assert "over 2 processes: each holds 1/2" in out
    assert train(taken, *OPTIONS) == 0
    expected = tmp_path / "alone" / "run"
    for folder in folders[1:]:
        run = folder / "run"
        close(run, expected)
        assert checkpoints(run) == checkpoints(expected)
        assert {p.name for p in run.iterdir()} == {p.name for p in expected.iterdir()}
        summary = json.loads((run / "summary.json").read_text())
        assert (run / summary["best"]["export"]["file"]).is_dir()
        assert summary["export"]["max_difference_to_policy"] < 1e-3
        assert [line["iteration"] for line in metrics(run)] == [0, 1, 2]


def environment(config: Path, *options: str) -> dict[str, str]:
    """What `accelerate launch` would hand on to processes."""
    words = ["--config_file", str(config), *options, "-m", "t2irl", "train"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    changed: dict[str, str] = prepare_multi_gpu_env(arguments)
    return {k: v for k, v in changed.items() if os.environ.get(k) != v}


@pytest.mark.parametrize("name", ["fsdp2_8", "fsdp2_4x8"])
def test_the_launchers_configs_are_what_happens(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As accelerate hands them on, defaults of its own included."""
    for variable, value in environment(ROOT / f"configs/accelerate/{name}.yaml").items():
        monkeypatch.setenv(variable, value)
    assert sharding.asked()


@pytest.mark.parametrize(
    "options, word",
    [
        (["--fsdp_version=1"], "fsdp_version: 2"),
        (["--fsdp_reshard_after_forward=false"], "fsdp_reshard_after_forward: true"),
        (["--fsdp_offload_params=true"], "fsdp_offload_params: false"),
        (["--fsdp_auto_wrap_policy=SIZE_BASED_WRAP"], "TRANSFORMER_BASED_WRAP"),
        (
            ["--fsdp_transformer_layer_cls_to_wrap=JointTransformerBlock"],
            "leave fsdp_transformer_layer_cls_to_wrap out",
        ),
        (["--fsdp_state_dict_type=SHARDED_STATE_DICT"], "FULL_STATE_DICT"),
        (["--fsdp_cpu_ram_efficient_loading=true"], "fsdp_cpu_ram_efficient_loading: false"),
        (["--fsdp_activation_checkpointing=true"], "model.gradient_checkpointing"),
        (
            ["--use_fsdp", "--fsdp_version=2", "--use_parallelism_config", "--parallelism_config_tp_size=2"],
            "leave parallelism_config out",
        ),
    ],
)
def test_other_ways_are_refused(monkeypatch: pytest.MonkeyPatch, options: list[str], word: str) -> None:
    """Each option that would not be what happens, by its variable and what to set."""
    for variable, value in environment(ROOT / "configs/accelerate/fsdp2_8.yaml", *options).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=word):
        sharding.asked()


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to use instead."""
    assert not sharding.asked()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"ACCELERATE_USE_DEEPSPEED.*fsdp2_8"):
        sharding.asked()


def test_what_spread_weights_cannot_be_had_with(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    """Compiled blocks in a run, and evaluations of checkpoints."""
    run = load_run([config], ["--speed.compile=true"])
    sharding.check(run, False)
    with pytest.raises(ConfigError, match=r"speed\.compile = true.*set it to false"):
        sharding.check(run, True)
    sharding.refuse("t2irl eval")
    for variable, value in FSDP.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=r"t2irl eval does not spread.*ddp_8"):
        sharding.refuse("t2irl eval")


def test_one_process_has_nothing_to_spread(monkeypatch: pytest.MonkeyPatch, config: Path, run_dir: Path) -> None:
    """The launcher may ask for it all the same: the same bits."""
    assert train(config, "--iterations=1") == 0
    for variable, value in FSDP.items():
        monkeypatch.setenv(variable, value)
    assert train(config, "--iterations=1", "--resume=never") == 0
    assert_same_run(run_dir, run_dir.with_name("run-2"), 1)


def test_check_counts_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path) -> None:
    """By its option, or as the launcher that it is started by says; a number of processes of one's own is not the launcher's."""

    def check(*options: str) -> str:
        assert cli.main(["check", str(config), "--policy.tune.type=full", *options]) == 0
        return capsys.readouterr().out

    whole, part = check("--processes=2"), check("--processes=2", "--spread")
    assert "spread     over 2 processes: each holds 1/2 of the denoiser" in part
    (held, unit), (all_of_it, other) = (
        next(line for line in text.splitlines() if "reference copy" in line).split()[-2:] for text in (part, whole)
    )
    assert unit == other and 2 * float(held) == pytest.approx(float(all_of_it), abs=0.11)
    for variable, value in {"WORLD_SIZE": "2", **FSDP}.items():
        monkeypatch.setenv(variable, value)
    assert check() == part
    assert "spread  " not in check("--processes=4")
