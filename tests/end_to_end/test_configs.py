"""Every YAML under configs/: it loads, `check` accepts it for its counts of processes; those of model families, and methods laid over
them, run two iterations with the family's tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from t2irl.check import describe
from t2irl.loading import load_run
from t2irl.shapes.captions import parse_caption, sample_captions
from t2irl.shapes.render import render, sample_scene
from t2irl.train import train
from tests.adversaries import write_references
from tests.end_to_end.runs import ROOT, metrics
from tests.families import CASES
from tests.judges import serving
from tests.reward_weights import head_weights, write_image_reward
from tests.tiny import WORDS

Folder = Callable[..., Path]
Files = tuple[Path, ...]
TINY = {"flux1_dev": "flux_dev", "qwen_image": "qwen_image", "sd15": "sd15", "sd35_medium": "sd3", "sdxl": "sdxl"}
"""Folder under configs/ -> case of `tests.families`."""
OTHER_LOADERS = {"accelerate", "eval", "hacklab"}
"""Folders of other kinds of settings: the launcher's; tests/unit/test_eval_settings.py and test_hacklab.py load the rest."""
PROCESSES = (1, 8, 32)


def under(*folders: str) -> list[Path]:
    """Configs, relative to the root."""
    return sorted(p.relative_to(ROOT) for name in folders for p in (ROOT / "configs" / name).glob("*.yaml"))


MODELS, METHODS, WORLD, GPUS = under(*TINY), under("methods"), under("tiny"), under("gpus")
PLAIN = [path for path in MODELS if path.stem.startswith("flow_grpo")]
"""What a method is laid over."""
IN_FULL = {"adv_dino": "flux1_dev", "adv_pickscore": "qwen_image", "artifact": "sdxl", "gardo": "flux1_dev"}
"""Method -> the model on which it also trains."""
RUNS: list[Files] = [(path,) for path in MODELS]
RUNS += [(Path("configs") / IN_FULL[method.stem] / "flow_grpo.yaml", method) for method in METHODS]
PAIRS: list[Files] = [(path, method) for method in METHODS for path in PLAIN]
ON_FEWER: list[Files] = [(*files, gpus) for gpus in GPUS for files in (*((path,) for path in MODELS), *PAIRS)]


def name(files: Files) -> str:
    """For test ids."""
    return "+".join(f"{path.parent.name}/{path.stem}" for path in files)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """Prompt files, an index of reference images for them, small rewards in the published formats, a judge's server."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(7)
    texts = list(dict.fromkeys(c.text for c in sample_captions(100, rng)))
    (folder / "train.txt").write_text("\n".join(texts) + "\n")
    (folder / "heldout.txt").write_text("\n".join(WORDS) + "\n")
    drawn = {text: [render(sample_scene(parse_caption(text), rng))] for text in texts}
    width = json.loads((ROOT / "assets/tiny-clip/config.json").read_text())["projection_dim"]
    torch.save(head_weights(width), folder / "head.pth")
    with serving() as judge:
        yield {
            "folder": folder,
            "index": write_references(folder / "references", drawn),
            "head": folder / "head.pth",
            "image_reward": write_image_reward(folder / "image_reward"),
            "judge": judge.url,
        }


def places(model: Path, data: dict[str, object]) -> dict[str, object]:
    """Where model and prompts are: all that `check` wants."""
    return {
        "model.path": model,
        "data.prompts": f"{data['folder']}/train.txt",
        "data.heldout": f"{data['folder']}/heldout.txt",
    }


def small(files: Files, data: dict[str, object]) -> dict[str, object]:
    """Settings that leave a config's algorithm alone and make everything small."""
    case, run = CASES[TINY[files[0].parent.name]], load_run(files)
    settings: dict[str, object] = {
        "iterations": 2, "model.precision": "fp32", "model.vae_precision": "fp32", "rollout.prompts": 4, "rollout.group_size": 2,
        "rollout.batch_size": 8, "update.batch_size": 8, "policy.tune.rank": 4, "policy.tune.alpha": 8, "evaluation.every": 0,
        "evaluation.images": 2, "evaluation.steps": 4, "grids.every": 0, "grids.prompts": 1, "checkpoints.every": 2,
        "tracking.trackers": "[]", **{f"model.{key}": value for key, value in case.model.items() if key != "type"},
        "model.resolution": 16,
    }  # fmt: skip
    for kind in ("rewards", "heldout_rewards", "regularizers"):
        for key, config in getattr(run, kind).items():
            known = {
                "path": data.get(config.type, f"assets/tiny-{'dinov2' if 'di' in config.type else 'clip'}"),
                "size": 64,
                "head": data["head"],
                "server": data["judge"],
                "references.index": data["index"],
            }
            absent = {"path"} if config.type == "artifact_judge" else set()
            fields = {field for field in known if field.split(".")[0] in type(config).model_fields} - absent
            settings |= {f"{kind}.{key}.{field}": known[field] for field in fields}
    return settings


