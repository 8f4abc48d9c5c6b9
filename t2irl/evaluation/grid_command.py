"""`t2irl grid`: pictures of finished evaluations on one sheet."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from t2irl.cli import Parser
from t2irl.errors import ConfigError
from t2irl.evaluation.eval_command import positive
from t2irl.evaluation.panels import Key, Pictures, check_score, chosen, fixed, hacked, read_pictures, worst
from t2irl.evaluation.sheets import SheetCell, SheetRow, draw_sheet

SHOWN = {
    "checkpoints": "prompts x checkpoints, the same noise in a row",
    "first-last": "the first column and the last",
    "seeds": "prompts x noises of one column (the last)",
    "worst": "the pictures of the last column with the lowest --by score",
    "hacked": "where the --proxy score rose most while the --by score fell, first column to last",
}


def grid_command(argv: Sequence[str]) -> int:
    """Run `t2irl grid` with these words; returns the exit code."""
    arguments = _parser().parse_args(argv)
    pictures = read_pictures(arguments.evaluations)
    columns = chosen(pictures, arguments.column, "--column") if arguments.column else pictures.columns
    for name in arguments.score or ():
        check_score(pictures, name, "--score")
    draw_rows = _seeds if arguments.show == "seeds" else _columns
    heads, rows, about = draw_rows(arguments, pictures, columns)
    if not rows:
        raise ConfigError(
            f"--show {arguments.show}: there is no such picture in {', '.join(map(str, arguments.evaluations))}"
        )
    out = arguments.out or arguments.evaluations[0] / "grids" / f"{arguments.show}.png"
    title = arguments.title or f"{arguments.evaluations[0].resolve().name}: {about}"
    draw_sheet(heads, rows, out, title, {"show": arguments.show, "config": _configs(rows)}, arguments.tile)
    print(out)
    return 0


def _columns(
    arguments: argparse.Namespace, pictures: Pictures, columns: list[str]
) -> tuple[list[str], list[SheetRow], str]:
    """Prompts x columns."""
    show, count = arguments.show, arguments.prompts
    base, last = columns[0], columns[-1]
    if show != "checkpoints":
        columns = list(dict.fromkeys([base, last]))
    about = SHOWN[show]
    if show in ("checkpoints", "first-last"):
        keys = _fixed(arguments, pictures, columns)
    else:
        by = _needed(arguments, pictures, "by")
        if show == "worst":
            keys, about = worst(pictures, last, by, columns, count), f"lowest {by} of {last}"
        else:
            proxy = _needed(arguments, pictures, "proxy")
            keys = hacked(pictures, last, base, proxy, by, columns, count)
            about = f"{proxy} up, {by} down, from {base} to {last}"
    references = _references(arguments.reference_images, [pictures.prompts[key[0]] for key in keys])
    rows = []
    for key in keys:
        base_scores = pictures.cells[base][key].scores
        cells = [_cell(arguments, pictures, column, key, base_scores if column != base else {}) for column in columns]
        prompt = pictures.prompts[key[0]]
        if references is not None:
            cells.insert(0, SheetCell(references.get(prompt), about={"reference_image": str(references.get(prompt))}))
        rows.append(SheetRow(prompt, cells, f"prompt {key[0]}, image {key[1]}"))
    return (["reference image"] * (references is not None) + columns), rows, about


def _seeds(
    arguments: argparse.Namespace, pictures: Pictures, columns: list[str]
) -> tuple[list[str], list[SheetRow], str]:
    """Prompts x noises of the last column: a collapse is seen at once."""
    column = columns[-1]
    keys = _fixed(arguments, pictures, [column])
    there = sorted({image for _, image in pictures.cells[column]})[: arguments.images]
    rows = []
    for prompt_id, _ in keys:
        cells = [
            _cell(arguments, pictures, column, (prompt_id, image), {})
            if (prompt_id, image) in pictures.cells[column]
            else SheetCell(None)
            for image in there
        ]
        rows.append(SheetRow(pictures.prompts[prompt_id], cells, f"prompt {prompt_id}"))
    return [f"image {image}" for image in there], rows, column


def _fixed(arguments: argparse.Namespace, pictures: Pictures, columns: Sequence[str]) -> list[Key]:
    """The prompts that were named, else the first ones."""
    if arguments.prompt is None:
        return fixed(pictures, columns, arguments.prompts)
    shared = set(pictures.shared(columns))
    for number in arguments.prompt:
        if (number, 0) not in shared:
            raise ConfigError(
                f"--prompt {number}: there is no such prompt; they are numbered 0 to {max(pictures.prompts)}"
            )
    return [(number, 0) for number in arguments.prompt]


def _cell(
    arguments: argparse.Namespace, pictures: Pictures, column: str, key: Key, base: Mapping[str, float]
) -> SheetCell:
    cell = pictures.cells[column][key]
    shown = arguments.score or pictures.scores
    scores = {name: cell.scores[name] for name in shown if name in cell.scores}
    about: dict[str, Any] = {"prompt_id": key[0], "image": key[1], "seed": cell.seed, "path": str(cell.path)}
    return SheetCell(cell.path, scores, base, about)


def _needed(arguments: argparse.Namespace, pictures: Pictures, option: str) -> str:
    name = getattr(arguments, option)
    if name is None:
        known = ", ".join(pictures.scores) or "none"
        raise ConfigError(f"--show {arguments.show} needs --{option} with the name of a score; there are {known}")
    return check_score(pictures, name, f"--{option}")


def _references(index: Path | None, prompts: Sequence[str]) -> dict[str, Path] | None:
    """The first reference image of each prompt that has one; None without an index."""
    if index is None:
        return None
    from t2irl.references import ReferenceImages  # brings torch, which a sheet does not need

    settings = {"folder": index} if index.is_dir() else {"index": index}
    found = ReferenceImages.load(
        ReferenceImages.Config.model_validate(settings), prompts, "--reference-images", may_lack=True
    )
    return {prompt: files[0] for prompt in prompts if (files := found.of(prompt))}


def _configs(rows: Sequence[SheetRow]) -> list[str]:
    """Hashes of what the pictures are made of, as they themselves say."""
    found = dict[str, None]()
    for row in rows:
        for cell in row.cells:
            if cell.path is not None and "seed" in cell.about:
                with Image.open(cell.path) as picture:
                    found.setdefault(str(picture.info.get("config", "unknown")))
    return list(found)


def _parser() -> Parser:
    parser = Parser(
        prog="t2irl grid",
        description="Put pictures of finished evaluations (`t2irl eval`) on one sheet, with their scores and what changed against the first "
        "column. Prompt, seed and config hash of each picture are text in the PNG, and in a .json beside it.",
        epilog="; ".join(f"--show {name}: {text}" for name, text in SHOWN.items()),
        allow_abbrev=False,
    )
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="EVAL", help="folders of evaluations of one suite")
    parser.add_argument("--show", choices=tuple(SHOWN), default="checkpoints", help="what is shown (checkpoints)")
    parser.add_argument(
        "--column", action="append", metavar="LABEL", help="only this column, or those that begin so; may be repeated"
    )
    parser.add_argument("--prompts", type=positive, default=8, metavar="N", help="rows (8)")
    parser.add_argument("--prompt", type=_numbers, metavar="A,B", help="these prompts, by number, instead of the first")
    parser.add_argument("--images", type=positive, default=8, metavar="N", help="noises of --show seeds (8)")
    parser.add_argument("--score", action="append", metavar="NAME", help="show only this score; may be repeated")
    parser.add_argument("--by", metavar="NAME", help="held-out score of --show worst and hacked")
    parser.add_argument("--proxy", metavar="NAME", help="score that was trained on, for --show hacked")
    parser.add_argument(
        "--reference-images",
        type=Path,
        metavar="INDEX",
        help="a first column of reference images: an index file or a folder",
    )
    parser.add_argument("--tile", type=positive, metavar="PIXELS", help="side of a picture on the sheet")
    parser.add_argument("--title", help="title of the sheet")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (EVAL/grids/<show>.png)")
    return parser


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers such as 0,3,5")
    return [int(word) for word in words]
