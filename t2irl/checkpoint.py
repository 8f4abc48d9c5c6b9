"""Checkpoints: written atomically, checked by hash when read, holding all that the loop reads."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2irl.errors import CheckpointError
from t2irl.types import Clock

PREFIX = "iteration_"
CONTENTS = ("weights.safetensors", "state.pt")
"""Files of a checkpoint whose hashes are in its manifest."""


def path_of(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return folder / f"{PREFIX}{iteration:06d}"


def iteration_of(path: Path) -> int:
    """The iterations that a checkpoint stands for."""
    return int(path.name.removeprefix(PREFIX))


def available(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit())


def save(folder: Path, clock: Clock, weights: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and drop all but the newest `keep`. Main process only.

    `weights` go to safetensors, `state` (optimiser, rewards, regularisers) to a file read without running code. A checkpoint
    appears under its name only when it is whole. Raises CheckpointError when writing fails; older ones stay.
    """
    target = path_of(folder, clock.iteration)
    temporary = folder / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary / "weights.safetensors")
        torch.save(state, temporary / "state.pt")
        hashes = {name: _sha256(temporary / name) for name in CONTENTS}
        (temporary / "manifest.json").write_text(json.dumps({"clock": asdict(clock), "sha256": hashes}, indent=1))
        for file in temporary.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        outdated = folder / f".{target.name}.old"
        if target.exists():  # a damaged one that the run has come back to
            target.replace(outdated)
        temporary.replace(target)
        shutil.rmtree(outdated, ignore_errors=True)
    # torch and safetensors report a failed write by errors of their own.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = available(folder)
        kept = f"The last good checkpoint is {last[-1]}" if last else "There is no earlier checkpoint"
        raise CheckpointError(
            f"cannot save {target}: {error} ({shutil.disk_usage(folder).free >> 20} MiB free there). {kept}; "
            "make room and give the same command again to continue"
        ) from error
    for old in available(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load(path: Path, device: torch.device, mapped: bool = False) -> tuple[Clock, dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: clock, weights, state. Raises CheckpointError naming the bad file.

    `mapped`: leave tensors in the file until something is done with them, instead of bringing all to `device`; for processes that need a
    part of each.
    """
    device = torch.device("cpu") if mapped else device
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in CONTENTS:
            if _sha256(path / name) != manifest["sha256"][name]:
                raise CheckpointError(f"checkpoint {path}: {name} is damaged (its hash differs from manifest.json)")
        weights = load_file(path / "weights.safetensors", device=str(device))
        state = torch.load(path / "state.pt", map_location=device, weights_only=True, mmap=mapped or None)
        return Clock(**manifest["clock"]), weights, state
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def load_newest(
    folder: Path, device: torch.device, say: Callable[[str], None], mapped: bool = False
) -> tuple[Clock, dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable checkpoint, None when there is none. Damaged ones are reported and passed over.

    Raises CheckpointError when there are checkpoints but none can be read: starting afresh would overwrite the run.
    """
    candidates = available(folder)
    problem: CheckpointError | None = None
    for path in reversed(candidates):
        try:
            return load(path, device, mapped)
        except CheckpointError as error:
            problem = error
            say(f"warning: {error}; trying the one before it")
    if problem is not None:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {folder} can be read ({problem}). Move the folder away or choose "
            "another --run_dir to start afresh"
        )
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
