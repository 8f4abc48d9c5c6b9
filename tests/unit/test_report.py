"""The report of a run, its curves, alarms, pictures and glossary."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from t2irl.errors import DataError
from t2irl.evaluation import frames as frames_module
from t2irl.evaluation.frames import load_frames
from t2irl.evaluation.grids import draw_grid
from t2irl.evaluation.report import write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&\ud800"
VOID = {"meta", "input", "br", "img", "link", "hr"}
SVG_LEAVES = {"line", "circle", "polyline"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; complains of tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID | SVG_LEAVES:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def text(self) -> str:
        """What a reader can read."""
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every such tag."""
        return [attributes for name, attributes in self.tags if name == tag]

    def content(self, tag: str) -> list[str]:
        """Texts directly inside such tags."""
        return [text for name, text in self.texts if name == tag]


def rows(count: int = 30) -> list[dict[str, Any]]:
    """A run whose reward rises from 0.4 to 0.7 and whose cleanliness stays."""
    found: list[dict[str, Any]] = [{"iteration": 0, "time": 1.0, "heldout/correct": 0.4, "heldout/cleanliness": 0.8}]
    for i in range(1, count + 1):
        row = {"iteration": i, "time": 1.0 + i, "reward/shapes/mean": 0.4 + 0.3 * i / count, "policy/lr": 3e-4}
        row |= {"reward/total/mean": row["reward/shapes/mean"], "policy/ratio_first": 1.0, "time/rollout_s": 2.0}
        if i % 10 == 0:
            row |= {"heldout/correct": 0.4 + 0.25 * i / count, "heldout/cleanliness": 0.8}
        found.append(row)
    return found


SUMMARY = {
    "base": {"correct": 0.4, "cleanliness": 0.8},
    "final": {"correct": 0.65, "cleanliness": 0.79},
    "images_evaluated": 256,
    "iterations": 30,
    "updates": 60,
    "images_sampled": 3840,
    "seconds": {"rollout": 60.0, "score": 5.0, "update": 50.0, "evaluate": 20.0, "total": 140.0},
    "export": {
        "file": "export/pytorch_lora_weights.safetensors",
        "max_difference_to_policy": 0.001,
        "difference_to_base": 0.5,
        "snippet": "pipe('a <red> & \"blue\" star')",
    },
    "warnings": ["3 prompts are in both files"],
}


def make_run(folder: Path, lines: list[dict[str, Any]], summary: dict[str, Any] | None = None, **config: Any) -> Path:
    """A run folder as training leaves it."""
    settings = {
        "iterations": 30,
        "model": {"type": "sd3", "path": "assets/tiny-sd3"},
        "data": {"prompts": "a.txt", "heldout": "b.txt"},
        "rewards": {"shapes": {"type": "shapes"}},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.7", "cpu": "A <fast> one", "gpus": []}))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def add_grid(folder: Path, iteration: int, prompts: list[str], side: int = 16, seed: int = 0) -> torch.Tensor:
    """A grid of noise pictures."""
    (folder / "grids").mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(prompts), 3, side, side), dtype=torch.uint8, generator=generator)
    scores = {"correct": [iteration / 30] * len(prompts)}
    draw_grid(images, prompts, scores, 4, folder / "grids" / f"iteration_{iteration:06d}.png", "t")
    return images


