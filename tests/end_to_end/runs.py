"""Small runs through the command line, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from t2irl import cli

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = "tests.end_to_end.plugins"
TRAIN = [
    f"a {size} {thing}" for size in ("red", "large", "flat") for thing in ("circle", "square", "photo", "triangle")
]
"""12 prompts, a third of them 'flat'."""
HELDOUT = ["a blue circle", "two green squares", "the night sky"]


def base_config(folder: Path, model: Path) -> Path:
    """A config of the smallest run that has everything, with its prompt files in `folder`; `folder`/run is its run."""
    (folder / "train.txt").write_text("\n".join(TRAIN) + "\n")
    (folder / "heldout.txt").write_text("\n".join(HELDOUT) + "\n")
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "iterations": 2,
        "model": {"type": "sd3", "path": str(model), "max_sequence_length": 0},
        "policy": {"tune": {"type": "lora", "rank": 4, "alpha": 8}},
        "data": {"prompts": str(folder / "train.txt"), "heldout": str(folder / "heldout.txt")},
        "rollout": {"prompts": 4, "group_size": 4, "steps": 4, "batch_size": 8},
        "algorithm": {"type": "grpo", "clip_range": 1e-2},
        "rewards": {"bright": {"type": f"{PLUGINS}:Brightness"}},
        "update": {"per_iteration": 2, "batch_size": 4},
        "optimizer": {"lr": 2e-4},
        "evaluation": {"every": 1, "images": 4},
        "grids": {"every": 0, "prompts": 2, "images": 1},
        "checkpoints": {"every": 1, "keep": 2},
        "tracking": {"trackers": []},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(config: Path, *options: str) -> int:
    """`t2irl train` in this process; the exit code."""
    return cli.main(["train", str(config), *options])


def command(config: Path, *options: str) -> list[str]:
    """The same as a command line."""
    return [sys.executable, "-m", "t2irl", "train", str(config), *options]


def spawn(*words: str, **variables: str) -> subprocess.Popen[str]:
    """Start a command in the repository root: one thread, more environment `variables`, output to be read line by line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb", **variables}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def call(*words: str, timeout: float = 240, **variables: str) -> tuple[int, str, str]:
    """Run a command in the repository root: exit code, standard output, standard error."""
    process = spawn(*words, **variables)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def two_processes(config: Path, *options: str, **variables: str) -> tuple[int, str, str]:
    """`t2irl train` by two processes on the CPU; by torchrun, since without mpirun `accelerate launch --cpu` starts only one."""
    words = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "t2irl", "train", str(config))
    return call(sys.executable, *words, *options, CUDA_VISIBLE_DEVICES="", **variables)


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it lies on the disk."""

    weights: dict[str, Tensor]
    state: dict[str, Any]
    clock: dict[str, int]


def checkpoints(run: Path) -> list[str]:
    """Names in the folder of checkpoints, hidden ones as well."""
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def saved(run: Path, iteration: int) -> Saved:
    """The checkpoint of an iteration."""
    folder = run / "checkpoints" / f"iteration_{iteration:06d}"
    return Saved(
        load_file(folder / "weights.safetensors"),
        torch.load(folder / "state.pt", weights_only=True),
        json.loads((folder / "manifest.json").read_text())["clock"],
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def measured(run: Path) -> list[dict[str, Any]]:
    """The same without what differs between equal runs: times and memory, and, since a continued run
    encodes its prompts again, encodings.
    """
    varying = ("time", "memory/", "work/encoded_prompts")
    return [{k: v for k, v in line.items() if not k.startswith(varying)} for line in metrics(run)]


def assert_equal(a: Any, b: Any, place: str = "") -> None:
    """Nested mappings and lists are equal, tensors to the last bit."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{place} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{place}: {set(a) ^ set(b)}"
        for key in a:
            assert_equal(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{place}/{i}")
    else:
        assert a == b, f"{place}: {a} != {b}"


def assert_same_run(a: Path, b: Path, iteration: int) -> None:
    """Two runs have the same checkpoint after `iteration`, and the same metrics up to it."""
    first, second = saved(a, iteration), saved(b, iteration)
    for name in ("weights", "state", "clock"):
        assert_equal(getattr(first, name), getattr(second, name), name)
    upto = [[line for line in measured(run) if line["iteration"] <= iteration] for run in (a, b)]
    assert_equal(*upto, "metrics")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
