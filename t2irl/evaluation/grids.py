"""Scored pictures on a page: one PNG that says what was asked, what came out, and what each measure gave."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from t2irl.utils.tracking import write_atomic

SMALL, LARGE = 128, 512
"""Smallest and largest side at which pictures are shown, in pixels."""
_INK, _QUIET, _LINE, _CARD, _PAGE = "#1b1f24", "#667080", "#d8dde3", "#ffffff", "#f4f6f8"
_PAD, _GAP, _MARGIN = 10, 12, 20
_PROMPT_SIZE, _SCORE_SIZE, _TITLE_SIZE = 14, 13, 20
_PROMPT_LINES, _PROMPT_CHARACTERS = 3, 400
_FALLBACK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "msgothic.ttc",
    "Arial Unicode.ttf",
)
"""Tried, where installed, for a text that Pillow's own font lacks letters of."""

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


def clean(text: str) -> str:
    """A text on one line that every font and encoder takes: no control characters, no lone surrogates."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


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
    rows = [[_Card(c.prompt, c.tiles, _wrap(clean(c.prompt), _card_width(c) - 2 * _PAD)) for c in row] for row in rows]
    heights = [max(_card_height(c) for c in row) for row in rows]
    width = max(sum(_card_width(c) + _GAP for c in row) for row in rows) - _GAP + 2 * _MARGIN
    top = _MARGIN + (_TITLE_SIZE + 16 if title else 0)
    page = Image.new("RGB", (width, top + sum(h + _GAP for h in heights) - _GAP + _MARGIN), _PAGE)
    pen = ImageDraw.Draw(page)
    if title:
        line = _ellipsise(title, _font(_TITLE_SIZE, title), width - 2 * _MARGIN)
        pen.text((_MARGIN, _MARGIN - 4), line, _INK, _font(_TITLE_SIZE, title))
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
            pen.text((x, y - 2), tile.head, _QUIET, _font(_SCORE_SIZE))
            y += _SCORE_SIZE + 6
        page.paste(tile.picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + w, y + h), outline=_LINE)
        boxes.append((x, y, x + w, y + h))
        y += h + 5
        for name, value in tile.scores.items():
            number = _format(value)
            room = w - pen.textlength(number, _font(_SCORE_SIZE)) - 8
            pen.text((x, y), _ellipsise(name, _font(_SCORE_SIZE, name), room), _QUIET, _font(_SCORE_SIZE, name))
            pen.text((x + w, y), number, _INK, _font(_SCORE_SIZE), anchor="ra")
            y += _SCORE_SIZE + 4
        x += w + _PAD
    y = top + max(_tile_height(tile) for tile in card.tiles) + 6
    font = _font(_PROMPT_SIZE, "".join(card.lines))
    for line in card.lines:
        pen.text((left, y), line, _INK, font)
        y += _PROMPT_SIZE + 4
    return boxes


def _tile_height(tile: _Tile) -> int:
    head = _SCORE_SIZE + 6 if tile.head else 0
    return head + tile.picture.height + 5 + len(tile.scores) * (_SCORE_SIZE + 4)


def _card_height(card: _Card) -> int:
    lines = len(card.lines) * (_PROMPT_SIZE + 4)
    return 2 * _PAD + max(_tile_height(tile) for tile in card.tiles) + 6 + lines


def _card_width(card: _Card) -> int:
    return sum(tile.picture.width + _PAD for tile in card.tiles) + _PAD


def _format(value: float) -> str:
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.4g}"


def _wrap(text: str, width: int) -> list[str]:
    """Break a text into at most `_PROMPT_LINES` lines of `width` pixels; what does not fit ends in an ellipsis."""
    text = text[:_PROMPT_CHARACTERS]
    font = _font(_PROMPT_SIZE, text)
    lines = [""]
    words = [piece for word in text.split() for piece in _pieces(word, font, width)]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) == _PROMPT_LINES:
            lines[-1] = _ellipsise(f"{longer} …", font, width)
            break
        else:
            lines.append(word)
    return lines


def _pieces(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A word cut where it is wider than a line, as text without spaces is."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _ellipsise(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@cache
def _load(name: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    if name is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # not installed
        return None


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, or an installed one that has the letters that it lacks."""
    default = _load(None, size)
    assert default is not None
    letters = frozenset(text.replace(" ", ""))
    if text.isascii() or _covers(None, letters):
        return default
    for name in _FALLBACK_FONTS:
        font = _load(name, size)
        if font is not None and _covers(name, letters):
            return font
    return default


@cache
def _covers(name: str | None, letters: frozenset[str]) -> bool:
    """Whether a font draws every letter as something else than the sign for a missing one."""
    font = _load(name, 24)
    if font is None:
        return False
    missing = _drawn("\ue0ff", font)  # private use: no font has it
    return all(_drawn(letter, font) != missing for letter in letters)


def _drawn(letter: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> bytes:
    page = Image.new("L", (48, 48))
    ImageDraw.Draw(page).text((4, 4), letter, 255, font)
    return page.tobytes()


def _save(page: Image.Image, path: Path, notes: dict[str, object]) -> None:
    """PNG with text metadata: title, and prompts as JSON."""
    info = PngImagePlugin.PngInfo()
    for key, value in notes.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    page.save(data, "PNG", pnginfo=info, compress_level=6)
    write_atomic(path, data.getvalue())
