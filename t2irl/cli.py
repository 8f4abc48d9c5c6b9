"""The `t2irl` command: parsing and dispatch only.

Exit codes: 0 done (also when the run was complete already), 2 a config or its data are wrong, 3 a checkpoint cannot be
read, written or continued, 4 the run had to stop, 128 + n signal n arrived, 1 a bug (with a traceback).
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from t2irl import __version__
from t2irl.errors import ConfigError, DataError, Interrupted, UserError

if TYPE_CHECKING:
    from t2irl.config import Run

OVERRIDES = """\
Overrides come after the config files: `--rollout.prompts 8` or `--rollout.prompts=8`, any field by its dotted path,
the value in YAML. `t2irl fields` lists them all.
"""
SIGPIPE = 13


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def entry() -> NoReturn:
    """The whole life of the process: `main` on the command line, then the end with its exit code.

    One of several processes (WORLD_SIZE) ends once hooks have run and output is written, without the interpreter's own
    teardown: threads of a process group may outlive it, and abort a process that has told its error and saved its run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(main())
    try:
        code = main()
    except SystemExit as ended:  # argparse, after --help and --version
        code = int(ended.code or 0)
    except BaseException:  # a bug; nobody above us is left to show it
        traceback.print_exc()
        code = 1
    # What Python does at the end and is of use: trackers and logging finish, child processes and temporary folders go.
    # multiprocessing ends its processes by the same two calls.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, `sys.argv` by default; returns the exit code."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        # `python -m t2irl` can import plugins from the current directory; so can the script.
        sys.path.append(os.getcwd())
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return _tell(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `t2irl fields | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + SIGPIPE


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _tell(error: UserError) -> int:
    # Every process finds the same fault in a config; what goes wrong later may be known to one process alone.
    if _rank() == 0 or not isinstance(error, ConfigError | DataError | Interrupted):
        process = f" (process {_rank()})" if _rank() else ""
        kind = "stopped" if isinstance(error, Interrupted) else "error"
        sys.stdout.flush()
        print(f"{kind}{process}: " + str(error).replace("\n", "\n  "), file=sys.stderr)
    return error.exit_code


def _parser() -> Parser:
    parser = Parser(prog="t2irl", description="RL fine-tuning of text-to-image flow models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"t2irl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="train", description="Train a policy.", epilog=OVERRIDES, allow_abbrev=False
    )
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: continue run_dir if it holds checkpoints (default). never: start afresh in the next free folder. "
        "PATH: start in the next free folder from that run or checkpoint.",
    )
    train.add_argument(
        "--print-config", action="store_true", help="print the whole config, defaults included, and stop"
    )
    check = commands.add_parser(
        "check",
        help="say what a run will be: geometry, calls, memory, legal alternatives",
        description="Check a config, its prompt files and its model folder, and say what the run will be. Loads no weights.",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    check.add_argument("--processes", type=int, default=None, metavar="N", help="number of processes (default: 1)")
    check.add_argument(
        "--spread",
        action="store_true",
        help="with the denoiser's weights spread over them, as by configs/accelerate/fsdp2_8.yaml",
    )
    for command in (train, check):
        command.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="YAML files, merged left to right")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    commands.add_parser("fields", help="list every field of a config", description="List every field of a config.")
    return parser


COMMANDS = {
    "hacklab": (
        "t2irl.hacklab.command:hacklab",
        "compare methods by a grid of runs: how does each of them hack its reward?",
    ),
    "eval": (
        "t2irl.evaluation.eval_command:evaluate_command",
        "measure checkpoints, exports and the base model on a suite of prompts",
    ),
    "grid": ("t2irl.evaluation.grid_command:grid_command", "pictures of an evaluation side by side, with their scores"),
    "compare": (
        "t2irl.evaluation.compare_command:compare_command",
        "compare runs: held-out table, over-optimisation, pictures side by side",
    ),
    "serve-reward": (
        "t2irl.serving.command:serve_reward",
        "serve the rewards of a config over HTTP, for runs with `type: remote`",
    ),
    "prefs": (
        "t2irl.preferences.command:prefs",
        "human preferences: pairs, a page to judge them on, formats, statistics, a reward",
    ),
}
"""Commands with options of their own: the function that takes their words and returns the exit code, and what `--help` says."""

OPTIONS = {
    "--resume": True, "--processes": True, "--spread": False, "--print-config": False, "--help": False, "--version": False,
}  # fmt: skip
"""What is not an override, and whether it takes a value."""


def split(arguments: Sequence[str], options: Mapping[str, bool] = OPTIONS) -> tuple[list[str], list[str]]:
    """What argparse knows, and the overrides: every other `--key value` or `--key=value`."""
    known: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        into = overrides if word.startswith("--") and name not in options else known
        into.append(word)
        takes_value = options.get(name, into is overrides) and "=" not in word
        # Once there are overrides, a bare word is a misplaced one: `loading` says so.
        if takes_value and rest and not rest[0].startswith("--"):
            into.append(rest.pop(0))
        elif into is known and overrides and not word.startswith("-"):
            overrides.append(known.pop())
    return known, overrides


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        module, _, function = COMMANDS[argv[0]][0].partition(":")
        return getattr(importlib.import_module(module), function)(argv[1:])
    known, overrides = split(argv)
    arguments = _parser().parse_args(known)
    # Whatever is imported below is not needed to print help.
    from t2irl.loading import describe_fields, dump_run, load_run

    if arguments.command == "fields":
        if overrides:
            raise ConfigError(f"t2irl fields takes no options, got {overrides[0]}")
        _say(describe_fields())
        return 0
    run = load_run(arguments.configs, overrides)
    if arguments.command == "check":
        _check(run, arguments.processes, arguments.spread)
    elif arguments.print_config:
        _say(dump_run(run).rstrip())
    else:
        from t2irl.train import train

        train(run, resume=arguments.resume)
    return 0


def _check(run: Run, processes: int | None, spread: bool) -> None:
    from t2irl.check import describe
    from t2irl.data import load_both
    from t2irl.preflight import check_files

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    world_size = launched if processes is None else processes
    if spread or world_size == launched > 1:
        from t2irl import sharding

        if world_size == 1:
            raise ConfigError("--spread: one process has nothing to spread weights over; add --processes N")
        spread = spread or sharding.asked()
        sharding.check(run, spread)
    prompts, heldout = data = load_both(run.data)
    _say(describe(run, world_size, spread, data))
    check_files(run, prompts.texts, heldout.texts)


def _say(text: str) -> None:
    if _rank() == 0:
        print(text, flush=True)
