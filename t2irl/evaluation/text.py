"""Text in pictures: any script that some installed font has letters for, letter by letter.

Pillow's wheels bring libraqm, which joins Arabic letters and turns right-to-left text around; without it such text is legible only
in part. Letters that no font has are drawn as the sign for a missing one. Most scripts and emoji are in Debian's `fonts-noto`.
"""

from __future__ import annotations

import shutil
import subprocess
import unicodedata
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
FONTS = (
    "NotoSans-Regular.ttf", "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf",
    "NotoColorEmoji.ttf", "msgothic.ttc", "Arial Unicode.ttf", "seguiemj.ttf", "Apple Color Emoji.ttc",
)  # fmt: skip
"""Tried in this order, where installed, for letters that Pillow's own font lacks; then whatever fontconfig knows."""
BITMAP = 109
"""The one size of fonts that are made of colour pictures."""
JOINERS = "\u200c\u200d"
"""Characters that cannot be seen themselves but shape what is beside them."""


def clean(text: str) -> str:
    """A text on one line that every font and encoder takes: no control characters, no lone surrogates."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() or c in JOINERS else " " for c in text).split())


@dataclass(frozen=True)
class Piece:
    """Letters that one font draws."""

    text: str
    font: Font
    scale: float = 1.0
    """Of a font that comes in one size only, to the size that was asked for."""

    @property
    def width(self) -> float:
        """In pixels."""
        return self.font.getlength(self.text) * self.scale


def pieces(text: str, size: int) -> list[Piece]:
    """A text by fonts, in the order in which the pieces stand from left to right."""
    found: list[tuple[str | None, str]] = []
    for letter in text:
        name = _font_of(letter)
        # Marks, joiners and blanks go with the letter before them, so that words are shaped as a whole.
        if found and (name == found[-1][0] or _follows(letter)):
            found[-1] = (found[-1][0], found[-1][1] + letter)
        else:
            found.append((name, letter))
    backwards = right_to_left(text)
    for k in range(len(found) - 1):
        (name, part), (after, rest) = found[k : k + 2]
        if right_to_left(part) != backwards:  # its blanks would stand on its other side
            blanks = len(part) - len(part.rstrip(" "))
            found[k : k + 2] = [(name, part[: len(part) - blanks]), (after, " " * blanks + rest)]
    made = [_piece(part, name, size) for name, part in found]
    return made[::-1] if backwards else made


def _piece(text: str, name: str | None, size: int) -> Piece:
    font = _load(name, size)
    if font is not None:
        return Piece(text, font)
    bitmap = _load(name, BITMAP)
    assert bitmap is not None
    return Piece(text, bitmap, 1.15 * size / BITMAP)


def length(text: str, size: int) -> float:
    """Width of a text in pixels."""
    return sum(piece.width for piece in pieces(text, size))


def draw(page: Image.Image, at: tuple[float, float], text: str, fill: str, size: int, right: bool = False) -> None:
    """Draw a text with its top left corner at `at`, its top right corner with `right`."""
    made = pieces(text, size)
    pen = ImageDraw.Draw(page)
    x, y = at
    x -= sum(piece.width for piece in made) if right else 0
    # Fonts sit at different heights above the same line, so that is where they are drawn from.
    line = y + size * 0.93
    for piece in made:
        if piece.scale == 1.0 and isinstance(piece.font, ImageFont.FreeTypeFont):
            pen.text((x, line), piece.text, fill, piece.font, anchor="ls")
        elif piece.scale == 1.0:
            pen.text((x, y), piece.text, fill, piece.font)
        else:
            _draw_scaled(page, piece, x, y, size)
        x += piece.width


def _draw_scaled(page: Image.Image, piece: Piece, x: float, y: float, size: int) -> None:
    whole = Image.new("RGBA", (max(1, round(piece.font.getlength(piece.text))), round(1.3 * BITMAP)))
    ImageDraw.Draw(whole).text((0, 0), piece.text, font=piece.font, embedded_color=True)
    small = whole.resize(
        (max(1, round(piece.width)), max(1, round(whole.height * piece.scale))), Image.Resampling.LANCZOS
    )
    page.paste(small, (round(x), round(y - 0.1 * size)), small)


def ellipsise(text: str, size: int, width: float) -> str:
    """A text that is at most `width` pixels wide; what was cut off is an ellipsis."""
    if length(text, size) <= width:
        return text
    while text and length(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, size: int, width: float, lines: int, characters: int) -> list[str]:
    """A text in at most so many lines, of its first so many characters; what does not fit ends in an ellipsis."""
    found = [""]
    words = [part for word in text[:characters].split() for part in _parts(word, size, width)]
    for word in words:
        longer = f"{found[-1]} {word}".strip()
        if length(longer, size) <= width:
            found[-1] = longer
        elif len(found) == lines:
            found[-1] = ellipsise(f"{longer} …", size, width)
            break
        else:
            found.append(word)
    return found


def _parts(word: str, size: int, width: float) -> list[str]:
    """A word cut where it is wider than a line, as text without spaces is."""
    if length(word, size) <= width:
        return [word]
    parts = [""]
    for letter in word:
        if parts[-1] and length(parts[-1] + letter, size) > width:
            parts.append("")
        parts[-1] += letter
    return parts


def right_to_left(text: str) -> bool:
    """Whether the first letter that has a direction is read from the right."""
    kinds = (unicodedata.bidirectional(letter) for letter in text)
    return next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L"


def _follows(letter: str) -> bool:
    return letter == " " or letter in JOINERS or unicodedata.category(letter).startswith("M")


@cache
def _font_of(letter: str) -> str | None:
    """Name of the font that draws a letter; None is Pillow's own, also for a letter that none has."""
    if letter.isascii() or _covers(None, letter):
        return None
    listed = next((name for name in FONTS if _covers(name, letter)), None)
    return listed or next((name for name in _installed_with(letter) if _covers(name, letter)), None)


def _installed_with(letter: str) -> list[str]:
    """Files of fonts that have a letter, by fontconfig where there is one."""
    program = shutil.which("fc-list")
    if program is None:
        return []
    done = subprocess.run(
        [program, f":charset={ord(letter):x}", "file"], capture_output=True, text=True, timeout=20, check=False
    )
    files = {line.rstrip(": ") for line in done.stdout.splitlines()}
    return sorted(files, key=lambda file: ("Regular" not in file, file))[:20]


@cache
def _load(name: str | None, size: int) -> Font | None:
    if name is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # not installed, or made of pictures of another size
        return None


def _covers(name: str | None, letter: str) -> bool:
    """Whether a font draws a letter as something else than the sign for a missing one."""
    missing = _missing(name)
    return missing is not None and _drawn(name, letter) != missing


@cache
def _missing(name: str | None) -> bytes | None:
    return _drawn(name, "\ue0ff")  # private use: no font has it


def _drawn(name: str | None, letter: str) -> bytes | None:
    font = _load(name, 24) or _load(name, BITMAP)
    if font is None:
        return None
    page = Image.new("L", (48, 48))
    ImageDraw.Draw(page).text((4, 4), letter, 255, font)
    return page.tobytes()
