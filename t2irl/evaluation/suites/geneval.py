"""GenEval (github.com/djghosh13/geneval): objects, counts, colours and positions, checked by a detector."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from t2irl.errors import DataError
from t2irl.evaluation.suites.base import Picture, Prompt, Results, Suite, fits, number, place_picture, read_objects

PLACE = re.compile(r"(\d+)/samples/(\d+)\.png$")


class GenEval(Suite):
    """553 prompts in 6 categories, 4 pictures each; the benchmark's number is the mean over categories."""

    class Config(Suite.Config):
        """Settings."""

        type: Literal["geneval"] = "geneval"

    official = "evaluation/evaluate_images.py FOLDER --outfile results.jsonl, of github.com/djghosh13/geneval"

    def prompts(self) -> list[Prompt]:
        """evaluation_metadata.jsonl: a line with tag, include, perhaps exclude, and prompt."""
        entries = read_objects(self.config.path, self.where, ("tag", "include", "prompt"))
        found = [Prompt(str(entry["prompt"]), str(entry["tag"]), entry) for _, entry in entries]
        if not found:
            raise DataError(f"{self.where}: is empty")
        return found

    def export(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], folder: Path) -> None:
        """00012/metadata.jsonl and 00012/samples/0003.png."""
        for picture in pictures:
            own = folder / f"{picture.prompt_id:05d}"
            place_picture(picture.path, own / "samples" / f"{picture.image:04d}.png")
            (own / "metadata.jsonl").write_text(json.dumps(prompts[picture.prompt_id].metadata), encoding="utf-8")

    def results(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], path: Path) -> Results:
        """`geneval`: 1 where a picture is right; `geneval_any`: 1 where any picture of the prompt is."""
        right: dict[tuple[int, int], float] = {}
        for place, entry in read_objects(path, str(path), ("filename", "prompt", "correct")):
            found = PLACE.search(str(entry["filename"]).replace("\\", "/"))
            if found is None:
                raise DataError(f"{place}: filename {entry['filename']!r} does not end in 00000/samples/0000.png")
            key = (int(found[1]), int(found[2]))
            if key[0] < len(prompts) and entry["prompt"] != prompts[key[0]].text:
                raise DataError(
                    f"{place}: prompt {key[0]} is {prompts[key[0]].text!r} here, but {entry['prompt']!r} there"
                )
            right[key] = number(entry["correct"], f"{place}: correct")
        fits(right, pictures, path)
        best: dict[int, float] = {}
        for (prompt_id, _), value in right.items():
            best[prompt_id] = max(value, best.get(prompt_id, 0.0))
        return {"geneval": right, "geneval_any": {key: best[key[0]] for key in right}}
