"""What the blocks of an arm come to: medians, spread, shares of the peak; and arms beside those of an earlier file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2irl.errors import ConfigError

ROLLOUT = ("text", "denoise", "decode")
UPDATE = ("forward", "backward", "optimizer")


def merged(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result of an arm from its blocks, each measured in a process of its own. One that failed makes the arm fail."""
    whole = next((block for block in blocks if block["status"] != "ok"), blocks[0])
    found = {name: value for name, value in whole.items() if name != "timings"}
    if whole["status"] != "ok":
        return found
    timings = [timing for block in blocks for timing in block["timings"]]
    totals = [sum(timing.values()) for timing in timings]
    median = statistics.median(totals)
    quarter = statistics.quantiles(totals, n=4) if len(totals) > 1 else [median] * 3
    names = dict.fromkeys(name for timing in timings for name in timing)
    found |= {
        "blocks_s": [[sum(timing.values()) for timing in block["timings"]] for block in blocks],
        "iteration_s": median,
        "iqr_s": quarter[2] - quarter[0],
        "stages_s": {name: statistics.median(t.get(name, 0.0) for t in timings) for name in names},
        "images_per_s": whole["images"] / median,
        "trained_rows_per_s": whole["images"] * whole["window"] / median if whole["flops"]["update"] else None,
        "log_ratio_first": max(block["log_ratio_first"] for block in blocks) if "log_ratio_first" in whole else None,
        "gpu": [block["gpu"] for block in blocks if "gpu" in block] or None,
    }
    for name in ("peak_bytes", "reserved_bytes"):
        found[name] = {key: max(block[name].get(key, 0) for block in blocks) for key in whole[name]}
    found["rss_bytes"] = max(block["rss_bytes"] for block in blocks)
    found["mfu"] = mfu(found, whole["tflops"]["peak"] * 1e12)
    return {name: value for name, value in found.items() if value is not None}


def mfu(arm: Mapping[str, Any], peak: float) -> dict[str, float]:
    """Shares of a peak: useful work of rollout, update and both; `update_hfu` counts recomputation as well."""
    work, stages = arm["flops"], arm["stages_s"]
    rollout, update = (sum(stages.get(name, 0.0) for name in names) for names in (ROLLOUT, UPDATE))
    found = {"rollout": work["rollout"] / rollout / peak, "denoise": work["rollout"] / stages["denoise"] / peak}
    if work["update"]:
        found["update"] = work["update"] / update / peak
        found["update_hfu"] = (work["update"] + work["again"]) / update / peak
        found["iteration"] = (work["rollout"] + work["update"]) / arm["iteration_s"] / peak
    return found


def compared(mine: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How far velocity and gradient are from the base's, which had the same weights and inputs."""
    (v, g), (v0, g0) = mine, base
    return {
        "velocity_max": float((v - v0).abs().max()),
        "velocity_relative": float((v - v0).norm() / v0.norm()),
        "gradient_cosine": float(torch.nn.functional.cosine_similarity(g.double(), g0.double(), dim=0)),
        "gradient_relative": float((g - g0).norm() / g0.norm()),
    }


def beside(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """(profile, arm, seconds now, seconds before) of what two files both measured.

    Raises ConfigError where the work is not the same, by the arms' digests, or the device is another one: such seconds say nothing.
    """
    devices = [", ".join(file["environment"]["gpus"]) or file["environment"]["cpu"] for file in (now, before)]
    if devices[0] != devices[1]:
        raise ConfigError(f"measured on {devices[0]} and on {devices[1]}: compare results of one device")
    old = {(p["profile"], a["name"]): a for p in before["profiles"] for a in p["arms"] if a["status"] == "ok"}
    rows, other = [], []
    for profile in now["profiles"]:
        for arm in profile["arms"]:
            earlier = old.get((profile["profile"], arm["name"]))
            if arm["status"] != "ok" or earlier is None:
                continue
            if arm["card"] != earlier.get("card"):
                other.append(
                    f"{profile['profile']}, {arm['name']}: {arm['card']['hash']}, before {earlier.get('card', {}).get('hash')}"
                )
            else:
                rows.append((profile["profile"], arm["name"], arm["iteration_s"], earlier["iteration_s"]))
    if other:
        raise ConfigError("these are not the same work, so their seconds are not compared:\n" + "\n".join(other))
    if not rows:
        raise ConfigError("the two files have no arm in common that was measured in both")
    return rows
