"""What the process of an arm does: build, warm up, time, and tell step by step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from full_size.arms import Arm
from full_size.flops import known_peak, measured_peak
from t2irl import speed
from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.loading import Layer, load_run
from t2irl.models.base import DTYPES
from t2irl.utils.memory import keep_heap

OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
"""How an allocator says so where it has no exception of its own."""


def peaks(device: torch.device, run: Run, given: float | None) -> dict[str, float]:
    """TFLOP/s to compare with: what was given, else the maker's, else what a product of large matrices reaches."""
    measured = measured_peak(device, DTYPES[run.model.precision]) / 1e12
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    known = known_peak(name, run.model.precision, bool(run.speed.tf32))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return {"peak": given or (known / 1e12 if known else measured), "measured": measured}


def measure(spec: Mapping[str, Any], out: Path) -> None:
    """Measure what the spec says. What is refused or does not fit is a result as well.

    Each line of `out` is a mapping that adds to the result, so that what was known before a crash is not lost.
    """

    def tell(found: dict[str, Any]) -> None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_heap()
    run, arm = load_run([Layer(spec["tree"], {})], spec["overrides"]), None
    speed.use_tf32(run.speed.tf32)
    try:
        tell({"tflops": peaks(device, run, spec["peak_tflops"])})
        arm = Arm(run, device, tell, spec["reference"])
        arm.measure(spec["warmup"], spec["iterations"])
        if arm.kept is not None:
            torch.save(arm.kept, spec["kept"])
        tell({"status": "ok", "stage": None})
    except ConfigError as error:
        tell({"status": "refused", "stage": None, "reason": str(error)})
    except (RuntimeError, MemoryError) as error:
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in OUT_OF_MEMORY)
        kind, stage = "out of memory" if memory else "failed", arm.stages.current if arm else "start"
        tell({"status": kind, "stage": stage, "reason": (str(error) or kind).splitlines()[0]})
