"""What nvidia-smi says of the GPU while an arm runs: clocks, power, temperature, driver."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from typing import Any

FIELDS = {
    "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "power_w", "temperature.gpu": "temperature_c",
}  # fmt: skip
"""Field of nvidia-smi -> what varies."""
FIXED = {
    "name": "name", "driver_version": "driver", "power.limit": "power_limit_w", "clocks.max.sm": "sm_limit_mhz",
    "clocks.max.mem": "memory_limit_mhz",
}  # fmt: skip
"""Field of nvidia-smi -> what stays."""


def read() -> dict[str, str] | None:
    """One reading, by the names above; None where there is no nvidia-smi or it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    words = ["nvidia-smi", "-i", first, f"--query-gpu={','.join((*FIXED, *FIELDS))}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    names = (*FIXED.values(), *FIELDS.values())
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else None


def summary(readings: list[dict[str, str]]) -> dict[str, Any] | None:
    """Of an arm's readings: what stays, and the lowest, middle and highest of what varies. None without any."""
    if not readings:
        return None
    found: dict[str, Any] = {name: readings[-1][name] for name in FIXED.values()}
    for name in FIELDS.values():
        values = [float(r[name]) for r in readings if r[name].replace(".", "", 1).isdigit()]  # not "[N/A]"
        found[name] = [min(values), statistics.median(values), max(values)] if values else None
    return found
