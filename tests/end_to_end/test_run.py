"""What a run leaves behind, what it does, and that every option works."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from t2irl.evaluation.glossary import lookup
from t2irl.geometry import Geometry, even_chunks
from t2irl.loading import load_run
from tests.end_to_end.runs import HELDOUT, PLUGINS, TRAIN, assert_equal, measured, metrics, saved, train

LOGGED = {
    "reward/bright/mean", "reward/bright/std_within_group", "reward/total/mean", "advantage/zero_variance_groups",
    "advantage/abs_mean", "policy/ratio_first", "policy/ratio_mean", "policy/log_ratio_first", "policy/clip_fraction_high",
    "policy/clip_fraction_low", "policy/approx_kl", "policy/grad_norm", "policy/loss", "policy/lr", "policy/omitted_timesteps",
    "time/rollout_s", "time/score_s", "time/update_s", "time/iteration_s", "work/denoiser_forward_images",
    "work/denoiser_backward_images", "work/denoiser_forward_calls", "work/decoded_images", "work/encoded_prompts",
    "work/reward_calls", "work/scored_images", "data/images_total", "data/passes_over_prompts", "memory/peak_gib",
}  # fmt: skip
"""In every iteration, for a run with the one reward `bright`."""
ONE = ("--iterations=1", "--evaluation.every=0")


def finite(line: dict[str, Any]) -> bool:
    """Whether every number of a line is one."""
    return all(value is not None and math.isfinite(value) for value in line.values())


def test_a_run_leaves_its_files(config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--heldout_rewards.vivid.type=vividness",
        "--grids.every=1",
        "--iterations=3",
        "--tracking.trackers=[tensorboard]",
    ]
    assert train(config, *options) == 0
    out = capsys.readouterr().out
    names = {str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file() and "trackers" not in p.parts}
    best = json.loads((run_dir / "summary.json").read_text())["best"]["iteration"]
    assert names == {
        "config.yaml", "command.txt", "environment.json", "metrics.jsonl", "summary.json", "report.html",
        *(f"grids/iteration_{i:06d}.{kind}" for i in range(4) for kind in ("png", "json")),
        *(f"checkpoints/iteration_{i:06d}/{file}" for i in (2, 3) for file in ("manifest.json", "state.pt", "weights.safetensors")),
        "export/pytorch_lora_weights.safetensors", "export/README.md",
        *(f"best/iteration_{best:06d}/{file}" for file in ("manifest.json", "state.pt", "weights.safetensors")),
    }  # fmt: skip
    assert list(run_dir.glob("trackers/**/events.out.tfevents.*"))
    again = load_run([run_dir / "config.yaml"])
    assert again == load_run([config], options)
    assert json.loads((run_dir / "environment.json").read_text())["packages"]["torch"]
    assert "load_lora_weights" in out and str(run_dir / "report.html") in out
    report = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "http://" not in report.replace("http://www.w3.org", "") and "reward/bright/mean" in report


def test_summary_and_metrics_have_the_documented_keys(config: Path, run_dir: Path) -> None:
    assert train(config, "--heldout_rewards.vivid.type=vividness") == 0
    summary, lines = json.loads((run_dir / "summary.json").read_text()), metrics(run_dir)
    assert set(summary) == {
        "base", "final", "images_evaluated", "iterations", "updates", "images_sampled", "seconds", "export", "warnings",
        "stopped", "best", "memory",
    }  # fmt: skip
    assert set(summary["base"]) == set(summary["final"]) == {"bright", "vivid"}
    assert (summary["iterations"], summary["updates"], summary["images_sampled"], summary["images_evaluated"]) == (
        2,
        4,
        32,
        4,
    )
    assert set(summary["seconds"]) == {"rollout", "score", "update", "evaluate", "grid", "total"}
    assert set(summary["export"]) == {"file", "max_difference_to_policy", "difference_to_base", "snippet"}
    assert (run_dir / summary["export"]["file"]).is_file()
    assert summary["export"]["max_difference_to_policy"] < 1e-4 < summary["export"]["difference_to_base"]
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line.keys() >= LOGGED | {"heldout/bright", "heldout/vivid", "time/evaluate_s"}
    for line in lines:
        assert finite(line)
        assert [name for name in line if name not in ("iteration", "time") and lookup(name) is None] == []
    assert summary["base"] == {"bright": lines[0]["heldout/bright"], "vivid": lines[0]["heldout/vivid"]}
    assert summary["final"] == {"bright": lines[2]["heldout/bright"], "vivid": lines[2]["heldout/vivid"]}


# V8: work is what the geometry says.


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--rollout.guidance_scale=2", "--rollout.negative_prompt=a dull picture"],
        ["--update.batch_size=3", "--rollout.batch_size=5", "--rollout.window.size=2"],
        ["--update.per_iteration=1", "--update.batch_size=16"],
        ["--regularizers.kl.type=kl", "--rollout.guidance_scale=2"],
        [
            "--rewards.vivid.type=vividness",
            "--heldout_rewards.flat.type=tests.end_to_end.plugins:PartlyFlat",
            "--rollout.batch_size=16",
        ],
    ],
    ids=["plain", "guidance", "uneven batches", "one update", "kl and guidance", "two rewards"],
)
def test_work_is_what_the_geometry_says(config: Path, run_dir: Path, options: list[str]) -> None:
    assert train(config, *options) == 0
    run = load_run([config], options)
    geometry, sampling = Geometry.of(run, 1), run.rollout
    branches = 2 if sampling.guidance_scale != 1 else 1
    passes = 2 if run.regularizers else 1  # the reference policy's forward pass
    trained = geometry.images * geometry.window_size
    for line in metrics(run_dir)[1:]:
        work = {name.removeprefix("work/"): value for name, value in line.items() if name.startswith("work/")}
        assert work.pop("encoded_prompts") <= sampling.prompts
        assert work == {
            "denoiser_forward_calls": geometry.denoiser_calls_rollout
            + passes * geometry.micro_batches * geometry.updates_per_iteration,
            "denoiser_forward_images": branches * (geometry.images * sampling.steps + passes * trained),
            "denoiser_backward_images": branches * trained,
            "decoded_images": geometry.images,
            "reward_calls": len(run.rewards) * len(even_chunks(geometry.images, sampling.batch_size)),
            "moved_parts": 0,
            "scored_images": len(run.rewards) * geometry.images,
        }


def test_each_prompt_is_encoded_once(config: Path, run_dir: Path) -> None:
    """Over two passes of the prompt file; held-out prompts and the negative one are not met in training for the first time."""
    assert train(config, "--iterations=6", "--evaluation.every=0", "--rollout.guidance_scale=2") == 0
    assert set(TRAIN).isdisjoint(HELDOUT)
    encoded = [line["work/encoded_prompts"] for line in metrics(run_dir)[1:]]
    assert encoded == [4, 4, 4, 0, 0, 0]


def test_groups_without_signal_cost_no_update(config: Path, run_dir: Path) -> None:
    """A third of the prompts are flat; their images are sampled and then left out of every pass of the update."""
    options = [f"--rewards.bright.type={PLUGINS}:PartlyFlat", "--iterations=3"]
    assert train(config, *options) == 0
    lines, signal = metrics(run_dir)[1:], 0
    for line in lines:
        flat = round(4 * line["advantage/zero_variance_groups"])
        passed = 4 * (4 - flat) * 3
        signal += 4 - flat
        assert line["work/denoiser_backward_images"] == passed
        assert line["work/denoiser_forward_images"] == 16 * 4 + passed
        assert 8 < line["work/denoiser_forward_calls"] <= 8 + 4
    assert signal == 8  # all 12 prompts were met once
    assert train(config, *options, "--resume=never", "--update.skip_zero_advantage=false") == 0
    kept = metrics(run_dir.with_name("run-2"))[1:]
    assert [line["work/denoiser_backward_images"] for line in kept] == [48] * 3


def test_nothing_but_flat_groups(config: Path, run_dir: Path) -> None:
    """No image has signal: an update without gradient, numbers that are finite, and the run goes on."""
    (run_dir.parent / "train.txt").write_text("flat one\nflat two\nflat three\nflat four\n")
    assert train(config, f"--rewards.bright.type={PLUGINS}:PartlyFlat", "--optimizer.weight_decay=0") == 0
    for line in metrics(run_dir)[1:]:
        assert line["advantage/zero_variance_groups"] == 1
        assert line["policy/grad_norm"] == line["work/denoiser_backward_images"] == 0


# V1 and V2: equal seeds give equal bits, and nothing has moved at the first update.


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_equal_seeds_give_equal_bits(config: Path, run_dir: Path, tune: str) -> None:
    for seed in ("5", "5", "6"):
        assert (
            train(
                config, "--resume=never", f"--policy.tune.type={tune}", f"--seed={seed}", "--rollout.guidance_scale=2"
            )
            == 0
        )
    first, second, other = (saved(run_dir.with_name(name), 2) for name in ("run", "run-2", "run-3"))
    assert_equal(first.weights, second.weights)
    assert_equal(first.state, second.state)
    assert_equal(measured(run_dir), measured(run_dir.with_name("run-2")))
    # Weights that get no gradient (the last block drops its text output) may stay at what they were set to.
    assert any(not tensor.equal(other.weights[name]) for name, tensor in first.weights.items())
    assert measured(run_dir) != measured(run_dir.with_name("run-3"))


def test_a_resumed_or_second_run_says_where_it_is(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, *ONE) == 0
    assert train(config, *ONE, "--resume=never") == 0
    other = run_dir.with_name("run-2")
    assert f"in {other}\n" in capsys.readouterr().out
    assert load_run([other / "config.yaml"]).run_dir == other


@pytest.mark.parametrize("guidance", ["1", "2.5"])
def test_ratios_are_1_at_the_first_update(config: Path, run_dir: Path, guidance: str) -> None:
    """Exactly, in fp32, when the update's passes have the composition of the rollout's."""
    options = [
        "--rollout.window.size=1", "--rollout.window.start=1", "--update.per_iteration=1", "--update.batch_size=8", "--iterations=3",
        f"--rollout.guidance_scale={guidance}", "--rollout.dynamics.type=flow_sde", "--update.skip_zero_advantage=false",
    ]  # fmt: skip
    assert train(config, *options) == 0
    for line in metrics(run_dir)[1:]:
        assert line["policy/log_ratio_first"] == 0.0
        assert line["policy/ratio_first"] == 1.0


# Every option works.

OPTIONS: dict[str, list[str]] = {
    "flow_sde": ["--rollout.dynamics.type=flow_sde"],
    "flow_sde, last step": ["--rollout.dynamics.type=flow_sde", "--rollout.last_step_stochastic=true"],
    "cps, squared error": ["--rollout.dynamics.density=squared_error", "--algorithm.clip_range=1e-4"],
    "dance_sde": ["--rollout.dynamics.type=dance_sde", "--rollout.same_noise=true"],
    "dance_sde, last step": ["--rollout.dynamics.type=dance_sde", "--rollout.last_step_stochastic=true"],
    "matching": ["--rollout.dynamics.type=matching"],
    "matching, weighted": ["--rollout.dynamics.type=matching", "--rollout.dynamics.weighting=t2", "--rollout.dynamics.range=[0, 1]"],
    "fixed window": ["--rollout.window.type=fixed", "--rollout.window.start=1", "--rollout.window.size=1"],
    "random window": ["--rollout.window.type=random", "--rollout.window.size=2"],
    "random window in a range": ["--rollout.window.type=random", "--rollout.window.size=1", "--rollout.window.range=[1, 3]"],
    "sliding window": ["--rollout.window.type=sliding", "--rollout.window.size=1", "--rollout.window.dwell=1"],
    "full": ["--policy.tune.type=full"],
    "full with kl": ["--policy.tune.type=full", "--regularizers.kl.type=kl", "--regularizers.kl.kind=no_dt"],
    "lora on given layers": ["--policy.tune.targets=[attn.to_q, ff.net.2]"],
    "no average": ["--policy.ema=null"],
    "no average, full": ["--policy.ema=null", "--policy.tune.type=full"],
    "average without warm-up": ["--policy.ema.warmup=false", "--policy.ema.decay=0.5"],
    "global std": ["--advantage.std=global"],
    "no std": ["--advantage.std=none"],
    "advantages combined": ["--advantage.combine=advantages", "--rewards.vivid.type=vividness", "--rewards.vivid.weight=-0.5"],
    "sum of the density": ["--algorithm.logprob_reduction=sum", "--algorithm.clip_range=[0.2, 0.3]"],
    "kl, exact": ["--regularizers.kl.type=kl", "--regularizers.kl.coefficient=0.1"],
    "kl, mean_mse": ["--regularizers.kl.type=kl", "--regularizers.kl.kind=mean_mse"],
    "kl, v_mse": ["--regularizers.kl.type=kl", "--regularizers.kl.kind=v_mse"],
    "kl to the average": ["--regularizers.kl.type=kl", "--regularizers.kl.anchor=average", "--rollout.dynamics.type=matching"],
    "guidance": ["--rollout.guidance_scale=2.5", "--rollout.negative_prompt=a dull picture"],
    "guidance in the evaluation alone": ["--evaluation.guidance_scale=3", "--evaluation.steps=2"],
    "bf16": ["--model.precision=bf16", "--model.vae_precision=bf16"],
    "gradient checkpointing": ["--model.gradient_checkpointing=true"],
    "gradient checkpointing, full": ["--model.gradient_checkpointing=true", "--policy.tune.type=full"],
    "T5 tokens": ["--model.max_sequence_length=4"],
    "no text cache": ["--model.text_cache=0", "--rollout.guidance_scale=2"],
    "linear schedule": ["--optimizer.schedule=linear", "--optimizer.warmup_updates=1"],
    "cosine schedule": ["--optimizer.schedule=cosine"],
    "smaller pictures": ["--model.resolution=12"],
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_every_option_trains(config: Path, run_dir: Path, model: Path, options: list[str]) -> None:
    """All numbers are finite, and trained weights, and their average, are no longer what they were."""
    assert train(config, *ONE, *options) == 0
    lines = metrics(run_dir)
    assert all(finite(line) for line in lines)
    assert lines[1]["policy/grad_norm"] > 0
    weights = saved(run_dir, 1).weights
    before = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    average = not any("ema=null" in option for option in options)
    for prefix in ("trained.", "average.") if average else ("trained.",):
        mine = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        if "--policy.tune.type=full" in options:
            moved = [name for name, w in mine.items() if not w.equal(before[name])]
        else:
            moved = [name for name, w in mine.items() if ".lora_B." in name and w.any()]
        assert moved, f"no {prefix} weight has changed"
    assert average or not any(name.startswith("average.") for name in weights)


def test_fp16_finds_its_loss_scale(config: Path, run_dir: Path) -> None:
    """Updates that overflow are left out while the scale comes down (their norm is null); later ones move the weights."""
    assert train(config, "--model.precision=fp16", "--iterations=6", "--evaluation.every=0") == 0
    lines = metrics(run_dir)
    assert all(finite({k: v for k, v in line.items() if k != "policy/grad_norm"}) for line in lines)
    assert any((line["policy/grad_norm"] or 0) > 0 for line in lines[1:])
    state = saved(run_dir, 6)
    assert state.state["optimizer"]["scaler"]["scale"] < 2**16
    assert any(".lora_B." in name and bool(w.any()) for name, w in state.weights.items())


def test_the_same_update_with_and_without_checkpointing(config: Path, run_dir: Path) -> None:
    """Recomputed activations are the same activations."""
    assert train(config) == 0
    assert train(config, "--resume=never", "--model.gradient_checkpointing=true") == 0
    assert_equal(saved(run_dir, 2).weights, saved(run_dir.with_name("run-2"), 2).weights)


def test_same_noise_starts_a_group_at_one_place(config: Path, run_dir: Path) -> None:
    """With next to no noise on the way, the images of a group are then next to equal."""
    spread = []
    for same in ("false", "true"):
        options = [
            "--resume=never",
            f"--rollout.same_noise={same}",
            "--rollout.dynamics.noise_level=0.01",
            "--algorithm.clip_range=1",
        ]
        assert train(config, *ONE, *options) == 0
        spread.append(
            metrics(run_dir.with_name("run-2" if same == "true" else "run"))[1]["reward/bright/std_within_group"]
        )
    assert spread[1] < 0.2 * spread[0]
