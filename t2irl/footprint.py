"""What memory a process really held, beside what was estimated: at the end of a run, in its summary and its last words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from t2irl.check import read_folder
from t2irl.estimate import estimate
from t2irl.geometry import Geometry
from t2irl.utils import distributed
from t2irl.utils.memory import held_gib, peak_gib


class Footprint:
    """Memory of this process at moments of its life: allocated on a GPU, resident otherwise."""

    def __init__(self, device: torch.device):
        self.device = device
        self.moments: dict[str, float] = {}

    def mark(self, moment: str) -> None:
        """Note what is held now: `start` before the model is loaded, `model` with it, `rewards` with all rewards."""
        self.moments[moment] = held_gib(self.device)

    def measured(self) -> dict[str, float]:
        """GiB: the peak, what was there before the model, what loading model and rewards added."""
        start, model, rewards = (self.moments[name] for name in ("start", "model", "rewards"))
        return {"peak": peak_gib(self.device), "before": start, "model": model - start, "rewards": max(rewards - model, 0.0)}  # fmt: skip


def compared(footprint: Footprint, g: Geometry, prompts: int, spread: bool) -> dict[str, Any]:
    """The estimate of `t2irl check` beside the peak of every process. Called on all of them.

    A process's ratio is what it held at most, without what was there before and without rewards, over the estimate.
    """
    found = estimate(g.run, g, read_folder(g.run.model.path), prompts, spread)
    expected = (found.in_one_memory if footprint.device.type == "cpu" else found.peak) / 2**30
    processes = [
        mine | {"ratio": (mine["peak"] - mine["before"] - mine["rewards"]) / expected}
        for mine in distributed.gather_objects(footprint.measured())
    ]
    kind = "allocated on the GPU" if footprint.device.type == "cuda" else "resident"
    return {"estimate_gib": expected, "complete": found.complete, "kind": kind, "processes_gib": processes}


def sentence(memory: Mapping[str, Any]) -> str:
    """The comparison in words, of the process that held most."""
    processes: Sequence[Mapping[str, float]] = memory["processes_gib"]
    most = max(processes, key=lambda p: p["peak"])
    own = most["peak"] - most["before"] - most["rewards"]
    unknown = "" if memory["complete"] else " for the known parts"
    return (
        f"{most['peak']:.2f} GiB {memory['kind']} at most, {most['before']:.2f} of it before the model was loaded and "
        f"{most['rewards']:.2f} for rewards; the other {own:.2f} GiB were estimated as {memory['estimate_gib']:.2f}{unknown} "
        f"(ratio {most['ratio']:.2f})"
    )
