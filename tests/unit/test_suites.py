"""Suites: prompts from upstream files, layouts for official scorers, and their results back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from t2irl import registry
from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.suites.base import Picture, Suite
from t2irl.evaluation.suites.ocr import accuracy, edit_distance, strict_accuracy


def suite(name: str, path: Path, **settings_: Any) -> Suite:
    """A suite by its name."""
    config = registry.find("evaluation.suites", name).Config.model_validate({"type": name, "path": path, **settings_})
    return registry.build("evaluation.suites", config)


def pictures(folder: Path, prompts: int, images: int, size: int = 8) -> list[Picture]:
    """Pictures of one colour each: red is the prompt, green the image."""
    found = []
    for p in range(prompts):
        for k in range(images):
            path = folder / f"drawn_{p}_{k}.png"
            Image.fromarray(np.full((size, size, 3), (10 * p, 50 * k, 7), np.uint8)).save(path)
            found.append(Picture(p, k, path))
    return found


def color(path: Path, x: int = 0, y: int = 0) -> tuple[int, int]:
    """(prompt, image) that a picture shows."""
    with Image.open(path) as found:
        r, g, _ = found.convert("RGB").getpixel((x, y))  # type: ignore[misc]
    return r // 10, g // 50


def lines(path: Path, entries: list[Any]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
    return path


GENEVAL = [
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [], "prompt": "a photo of two dogs"},
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"},
]


def test_geneval_there_and_back(tmp_path: Path) -> None:
    bench = suite("geneval", lines(tmp_path / "meta.jsonl", GENEVAL))
    prompts, drawn = bench.prompts(), pictures(tmp_path, 2, 2)
    assert [(p.text, p.tag) for p in prompts] == [
        ("a photo of two dogs", "counting"),
        ("a photo of a red cup", "colors"),
    ]
    out = tmp_path / "out"
    bench.export(prompts, drawn, out)
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files[:3] == ["00000/metadata.jsonl", "00000/samples/0000.png", "00000/samples/0001.png"] and len(files) == 6
    assert json.loads((out / "00001/metadata.jsonl").read_text()) == GENEVAL[1]
    assert color(out / "00001/samples/0001.png") == (1, 1)
    results = [
        {"filename": f"{out}/{p:05d}/samples/{k:04d}.png", "tag": "", "prompt": prompts[p].text, "correct": p == k == 1}
        for k in range(2)
        for p in range(2)
    ]
    found = bench.results(prompts, drawn, lines(tmp_path / "results.jsonl", results))
    assert found["geneval"] == {(0, 0): 0.0, (0, 1): 0.0, (1, 0): 0.0, (1, 1): 1.0}
    assert found["geneval_any"] == {(0, 0): 0.0, (0, 1): 0.0, (1, 0): 1.0, (1, 1): 1.0}
    with pytest.raises(DataError, match="no result for 1 of 4 pictures, for example prompt 1, image 1"):
        bench.results(prompts, drawn, lines(tmp_path / "short.jsonl", results[:3]))
    results[0]["prompt"] = "a photo of something else"
    with pytest.raises(DataError, match="line 1: prompt 0 is 'a photo of two dogs' here"):
        bench.results(prompts, drawn, lines(tmp_path / "other.jsonl", results))


def test_geneval2_there_and_back(tmp_path: Path) -> None:
    data = [
        {
            "prompt": "two cats",
            "atom_count": 2,
            "vqa_list": [["How many?", "two"], ["Cats?", "Yes"]],
            "skills": ["count", "object"],
        },
        {"prompt": "a cup", "atom_count": 1, "vqa_list": [["Is there a cup?", "Yes"]], "skills": ["object"]},
    ]
    bench = suite("geneval2", lines(tmp_path / "data.jsonl", data), images=2)
    prompts, drawn = bench.prompts(), pictures(tmp_path, 2, 2)
    out = tmp_path / "out"
    bench.export(prompts, drawn, out)
    paths = json.loads((out / "images_1.json").read_text())
    assert list(paths) == ["two cats", "a cup"] and color(Path(paths["a cup"])) == (1, 1)
    assert [json.loads(line) for line in (out / "benchmark.jsonl").read_text().splitlines()] == data
    (out / "score_lists_0.json").write_text(json.dumps([[0.5, 0.5], [0.9]]))
    (out / "score_lists_1.json").write_text(json.dumps({"a cup": [0.1], "two cats": [0.25, 1.0]}))
    found = bench.results(prompts, drawn, out)
    assert found["geneval2_am"] == pytest.approx({(0, 0): 0.5, (1, 0): 0.9, (0, 1): 0.625, (1, 1): 0.1})
    assert found["geneval2_gm"] == pytest.approx({(0, 0): 0.5, (1, 0): 0.9, (0, 1): 0.5, (1, 1): 0.1})
    (out / "score_lists_0.json").write_text("[[0.5], []]")
    with pytest.raises(DataError, match="expected a list of the scores of its atoms"):
        bench.results(prompts, drawn, out)


def test_dpg_bench_there_and_back(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("12", "A long prompt.\n"), ("partiprompts7", "Another, longer prompt.")):
        (folder / f"{name}.txt").write_text(text)
    bench = suite("dpg_bench", folder)
    prompts, drawn = bench.prompts(), pictures(tmp_path, 2, 4)
    assert [p.text for p in prompts] == ["A long prompt.", "Another, longer prompt."]
    out = tmp_path / "out"
    bench.export(prompts, drawn, out)
    sheet = out / "images" / "partiprompts7.png"
    assert Image.open(sheet).size == (16, 16)
    assert [color(sheet, x, y) for x, y in ((0, 0), (8, 0), (0, 8), (8, 8))] == [(1, 0), (1, 1), (1, 2), (1, 3)]
    said = f"{out}/images/12.png, 1.0, 0.5, 0.0, 0.5, 0.5\n{sheet}, 0.25, 0.25, 1.0, 0.5, 0.5\nModel: x\nL1 category scores:\n"
    (tmp_path / "results.txt").write_text(said + "\tentity: 50.0\nDPG-Bench score: 50.0\n")
    found = bench.results(prompts, drawn, tmp_path / "results.txt")["dpg"]
    assert [found[0, k] for k in range(4)] == [1.0, 0.5, 0.0, 0.5] and found[1, 2] == 1.0
    (tmp_path / "results.txt").write_text(said.replace("/12.png", "/13.png"))
    with pytest.raises(DataError, match="line 1: '13' is none of the prompts"):
        bench.results(prompts, drawn, tmp_path / "results.txt")
    with pytest.raises(ConfigError, match="square pictures of one size"):
        Image.new("RGB", (8, 4)).save(drawn[0].path)
        bench.export(prompts, drawn, tmp_path / "out2")


def test_t2i_compbench_there_and_back(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "color_val.txt").write_text("a green bench and a blue bowl\na red/pink_cup\n")
    (folder / "complex_val.txt").write_text("a cat under a chair\n")
    bench = suite("t2i_compbench", folder, images=2)
    prompts, drawn = bench.prompts(), pictures(tmp_path, 3, 2)
    assert [p.tag for p in prompts] == ["color", "color", "complex"]
    out = tmp_path / "out"
    bench.export(prompts, drawn, out)
    assert sorted(p.name for p in (out / "color/samples").iterdir()) == [
        "a green bench and a blue bowl_000000.png",
        "a green bench and a blue bowl_000001.png",
        "a red pink cup_000002.png",
        "a red pink cup_000003.png",
    ]
    assert color(out / "complex/samples/a cat under a chair_000001.png") == (2, 1)
    (out / "color/annotation_blip").mkdir()
    answers = [{"question_id": k, "answer": f"0.{k}000"} for k in range(4)]
    (out / "color/annotation_blip/vqa_result.json").write_text(json.dumps(answers[::-1]))
    (out / "color/annotation1_blip").mkdir()  # what the scorer leaves beside it
    found = bench.results(prompts, drawn, out)
    assert found == {"compbench_blip": {(0, 0): 0.0, (0, 1): 0.1, (1, 0): 0.2, (1, 1): 0.3}}
    (out / "color/annotation_blip/vqa_result.json").write_text(json.dumps(answers[:3]))
    with pytest.raises(DataError, match="expected a list of 4 results"):
        bench.results(prompts, drawn, out)


def test_drawbench_reads_either_separator(tmp_path: Path) -> None:
    rows = [("Prompts", "Category"), ("A red colored car.", "Colors"), ("One cat, and two dogs", "Counting")]
    (tmp_path / "a.csv").write_text('Prompts,Category\nA red colored car.,Colors\n"One cat, and two dogs",Counting\n')
    (tmp_path / "b.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    for name in ("a.csv", "b.tsv"):
        assert [(p.text, p.tag) for p in suite("drawbench", tmp_path / name).prompts()] == rows[1:]
    (tmp_path / "c.csv").write_text("text,kind\nx,y\n")
    with pytest.raises(DataError, match="lacks the column Prompts; its first line is 'text,kind'"):
        suite("drawbench", tmp_path / "c.csv").prompts()


def test_ocr_there_and_back(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('A sign that says "Open Now" in red\nA mug with "TEA" on it and "not this"\n')
    bench = suite("ocr", tmp_path / "p.txt")
    prompts, drawn = bench.prompts(), pictures(tmp_path, 2, 1)
    assert [p.metadata["target"] for p in prompts] == ["Open Now", "TEA"]
    bench.export(prompts, drawn, tmp_path / "out")
    assert color(tmp_path / "out/00001_000.png") == (1, 0)
    read = [{"filename": "00000_000.png", "text": "OPEN NOW open now"}, {"filename": "x/00001_000.png", "text": "TE"}]
    found = bench.results(prompts, drawn, lines(tmp_path / "r.jsonl", read))
    assert found["ocr"] == pytest.approx({(0, 0): 1.0, (1, 0): 2 / 3})
    assert found["ocr_strict"] == pytest.approx({(0, 0): 0.5, (1, 0): 2 / 3})
    (tmp_path / "p.txt").write_text("A sign without any text\n")
    with pytest.raises(DataError, match="prompt 1: has no text between double quotes"):
        bench.prompts()


@given(st.text("abc ", max_size=6), st.text("abc", min_size=1, max_size=6))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_edit_distance_and_accuracies_are_in_range(a: str, b: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) and edit_distance(a, a) == 0
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert 0 <= strict_accuracy(a, b) <= 1 and 0 <= accuracy(a, b) <= 1 and strict_accuracy(b, b) == 1


def test_edit_distance_of_known_words() -> None:
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("flaw", "lawn"), ("", "abc"))] == [3, 2, 3]


def test_a_prompt_file_of_ones_own_and_scores_of_any_scorer(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", [{"prompt": "a cat", "tag": "animals"}, {"prompt": "a cup"}])
    bench = suite("prompts", path)
    prompts, drawn = bench.prompts(), pictures(tmp_path, 2, 2)
    assert [(p.text, p.tag) for p in prompts] == [("a cat", "animals"), ("a cup", "")]
    bench.export(prompts, drawn, tmp_path / "out")
    told = [json.loads(line) for line in (tmp_path / "out/pictures.jsonl").read_text().splitlines()]
    assert told[3] == {"prompt_id": 1, "image": 1, "file": "00001_001.png", "prompt": "a cup"}
    scores = [entry | {"scores": {"judge": entry["prompt_id"] + entry["image"] / 10}} for entry in told]
    found = bench.results(prompts, drawn, lines(tmp_path / "s.jsonl", scores))
    assert found == {"judge": {(0, 0): 0.0, (0, 1): 0.1, (1, 0): 1.0, (1, 1): 1.1}}
    scores[0]["scores"] = {"judge": "high"}
    with pytest.raises(DataError, match="line 1: judge: 'high' is no number"):
        bench.results(prompts, drawn, lines(tmp_path / "s.jsonl", scores))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("geneval", '{"prompt": "x"}\n', "line 1: lacks tag, include"),
        ("geneval", "not json\n", "line 1: is not JSON"),
        ("geneval2", '{"prompt": "x", "atom_count": 1}\n', "lacks vqa_list"),
        ("ocr", "", "the file is empty"),
        ("shapes", "a red cat\n", "not a caption of the shapes world"),
    ],
)
def test_files_that_are_not_the_benchmarks_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "f").write_text(content)
    with pytest.raises(DataError, match=message):
        suite(name, tmp_path / "f").prompts()


@pytest.mark.parametrize("name", ["geneval", "dpg_bench", "t2i_compbench", "drawbench", "ocr", "prompts"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    read: Callable[[], Any] = suite(name, tmp_path / "none").prompts
    with pytest.raises(DataError, match=r"suite\.path = .*none"):
        read()
