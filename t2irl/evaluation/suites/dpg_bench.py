"""DPG-Bench (github.com/TencentQQGYLab/ELLA): long, dense prompts, questions that depend on each other."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field

from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.suites.base import Picture, Prompt, Results, Suite, fits, number, read_text

LINE = re.compile(r"^(?P<file>.+\.(?:png|jpg|jpeg)), (?P<scores>[-+.\deE, ]+)$")


class DpgBench(Suite):
    """1,065 prompts, 4 pictures each, which the scorer reads as one picture of 2 x 2."""

    class Config(Suite.Config):
        """Settings."""

        type: Literal["dpg_bench"] = "dpg_bench"
        images: int = Field(default=4, ge=1, le=4)
        """Pictures of each prompt; the scorer takes up to 4."""

    official = (
        "dpg_bench/compute_dpg_bench.py --image-root-path FOLDER/images --resolution SIDE --pic-num IMAGES --res-path results.txt, of "
        "github.com/TencentQQGYLab/ELLA; leave nothing else in that folder"
    )

    def prompts(self) -> list[Prompt]:
        """dpg_bench/prompts: one .txt file a prompt; its name is what the questions are filed under."""
        files = sorted(self.config.path.glob("*.txt"))
        if not files:
            raise DataError(f"{self.where}: holds no .txt files; expected the folder dpg_bench/prompts")
        return [Prompt(read_text(file, str(file)).strip(), metadata={"item_id": file.stem}) for file in files]

    def export(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], folder: Path) -> None:
        """images/<item id>.png: the pictures of a prompt from left to right, then below."""
        by_prompt: dict[int, list[Picture]] = {}
        for picture in pictures:
            by_prompt.setdefault(picture.prompt_id, []).append(picture)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for prompt_id, own in by_prompt.items():
            tiles = []
            for picture in sorted(own, key=lambda p: p.image):
                with Image.open(picture.path) as tile:
                    tiles.append(tile.convert("RGB"))
            side = tiles[0].width
            if any(tile.size != (side, side) for tile in tiles):
                raise ConfigError(f"{own[0].path}: DPG-Bench reads square pictures of one size")
            across, down = min(len(tiles), 2), math.ceil(len(tiles) / 2)
            sheet = Image.new("RGB", (across * side, down * side))
            for k, tile in enumerate(tiles):
                sheet.paste(tile, (k % 2 * side, k // 2 * side))
            sheet.save(folder / "images" / f"{prompts[prompt_id].metadata['item_id']}.png")

    def results(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], path: Path) -> Results:
        """`dpg`: the scorer's number of each tile, questions below a failed one counted as failed. Other lines are its summary."""
        places = {prompt.metadata["item_id"]: k for k, prompt in enumerate(prompts)}
        found: dict[tuple[int, int], float] = {}
        for count, line in enumerate(read_text(path, str(path)).splitlines(), 1):
            match = LINE.match(line.strip())
            if match is None:
                continue
            place, item = f"{path}, line {count}", Path(match["file"].replace("\\", "/")).stem
            if item not in places:
                raise DataError(f"{place}: {item!r} is none of the prompts")
            *tiles, _ = (number(part, place) for part in match["scores"].split(","))  # the last one is their mean
            found |= {(places[item], image): value for image, value in enumerate(tiles)}
        fits(found, pictures, path)
        return {"dpg": found}