def unpack(sheet: str) -> Image.Image:
    """The picture of a data: URI."""
    kind, _, data = sheet.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run with three grids."""
    folder = make_run(tmp_path / "demo", rows(), SUMMARY)
    for k, iteration in enumerate((0, 10, 30)):
        add_grid(folder, iteration, ["a red circle", "a blue star", "a red circle", HOSTILE], seed=k)
    return folder


def test_report_of_a_finished_run(finished: Path) -> None:
    path = write_report(finished)
    page = Page(path)
    text = page.text()
    assert path == finished / "report.html"
    assert (
        "On 256 held-out pictures, correct rose from 0.400 to 0.650 and cleanliness fell from 0.800 to 0.790." in text
    )
    assert "+0.250" in text and "\N{MINUS SIGN}0.010" in text and "images sampled 3 840" in text and "2:20" in text
    assert "3 prompts are in both files" in text and "A <fast> one" in text
    assert SUMMARY["export"]["snippet"] in page.content("code")
    assert len([a for a in page.all("div") if a.get("class") == "tile now"]) == 4
    slider = next(a for a in page.all("input") if a.get("type") == "range")
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "2", "2")
    shown = json.loads(next(t for t in page.content("script") if t.startswith("[")))
    assert [f["iteration"] for f in shown] == [0, 10, 30] and shown[1]["scores"] == {"correct": [10 / 30] * 4}


def test_charts_carry_the_numbers_of_the_run(finished: Path) -> None:
    page = Page(write_report(finished))
    charts = [json.loads(a["data-chart"]) for a in page.all("figure")]
    drawn = {series["name"]: series["points"] for chart in charts for series in chart["series"]}
    assert drawn["reward/shapes/mean"] == [[r["iteration"], pytest.approx(r["reward/shapes/mean"])] for r in rows()[1:]]
    assert [x for x, _ in drawn["heldout/correct"]] == [0, 10, 20, 30]
    assert "policy/lr" not in drawn and "policy/lr 0.0003" in page.text()  # it never changed


def test_nothing_is_fetched_and_only_our_script_may_run(finished: Path) -> None:
    page = Page(write_report(finished))
    links = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "action", "data") if key in a]
    assert links and all(link.startswith("#") for link in links)
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert all(link[1:] in ids for link in links)
    assert not re.search(r"url\((?!\"?data:)", "".join(page.content("style")))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    scripts = [t for t in page.content("script") if not t.startswith("[")]
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_hostile_names_and_prompts_are_only_text(tmp_path: Path) -> None:
    lines = [{"iteration": i, f"reward/{HOSTILE}/mean": i, f"heldout/{HOSTILE}": i} for i in range(3)]
    summary = SUMMARY | {
        "base": {HOSTILE: 0.1},
        "final": {HOSTILE: 0.2},
        "warnings": [HOSTILE],
        "export": {"snippet": HOSTILE},
    }
    folder = make_run(tmp_path / "x", lines, summary, rewards={HOSTILE.replace("\ud800", ""): {"type": "shapes"}})
    add_grid(folder, 0, [HOSTILE])
    page = Page(write_report(folder))
    assert len(page.all("script")) == 2 and not page.all("img")
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.text().count("alert(1)") >= 4


def test_report_of_an_unfinished_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows()[:15])
    page = Page(write_report(folder))
    assert "unfinished, iteration 14 of 30" in page.text()
    assert "correct rose from 0.400 to 0.483" in page.text() and "Use the result" not in page.text()


@pytest.mark.parametrize("lines", [[], [{"iteration": 1, "reward/total/mean": 0.5}]])
def test_report_of_a_run_without_evaluations(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    folder = make_run(tmp_path / "run", lines)
    (folder / "environment.json").unlink()
    assert "Nothing was measured on held-out prompts yet." in Page(write_report(folder)).text()


def test_a_cut_off_line_and_a_broken_grid_are_noted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 31, "rew')
    add_grid(folder, 0, ["a"])
    (folder / "grids" / "iteration_000010.png").write_bytes(b"\x89PNG cut off")
    text = Page(write_report(folder)).text()
    assert "1 damaged line(s)" in text and "iteration_000010.png cannot be read" in text and "iteration 30 of" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run folder: it has no config\.yaml"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(DataError, match="cannot be read"):
        write_report(tmp_path)


def test_settings_that_differ_stand_first_and_a_foreign_plugin_is_no_obstacle(tmp_path: Path) -> None:
    known = make_run(tmp_path / "known", [], optimizer={"lr": 7e-4, "eps": 1e-8})
    changed, full = (t for t in Page(write_report(known)).content("code") if "prompts: a.txt" in t)
    assert "lr: 0.0007" in changed and "eps" not in changed and "eps" in full
    foreign = make_run(tmp_path / "foreign", [], rewards={"mine": {"type": "not_installed:Mine"}})
    assert len([t for t in Page(write_report(foreign)).content("code") if "not_installed" in t]) == 1


def test_frames_give_the_very_pixels_back(tmp_path: Path) -> None:
    images = add_grid(tmp_path, 20, ["a", "b", "a", "c", "b"], side=24)
    (frame,), notes = load_frames(tmp_path / "grids")
    sheet = np.asarray(unpack(frame.sheet).convert("RGB"))
    assert (
        notes == [] and frame.iteration == 20 and frame.prompts == ["a", "b", "a", "c", "b"] and frame.size == (24, 24)
    )
    for k, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        y, x = k // frame.across * 24, k % frame.across * 24
        np.testing.assert_array_equal(sheet[y : y + 24, x : x + 24], image)


def test_frames_are_thinned_and_shrunk_to_their_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration in range(9):
        add_grid(tmp_path, iteration, ["a"], side=200)
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 4)
    monkeypatch.setattr(frames_module, "BUDGET", 40_000)
    frames, _ = load_frames(tmp_path / "grids")
    assert [f.iteration for f in frames] == [0, 3, 5, 8] and frames[0].size < (200, 200)
    assert sum(len(base64.b64decode(f.sheet.partition(",")[2])) for f in frames) <= 40_000


def test_frames_of_other_prompts_are_left_out(tmp_path: Path) -> None:
    for iteration, prompts in ((0, ["old"]), (10, ["a", "b"]), (20, ["a", "b"])):
        add_grid(tmp_path, iteration, prompts)
    assert [f.iteration for f in load_frames(tmp_path / "grids")[0]] == [10, 20]
