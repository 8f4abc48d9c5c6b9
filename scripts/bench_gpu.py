"""Models at full size with random weights, by the trainer's own functions: seconds by stage, memory, use of the device.

    python scripts/bench_gpu.py --json bench.json                           # on a GPU: profiles b, c and d, all variants
    python scripts/bench_gpu.py --profile b --variant diffusers compile flash --order abba
    python scripts/bench_gpu.py --profile tiny --json tiny.json              # the same code on a CPU, in some minutes
    python scripts/bench_gpu.py --compare new.json old.json                  # the same work before and after a change

Nothing is downloaded: weights are drawn on the device from published configs, text embeddings are random numbers of the right
shape, the reward costs next to nothing. So speed, memory and rounding mean something, scores do not. Each arm runs in a process of
its own: one that crashes, does not fit or takes too long is a result, and the next one starts afresh. Further arguments are
overrides of every variant, as for `t2irl train`: `--rollout.batch_size 16`. A variant of your own: `--own "NAME=--a.b=c --d.e=f"`.
What the columns mean: docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from full_size.card import card
from full_size.processes import run_arm
from full_size.profiles import AGAIN, BASE, DIFFUSERS, GPU_ONLY, PROFILES, VARIANTS
from full_size.results import beside, compared, merged
from full_size.tables import show, show_beside
from rich.console import Console

from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.loading import Layer, load_run
from t2irl.utils.files import write_atomic
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
    parser.add_argument("--order", choices=("once", "abba"), default="once", help="abba: all arms and back again, so that each is measured twice and drift cancels; default once")  # fmt: skip
    parser.add_argument("--iterations", type=int, default=5, help="timed ones of a block, default 5; 10 or more to report")  # fmt: skip
    parser.add_argument("--warmup", type=int, default=1, help="iterations before, default 1; 3 to report")
    parser.add_argument("--arm-timeout", type=float, metavar="SECONDS", help="for a block with its start; default none")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for one that is not known")
    parser.add_argument("--json", type=Path, help="where everything is written to, after every block")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="FILE", help="measure nothing; seconds of two such files"
    )
    args, overrides = parser.parse_known_args()
    if args.iterations < 1 or args.warmup < 1:
        parser.error("--iterations and --warmup must be at least 1")
    if args.arm_timeout is not None and args.arm_timeout <= 0:
        parser.error(f"--arm-timeout = {args.arm_timeout:g}: must be above 0")
    return args, overrides


@dataclass
class Arm:
    """A variant of a profile and what its blocks have given."""

    name: str
    overrides: list[str]
    card: dict[str, Any]
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def result(self, kept: Path) -> dict[str, Any]:
        """For the JSON file; compared with the base where that was measured as well."""
        found = {"name": self.name, "overrides": self.overrides, "card": self.card, **merged(self.blocks)}
        mine, base = kept / f"{self.name}.pt", kept / f"{BASE}.pt"
        if self.name != BASE and mine.exists() and base.exists():
            found["against_base"] = compared(torch.load(mine), torch.load(base))
        return found


class Profile:
    """The arms of a profile, to be measured in turn."""

    def __init__(self, name: str, args: argparse.Namespace, overrides: Sequence[str], place: Path):
        """`place`: a folder for the model's configs and for what arms are compared by. Raises ConfigError for wrong overrides."""
        self.name, self.args, self.place = name, args, place
        folder = PROFILES[name].folder(place / "model")
        self.tree = PROFILES[name].tree(folder)
        base = self._run(overrides)
        self.card = {"title": PROFILES[name].title, **card(base, folder), "settings": base.model_dump(mode="json", exclude={"model": {"path"}})}  # fmt: skip
        self.arms: list[Arm] = []
        self.others: list[dict[str, Any]] = []
        """Variants that are not measured, and why."""
        for variant, words in chosen(args).items():
            mine = [*overrides, *words]
            try:
                run = self._run(mine)
            except ConfigError as error:
                self.others.append({"name": variant, "status": "refused", "reason": str(error)})
                continue
            if run == base and variant not in (BASE, AGAIN, DIFFUSERS):
                if args.variant:
                    self.others.append({"name": variant, "status": "skipped", "reason": f"changes nothing of {BASE} here"})  # fmt: skip
                continue
            self.arms.append(Arm(variant, mine, card(run, folder, variant == DIFFUSERS)))

    def _run(self, words: Sequence[str]) -> Run:
        return load_run([Layer(self.tree, {})], words)

    def measure(self) -> Iterator[str]:
        """Block after block; gives the name of an arm before each and nothing more."""
        back = reversed(self.arms) if self.args.order == "abba" else ()
        for arm in (*self.arms, *back):
            yield arm.name
            spec = {
                "tree": self.tree, "overrides": arm.overrides, "reference": arm.name == DIFFUSERS, "warmup": self.args.warmup,
                "iterations": self.args.iterations, "peak_tflops": self.args.peak_tflops, "kept": str(self.place / f"{arm.name}.pt"),
            }  # fmt: skip
            arm.blocks.append(run_arm(spec, self.args.arm_timeout))

    def results(self) -> dict[str, Any]:
        """What there is by now, for the JSON file."""
        arms = [arm.result(self.place) for arm in self.arms if arm.blocks]
        return {"profile": self.name, "card": self.card, "arms": [*arms, *self.others]}


def chosen(args: argparse.Namespace) -> dict[str, Sequence[str]]:
    """Variants by name, the base first. Names that were asked for are all taken."""
    names = args.variant or [n for n in VARIANTS if torch.cuda.is_available() or n not in GPU_ONLY]
    own = {name: shlex.split(words) for name, _, words in (text.partition("=") for text in args.own)}
    return {BASE: (), **{n: VARIANTS[n] for n in names if n != AGAIN}, **own, **({AGAIN: ()} if AGAIN in names else {})}


def write(file: Path | None, about: Mapping[str, Any], profiles: Sequence[Mapping[str, Any]]) -> None:
    """The JSON file as it stands: after every block, since a later one may be cut off."""
    if file is not None:
        write_atomic(file, json.dumps({**about, "profiles": profiles}, indent=1).encode())


def measure(args: argparse.Namespace, overrides: Sequence[str], console: Console) -> int:
    """Measure, print, write; 1 if the base of a profile was not measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = args.profile or ["full" if device == "cuda" else "tiny"]
    about = {"environment": environment(), "device": device, "warmup": args.warmup, "order": args.order}
    done: list[dict[str, Any]] = []
    for name in dict.fromkeys(name for word in asked for name in GROUPS.get(word, [word])):
        with tempfile.TemporaryDirectory() as place:
            profile = Profile(name, args, overrides, Path(place))
            for arm in profile.measure():
                write(args.json, about, [*done, profile.results()])
                console.print(f"{name}: {arm} ...", highlight=False)
            done.append(profile.results())
        write(args.json, about, done)
        show(console, done[-1]["card"], done[-1]["arms"])
    return int(any(p["arms"][0]["status"] != "ok" for p in done))


def main() -> int:
    """Measure or compare; the exit code."""
    args, overrides = arguments()
    console = Console(width=150)
    try:
        if args.compare:
            now, before = (json.loads(file.read_text(encoding="utf-8")) for file in args.compare)
            show_beside(console, beside(now, before))
            return 0
        return measure(args, overrides, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
