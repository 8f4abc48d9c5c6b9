"""Scored pictures on a page: one PNG that says what was asked, what came out, and what each measure gave."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

from t2irl.evaluation.text import clean, draw, ellipsise, length, right_to_left, wrap
from t2irl.utils.files import write_atomic

SMALL, LARGE = 128, 512
"""Smallest and largest side at which pictures are shown, in pixels."""
_INK, _QUIET, _LINE, _CARD, _PAGE = "#1b1f24", "#667080", "#d8dde3", "#ffffff", "#f4f6f8"
_PAD, _GAP, _MARGIN = 10, 12, 20
_PROMPT_SIZE, _SCORE_SIZE, _TITLE_SIZE = 14, 13, 20
_PROMPT_LINES, _PROMPT_CHARACTERS = 3, 400
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Tile:
    """One picture, ready to be pasted, with its scores and a word above them."""

    picture: Image.Image
    scores: dict[str, float]
    head: str = ""


@dataclass(frozen=True)
class _Card:
    """Pictures that belong to one prompt and stand side by side."""

    prompt: str
    tiles: list[_Tile]
    lines: list[str] = field(default_factory=list)


def draw_grid(
    images: Tensor, prompts: Sequence[str], scores: Mapping[str, Sequence[float]], columns: int, path: Path, title: str
) -> None:
    """Write pictures with prompts and scores to `path` (PNG), and prompts, scores and places to its .json sidecar.

    `images`: (N, 3, H, W) uint8; `prompts`: N; `scores`: measure -> N numbers, NaN where it does not apply; `columns`:
    pictures in a row. Pictures of one prompt stand together under its label, wherever they are in the batch. Those
    below 128 px are enlarged by a whole factor without smoothing, those above 512 px reduced. In the sidecar, `boxes`
    are the places of the pictures in the PNG (left, top, right, bottom) and `picture` is their (H, W). Raises
    ValueError for counts that disagree, RunError if a file cannot be written.
    """
    tiles = _tiles(images, prompts, scores)
    together: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        together.setdefault(prompt, []).append(i)
    parts = [(p, own[k : k + columns]) for p, own in together.items() for k in range(0, len(own), columns)]
    per_row = max(1, columns // max(len(own) for _, own in parts))
    cards = [_Card(prompt, [tiles[i] for i in own]) for prompt, own in parts]
    page, drawn = _paint([cards[k : k + per_row] for k in range(0, len(cards), per_row)], clean(title))
    _save(page, path, {"title": clean(title), "prompts": list(prompts)})
    place = dict(zip((i for _, own in parts for i in own), drawn, strict=True))
    sidecar = {
        "title": clean(title),
        "prompts": list(prompts),
        "scores": {name: [_number(v) for v in values] for name, values in scores.items()},
        "picture": list(images.shape[2:]),
        "boxes": [place[i] for i in range(len(prompts))],
    }
    write_atomic(path.with_suffix(".json"), json.dumps(sidecar).encode())


def draw_pairs(
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    scores_before: Mapping[str, Sequence[float]],
    scores_after: Mapping[str, Sequence[float]],
    path: Path,
    columns: int = 3,
    heads: tuple[str, str] = ("base model", "after training"),
    title: str = "",
) -> None:
    """Write pairs of pictures of the same prompt and noise to `path` (PNG), `columns` pairs in a row.

    Arguments are as in `draw_grid`, once for each side; `heads` name the sides.
    """
    left, right = _tiles(before, prompts, scores_before, heads[0]), _tiles(after, prompts, scores_after, heads[1])
    cards = [_Card(prompt, [a, b]) for prompt, a, b in zip(prompts, left, right, strict=True)]
    page, _ = _paint([cards[i : i + columns] for i in range(0, len(cards), columns)], clean(title))
    _save(page, path, {"title": clean(title), "prompts": list(prompts)})


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def _tiles(
    images: Tensor, prompts: Sequence[str], scores: Mapping[str, Sequence[float]], head: str = ""
) -> list[_Tile]:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"pictures must be (N, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
    for what, count in [("prompts", len(prompts)), *((f"scores {name!r}", len(v)) for name, v in scores.items())]:
        if count != len(images):
            raise ValueError(f"{len(images)} pictures but {count} {what}")
    pixels: np.ndarray = images.permute(0, 2, 3, 1).cpu().numpy()
    own = [{clean(name): float(values[i]) for name, values in scores.items()} for i in range(len(images))]
    return [_Tile(_resize(Image.fromarray(p)), s, head) for p, s in zip(pixels, own, strict=True)]


def _resize(picture: Image.Image) -> Image.Image:
    """Enlarge by a whole factor to at least 1.25 x SMALL, or reduce to LARGE."""
    side = max(picture.size)
    if side < SMALL:
        factor = math.ceil(1.25 * SMALL / side)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    return picture


def _paint(rows: list[list[_Card]], title: str) -> tuple[Image.Image, list[Box]]:
    """Draw rows of cards; returns the page and the place of each picture (left, top, right, bottom), in order."""
    rows = [[_Card(c.prompt, c.tiles, _lines(c)) for c in row] for row in rows]
    heights = [max(_card_height(c) for c in row) for row in rows]
    width = max(sum(_card_width(c) + _GAP for c in row) for row in rows) - _GAP + 2 * _MARGIN
    top = _MARGIN + (_TITLE_SIZE + 16 if title else 0)
    page = Image.new("RGB", (width, top + sum(h + _GAP for h in heights) - _GAP + _MARGIN), _PAGE)
    pen = ImageDraw.Draw(page)
    if title:
        draw(page, (_MARGIN, _MARGIN - 4), ellipsise(title, _TITLE_SIZE, width - 2 * _MARGIN), _INK, _TITLE_SIZE)
    boxes: list[Box] = []
    for row, height in zip(rows, heights, strict=True):
        left = _MARGIN
        for card in row:
            pen.rounded_rectangle((left, top, left + _card_width(card), top + height), 8, _CARD, _LINE)
            boxes += _paint_card(page, pen, card, left + _PAD, top + _PAD)
            left += _card_width(card) + _GAP
        top += height + _GAP
    return page, boxes


def _paint_card(page: Image.Image, pen: ImageDraw.ImageDraw, card: _Card, left: int, top: int) -> list[Box]:
    boxes: list[Box] = []
    x = left
    for tile in card.tiles:
        y, (w, h) = top, tile.picture.size
        if tile.head:
            draw(page, (x, y - 2), tile.head, _QUIET, _SCORE_SIZE)
            y += _SCORE_SIZE + 6
        page.paste(tile.picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + w, y + h), outline=_LINE)
        boxes.append((x, y, x + w, y + h))
        y += h + 5
        for name, value in tile.scores.items():
            number = _format(value)
            room = w - length(number, _SCORE_SIZE) - 8
            draw(page, (x, y), ellipsise(name, _SCORE_SIZE, room), _QUIET, _SCORE_SIZE)
            draw(page, (x + w, y), number, _INK, _SCORE_SIZE, right=True)
            y += _SCORE_SIZE + 4
        x += w + _PAD
    y = top + max(_tile_height(tile) for tile in card.tiles) + 6
    end = left + _card_width(card) - 2 * _PAD
    for line in card.lines:
        backwards = right_to_left(line)
        draw(page, (end if backwards else left, y), line, _INK, _PROMPT_SIZE, right=backwards)
        y += _PROMPT_SIZE + 4
    return boxes


def _tile_height(tile: _Tile) -> int:
    head = _SCORE_SIZE + 6 if tile.head else 0
    return head + tile.picture.height + 5 + len(tile.scores) * (_SCORE_SIZE + 4)


def _card_height(card: _Card) -> int:
    lines = len(card.lines) * (_PROMPT_SIZE + 4)
    return 2 * _PAD + max(_tile_height(tile) for tile in card.tiles) + 6 + lines


def _lines(card: _Card) -> list[str]:
    width = _card_width(card) - 2 * _PAD
    return wrap(clean(card.prompt), _PROMPT_SIZE, width, _PROMPT_LINES, _PROMPT_CHARACTERS)


def _card_width(card: _Card) -> int:
    return sum(tile.picture.width + _PAD for tile in card.tiles) + _PAD


def _format(value: float) -> str:
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.4g}"


def _save(page: Image.Image, path: Path, notes: dict[str, object]) -> None:
    """PNG with text metadata: title, and prompts as JSON."""
    info = PngImagePlugin.PngInfo()
    for key, value in notes.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    page.save(data, "PNG", pnginfo=info, compress_level=6)
    write_atomic(path, data.getvalue())
