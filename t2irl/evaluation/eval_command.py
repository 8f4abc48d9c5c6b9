"""`t2irl eval`: parsing, then the stages of an evaluation; `t2irl eval export` and `t2irl eval import` for official scorers."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2irl.cli import Parser, split
from t2irl.errors import ConfigError
from t2irl.evaluation.settings import Evaluated
from t2irl.loading import load, read_file
from t2irl.registry import describe

EXAMPLE = "t2irl eval configs/eval/shapes.yaml base runs/demo"
STAGES = ("all", "generate", "score", "report")
OPTIONS = {"--stage": True, "--fields": False, "--help": False}
"""What is not an override, and whether it takes a value."""


def evaluate_command(argv: Sequence[str]) -> int:
    """Run `t2irl eval` with these words; returns the exit code."""
    if argv[:1] in (["export"], ["import"]):
        from t2irl.evaluation.official import export_command, import_command

        return (export_command if argv[0] == "export" else import_command)(argv[1:])
    known, overrides = split(argv, OPTIONS)
    arguments = _parser().parse_args(known)
    if arguments.fields:
        print(describe(Evaluated))
        return 0
    configs, subjects = sort_words(arguments.words)
    settings = load(Evaluated, configs, overrides, EXAMPLE)
    from t2irl.evaluation.run import evaluate

    evaluate(settings, subjects, arguments.stage, shlex.join(["t2irl", "eval", *argv]))
    return 0


def sort_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Config files, which end in .yaml or .yml, and everything else."""
    configs = [Path(word) for word in words if word.lower().endswith((".yaml", ".yml"))]
    return configs, [word for word in words if Path(word) not in configs]


def reload(out: Path) -> tuple[Evaluated, list[str]]:
    """The settings and subjects that an evaluation's folder was made with."""
    layer = read_file(out / "config.yaml")
    subjects: Any = layer.values.pop("subjects", None)
    if not isinstance(subjects, list) or not all(isinstance(word, str) for word in subjects):
        raise ConfigError(f"{out}/config.yaml: subjects is missing; it should list what was evaluated")
    return load(Evaluated, [layer], [], EXAMPLE), subjects


def _parser() -> Parser:
    parser = Parser(
        prog="t2irl eval",
        description="Draw the prompts of a suite with checkpoints, exports and the base model, score the pictures, and write a table with "
        "intervals and a report. What is there already is kept, so an interrupted command goes on where it stopped. "
        "`t2irl eval export` writes the layout of a benchmark's own scorer, `t2irl eval import` reads its results.",
        epilog="Overrides come last: `--out runs/eval/mine --suite.images 8`. `t2irl eval --fields` lists them all.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG|SUBJECT",
        help="YAML files, and what is evaluated: base, a run folder (its newest checkpoint), RUN@all, RUN@best, RUN@20,40, a "
        "checkpoint folder, an export folder or a .safetensors file; NAME=... gives it another name",
    )  # fmt: skip
    parser.add_argument(
        "--stage", choices=STAGES, default="all", help="only this one; generate and score may run on several processes"
    )
    parser.add_argument("--fields", action="store_true", help="list every field of the config and stop")
    return parser


def positive(text: str) -> int:
    """For options that take a whole number from 1."""
    if not text.isdigit() or text == "0":
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)
