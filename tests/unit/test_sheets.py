"""Sheets of pictures: which ones are on it, where, what the file says of them, and text in any script."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from t2irl import cli
from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.panels import chosen, fixed, hacked, read_pictures, worst
from t2irl.evaluation.sheets import SheetCell, SheetRow, draw_sheet
from t2irl.evaluation.text import clean, draw, length, pieces, right_to_left, wrap


def write_eval(folder: Path, columns: int = 3, prompts: int = 4, images: int = 2, size: int = 64, **texts: str) -> Path:
    """A finished evaluation: gold falls and proxy rises with the column, by how much depends on the prompt."""
    lines = []
    for c in range(columns):
        method, checkpoint = ("base", "base") if c == 0 else ("run", f"iteration {c}")
        for p in range(prompts):
            for k in range(images):
                path = f"images/{c}/{p:05d}_{k:03d}.png"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((size, size, 3), (40 * c, 40 * p, 90 * k), np.uint8)).save(folder / path)
                scores = {"gold": 0.9 - 0.1 * c * (p - 1), "proxy": 0.1 + 0.2 * c + 0.01 * p}
                lines.append(
                    {
                        "prompt": texts.get(f"p{p}", f"prompt number {p}"), "prompt_id": p, "image": k, "path": path,
                        "method": method, "checkpoint": checkpoint, "seed": 0, "scores": scores,
                    }
                )  # fmt: skip
    (folder / "images.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return folder


def test_panels_choose_what_they_say(tmp_path: Path) -> None:
    found = read_pictures([write_eval(tmp_path)])
    columns = ["base", "run, iteration 1", "run, iteration 2"]
    assert found.columns == columns and found.scores == ["gold", "proxy"]
    assert fixed(found, columns, 3) == [(0, 0), (1, 0), (2, 0)]
    assert worst(found, columns[2], "gold", columns, 2) == [(3, 0), (2, 0)]  # one of each prompt
    # Prompts 0 and 1 did not lose any gold, so they were not hacked.
    assert hacked(found, columns[2], "base", "proxy", "gold", columns, 9) == [(3, 0), (2, 0)]
    assert chosen(found, ["run"], "--column") == columns[1:]
    with pytest.raises(ConfigError, match=r"--column rnu: there is no such column.* Columns: base; run, iteration 1"):
        chosen(found, ["rnu"], "--column")


def test_several_evaluations_stand_side_by_side_and_must_be_of_one_suite(tmp_path: Path) -> None:
    a, b, c = (write_eval(tmp_path / name, **texts) for name, texts in (("a", {}), ("b", {}), ("c", {"p1": "another"})))
    both = read_pictures([a, b])
    assert len(both.columns) == 6 and both.columns[3] == f"base ({b})"
    with pytest.raises(DataError, match=r"prompt 1 is 'another', elsewhere 'prompt number 1'"):
        read_pictures([a, c])
    text = (a / "images.jsonl").read_text()
    (a / "images.jsonl").write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="line 25: a second picture of prompt 0, image 0"):
        read_pictures([a])
    (a / "images.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="lacks prompt_id, image"):
        read_pictures([a])


def test_a_sheet_shows_each_picture_in_its_place_and_says_what_it_is(tmp_path: Path) -> None:
    folder = write_eval(tmp_path)
    assert cli.main(["grid", str(folder), "--prompts", "3"]) == 0
    path = folder / "grids/checkpoints.png"
    with Image.open(path) as page:
        pixels, info = np.asarray(page), page.info
    cells = json.loads(info["cells"])
    assert [cell["column"] for cell in cells[:3]] == ["base", "run, iteration 1", "run, iteration 2"] and len(
        cells
    ) == 9
    for cell in cells:
        left, top, right, bottom = cell["box"]
        column = int(cell["column"][-1]) if "iteration" in cell["column"] else 0
        assert (pixels[top:bottom, left:right] == [40 * column, 40 * cell["prompt_id"], 0]).all()
        assert cell["seed"] == 0 and cell["scores"]["gold"] == pytest.approx(
            0.9 - 0.1 * column * (cell["prompt_id"] - 1)
        )
    assert json.loads(info["prompts"]) == ["prompt number 0", "prompt number 1", "prompt number 2"]
    assert json.loads(path.with_suffix(".json").read_text())["cells"] == cells


def test_seeds_references_and_named_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_eval(tmp_path / "e")
    assert cli.main(["grid", str(folder), "--show", "seeds", "--prompt", "2,0", "--score", "gold"]) == 0
    told = json.loads((folder / "grids/seeds.json").read_text())
    assert told["prompts"] == ["prompt number 2", "prompt number 0"] and told["columns"] == ["image 0", "image 1"]
    assert all(list(cell["scores"]) == ["gold"] for cell in told["cells"])
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"prompt number 1": [str(folder / "images/2/00003_001.png")]}))
    out = tmp_path / "with.png"
    words = ["grid", str(folder), "--show", "first-last", "--reference-images", str(index), "--out", str(out)]
    assert cli.main(words) == 0
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["columns"] == ["reference image", "base", "run, iteration 2"]
    assert [cell["prompt"] for cell in told["cells"] if cell["column"] == "reference image"] == ["prompt number 1"]
    capsys.readouterr()
    for words, message in (
        (["--show", "worst"], "needs --by"),
        (["--show", "hacked", "--by", "gold"], "needs --proxy"),
        (["--show", "worst", "--by", "golt"], "Did you mean 'gold'"),
        (["--prompt", "9"], "numbered 0 to 3"),
        (["--show", "hacked", "--by", "proxy", "--proxy", "gold"], "there is no such picture"),
    ):
        assert cli.main(["grid", str(folder), *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["grid", str(tmp_path)]) == 2


def test_eight_prompts_by_six_checkpoints_in_two_seconds(tmp_path: Path) -> None:
    """Of existing pictures of 512 pixels, the start of the program included; it must not wait for torch."""
    folder = write_eval(tmp_path, columns=6, prompts=8, images=1, size=512)
    code = (
        "import sys, time; from t2irl import cli; "
        f"code = cli.main(['grid', {str(folder)!r}]); print(time.process_time()); sys.exit(code or 'torch' in sys.modules)"
    )
    seconds = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr or "torch was imported"
        seconds.append(float(done.stdout.split()[-1]))
    assert min(seconds) < 2


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write_eval(tmp_path)
    (folder / "images/1/00002_000.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"00002_000\.png: cannot be read"):
        draw_sheet(["a"], [SheetRow("x", [SheetCell(folder / "images/1/00002_000.png")])], tmp_path / "x.png", "", {})


SCRIPTS = {
    "arabic": "قطة حمراء على سجادة",
    "hebrew": "חתול אדום",
    "chinese": "一只红色的猫",
    "japanese": "赤い猫がいる",
    "korean": "빨간 고양이",
    "cyrillic": "рыжий кот",
    "greek": "κόκκινη γάτα",
    "hindi": "लाल बिल्ली",
    "thai": "แมวสีแดง",
    "emoji": "a fox 🦊 and 👩‍🚀",
    "mixed": "the word مرحبا on a 看板 in Ελλάδα",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_text_of_any_script_is_drawn_whole_and_within_its_width(name: str) -> None:
    text = clean(SCRIPTS[name])
    made = pieces(text, 14)
    assert "".join(p.text for p in (made[::-1] if right_to_left(text) else made)) == text
    for line in wrap(text, 14, 120, 4, 400):
        assert length(line, 14) <= 120
    page = Image.new("RGB", (400, 40), "white")
    draw(page, (10, 10), text, "black", 14)
    dark = np.asarray(page).min(2) < 128
    assert dark.any() and not dark[:, :8].any() and not dark[:, 12 + int(length(text, 14)) + 6 :].any()


def test_letters_that_one_font_lacks_come_from_another() -> None:
    made = pieces("cat 猫 κότα", 14)
    if not any(
        "Noto" in str(getattr(p.font, "path", "")) or "DejaVu" in str(getattr(p.font, "path", "")) for p in made
    ):
        pytest.skip("no fonts installed")
    assert len({str(getattr(p.font, "path", "")) for p in made}) >= 2


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow without libraqm")
def test_arabic_letters_are_joined() -> None:
    """Joined letters are narrower than the same letters apart."""
    apart = sum(length(letter, 20) for letter in "مرحبا")
    assert length("مرحبا", 20) < 0.95 * apart


def test_right_to_left_lines_end_at_the_right() -> None:
    page = Image.new("RGB", (300, 40), "white")
    draw(page, (290, 10), "חתול אדום", "black", 14, right=True)
    dark = np.asarray(page).min(2) < 128
    assert dark.any() and not dark[:, :150].any() and not dark[:, 292:].any()


def test_long_text_is_cut_quickly() -> None:
    started = time.process_time()
    lines = wrap("日本" * 200 + " " + "w" * 500, 14, 180, 3, 900)
    assert len(lines) == 3 and lines[-1].endswith("…") and time.process_time() - started < 3
