"""Reference images that will not do are found by `check` and at the start of a run, in the same words, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from t2irl import cli, data, registry
from tests.adversaries import write_references
from tests.end_to_end.runs import HELDOUT, TRAIN

Index = dict[str, list[str]]


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """Two reference images for every prompt, held-out ones included; the path of their index."""
    rng = np.random.default_rng(0)
    drawn = {t: [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(2)] for t in (*TRAIN, *HELDOUT)}
    return write_references(tmp_path / "references", drawn)


@pytest.fixture
def said(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What `check` and `train` say of a config with some entries; neither gets as far as loading a model."""
    build = registry.build

    def no_models(kind: str, *args: Any) -> Any:
        assert kind in ("dynamics", "algorithms", "regularizers"), f"{kind} are built before files are looked at"
        return build(kind, *args)

    monkeypatch.setattr(registry, "build", no_models)

    def run(**entries: Any) -> list[str]:
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | entries))
        found = []
        for command in (["check", str(config)], ["train", str(config), "--resume", "never"]):
            assert cli.main(command) == 2
            err = capsys.readouterr().err
            assert "Traceback" not in err
            found.append(err[err.index("error: ") :])
        assert not list(config.parent.glob("run*/metrics.jsonl"))
        return found

    return run


def lost(folder: Path, index: Index) -> str:
    (folder / index[TRAIN[1]][0]).unlink()
    return "001_0.png: no such file"


def unknown(folder: Path, index: Index) -> str:
    del index[TRAIN[4]]
    return f"no reference images for the prompt {TRAIN[4]!r}"


def short(folder: Path, index: Index) -> str:
    index[TRAIN[2]].pop()
    return f"1 reference images for {TRAIN[2]!r}, at_least = 2"


def twice(folder: Path, index: Index) -> str:
    index[TRAIN[3]].append(index[TRAIN[3]][0])
    return f"003_0.png stands twice for {TRAIN[3]!r}"


def cut(folder: Path, index: Index) -> str:
    file = folder / index[TRAIN[0]][0]
    file.write_bytes(file.read_bytes()[:-20])
    return "000_0.png: the file is cut short"


def text(folder: Path, index: Index) -> str:
    (folder / index[TRAIN[0]][1]).write_text("no picture")
    return "000_1.png: cannot be read as a picture"


def deep(folder: Path, index: Index) -> str:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / index[TRAIN[0]][1])
    return "000_1.png: it has more than 8 bits a channel"


@pytest.mark.parametrize("spoil", [lost, unknown, short, twice, cut, text, deep], ids=lambda f: f.__name__)
def test_the_same_words_at_check_and_at_the_start(
    spoil: Callable[[Path, Index], str], references: Path, said: Callable[..., list[str]]
) -> None:
    index = json.loads(references.read_text())
    problem = spoil(references.parent, index)
    references.write_text(json.dumps(index))
    where = {"index": str(references), "at_least": 2}
    # There is no such network: reference images come before it.
    checked, started = said(rewards={"like": {"type": "dino_similarity", "path": "nowhere", "references": where}})
    assert checked == started and "reward dino_similarity: references" in checked and problem in checked


def test_everything_that_takes_reference_images_is_asked(references: Path, said: Callable[..., list[str]]) -> None:
    """Adversaries, the post-hoc discriminator and the regulariser; each for the prompts that it will be given."""
    index = json.loads(references.read_text())
    without_heldout = references.with_name("train.json")
    without_heldout.write_text(json.dumps({text: index[text] for text in TRAIN}))
    without_train = references.with_name("heldout.json")
    without_train.write_text(json.dumps({text: index[text] for text in HELDOUT}))
    only_train, only_heldout = ({"index": str(x)} for x in (without_heldout, without_train))
    fine = {"dino": {"type": "adversarial_dino", "references": only_train}}
    posthoc = {"type": "posthoc_discriminator", "references": only_train}
    for message in said(rewards=fine, heldout_rewards={"auc": posthoc}):
        assert "reward posthoc_discriminator: references.index" in message and repr(HELDOUT[0]) in message
    fine_too = {"auc": posthoc | {"references": only_heldout}}
    spoilt = {"clip": {"type": "adversarial_clip", "references": only_heldout}}
    for message in said(rewards=fine | spoilt, heldout_rewards=fine_too):
        assert "reward adversarial_clip: references.index" in message and repr(TRAIN[0]) in message
    sft = {"tuned": {"type": "sft", "references": only_heldout, "images": 2}}
    for message in said(rewards=fine, heldout_rewards=fine_too, regularizers=sft):
        assert "regularizers.tuned.references.index" in message and repr(TRAIN[0]) in message
    nothing = {"like": {"type": "dino_similarity"}}
    for message in said(rewards=fine, heldout_rewards=nothing, regularizers={}):
        assert "reward dino_similarity: references is missing; give references: {index: FILE}" in message


def test_prompt_files_are_read_once(said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """By `check`, and by the start of a run, which is told what it will be from the same prompts."""
    read, lines = [], data._lines
    monkeypatch.setattr(data, "_lines", lambda path, where: read.append(path.name) or lines(path, where))
    for message in said(rewards={"like": {"type": "dino_similarity"}}):
        assert "references is missing" in message
    assert read == 2 * ["train.txt", "heldout.txt"]


def test_what_is_fine_is_not_looked_into_twice(
    references: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A frozen adversary needs none; prompts without any may be skipped; files are opened once, and again when changed."""
    tree, index = yaml.safe_load(config.read_text()), json.loads(references.read_text())
    del index[TRAIN[4]]
    references.write_text(json.dumps(index))
    where = {"index": str(references)}
    tree["rewards"] = {
        "like": {"type": "dreamsim", "references": where, "missing": "skip"},
        "dino": {"type": "adversarial_dino", "frozen": "an/exported/one"},
    }
    config.write_text(yaml.safe_dump(tree))
    assert cli.main(["check", str(config)]) == 0
    opened = []
    image_open = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or image_open(file))
    assert cli.main(["check", str(config)]) == 0 and not opened
    changed = references.parent / index[TRAIN[0]][0]
    changed.write_bytes(b"longer than it was" * 100)
    assert cli.main(["check", str(config)]) == 2 and opened == [changed]
    assert f"{changed.name}: cannot be read as a picture" in capsys.readouterr().err
