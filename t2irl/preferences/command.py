"""`t2irl prefs`: parsing and dispatch."""

from __future__ import annotations

import argparse
import json
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from t2irl.cli import Parser
from t2irl.errors import ConfigError

LONGEST_WORD = re.compile(r"[A-Za-z0-9_-]{16,}")
"""A token that cannot be guessed and needs no quoting."""


def prefs(argv: Sequence[str]) -> int:
    """Run `t2irl prefs` with these words; returns the exit code."""
    parser = Parser(prog="t2irl prefs", description="Collect human preferences and use them.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_make, _serve, _stats, _export, _import, _formats, _train):
        add(commands)
    arguments = parser.parse_args(list(argv))
    run: Callable[[argparse.Namespace], None] = arguments.run
    run(arguments)
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")
    return value


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least}")
        return int(text)

    return read


def _sub(
    commands: argparse._SubParsersAction, name: str, text: str, run: Callable[[argparse.Namespace], None]
) -> Parser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


# --------------------------------------------------------------------------------------------------------------- make
def _make(commands: argparse._SubParsersAction) -> None:
    p = _sub(commands, "make", "make a study of blind pairs from evaluations", _run_make)
    p.add_argument(
        "evaluations", nargs="+", type=Path, metavar="EVAL", help="folders of `t2irl eval`, each with images.jsonl"
    )
    p.add_argument("--out", type=Path, required=True, metavar="STUDY", help="folder of the study, new")
    p.add_argument("--name", help="name of the study, in records (the folder's)")
    p.add_argument("--axes", default="overall", metavar="A,B", help="of overall,alignment,quality,artifact (overall)")
    p.add_argument("--pairs", type=_whole(1), metavar="N", help="pairs of pictures, without checks (all there are)")
    p.add_argument("--against", metavar="METHOD", help="compare all methods with this one alone")
    p.add_argument("--gold", type=_share, default=0.1, metavar="SHARE", help="pairs with a known answer, added (0.1)")
    p.add_argument(
        "--repeat", type=_share, default=0.1, metavar="SHARE", help="pairs shown twice, sides swapped, added (0.1)"
    )
    p.add_argument("--licence", default="", help="of pictures and answers, kept in every record")
    p.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of every draw (0)")


def _run_make(a: argparse.Namespace) -> None:
    from t2irl.preferences.pairs import Plan, axes_from, make_study

    plan = Plan(axes_from(a.axes), a.pairs, a.against, a.gold, a.repeat, a.seed)
    study = make_study(a.evaluations, a.out, plan, a.name, a.licence, _say)
    systems = sorted({name for item in study.items for name in (item.model_a, item.model_b)})
    gold = sum(item.gold is not None for item in study.items)
    repeats = sum(item.repeat_of is not None for item in study.items)
    plain = len(study.items) - gold - repeats
    _say(
        f"{a.out}: {plain} questions on {', '.join(systems)}, and {gold} of known answer and {repeats} repetitions as checks.\n"
        f"Next: t2irl prefs serve {a.out}"
    )


# -------------------------------------------------------------------------------------------------------------- serve
def _serve(commands: argparse._SubParsersAction) -> None:
    p = _sub(commands, "serve", "show a study to raters in their browsers", _run_serve)
    p.add_argument("study", type=Path, metavar="STUDY", help="folder of `t2irl prefs make`")
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but this machine's own needs a token (127.0.0.1)"
    )
    p.add_argument("--port", type=_whole(0), default=8100, metavar="N", help="0: any that is free (8100)")
    p.add_argument(
        "--token", help="what raters must know, 16 letters or more; made up if --host is not this machine alone"
    )
    p.add_argument(
        "--votes",
        type=_whole(0),
        default=0,
        metavar="N",
        help="a question is done after so many votes; 0: all raters get all (0)",
    )


def _run_serve(a: argparse.Namespace) -> None:
    from t2irl.preferences.study import Study

    study = Study.load(a.study)
    try:
        from t2irl.preferences.server import is_loopback, serve
    except ImportError as error:
        raise ConfigError(
            f"t2irl prefs serve needs {error.name}, which is not installed: pip install 't2irl[serve]'"
        ) from error
    if a.token is not None and not LONGEST_WORD.fullmatch(a.token):
        raise ConfigError("--token: expected at least 16 letters, digits, - or _; leave it out and one is made up")
    token = a.token if a.token or is_loopback(a.host) else secrets.token_urlsafe(24)
    try:
        serve(study, a.host, a.port, token, a.votes, lambda where: _say(f"Raters open {where} (end with Ctrl-C)"))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {a.host} --port {a.port}: cannot listen there: {error}. Try --port 0") from error


