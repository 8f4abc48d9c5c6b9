"""Can the text be read that a prompt puts in quotes? Recognisers behind one interface, and the published rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
Reader = Callable[[np.ndarray], str]
"""(H, W, 3) uint8 -> all text in it, in reading order."""


def wanted_text(prompt: str) -> str | None:
    """The text between the first pair of double quotes; None where there is none."""
    match = QUOTED.search(prompt)
    found = next((g for g in match.groups() if g), "") if match else ""
    return found if squeezed(found) else None


def squeezed(text: str) -> str:
    """Without blanks, in lower case, as texts are compared."""
    return "".join(text.split()).lower()


def edit_distance(a: str, b: str) -> int:
    """Fewest characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def legibility(read: str, wanted: str, extra: float = 0.0) -> float:
    """1 if the wanted text is within what was read, else 1 - distance / length, from 0 (Flow-GRPO, arXiv 2505.05470).

    Text in abundance then costs nothing. With `extra` each character beyond the wanted number takes extra / length away.
    """
    read, wanted = squeezed(read), squeezed(wanted)
    score = 1.0 if wanted in read else 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)
    return max(score - extra * max(len(read) - len(wanted), 0) / len(wanted), 0.0)


def make_reader(engine: Literal["rapidocr", "paddleocr"]) -> Reader:
    """A recogniser. Raises ImportError with the command that installs it."""
    return _rapid() if engine == "rapidocr" else _paddle()


def _rapid() -> Reader:
    try:
        from rapidocr_onnxruntime import RapidOCR  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("engine rapidocr is not installed: pip install rapidocr-onnxruntime") from error
    engine = RapidOCR()

    def read(picture: np.ndarray) -> str:
        found, _ = engine(np.ascontiguousarray(picture[..., ::-1]), use_cls=False)  # it takes BGR
        return in_order([(box, text) for box, text, _ in found or ()])

    return read


def _paddle() -> Reader:
    try:
        from paddleocr import PaddleOCR  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("engine paddleocr is not installed: pip install 'paddleocr<3' paddlepaddle") from error
    engine = PaddleOCR(use_angle_cls=False, lang="en", use_gpu=False, show_log=False)

    def read(picture: np.ndarray) -> str:
        found = engine.ocr(np.ascontiguousarray(picture[..., ::-1]), cls=False)[0]
        return in_order([(box, said[0]) for box, said in found or ()])

    return read


def in_order(lines: Sequence[tuple[Any, str]]) -> str:
    """Texts from top to bottom and from left to right. Boxes are four corners each; those that overlap by half are a row."""
    spans = [(np.asarray(box, dtype=float), text) for box, text in lines]
    rows: list[list[tuple[np.ndarray, str]]] = []
    for box, text in sorted(spans, key=lambda s: s[0][:, 1].mean()):
        middle = box[:, 1].mean()
        last = rows[-1][-1][0] if rows else None
        if last is not None and last[:, 1].min() <= middle <= last[:, 1].max():
            rows[-1].append((box, text))
        else:
            rows.append([(box, text)])
    return " ".join(text for row in rows for _, text in sorted(row, key=lambda s: s[0][:, 0].min()))
