"""scripts/make_references.py and the styles that it draws."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from t2irl.references import ReferenceImages
from t2irl.shapes.captions import BACKGROUNDS, COLORS, parse_caption, sample_captions
from t2irl.shapes.render import Scene, render, sample_scene
from t2irl.shapes.styles import PASTEL_BACKGROUNDS, PASTEL_COLORS, STYLES, strength, style_of
from t2irl.shapes.verify import PALETTE, read, verify

ROOT = Path(__file__).parents[2]
PROMPTS = [c.text for c in sample_captions(4, np.random.default_rng(3))]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("make_references", ROOT / "scripts/make_references.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A prompt file; one prompt stands there twice."""
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{p}\n" for p in [*PROMPTS, PROMPTS[0]]))
    return file


def call(script: ModuleType, prompts: Path, out: Path, *more: str) -> int:
    """One call with the renderer unless `more` names a model."""
    source = () if "--model" in more else ("--renderer", "shapes")
    return script.main(["--prompts", str(prompts), "--out", str(out), "--count", "2", *source, *more])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_index_is_what_a_run_reads(script: ModuleType, prompts: Path, tmp_path: Path) -> None:
    assert call(script, prompts, tmp_path / "out") == 0
    config = ReferenceImages.Config(index=tmp_path / "out" / "index.jsonl", at_least=2)
    images = ReferenceImages.load(config, PROMPTS, "refs")
    for prompt in PROMPTS:
        pictures = torch.stack([images.picture(file) for file in images.of(prompt)])
        assert verify(pictures, [prompt] * 2)["correct"].all() and not torch.equal(*pictures)