# -------------------------------------------------------------------------------------------------------------- stats
def _stats(commands: argparse._SubParsersAction) -> None:
    p = _sub(commands, "stats", "sum up judgements: win rates, strengths, agreement, raters", _run_stats)
    p.add_argument("source", type=Path, metavar="STUDY|FILE", help="a study's folder, or a file of records")
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    p.add_argument("--baseline", metavar="MODEL", help="whose strength is 0 (the first by name)")
    p.add_argument(
        "--least-gold",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="leave out raters with fewer known answers right (0)",
    )
    p.add_argument(
        "--resamples", type=_whole(100), default=10_000, metavar="N", help="of the bootstrap over prompts (10000)"
    )
    p.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of the bootstrap (0)")


def _run_stats(a: argparse.Namespace) -> None:
    from t2irl.preferences.record import write_text
    from t2irl.preferences.study import open_preferences
    from t2irl.preferences.summary import Options, as_text, summarise

    options = Options(a.baseline, resamples=a.resamples, seed=a.seed, least_gold=a.least_gold)
    summary = summarise(open_preferences(a.source).records, options)
    if a.json is not None:
        write_text(a.json, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    _say(as_text(summary))


# --------------------------------------------------------------------------------------------------- export and import
def _export(commands: argparse._SubParsersAction) -> None:
    p = _sub(commands, "export", "write judgements in a format of other tools", _run_export)
    p.add_argument("source", type=Path, metavar="STUDY|FILE", help="a study's folder, or a file of records")
    p.add_argument("--format", required=True, metavar="NAME", help="see `t2irl prefs formats`")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    p.add_argument(
        "--axis",
        metavar="AXIS",
        help="this one alone; needed where a format says nothing of axes and there are several",
    )
    p.add_argument("--checks", action="store_true", help="gold pairs and repetitions as well")
    p.add_argument(
        "--waiting",
        action="store_true",
        help="pairs that nobody has judged as well, for formats of annotation platforms",
    )


def _run_export(a: argparse.Namespace) -> None:
    from t2irl.preferences.convert import export

    _say(export(a.source, a.format, a.out, a.axis, a.checks, a.waiting))


def _import(commands: argparse._SubParsersAction) -> None:
    p = _sub(commands, "import", "read judgements of other tools into our own records", _run_import)
    p.add_argument("source", type=Path, metavar="FILE|FOLDER", help="data in that format")
    p.add_argument("--format", required=True, metavar="NAME", help="see `t2irl prefs formats`")
    p.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new folder, for records.jsonl and images/"
    )
    p.add_argument("--licence", default="", help="of the data, kept in every record that names none")


def _run_import(a: argparse.Namespace) -> None:
    from t2irl.preferences.convert import bring_in

    _say(bring_in(a.source, a.format, a.out, a.licence))


def _formats(commands: argparse._SubParsersAction) -> None:
    _sub(commands, "formats", "list the formats, and what each of them loses", _run_formats)


def _run_formats(a: argparse.Namespace) -> None:
    from t2irl.preferences.convert import describe_formats

    _say(describe_formats())


# -------------------------------------------------------------------------------------------------------------- train
def _train(commands: argparse._SubParsersAction) -> None:
    p = _sub(commands, "train", "train a reward on judgements, for `type: preference` in a config", _run_train)
    p.add_argument("source", type=Path, metavar="STUDY|FILE", help="a study's folder, or a file of records")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the model, new")
    p.add_argument("--axis", default="overall", help="of the judgements (overall)")
    p.add_argument("--backbone", type=Path, metavar="FOLDER", help="frozen vision backbone: looks at the picture alone")
    p.add_argument("--clip", type=Path, metavar="FOLDER", help="frozen CLIP: reads the prompt as well")
    p.add_argument("--steps", type=_whole(1), default=400, metavar="N", help="most optimiser steps (400)")
    p.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of the split by prompt and of the head (0)")
    p.add_argument("--device", default=None, help="cpu, cuda or cuda:N (cuda if there is one)")


def _run_train(a: argparse.Namespace) -> None:
    from t2irl.preferences.pairs import axes_from
    from t2irl.preferences.study import open_preferences
    from t2irl.preferences.train import device_of, train_reward

    (axis,) = axes_from(a.axis, "--axis", 1)
    device, source = device_of(a.device), open_preferences(a.source)
    found = train_reward(source, a.source, a.out, axis, a.backbone, a.clip, a.steps, a.seed, device, _say)
    _say(
        f"{a.out}: accuracy {found.accuracy:.3f} on {found.pairs} pairs of {found.prompts} unseen prompts\n\n{found.table}\n"
    )
    _say(f"In a config:\nrewards:\n  people:\n    type: preference\n    path: {a.out}")
