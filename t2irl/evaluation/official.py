"""`t2irl eval export` and `t2irl eval import`: pictures for a benchmark's own scorer, and what it said of them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2irl import registry
from t2irl.cli import Parser
from t2irl.config import ENTRY_NAME
from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.eval_command import reload
from t2irl.evaluation.settings import Evaluated

if TYPE_CHECKING:
    from t2irl.evaluation.store import Drawn, Store


def export_command(argv: Sequence[str]) -> int:
    """Run `t2irl eval export` with these words; returns the exit code."""
    parser = _parser(
        "export",
        "Write the pictures of one row in the layout that the suite's official scorer reads, and say how to call it.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where to; must not exist or be empty"
    )
    arguments = parser.parse_args(argv)
    settings, store, row = _open(arguments.evaluation, arguments.row)
    suite = registry.build("evaluation.suites", settings.suite)
    if arguments.out.exists() and any(arguments.out.iterdir()):
        raise ConfigError(f"--out {arguments.out}: is not empty; give a new folder")
    if missing := store.missing(row):
        raise ConfigError(f"{len(missing)} pictures of {row.label} are not drawn yet; run `t2irl eval` again")
    arguments.out.mkdir(parents=True, exist_ok=True)
    suite.export(store.prompts, store.pictures(row), arguments.out)
    print(f"{arguments.out}: {len(store.keys)} pictures of {row.label}")
    print(f"now run {suite.official}")
    print(
        f"then: {shlex.join(['t2irl', 'eval', 'import', str(arguments.evaluation), '--row', row.label, '--results', 'FILE'])}"
    )
    return 0


def import_command(argv: Sequence[str]) -> int:
    """Run `t2irl eval import` with these words; returns the exit code."""
    parser = _parser("import", "Read what the suite's official scorer wrote about one row, and write the report again.")
    parser.add_argument(
        "--results", type=Path, required=True, metavar="FILE", help="its results: a file, or the folder"
    )
    arguments = parser.parse_args(argv)
    settings, store, row = _open(arguments.evaluation, arguments.row)
    suite = registry.build("evaluation.suites", settings.suite)
    if not arguments.results.exists():
        raise DataError(f"--results {arguments.results}: no such file or folder")
    found = suite.results(store.prompts, store.pictures(row), arguments.results)
    import torch

    from t2irl.evaluation.run import report
    from t2irl.evaluation.store import Lines

    for name, values in found.items():
        if not ENTRY_NAME.fullmatch(name) or name in settings.rewards:
            raise DataError(
                f"{arguments.results}: a score cannot be called {name!r}; use letters, digits, _ and -, no reward's name"
            )
        # Pictures that a scorer is not for have no number.
        every = {store.picture(row, key): values.get(key, math.nan) for key in store.keys}
        Lines(store.out / "imported" / name).add(every)
    for name, values in found.items():
        print(f"{name}: {sum(values.values()) / len(values):.4f} over {len(values)} pictures of {row.label}")
    print(report(settings, store, torch.device("cpu"), shlex.join(["t2irl", "eval", "import", *argv])))
    return 0


def _parser(name: str, description: str) -> Parser:
    parser = Parser(prog=f"t2irl eval {name}", description=description, allow_abbrev=False)
    parser.add_argument("evaluation", type=Path, metavar="EVAL", help="folder of an evaluation")
    parser.add_argument("--row", metavar="LABEL", help="which, as the table calls it; needed where there are several")
    return parser


def _open(out: Path, label: str | None) -> tuple[Evaluated, Store, Drawn]:
    from t2irl.evaluation.store import open_store

    store = open_store(out)
    settings, _ = reload(out)
    labels = {row.label: row for row in store.drawn}
    if label is None and len(labels) == 1:
        label = next(iter(labels))
    if label not in labels:
        hint = registry.did_you_mean(label or "", list(labels))
        raise ConfigError(f"--row {label or 'is missing'}: the evaluation has {'; '.join(labels)}.{hint}")
    return settings, store, labels[label]
