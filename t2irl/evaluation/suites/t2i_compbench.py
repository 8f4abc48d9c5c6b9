"""T2I-CompBench++ (github.com/Karine-Huang/T2I-CompBench): 8 categories of 300 prompts, each with a scorer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from t2irl.errors import DataError
from t2irl.evaluation.suites.base import Picture, Prompt, Results, Suite, number, place_picture, read_json, read_text

LONGEST = 200
"""Characters of a prompt that go into a file name; file systems take 255 bytes."""


class T2iCompBench(Suite):
    """The *_val.txt files of the benchmark, 10 pictures of each prompt."""

    class Config(Suite.Config):
        """Settings."""

        type: Literal["t2i_compbench"] = "t2i_compbench"
        images: PositiveInt = 10
        """Pictures of each prompt."""

    official = (
        "BLIPvqa_eval/BLIP_vqa.py --out_dir=FOLDER/<category> and the other scorers of github.com/Karine-Huang/T2I-CompBench, each on the "
        "categories that it is for; resize to 512 pixels for the spatial ones, whose distances are absolute"
    )

    def prompts(self) -> list[Prompt]:
        """examples/dataset: color_val.txt, shape_val.txt and so on, one prompt a line. The category is the tag."""
        files = sorted(self.config.path.glob("*_val.txt"))
        if not files:
            raise DataError(f"{self.where}: holds no *_val.txt; expected the folder examples/dataset")
        found = []
        for file in files:
            lines = [line.strip() for line in read_text(file, str(file)).splitlines()]
            found += [Prompt(line, file.stem.removesuffix("_val")) for line in lines if line]
        return found

    def export(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], folder: Path) -> None:
        """<category>/samples/<prompt>_000012.png, numbered through within a category."""
        for (category, place), picture in _numbered(prompts, pictures).items():
            # The scorer takes what stands before the first underscore for the prompt.
            text = prompts[picture.prompt_id].text.replace("_", " ").replace("/", " ")[:LONGEST]
            place_picture(picture.path, folder / category / "samples" / f"{text}_{place:06d}.png")

    def results(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], path: Path) -> Results:
        """vqa_result.json of every scorer below the exported folder: `compbench_blip`, `compbench_clip`, `compbench_obj_detection` ...

        A scorer has numbers for the categories that it was run on, for all of their pictures.
        """
        numbered = _numbered(prompts, pictures)
        found: Results = {}
        files = [*path.glob("*/annotation_*/vqa_result.json"), *path.glob("*/labels/annotation_*/vqa_result.json")]
        for file in sorted(files):
            category = file.relative_to(path).parts[0]
            own = {place: picture for (name, place), picture in numbered.items() if name == category}
            scores = found.setdefault(f"compbench_{file.parent.name.removeprefix('annotation_')}", {})
            entries = read_json(file, str(file))
            if not isinstance(entries, list) or len(entries) != len(own):
                raise DataError(f"{file}: expected a list of {len(own)} results, one for each picture of {category}")
            for entry in entries:
                place = entry.get("question_id") if isinstance(entry, dict) else None
                if place not in own:
                    raise DataError(f"{file}: question_id {place!r} belongs to no picture of {category}")
                scores[own[place].prompt_id, own[place].image] = number(
                    entry.get("answer"), f"{file}: question {place}"
                )
        if not found:
            raise DataError(
                f"{path}: holds no <category>/annotation_*/vqa_result.json; give the exported folder, scored"
            )
        return found


def _numbered(prompts: Sequence[Prompt], pictures: Sequence[Picture]) -> dict[tuple[str, int], Picture]:
    """(category, number within it) -> picture."""
    counts: dict[str, int] = {}
    found = {}
    for picture in sorted(pictures, key=lambda p: (p.prompt_id, p.image)):
        category = prompts[picture.prompt_id].tag
        found[category, counts.get(category, 0)] = picture
        counts[category] = counts.get(category, 0) + 1
    return found
