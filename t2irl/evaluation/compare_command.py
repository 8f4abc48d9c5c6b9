"""`t2irl compare`: an evaluation of several runs, and one page and one JSON file on what they did to their rewards."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2irl.cli import Parser
from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.eval_command import positive


def compare_command(argv: Sequence[str]) -> int:
    """Run `t2irl compare` with these words; returns the exit code."""
    arguments = _parser().parse_args(argv)
    # Whatever is imported below is not needed to print help.
    from t2irl.evaluation.compare import as_dict, curves, fits, pairs, read_runs, settings_that_differ, watched
    from t2irl.evaluation.eval_page import render
    from t2irl.evaluation.panels import label_of, read_pictures
    from t2irl.utils.tracking import write_atomic

    runs = read_runs(arguments.runs)
    out = arguments.out or Path("runs/compare") / "-".join(c.name for c in runs)
    command = shlex.join(["t2irl", "compare", *argv])
    folder = arguments.eval or _evaluate(runs, arguments, out / "eval", command)
    pictures = read_pictures([folder])
    columns = _columns(pictures, runs, folder)
    heldout = watched(runs)
    if arguments.heldout:
        if arguments.heldout not in heldout:
            raise ConfigError(
                f"--heldout {arguments.heldout}: the runs share these held-out rewards: {', '.join(heldout) or 'none'}"
            )
        heldout.sort(key=lambda name: name != arguments.heldout)
    fitted = fits(runs, heldout[0]) if heldout else {}
    compared = pairs(pictures, columns)
    table = _table(folder)
    table["rows"] = [row for row in table["rows"] if label_of(row) in columns]
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "compare.json", json.dumps(as_dict(runs, heldout, compared, fitted, table), indent=1).encode())
    page = render(
        "compare.html.j2", title=" / ".join(c.name for c in runs), runs=runs, columns=columns, table=table, pairs=compared,
        measures=[name for name in table["measures"] if not name.startswith("spread/")], charts=curves(runs, heldout), fitted=fitted,
        heldout=heldout, differing=settings_that_differ(runs), panels=_panels(pictures, runs, columns, heldout), command=command,
    )  # fmt: skip
    path = out / "compare.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    print(path)
    return 0


def _evaluate(runs: Sequence[Any], arguments: Any, out: Path, command: str) -> Path:
    """Draw and score held-out prompts of the first run with the base model and the newest checkpoint of every run."""
    from t2irl.data import load_prompts
    from t2irl.evaluation.run import evaluate
    from t2irl.evaluation.settings import Evaluated
    from t2irl.registry import find
    from t2irl.rewards.base import Reward

    first = runs[0].run
    there = len(load_prompts(first.data.heldout, "data.heldout"))
    rewards: dict[str, Any] = {}
    for name, config in (
        entry for c in runs for kind in (c.run.heldout_rewards, c.run.rewards) for entry in kind.items()
    ):
        told = config.model_dump(mode="json")
        # One that learns can only be measured with once it is exported and named as frozen.
        if told.get("frozen") is not None or find("rewards", config.type).update is Reward.update:
            rewards.setdefault(name, told)
    settings = Evaluated.model_validate(
        {
            "out": str(out),
            "seed": first.seed,
            "limit": min(arguments.prompts, there),
            "rewards": rewards,
            "suite": {"type": "prompts", "path": str(first.data.heldout), "images": arguments.images},
            "features": {"pixels": {"type": "pixels"}},
            "distances": {"prdc": False},
        }
    )
    evaluate(settings, ["base", *(f"{c.name}={c.recorded.folder}" for c in runs)], "all", command)
    return out


def _columns(pictures: Any, runs: Sequence[Any], folder: Path) -> list[str]:
    """Base and the newest column of each run. Raises DataError for a run that was not evaluated."""
    found = [pictures.columns[0]] if pictures.columns[0].startswith("base") else []
    for compared in runs:
        mine = [column for column in pictures.columns if column.partition(",")[0].partition(" (")[0] == compared.name]
        if not mine:
            raise DataError(f"{folder} has no pictures of {compared.name}; it has {'; '.join(pictures.columns)}")
        found.append(mine[-1])
    return found


def _table(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "table.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}/table.json cannot be read: {error}; give the --out of `t2irl eval`") from error


def _panels(pictures: Any, runs: Sequence[Any], columns: list[str], heldout: Sequence[str]) -> list[Any]:
    from t2irl.evaluation.eval_page import PROMPTS, panel
    from t2irl.evaluation.panels import fixed, hacked

    found = [
        panel(
            pictures,
            "Fixed list",
            "The first prompts, the first image of each.",
            columns,
            fixed(pictures, columns, PROMPTS),
        )
    ]
    gold = next((name for name in heldout if name in pictures.scores), None)
    for compared, column in zip(runs, columns[-len(runs) :], strict=True):
        proxy = max(compared.trained, key=lambda name: abs(compared.trained[name]))
        if gold is None or proxy not in pictures.scores or proxy == gold or len(columns) == len(runs):
            continue
        keys = hacked(pictures, column, columns[0], proxy, gold, columns, 4)
        note = f"Where {proxy}, which {compared.name} was trained on, rose most while {gold} fell against {columns[0]}."
        found.append(panel(pictures, f"{compared.name}: {proxy} up, {gold} down", note, columns, keys))
    return found


def _parser() -> Parser:
    parser = Parser(
        prog="t2irl compare",
        description="Compare the newest checkpoints of two or more runs: held-out scores with intervals and paired tests, over-optimisation "
        "curves, settings that differ, pictures side by side. Draws and scores held-out prompts unless --eval names an evaluation.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; NAME=FOLDER calls one otherwise")
    parser.add_argument("--eval", type=Path, metavar="FOLDER", help="an evaluation that has these runs, by their names")
    parser.add_argument(
        "--prompts", type=positive, default=64, metavar="N", help="held-out prompts that are drawn (64)"
    )
    parser.add_argument("--images", type=positive, default=4, metavar="N", help="pictures of each (4)")
    parser.add_argument(
        "--heldout", metavar="NAME", help="held-out reward that is the truth (the one that monitors watch)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (runs/compare/<names>)")
    return parser
