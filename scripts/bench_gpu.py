"""Models at full size with random weights, by the trainer's own functions: seconds by stage, memory, use of the device.

    python scripts/bench_gpu.py --json bench.json                           # on a GPU: profiles b, c and d, all variants
    python scripts/bench_gpu.py --profile b --variant base compile flash
    python scripts/bench_gpu.py --profile tiny --json tiny.json              # the same code on a CPU, in a minute

Nothing is downloaded: weights are drawn on the device from published configs, text embeddings are random numbers of the right
shape, the reward costs next to nothing. So speed, memory and rounding mean something, scores do not. Further arguments are
overrides of every variant, as for `t2irl train`: `--rollout.batch_size 16`. A variant of your own: `--own "NAME=--a.b=c --d.e=f"`.
What the columns mean: docs/speed.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from full_size.arms import attempt, compared
from full_size.flops import known_peak, measured_peak
from full_size.profiles import AGAIN, BASE, GPU_ONLY, PROFILES, VARIANTS
from full_size.tables import show
from rich.console import Console

from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.loading import Layer, load_run
from t2irl.models.base import DTYPES
from t2irl.utils.memory import keep_heap
from t2irl.utils.tracking import environment

GROUPS = {"tiny": [name for name in PROFILES if name.startswith("tiny-")], "full": ["b", "c", "d"]}


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and overrides of all variants."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--profile", nargs="+", choices=[*PROFILES, *GROUPS], metavar="NAME", help=f"of {', '.join([*PROFILES, *GROUPS])}; full on a GPU, tiny without one")  # fmt: skip
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), metavar="NAME", help=f"of {', '.join(VARIANTS)}; all that change something")  # fmt: skip
    parser.add_argument("--own", action="append", default=[], metavar="NAME=OVERRIDES", help="another variant")
    parser.add_argument("--iterations", type=int, default=5, help="timed ones, default 5; 10 or more to report")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before, default 1; 3 to report")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for one that is not known")
    parser.add_argument("--json", type=Path, help="where everything is written to")
    args, overrides = parser.parse_known_args()
    if args.iterations < 1 or args.warmup < 1:
        parser.error("--iterations and --warmup must be at least 1")
    return args, overrides


def card(run: Run, title: str) -> dict[str, Any]:
    """What the work is; its hash says whether two results may be compared."""
    tree = run.model_dump(mode="json")
    tree["model"].pop("path")
    text = json.dumps(tree, sort_keys=True) + title
    return {"title": title, "hash": hashlib.sha256(text.encode()).hexdigest()[:12], "settings": tree}


def peaks(device: torch.device, run: Run, given: float | None) -> dict[str, float]:
    """FLOP/s to compare with: the maker's, else what a product of large matrices reaches."""
    measured = measured_peak(device, DTYPES[run.model.precision])
    if given is not None:
        return {"peak": given * 1e12, "measured": measured}
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return {"peak": known_peak(name, run.model.precision, bool(run.speed.tf32)) or measured, "measured": measured}


def mfu(arm: Mapping[str, Any], peak: float) -> dict[str, float]:
    """Shares of a peak: useful work of rollout, update and both; `update_hfu` counts recomputation as well."""
    work, stages = arm["flops"], arm["stages_s"]
    rollout = sum(stages.get(name, 0.0) for name in ("text", "denoise", "decode"))
    update = sum(stages.get(name, 0.0) for name in ("forward", "backward", "optimizer"))
    return {
        "rollout": work["rollout"] / rollout / peak,
        "denoise": work["rollout"] / stages["denoise"] / peak,
        "update": work["update"] / update / peak,
        "update_hfu": (work["update"] + work["again"]) / update / peak,
        "iteration": (work["rollout"] + work["update"]) / arm["iteration_s"] / peak,
    }


def chosen(args: argparse.Namespace, device: torch.device) -> dict[str, Sequence[str]]:
    """Variants by name, the base first. Names that were asked for are all taken."""
    names = args.variant or [n for n in VARIANTS if device.type == "cuda" or n not in GPU_ONLY]
    own = {name: shlex.split(words) for name, _, words in (text.partition("=") for text in args.own)}
    return {BASE: (), **{n: VARIANTS[n] for n in names if n != AGAIN}, **own, **({AGAIN: ()} if AGAIN in names else {})}


def bench(
    name: str, args: argparse.Namespace, overrides: Sequence[str], device: torch.device, console: Console
) -> dict[str, Any]:
    """All variants of a profile."""
    profile, arms, base_kept, base_run = PROFILES[name], [], None, None
    with tempfile.TemporaryDirectory() as place:
        tree = profile.tree(profile.folder(Path(place) / "model"))
        for variant, words in chosen(args, device).items():
            try:
                run = load_run([Layer(tree, {})], [*overrides, *words])
            except ConfigError as error:
                arms.append({"name": variant, "status": "refused", "reason": str(error)})
                continue
            base_run = base_run or run
            if run == base_run and variant not in (BASE, AGAIN):
                if args.variant:
                    arms.append({"name": variant, "status": "skipped", "reason": f"changes nothing of {BASE} here"})
                continue
            console.print(f"{name}: {variant} ...", highlight=False)
            result, kept = attempt(run, device, args.warmup, args.iterations)
            arm = {"name": variant, "overrides": list(words), **result}
            if arm["status"] == "ok":
                arm["tflops"] = {k: v / 1e12 for k, v in peaks(device, run, args.peak_tflops).items()}
                arm["mfu"] = mfu(arm, arm["tflops"]["peak"] * 1e12)
            base_kept = base_kept or kept
            if kept is not None and base_kept is not None and kept is not base_kept:
                arm["against_base"] = compared(kept, base_kept)
            arms.append(arm)
    assert base_run is not None, "the settings of a profile are right"
    return {"profile": name, "card": card(base_run, profile.title), "arms": arms}


def main() -> None:
    """Measure, print, write."""
    args, overrides = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_heap()
    asked = args.profile or ["full" if device.type == "cuda" else "tiny"]
    names = list(dict.fromkeys(name for word in asked for name in GROUPS.get(word, [word])))
    console, found = Console(width=150), []
    for name in names:
        found.append(bench(name, args, overrides, device, console))
        show(console, found[-1]["card"], found[-1]["arms"])
        if args.json:  # after every profile: a later one may be cut off
            about = {"environment": environment(), "device": device.type, "warmup": args.warmup, "profiles": found}
            args.json.write_text(json.dumps(about, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
