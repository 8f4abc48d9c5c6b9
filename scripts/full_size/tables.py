"""What a benchmark found, for people: tables on the terminal. The JSON file has all of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from full_size.profiles import AGAIN, BASE, DIFFUSERS
from full_size.results import ROLLOUT

STAGES = ("text", "denoise", "decode", "score", "forward", "backward", "optimizer", "other")
GIB = 2**30


def show(console: Console, card: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> None:
    """The tables of one profile."""
    console.print(f"\n{card['title']} (card {card['hash']})", highlight=False)
    good = [arm for arm in arms if arm["status"] == "ok"]
    base = next((arm for arm in good if arm["name"] == BASE), None)
    for title, columns, row in (
        ("seconds of an iteration, medians", ("iteration", "± IQR", f"gain over {BASE}", "images/s", *STAGES), _seconds),
        ("memory and use of the device", ("peak GiB", "reserved", "stage", "estimate GiB", "peak over it", "CPU GiB", "MFU rollout", "MFU update", "HFU update", "MFU all"), _use),
        (f"numbers, against {BASE}", ("first log-ratio", "velocity", "gradient", "cosine", "first iteration", "evaluation", "graphs"), _numbers),
    ):  # fmt: skip
        table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("variant")
        for column in columns:
            table.add_column(column, justify="right")
        for arm in good:
            table.add_row(arm["name"], *row(arm, base))
        console.print(table)
    for arm in arms:
        if arm["status"] != "ok":
            at = f" in {arm['stage']}" if "stage" in arm else ""
            console.print(f"{arm['name']}: {arm['status']}{at}: {arm['reason']}", highlight=False, markup=False)
    plain = next((arm for arm in good if arm["name"] == DIFFUSERS), None)
    if base and plain:
        ours, bare = (sum(arm["stages_s"].get(name, 0.0) for name in ROLLOUT) for arm in (base, plain))
        console.print(
            f"the rollout takes {ours / bare:.3f} times the plain denoiser calls and decoding", highlight=False
        )
    again = next((arm for arm in good if arm["name"] == AGAIN), None)
    blocks = [statistics.median(block) for block in base["blocks_s"]] if base else []
    pair = [base["iteration_s"], again["iteration_s"]] if base and again else blocks
    if len(pair) > 1:
        spread = abs(pair[1] / pair[0] - 1)
        console.print(f"equal arms differ by {spread:.1%}: a gain below twice that is none", highlight=False)


def show_beside(console: Console, rows: Sequence[tuple[str, str, float, float]]) -> None:
    """The same work in two files."""
    table = Table("profile", "variant", "seconds now", "before", "before / now", show_edge=False, pad_edge=False)
    for profile, arm, now, before in rows:
        table.add_row(profile, arm, _number(now), _number(before), f"{before / now:.3f}")
    console.print(table)


def _seconds(arm: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    gain = "" if base is None else "other work"
    if base and arm["card"]["work"] == base["card"]["work"] and arm["name"] != DIFFUSERS:
        gain = f"{base['iteration_s'] / arm['iteration_s']:.2f}"
    stages = [_number(arm["stages_s"].get(name)) for name in STAGES]
    return [_number(arm["iteration_s"]), _number(arm["iqr_s"]), gain, _number(arm["images_per_s"]), *stages]


def _use(arm: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    peaks, estimate = arm["peak_bytes"], arm.get("estimate", {}).get("peak_bytes")
    at = max(peaks, key=peaks.get, default=None)
    found = [_number(peaks[at] / GIB) if at else "", _number(max(arm["reserved_bytes"].values()) / GIB) if arm["reserved_bytes"] else "", at or ""]  # fmt: skip
    found += [_number(estimate / GIB), f"{peaks[at] / estimate:.2f}" if at else ""] if estimate else ["", ""]
    shares = (arm["mfu"].get(name) for name in ("rollout", "update", "update_hfu", "iteration"))
    return [*found, _number(arm["rss_bytes"] / GIB), *("" if share is None else f"{share:.1%}" for share in shares)]


def _numbers(arm: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    close = arm.get("against_base", {})
    found = [close.get(name) for name in ("velocity_relative", "gradient_relative")]
    return [
        f"{arm['log_ratio_first']:.1e}" if "log_ratio_first" in arm else "",
        *("" if x is None else f"{x:.1e}" for x in found),
        f"{close['gradient_cosine']:.6f}" if close else "",
        _number(arm["cold_start_s"]),
        _number(arm.get("evaluation_s")),
        str(arm.get("graphs", "")),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
