"""Scored picture grids."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2irl.evaluation.grids import LARGE, SMALL, draw_grid, draw_pairs
from t2irl.evaluation.text import clean, length, wrap

HOSTILE = [
    "日本語のプロンプト" * 20,
    "<b>x</b>\n\t\0 \ud800 surrogate",
    "w" * 5000,
    "",
    "🦊 ελληνικά é",
    "\u202eabc\u200b",
]


def pictures(count: int, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def cut(path: Path) -> list[np.ndarray]:
    """Pictures of a grid, cut out by its sidecar and brought back to their size."""
    sidecar = json.loads(path.with_suffix(".json").read_text())
    height, width = sidecar["picture"]
    page = Image.open(path)
    return [np.asarray(page.crop(box).resize((width, height), Image.Resampling.NEAREST)) for box in sidecar["boxes"]]


def test_pictures_are_in_the_page_pixel_by_pixel_in_the_order_given(tmp_path: Path) -> None:
    images, prompts = pictures(7), ["a", "b", "c", "a", "b", "c", "a"]
    draw_grid(images, prompts, {"s": list(range(7))}, 4, tmp_path / "g.png", "title")
    for found, image in zip(cut(tmp_path / "g.png"), images.permute(0, 2, 3, 1).numpy(), strict=True):
        np.testing.assert_array_equal(found, image)


def test_prompts_and_scores_are_in_the_sidecar_and_in_the_png(tmp_path: Path) -> None:
    prompts = ["a red circle", "日本語"]
    folder = tmp_path / "grids"
    draw_grid(pictures(2), prompts, {"correct": [1.0, float("nan")]}, 2, folder / "g.png", "runs/demo, iteration 0")
    sidecar = json.loads((folder / "g.json").read_text())
    assert sidecar["prompts"] == prompts and sidecar["scores"] == {"correct": [1.0, None]}
    notes = Image.open(folder / "g.png").text  # type: ignore[attr-defined]
    assert notes["title"] == "runs/demo, iteration 0" and json.loads(notes["prompts"]) == prompts
    assert sorted(p.name for p in folder.iterdir()) == ["g.json", "g.png"]


def test_small_pictures_are_enlarged_and_large_ones_reduced(tmp_path: Path) -> None:
    draw_grid(pictures(2, 48, 64), ["a", "b"], {}, 2, tmp_path / "small.png", "")
    draw_grid(pictures(1, 1024, 768), ["a"], {}, 1, tmp_path / "large.png", "")
    left, top, right, bottom = json.loads((tmp_path / "small.json").read_text())["boxes"][0]
    assert right - left >= SMALL and (right - left) % 64 == 0 and (right - left) * 48 == (bottom - top) * 64
    left, top, right, bottom = json.loads((tmp_path / "large.json").read_text())["boxes"][0]
    assert (right - left, bottom - top) == (LARGE * 3 // 4, LARGE)


def test_columns_are_pictures_in_a_row(tmp_path: Path) -> None:
    draw_grid(pictures(8), [f"prompt {i // 2}" for i in range(8)], {}, 4, tmp_path / "g.png", "")
    boxes = json.loads((tmp_path / "g.json").read_text())["boxes"]
    assert [box[1] == boxes[0][1] for box in boxes] == [True] * 4 + [False] * 4


def test_more_pictures_of_a_prompt_than_columns_take_several_rows(tmp_path: Path) -> None:
    draw_grid(pictures(5), ["a"] * 5, {}, 2, tmp_path / "g.png", "")
    assert len({box[1] for box in json.loads((tmp_path / "g.json").read_text())["boxes"]}) == 3


def test_scores_and_prompts_are_drawn(tmp_path: Path) -> None:
    def page(prompt: str, score: float) -> np.ndarray:
        draw_grid(pictures(1), [prompt], {"s": [score]}, 1, tmp_path / "g.png", "t")
        return np.asarray(Image.open(tmp_path / "g.png"))

    first = page("a circle", 0.1)
    assert (page("a circle", 0.1) == first).all()
    assert (page("a circle", 0.9) != first).any() and (page("a square", 0.1) != first).any()


def test_any_text_is_drawn_without_error(tmp_path: Path) -> None:
    scores = {"a name that is far too long for the picture it stands under": [float("inf"), 1e12, -3.0, 0.0, 1.0, 2.0]}
    draw_grid(pictures(6), HOSTILE, scores, 3, tmp_path / "g.png", HOSTILE[1])
    assert json.loads((tmp_path / "g.json").read_text())["prompts"] == HOSTILE


def test_clean_keeps_one_printable_line() -> None:
    assert clean(" a\n\tb\0 c\ud800 日本\u202e ") == "a b c? 日本"


@pytest.mark.parametrize(
    "text", ["a purple triangle left of a yellow star on a gray background " * 3, "w" * 200, "日本" * 90]
)
def test_labels_fit_their_width_and_end_in_an_ellipsis(text: str) -> None:
    lines = wrap(text, 14, 180, 3, 400)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(length(line, 14) <= 180 for line in lines)


def test_a_short_label_stays_whole() -> None:
    assert wrap("two red stars", 14, 180, 3, 400) == ["two red stars"]


def test_a_grid_of_24_is_drawn_in_half_a_second(tmp_path: Path) -> None:
    images, prompts = pictures(24), [f"a purple triangle left of star {i // 2} on a gray background" for i in range(24)]
    seconds = []
    for _ in range(2):
        started = time.process_time()
        draw_grid(images, prompts, {n: [0.5] * 24 for n in "abc"}, 6, tmp_path / "g.png", "t")
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.5


def test_pairs_stand_side_by_side(tmp_path: Path) -> None:
    red, blue = torch.zeros(3, 3, 64, 64, dtype=torch.uint8), torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    red[:, 0], blue[:, 2] = 255, 255
    draw_pairs(red, blue, ["a", "b", "c"], {"s": [0.0] * 3}, {"s": [1.0] * 3}, tmp_path / "p.png", columns=2)
    page = np.asarray(Image.open(tmp_path / "p.png")).astype(int)
    is_red, is_blue = (page == [255, 0, 0]).all(2), (page == [0, 0, 255]).all(2)
    assert is_red.sum() == is_blue.sum() == 3 * 192 * 192
    row = is_red.any(1).nonzero()[0][0]
    order = ["red" if is_red[row, x] else "blue" for x in range(page.shape[1]) if is_red[row, x] or is_blue[row, x]]
    assert [order[0], order[192], order[384], order[576]] == ["red", "blue", "red", "blue"] and len(order) == 4 * 192


def test_counts_that_disagree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 pictures but 1 prompts"):
        draw_grid(pictures(2), ["a"], {}, 2, tmp_path / "g.png", "")
    with pytest.raises(ValueError, match="2 pictures but 3 scores 's'"):
        draw_grid(pictures(2), ["a", "b"], {"s": [1, 2, 3]}, 2, tmp_path / "g.png", "")
    with pytest.raises(ValueError, match="uint8"):
        draw_grid(pictures(2).float(), ["a", "b"], {}, 2, tmp_path / "g.png", "")
    assert not list(tmp_path.iterdir())
