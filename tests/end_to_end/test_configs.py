"""Every config of a model family: `check` for its counts of processes, and two iterations with the family's tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from t2irl.check import describe
from t2irl.loading import load_run
from t2irl.shapes.captions import parse_caption, sample_captions
from t2irl.shapes.render import render, sample_scene
from t2irl.train import train
from tests.adversaries import write_references
from tests.end_to_end.runs import ROOT, metrics
from tests.families import CASES
from tests.tiny import WORDS

Folder = Callable[..., Path]
TINY = {"flux1_dev": "flux_dev", "qwen_image": "qwen_image", "sd15": "sd15", "sd35_medium": "sd3", "sdxl": "sdxl"}
"""Folder under configs/ -> case of `tests.families`."""
CONFIGS = sorted(p.relative_to(ROOT) for name in TINY for p in (ROOT / "configs" / name).glob("*.yaml"))


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prompt files, and an index of reference images for the prompts."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(7)
    texts = list(dict.fromkeys(c.text for c in sample_captions(100, rng)))
    (folder / "train.txt").write_text("\n".join(texts) + "\n")
    (folder / "heldout.txt").write_text("\n".join(WORDS) + "\n")
    drawn = {text: [render(sample_scene(parse_caption(text), rng)) for _ in range(1)] for text in texts}
    return {"folder": folder, "index": write_references(folder, drawn)}


def small(path: Path, model: Path, data: dict[str, Path], run_dir: Path) -> list[str]:
    """Overrides that leave a config's algorithm alone and make everything small."""
    case = CASES[TINY[path.parent.name]]
    settings = {
        "run_dir": run_dir, "iterations": 2, "data.prompts": data["folder"] / "train.txt",
        "data.heldout": data["folder"] / "heldout.txt", "model.path": model, "model.precision": "fp32",
        "model.vae_precision": "fp32", "rollout.prompts": 4, "rollout.group_size": 2, "rollout.batch_size": 8,
        "update.batch_size": 8, "policy.tune.rank": 4, "policy.tune.alpha": 8, "evaluation.every": 0, "evaluation.images": 2,
        "evaluation.steps": 4, "grids.every": 0, "grids.prompts": 1, "checkpoints.every": 2, "tracking.trackers": "[]",
        **{f"model.{key}": value for key, value in case.model.items() if key != "type"}, "model.resolution": 16,
    }  # fmt: skip
    run = load_run([path])
    for kind in ("rewards", "heldout_rewards"):
        for name, config in getattr(run, kind).items():
            weights = {"path": "assets/tiny-dinov2" if config.type == "adversarial_dino" else "assets/tiny-clip"}
            index = {"references.index": data["index"]} if "references" in type(config).model_fields else {}
            weights |= {"size": 64} if "size" in type(config).model_fields else {}
            settings |= {f"{kind}.{name}.{key}": value for key, value in (weights | index).items()}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_check_and_two_iterations(tiny_folder: Folder, captions: dict[str, Path], tmp_path: Path, path: Path) -> None:
    words = small(path, tiny_folder(TINY[path.parent.name]), captions, tmp_path / "run")
    places = [words.index(f"--{key}") for key in ("data.prompts", "data.heldout", "model.path")]
    run = load_run([path], [word for place in places for word in words[place : place + 2]])
    for processes in (1, 8, 32):
        shown = describe(run, processes)
        assert "estimate per process" in shown
        assert "unknown" not in shown.split("time ")[0]
    train(load_run([path], words), resume="never")
    lines = metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines if "work/denoiser_forward_calls" in line] == [1, 2]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["export"]["max_difference_to_policy"] < 1e-3
