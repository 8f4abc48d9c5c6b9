"""`t2irl hacklab`: parsing, then a grid of runs and its report."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from t2irl.cli import Parser, split
from t2irl.errors import ConfigError, RunError
from t2irl.hacklab.grid import Cell, Chosen, expand, load_grid
from t2irl.hacklab.results import write_results
from t2irl.hacklab.runner import Pool, finished, refuse_changed

OPTIONS = {
    "--out": True, "--jobs": True, "--methods": True, "--proxies": True, "--seeds": True, "--report-only": False,
    "--list": False, "--help": False,
}  # fmt: skip
"""What is not an override, and whether it takes a value."""


def hacklab(argv: Sequence[str]) -> int:
    """Run `t2irl hacklab` with these words; returns the exit code."""
    known, overrides = split(argv, OPTIONS)
    arguments = _parser().parse_args(known)
    grid, layer = load_grid(arguments.grid)
    out = arguments.out or Path("runs/hacklab") / arguments.grid.stem
    chosen = Chosen(*(_words(getattr(arguments, name)) for name in ("methods", "proxies")), _numbers(arguments.seeds))
    cells = expand(grid, layer, arguments.grid, out, chosen, overrides)
    if arguments.list:
        _list(cells)
        return 0
    refuse_changed(cells)
    failures = []
    if not arguments.report_only:
        _check(cells)
        failures = Pool(cells, arguments.jobs, lambda text: print(text, flush=True)).run()
    # The report speaks of the whole grid, whatever part of it was run this time.
    everything = expand(grid, layer, arguments.grid, out, overrides=overrides)
    print(write_results(grid, everything, out, shlex.join(["t2irl", "hacklab", *argv])))
    if failures:
        lines = [f"{failure.name}, exit code {failure.code}: {failure.words}" for failure in failures]
        raise RunError("\n".join([f"{len(failures)} of {len(cells)} runs failed; all others are done", *lines]))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="t2irl hacklab",
        description="Run methods x proxies x seeds and compare what they do to a reward that none is trained on. "
        "Runs that are there are left alone, interrupted ones go on.",
        epilog="Overrides come last and are for every run: `--iterations 2 --evaluation.images 16` tries a grid out.",
        allow_abbrev=False,
    )
    parser.add_argument("grid", type=Path, metavar="GRID", help="YAML file, see docs/hacklab.md")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where runs and results go (runs/hacklab/<grid>)")
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


def _list(cells: Sequence[Cell]) -> None:
    for cell in cells:
        begun = any((cell.run.run_dir / "checkpoints").glob("iteration_*"))
        print(f"{'done' if finished(cell) else 'begun' if begun else 'open':<6} {cell.name}")


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
        except ConfigError as error:
            raise ConfigError(f"{cell.name}: {error}") from error
