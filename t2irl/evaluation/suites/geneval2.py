"""GenEval 2 (github.com/facebookresearch/GenEval2): up to ten atoms in a prompt, each asked of a vision-language model.

Its data are for non-commercial use (CC BY-NC 4.0); none of them are here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from t2irl.errors import DataError
from t2irl.evaluation.suites.base import (
    Picture,
    Prompt,
    Results,
    Suite,
    fits,
    number,
    place_picture,
    read_json,
    read_objects,
)


class GenEval2(Suite):
    """800 prompts, one picture each; categories are the number of atoms."""

    class Config(Suite.Config):
        """Settings."""

        type: Literal["geneval2"] = "geneval2"
        images: PositiveInt = 1
        """Pictures of each prompt; the scorer is run once for each."""

    official = (
        "evaluation.py --benchmark_data benchmark.jsonl --image_filepath_data images_0.json --method soft_tifa_gm --output_file "
        "score_lists_0.json, of github.com/facebookresearch/GenEval2, once for each images_<k>.json"
    )

    def prompts(self) -> list[Prompt]:
        """geneval2_data.jsonl: prompt, atom_count, vqa_list, skills."""
        found = []
        for _, entry in read_objects(self.config.path, self.where, ("prompt", "atom_count", "vqa_list")):
            found.append(Prompt(str(entry["prompt"]), f"{entry['atom_count']} atoms", entry))
        if not found:
            raise DataError(f"{self.where}: is empty")
        return found

    def export(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], folder: Path) -> None:
        """benchmark.jsonl, and for image k of every prompt images_<k>.json, {prompt: path of the picture}."""
        paths: dict[int, dict[str, str]] = {}
        for picture in pictures:
            target = folder / f"images_{picture.image}" / f"{picture.prompt_id:05d}.png"
            place_picture(picture.path, target)
            paths.setdefault(picture.image, {})[prompts[picture.prompt_id].text] = str(target.resolve())
        lines = "".join(f"{json.dumps(prompt.metadata)}\n" for prompt in prompts)
        (folder / "benchmark.jsonl").write_text(lines, encoding="utf-8")
        for image, found in paths.items():
            (folder / f"images_{image}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

    def results(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], path: Path) -> Results:
        """Soft-TIFA: arithmetic (`geneval2_am`) and geometric (`geneval2_gm`) mean of a picture's atoms.

        `path`: the score lists of image 0, or a folder with score_lists_<k>.json. Lists come in the order of the prompts, or by prompt.
        """
        files = {0: path}
        if path.is_dir():
            files = {k: path / f"score_lists_{k}.json" for k in sorted({picture.image for picture in pictures})}
        arithmetic: dict[tuple[int, int], float] = {}
        geometric: dict[tuple[int, int], float] = {}
        for image, file in files.items():
            for prompt_id, atoms in enumerate(_lists(read_json(file, str(file)), prompts, file)):
                scores = [number(atom, f"{file}: prompt {prompt_id}") for atom in atoms]
                arithmetic[prompt_id, image] = sum(scores) / len(scores)
                geometric[prompt_id, image] = math.prod(max(score, 0.0) for score in scores) ** (1 / len(scores))
        fits(arithmetic, pictures, path)
        return {"geneval2_am": arithmetic, "geneval2_gm": geometric}


def _lists(content: Any, prompts: Sequence[Prompt], file: Path) -> list[list[Any]]:
    if isinstance(content, Mapping):
        missing = [prompt.text for prompt in prompts if prompt.text not in content]
        if missing:
            raise DataError(f"{file}: has no scores of the prompt {missing[0]!r}")
        content = [content[prompt.text] for prompt in prompts]
    if not isinstance(content, list) or not all(isinstance(atoms, list) and atoms for atoms in content):
        raise DataError(f"{file}: expected a list of the scores of its atoms for each prompt")
    return content
