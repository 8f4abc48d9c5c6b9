"""Settings of evaluations, and the folder that they are kept in."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from t2irl import registry
from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.distances import Overlap, Within
from t2irl.evaluation.glossary import lookup
from t2irl.evaluation.settings import Evaluated
from t2irl.evaluation.store import Drawn, Lines, Store, open_store, settings_key
from t2irl.evaluation.suites.base import Prompt
from t2irl.evaluation.summary import refuse_impossible
from t2irl.loading import load

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs/eval").glob("*.yaml"))


def read(*files: Path, overrides: tuple[str, ...] = ()) -> Evaluated:
    """Settings from files."""
    return load(Evaluated, files, overrides, "example")


def row(name: str = "run", **changes: object) -> Drawn:
    """A row of a table."""
    settings = {"iteration": 4, "base": False, "drawing": {"steps": 4}, "fingerprint": "f"} | changes
    return Drawn(name, "iteration 4", "deployment", f"{name}/iteration_4/deployment", **settings)  # type: ignore[arg-type]


def store(out: Path, *rows: Drawn, seed: int = 0, texts: tuple[str, ...] = ("a cat", "日本 \ud83e")) -> Store:
    """A folder for two prompts, two pictures each."""
    return Store(out, seed, [Prompt(text) for text in texts], 2, rows or (row(),))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    settings = read(path)
    assert settings.suite.type == path.stem
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert read(saved) == settings


def test_an_entry_without_a_type_is_of_the_usual_one(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("suite: {type: shapes}\n")
    settings = read(path, overrides=("--samplers.deployment.steps", "28", "--features.d.token", "patches"))
    assert settings.samplers["deployment"].model_dump()["steps"] == 28
    assert (settings.features["d"].type, settings.features["d"].model_dump()["token"]) == ("vision", "patches")


def test_there_is_a_config_for_every_benchmark() -> None:
    assert {path.stem for path in CONFIGS} == {*registry.names("evaluation.suites")} - {"prompts"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--suite.type", "genevl"), "Did you mean 'geneval'"),
        (
            ("--samplers.deployment.steps", "0"),
            "samplers.deployment.steps = 0 .--samplers.deployment.steps.: must be greater than 0",
        ),
        (("--features.x.type", "dino"), "must be one of 'vision', 'fidelity', 'pixels'"),
        (("--rewards.a b.type", "shapes"), "the name 'a b' should be of letters"),
        (("--statistics.confidence", "95"), "must be less than 1"),
        (("--weights", "ema"), "must be one of 'average', 'trained' or 'both'"),
        (("--sead", "1"), "unknown key. Did you mean seed"),
    ],
)
def test_wrong_settings_are_refused_with_what_would_be_right(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(ROOT / "configs/eval/shapes.yaml", overrides=overrides)


def test_reference_images_need_features(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("suite: {type: shapes}\nreference_images: x\n")
    with pytest.raises(ConfigError, match="reference_images needs an entry of features"):
        read(path)


def test_every_measure_that_there_can_be_is_in_the_glossary() -> None:
    diversity = [f"diversity/x/{f.name}" for f in fields(Within)]
    sets = ("kid", "kid_std", "cmmd", "fd", *(f.name for f in fields(Overlap)))
    distances = [f"{kind}/x/{name}" for kind in ("drift", "quality") for name in sets]
    every = ["score/x", "spread/x", "set/x", "diversity/lpips/pairwise", *diversity, *distances]
    assert not [name for name in every if lookup(name) is None]


def test_a_frechet_distance_of_few_pictures_is_refused_before_anything_is_drawn() -> None:
    settings = read(ROOT / "configs/eval/shapes.yaml", overrides=("--distances.fd", "true"))
    with pytest.raises(ConfigError, match="of 100 pictures says more of their number"):
        refuse_impossible(settings, [row(base=True)], 100)
    refuse_impossible(settings, [row(base=True)], 2000)
    refuse_impossible(settings, [row()], 100)  # nothing to compare with


def test_a_picture_says_what_it_is_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    own = store(tmp_path)
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    own.save(row(), (1, 0), pixels, "abc")
    assert torch.equal(own.load(row(), [(1, 0)])[0], pixels)
    assert own.missing(row()) == {(0, 0), (0, 1), (1, 1)}
    (tmp_path / own.picture(row(), (0, 0))).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"00000_000\.png: cannot be read"):
        own.load(row(), [(0, 0)])


def test_a_folder_is_opened_as_it_was_left_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    settings = read(ROOT / "configs/eval/shapes.yaml", overrides=("--seed", "0"))
    first = store(tmp_path, row(), row("other"), texts=("a cat", "日本"))
    told = first.begin(settings, write=True)
    again = open_store(tmp_path)
    assert (again.prompts, again.images, again.drawn) == (first.prompts, 2, first.drawn)
    assert store(tmp_path, row("third"), texts=("a cat", "日本")).begin(settings, write=True) == told
    assert set(json.loads((tmp_path / "manifest.json").read_text())["subjects"]) == {
        f"{name}/iteration_4/deployment" for name in ("run", "other", "third")
    }
    assert [r.method for r in open_store(tmp_path).drawn] == ["third"]
    changes = {
        "seed: 0 -> 3": store(tmp_path, seed=3, texts=("a cat", "日本")),
        "prompts": store(tmp_path, texts=("a cat", "a dog")),
        "fingerprint: f -> g": store(tmp_path, row(fingerprint="g"), texts=("a cat", "日本")),
        "steps: 4 -> 5": store(tmp_path, row(drawing={"steps": 5}), texts=("a cat", "日本")),
    }
    for message, other in changes.items():
        with pytest.raises(ConfigError, match=message):
            other.begin(settings, write=False)
    with pytest.raises(DataError, match="holds no evaluation"):
        open_store(tmp_path / "images")


def test_scores_survive_whatever_cuts_them_off(tmp_path: Path) -> None:
    """Every prefix of the file, and then more lines: what was whole stays, nothing is read wrong."""
    lines = Lines(tmp_path)
    lines.add({"a": 0.5, "b": math.nan, "c": -1.25})
    data = (tmp_path / "0000.jsonl").read_bytes()
    for cut in range(len(data) + 1):
        (tmp_path / "0000.jsonl").write_bytes(data[:cut])
        before = lines.read()
        assert set(before) <= {"a", "b", "c"} and before.get("a", 0.5) == 0.5 and before.get("c", -1.25) == -1.25
        lines.add({"d": 2.0})
        assert lines.read().keys() == {*before, "d"}
    other = Lines(tmp_path, 1)
    other.add({"e": 1.0})
    assert lines.read()["e"] == 1.0 and math.isnan(lines.read().get("b", math.nan))


def test_other_settings_are_filed_under_another_name() -> None:
    settings = read(ROOT / "configs/eval/shapes.yaml")
    keys = {settings_key("x", config) for config in settings.rewards.values()}
    assert len(keys) == len(settings.rewards) and all(key.startswith("x-") for key in keys)
