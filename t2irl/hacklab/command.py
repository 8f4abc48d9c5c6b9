"""`t2irl hacklab`: parsing, then a grid of runs and its report, or `t2irl hacklab probe`."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from t2irl.cli import Parser, split
from t2irl.errors import ConfigError, DataError, RunError
from t2irl.hacklab.grid import Cell, Chosen, expand, load_grid
from t2irl.hacklab.joined import join
from t2irl.hacklab.results import write_results
from t2irl.hacklab.runner import Pool, finished, refuse_changed
from t2irl.loading import load_run

OPTIONS = {
    "--out": True, "--join": True, "--jobs": True, "--methods": True, "--proxies": True, "--seeds": True,
    "--report-only": False, "--list": False, "--help": False,
}  # fmt: skip
"""What is not an override, and whether it takes a value."""


def hacklab(argv: Sequence[str]) -> int:
    """Run `t2irl hacklab` with these words; returns the exit code."""
    if argv[:1] == ["probe"]:
        return _probe(argv[1:])
    known, overrides = split(argv, OPTIONS)
    arguments = _parser().parse_args(known)
    grid, layer = load_grid(arguments.grid)
    out = arguments.out or Path("runs/hacklab") / arguments.grid.stem
    chosen = Chosen(_words(arguments.methods), _words(arguments.proxies), _numbers(arguments.seeds))
    cells = expand(grid, layer, arguments.grid, out, chosen, overrides)
    # The report speaks of the whole grid, whatever part of it is run this time; so do files that are joined.
    everything = cells if chosen == Chosen() else expand(grid, layer, arguments.grid, out, overrides=overrides)
    joined = join(arguments.join, grid, everything, _say)
    if arguments.list:
        _list(cells, joined)
        return 0
    own = [cell for cell in cells if cell.name not in joined]
    refuse_changed(own)
    failures = []
    if not arguments.report_only:
        _check(own)
        failures = Pool(own, arguments.jobs, _say).run()
    print(write_results(grid, everything, out, _command(argv), joined))
    if failures:
        lines = [f"{failure.name}, exit code {failure.code}: {failure.words}" for failure in failures]
        raise RunError("\n".join([f"{len(failures)} of {len(own)} runs failed; all others are done", *lines]))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _command(argv: Sequence[str]) -> str:
    """The command for the results, which may be committed: what lies below the current directory is named from there."""
    return re.sub(rf"(?<![\w./~-]){re.escape(str(Path.cwd()))}/", "", shlex.join(["t2irl", "hacklab", *argv]))


def _probe(argv: Sequence[str]) -> int:
    options = {"--out": True, "--gold": True, "--prompts": True, "--images": True, "--help": False}
    known, overrides = split(argv, options)
    parser = Parser(
        prog="t2irl hacklab probe",
        description="Without training: which planted hacks each reward of a config likes and, with a held-out reward as the truth, "
        "what becomes of that when the best of k pictures is picked by each, and whether the rewards are wrong alike.",
        allow_abbrev=False,
    )
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="YAML files, merged left to right")
    parser.add_argument("--out", type=Path, default=Path("runs/probe"), metavar="FOLDER", help="results (runs/probe)")
    parser.add_argument(
        "--gold", metavar="NAME", help="held-out reward that is the truth (gold, where there is one of that name)"
    )
    parser.add_argument("--prompts", type=_positive, default=64, metavar="N", help="held-out prompts (64)")
    parser.add_argument(
        "--images", type=_positive, default=16, metavar="N", help="pictures of each, the largest k (16)"
    )
    arguments = parser.parse_args(known)
    run = load_run(arguments.configs, overrides)
    from t2irl.hacklab.probe import write_probe

    gold = arguments.gold or ("gold" if "gold" in run.heldout_rewards else None)
    print(write_probe(run, gold, arguments.prompts, arguments.images, arguments.out))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="t2irl hacklab",
        description="Run methods x proxies x seeds and compare what they do to a reward that none is trained on. "
        "Runs that are there are left alone, interrupted ones go on. `t2irl hacklab probe CONFIG` looks at rewards instead.",
        epilog="Overrides come last and are for every run: `--iterations 2 --evaluation.images 16` tries a grid out.",
        allow_abbrev=False,
    )
    parser.add_argument("grid", type=Path, metavar="GRID", help="YAML file, see docs/hacklab.md")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where runs and results go (runs/hacklab/<grid>)")
    parser.add_argument(
        "--join",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="results.json of the same grid from another machine or an earlier time, may be given more than once: its finished "
        "runs count as done",
    )
    parser.add_argument(
        "--jobs", type=_positive, default=2, metavar="N", help="runs at a time; they share the cores (2)"
    )
    for kind in ("methods", "proxies", "seeds"):
        parser.add_argument(f"--{kind}", metavar="A,B", help=f"only these {kind}")
    parser.add_argument("--list", action="store_true", help="list the runs and how far they are, and stop")
    parser.add_argument("--report-only", action="store_true", help="run nothing, report on what is there")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or text == "0":
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",")]


def _numbers(text: str | None) -> list[int] | None:
    words = _words(text)
    if words and not all(word.isdigit() for word in words):
        raise ConfigError(f"--seeds {text}: expected whole numbers such as 0,1")
    return None if words is None else [int(word) for word in words]


def _list(cells: Sequence[Cell], joined: Collection[str]) -> None:
    for cell in cells:
        begun = any((cell.run.run_dir / "checkpoints").glob("iteration_*"))
        state = "joined" if cell.name in joined else "done" if finished(cell) else "begun" if begun else "open"
        print(f"{state:<6} {cell.name}")


def _check(cells: Sequence[Cell]) -> None:
    """Look at prompt files, model folders and geometry of every kind of run before the first one starts."""
    from t2irl.check import describe

    looked: set[tuple[str, str]] = set()
    for cell in cells:
        if (cell.proxy, cell.method) in looked or finished(cell):
            continue
        looked.add((cell.proxy, cell.method))
        try:
            describe(cell.run, 1)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{cell.name}: {error}") from error