def test_interrupted_and_shared_work_gives_the_same_files(script: ModuleType, prompts: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(script, prompts, whole)
    assert call(script, prompts, parts, "--shard", "1/2") == 0
    assert not (parts / "index.jsonl").exists()
    lost = next(parts.rglob("*.png"))
    lost.unlink()
    kept = {p: p.stat().st_mtime_ns for p in parts.rglob("*.png")}
    call(script, prompts, parts, "--shard", "0/2")
    assert not (parts / "index.jsonl").exists()
    call(script, prompts, parts, "--shard", "1/2")
    assert contents(parts) == contents(whole)
    assert all(p.stat().st_mtime_ns == before for p, before in kept.items())  # nothing is drawn twice


def test_prompts_can_be_added_and_order_does_not_matter(script: ModuleType, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call(script, prompts, out)
    before = contents(out)
    prompts.write_text("".join(f"{p}\n" for p in ["a red circle on a white background", *PROMPTS[::-1]]))
    call(script, prompts, out)
    after = contents(out)
    assert {k: v for k, v in after.items() if k in before and k != "index.jsonl"} == {
        k: v for k, v in before.items() if k != "index.jsonl"
    }
    assert len((out / "index.jsonl").read_text().splitlines()) == 5


def test_bad_calls_are_named(
    script: ModuleType, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*more: str, out: str = "out") -> str:
        assert call(script, prompts, tmp_path / out, *more) == 2
        return capsys.readouterr().err

    call(script, prompts, tmp_path / "out")
    capsys.readouterr()
    assert "style was 'plain' and is 'pastel'. Choose another folder" in error("--style", "pastel")
    assert "seed was 0 and is 1" in error("--seed", "1")
    assert "--style = neon: known styles are plain, outlined, pastel" in error("--style", "neon", out="b")
    assert "--shard = 2/2: expected i/n" in error("--shard", "2/2")
    assert "the renderer has only --style" in error("--steps", "3")
    assert "--model = " in error("--model", str(tmp_path), out="c")
    prompts.write_text("a cat\n")
    assert "not a caption of the shapes world: 'a cat'" in error(out="d")


def test_a_pipelines_pictures_depend_on_seed_and_prompt_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a pipeline: what it is called with is what counts."""
    import diffusers

    class Pipe:
        calls: list[dict] = []

        @classmethod
        def from_pretrained(cls, path: str, **kwargs: object) -> Pipe:
            return cls()

        def to(self, device: str) -> Pipe:
            return self

        def set_progress_bar_config(self, **kwargs: object) -> None:
            pass

        def __call__(self, texts: list[str], generator: list[torch.Generator], **kwargs: object) -> object:
            self.calls.append({"texts": texts} | kwargs)
            noise = [torch.randint(256, (4, 4, 3), generator=g, dtype=torch.uint8) for g in generator]
            images = [Image.fromarray(n.numpy()) for n in noise]
            return type("Output", (), {"images": images})()

    monkeypatch.setattr(diffusers, "DiffusionPipeline", Pipe)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\na dog\n")
    settings = (
        "--model",
        "m",
        "--suffix",
        ", inked",
        "--steps",
        "3",
        "--option",
        "true_cfg_scale=4.0",
        "--device",
        "cpu",
    )
    call(script, prompts, tmp_path / "one", *settings, "--batch-size", "1")
    call(script, prompts, tmp_path / "other", *settings, "--batch-size", "3")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert [len(c["texts"]) for c in Pipe.calls] == [1, 1, 1, 1, 3, 1]
    expected = {"texts": ["a cat, inked"], "num_inference_steps": 3, "true_cfg_scale": 4.0, "output_type": "pil"}
    assert Pipe.calls[0] == expected
    index = [json.loads(line) for line in (tmp_path / "one/index.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in index] == ["a cat", "a dog"]  # without the suffix: that is the run's key
    assert len({(tmp_path / "one" / f).read_bytes() for entry in index for f in entry["files"]}) == 4


# -------------------------------------------------------------------------------------------------------------- styles
def test_every_style_keeps_what_is_shown() -> None:
    rng = np.random.default_rng(8)
    captions = sample_captions(120, rng)
    scenes = [sample_scene(c, rng) for c in captions]
    drawn = {name: np.stack([draw(scene) for scene in scenes]) for name, draw in STYLES.items()}
    assert np.array_equal(drawn["plain"], np.stack([render(scene) for scene in scenes]))
    for name, pictures in drawn.items():
        scores = verify(torch.from_numpy(pictures).permute(0, 3, 1, 2), [c.text for c in captions])
        assert scores["correct"].mean() > 0.97, name
        if name != "plain":
            assert (pictures != drawn["plain"]).any((1, 2, 3)).all()
            assert scores["cleanliness"].mean() < 0.9  # drawn again in the plain style, it is not the same picture


def test_outlines_are_of_one_width_and_run_over_nothing() -> None:
    scene = sample_scene(parse_caption("a red star on a white background"), np.random.default_rng(0))
    plain, outlined = (STYLES[name](scene).astype(int) for name in ("plain", "outlined"))
    inside = (plain == COLORS["red"]).all(-1)
    assert (outlined[inside] == COLORS["red"]).all()
    ink = (outlined == BACKGROUNDS["black"]).all(-1)
    assert ink.sum() > 20 and not (ink & inside).any()


def test_pastel_colors_are_nearest_to_their_own_names() -> None:
    names = [*COLORS, *BACKGROUNDS]
    for name, color in (PASTEL_COLORS | PASTEL_BACKGROUNDS).items():
        distances = np.linalg.norm(PALETTE - np.asarray(color), axis=1)
        assert names[distances.argmin()] == name


def test_styles_are_told_apart_in_what_the_verifier_reads() -> None:
    rng = np.random.default_rng(9)
    scenes = [sample_scene(c, rng) for c in sample_captions(60, rng)]
    for name, draw in STYLES.items():
        pictures = np.stack([draw(scene) for scene in scenes])
        rows = read(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        assert [style_of(*row) for row in rows] == [name] * len(scenes)
        found = {other: np.median([strength(*row, other) for row in rows]) for other in ("outlined", "pastel")}
        assert all(value > 0.9 if name == other else value < 0.1 for other, value in found.items())


def test_strength_is_how_much_of_a_style_there_is() -> None:
    scene = sample_scene(parse_caption("a blue square on a white background"), np.random.default_rng(0))
    plain, outlined = (STYLES[name](scene).astype(np.float32) for name in ("plain", "outlined"))
    for share in (0.25, 0.5, 0.75):
        assert strength(plain + share * (outlined - plain), scene, "outlined") == pytest.approx(share, abs=0.01)
    empty = Scene("white", ())
    assert strength(STYLES["plain"](empty), empty, "outlined") == 0