def words(settings: dict[str, object]) -> list[str]:
    """Overrides of a command line."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def check(files: Files, overrides: list[str]) -> None:
    """As `t2irl check`."""
    run = load_run(files, overrides)
    for processes in PROCESSES:
        shown = describe(run, processes)
        assert "estimate per process" in shown
        assert "unknown" not in shown.split("time ")[0]


@pytest.mark.parametrize("files", RUNS, ids=name)
def test_check_and_two_iterations(tiny_folder: Folder, data: dict[str, object], tmp_path: Path, files: Files) -> None:
    there = places(tiny_folder(TINY[files[0].parent.name]), data)
    check(files, words(there))
    run = load_run(files, words(there | small(files, data) | {"run_dir": tmp_path / "run"}))
    train(run, resume="never")
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines if "work/denoiser_forward_calls" in line] == [1, 2]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["export"]["max_difference_to_policy"] < 1e-3


@pytest.mark.parametrize("files", PAIRS, ids=name)
def test_every_method_goes_with_every_model(tiny_folder: Folder, data: dict[str, object], files: Files) -> None:
    check(files, words(places(tiny_folder(TINY[files[0].parent.name]), data)))
    assert load_run(files).run_dir not in {load_run([path]).run_dir for path in MODELS}


@pytest.mark.parametrize("files", ON_FEWER, ids=name)
def test_fewer_gpus_draw_fewer_images(tiny_folder: Folder, data: dict[str, object], files: Files) -> None:
    """Over every model and method; the algorithm stays what it was."""
    check(files, words(places(tiny_folder(TINY[files[0].parent.name]), data)))
    whole, fewer = load_run(files[:-1]), load_run(files)
    assert fewer.rollout.prompts * fewer.rollout.group_size < whole.rollout.prompts * whole.rollout.group_size
    changed = {"prompts", "group_size"}
    assert fewer.rollout.model_dump(exclude=changed) == whole.rollout.model_dump(exclude=changed)
    for part in ("policy", "algorithm", "advantage", "regularizers", "rewards", "update", "optimizer"):
        assert getattr(fewer, part) == getattr(whole, part)


@pytest.mark.parametrize("method", ["adv_dino", "adv_pickscore"])
def test_the_published_adversarial_run_is_the_method_over_its_model(method: str) -> None:
    """Whatever a method's overlay says is what its complete file says; what is the model's may differ."""
    folder, other = Path("configs/sd35_medium"), {"run_dir", "rollout.batch_size", "update.batch_size"}
    whole = load_run([folder / f"{method}.yaml"]).model_dump(mode="json")
    laid = load_run([folder / "flow_grpo.yaml", f"configs/methods/{method}.yaml"], ["--regularizers.kl", "null"])
    found = laid.model_dump(mode="json")
    for key in other:
        *path, last = key.split(".")
        for tree in (whole, found):
            for step in path:
                tree = tree[step]
            del tree[last]
    assert found == whole


@pytest.mark.parametrize("path", WORLD, ids=lambda p: p.stem)
def test_check_of_the_shapes_worlds_runs(path: Path) -> None:
    check((path,), [])


def test_every_config_belongs_to_a_kind() -> None:
    """A new folder must be given a test."""
    tested = {*MODELS, *METHODS, *WORLD, *GPUS, *under(*OTHER_LOADERS)}
    assert tested == {p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.y*ml")}
