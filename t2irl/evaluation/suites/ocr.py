"""Text in pictures (Flow-GRPO's OCR task): the target is what stands between the first two double quotes of the prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from t2irl.data import load_prompts
from t2irl.errors import DataError
from t2irl.evaluation.suites.base import Picture, Prompt, Results, Suite, fits, place_picture, read_objects

QUOTED = re.compile(r'"([^"]*)"')
NAME = re.compile(r"(\d+)_(\d+)\.png$")


class Ocr(Suite):
    """Prompts with quoted text. A recogniser of your choice reads the exported pictures; what it read is imported and scored here."""

    class Config(Suite.Config):
        """Settings."""

        type: Literal["ocr"] = "ocr"

    official = (
        'any recogniser over FOLDER/*.png that writes lines such as {"filename": "00000_000.png", "text": "OPEN"}'
    )

    def prompts(self) -> list[Prompt]:
        """One prompt a line. Raises DataError for one without a quoted text."""
        found = []
        for line, text in enumerate(load_prompts(self.config.path, "suite.path").texts, 1):
            quoted = QUOTED.search(text)
            if quoted is None or not normal(quoted[1]):
                raise DataError(
                    f"{self.where}, prompt {line}: has no text between double quotes to be drawn: {text[:80]!r}"
                )
            found.append(Prompt(text, metadata={"target": quoted[1]}))
        return found

    def export(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], folder: Path) -> None:
        """00012_003.png, and targets.jsonl with filename, prompt and target."""
        lines = []
        for picture in pictures:
            name = f"{picture.prompt_id:05d}_{picture.image:03d}.png"
            place_picture(picture.path, folder / name)
            prompt = prompts[picture.prompt_id]
            lines.append(json.dumps({"filename": name, "prompt": prompt.text, "target": prompt.metadata["target"]}))
        (folder / "targets.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def results(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], path: Path) -> Results:
        """`ocr`: Flow-GRPO's accuracy; `ocr_strict`: one that more text than was asked for lowers as well."""
        loose: dict[tuple[int, int], float] = {}
        strict: dict[tuple[int, int], float] = {}
        for place, entry in read_objects(path, str(path), ("filename", "text")):
            found = NAME.search(str(entry["filename"]))
            if found is None or int(found[1]) >= len(prompts):
                raise DataError(f"{place}: filename {entry['filename']!r} is none of the exported pictures")
            key = (int(found[1]), int(found[2]))
            target = prompts[key[0]].metadata["target"]
            loose[key], strict[key] = accuracy(str(entry["text"]), target), strict_accuracy(str(entry["text"]), target)
        fits(loose, pictures, path)
        return {"ocr": loose, "ocr_strict": strict}


def normal(text: str) -> str:
    """Without blanks, in small letters."""
    return "".join(text.split()).lower()


def accuracy(read: str, target: str) -> float:
    """1 if the target is part of what was read, else 1 - min(d, n) / n with the edit distance d and the target's length n.

    As Flow-GRPO has it, so text may be repeated all over the picture without loss.
    """
    read, target = normal(read), normal(target)
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def strict_accuracy(read: str, target: str) -> float:
    """1 - d / max(n, m), m the length of what was read: letters too many count as much as letters that are missing."""
    read, target = normal(read), normal(target)
    return 1 - edit_distance(read, target) / max(len(read), len(target))


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]
