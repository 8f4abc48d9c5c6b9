"""From judgements to a reward: the head learns what the shapes verifier prefers, and is one function in training and scoring."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reward_models.preference import Design, PreferenceModel, build
from reward_models.recipes.train_preference import (
    Pair,
    Settings,
    fit,
    margins,
    report,
    rows_of,
    split,
    with_calibration,
)
from t2irl import registry
from t2irl.cli import main
from t2irl.errors import ConfigError, DataError
from t2irl.preferences.record import Record, write_records
from t2irl.rewards.base import Reward
from t2irl.shapes.captions import sample_captions
from t2irl.shapes.render import render, sample_scene
from t2irl.shapes.verify import verify
from t2irl.types import PromptGroups
from tests.preferences import write_preference

ROOT = Path(__file__).resolve().parents[2]
DINO, CLIP = ROOT / "assets/tiny-dinov2", ROOT / "assets/tiny-clip"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of pictures of 400 captions, of which the verifier prefers the one that scores higher; equal ones are ties.

    Pictures are of the caption or of another, clean or speckled.
    """
    folder, rng = tmp_path_factory.mktemp("judged"), np.random.default_rng(0)
    captions = sample_captions(400, rng)
    records = []
    for k, caption in enumerate(captions):
        drawn = []
        for side in "ab":
            right, clean = rng.random(2) < 0.6
            picture = render(sample_scene(caption if right else captions[(k + 7) % 400], rng)).astype(np.float64)
            if not clean:
                picture = picture + rng.normal(0, 30, picture.shape)
            drawn.append(picture.clip(0, 255).astype(np.uint8))
            Image.fromarray(drawn[-1]).save(folder / f"{k}{side}.png")
        found = verify(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2), [caption.text] * 2)
        # An imperfect judge of both: following the prompt counts most, cleanness decides the rest.
        a, b = (found["clauses"] + 0.5 * found["cleanliness"]).tolist()
        label = "tie" if abs(a - b) < 0.05 else "a" if a > b else "b"
        records.append(
            Record(
                id=str(k),
                prompt=caption.text,
                image_a=f"{k}a.png",
                image_b=f"{k}b.png",
                label=label,
                annotator="verifier",
            )
        )
    write_records(records, folder / "records.jsonl")
    return folder / "records.jsonl"


@pytest.fixture(scope="module")
def trained(judged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `t2irl prefs train` makes of them."""
    out = tmp_path_factory.mktemp("trained") / "people"
    options = ["--backbone", str(DINO), "--clip", str(CLIP), "--device", "cpu"]
    assert main(["prefs", "train", str(judged), "--out", str(out), *options]) == 0
    return out


def figures(folder: Path) -> list[float]:
    """Pairs, accuracy, lower end of its interval, log loss and calibration error on a model's card."""
    row = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("|")][-1]
    cells = [cell.split(" to ")[0] for cell in row.strip("| ").split(" | ")]
    return [float(cells[k]) for k in (0, 2, 3, 4, 5)]


def test_the_head_learns_what_the_verifier_prefers(trained: Path, judged: Path) -> None:
    pairs, accuracy, low, loss, calibration = figures(trained)
    assert pairs > 60 and accuracy > 0.75 and low > 0.65 and loss < 0.6 and calibration < 0.15
    # A head that does not read the prompt cannot know as much of these pairs.
    blind = trained.with_name("blind")
    assert main(["prefs", "train", str(judged), "--out", str(blind), "--backbone", str(DINO), "--device", "cpu"]) == 0
    assert "It does not read the prompt." in (blind / "README.md").read_text()
    assert figures(blind)[1] < accuracy - 0.05


def test_labels_without_meaning_teach_nothing(judged: Path) -> None:
    """The report would show it if prompts of the report were learned from."""
    rng, accuracies = np.random.default_rng(1), []
    model = build(Design(str(DINO), str(CLIP)), Path(), CPU)
    entries = [json.loads(line) for line in judged.read_text().splitlines()]
    known: dict = {}
    for seed in range(3):
        pairs = [
            Pair(judged.parent / e["image_a"], judged.parent / e["image_b"], e["prompt"], float(rng.integers(2)))
            for e in entries
        ]
        parts = split(pairs, seed)
        rows = {name: rows_of(model, members, known) for name, members in parts.items()}
        fit(model, rows["train"], rows["select"], Settings(steps=100), seed)
        with_calibration(model, rows["train"], rows["select"])
        accuracies.append(report(model, rows["report"], parts["report"]).accuracy)
    assert abs(np.mean(accuracies) - 0.5) < 3 * 0.5 / math.sqrt(300)


def test_the_reward_is_the_trained_function(trained: Path, judged: Path) -> None:
    entries = [json.loads(line) for line in judged.read_text().splitlines()][:40]
    pairs = [Pair(judged.parent / e["image_a"], judged.parent / e["image_b"], e["prompt"], 1.0) for e in entries]
    model = PreferenceModel.load(trained, CPU)
    wanted = margins(model, rows_of(model, pairs, {})) / model.design.temperature
    config = registry.find("rewards", "preference").Config(type="preference", path=trained)
    reward: Reward = registry.build("rewards", config, CPU)
    prompts = [e["prompt"] for e in entries]
    scores = []
    for key in ("image_a", "image_b"):
        pixels = [np.asarray(Image.open(judged.parent / e[key])) for e in entries]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        scores.append(reward.score(images, PromptGroups.of(prompts, range(40), [0] * 40)))
    torch.testing.assert_close(scores[0] - scores[1], wanted, atol=1e-4, rtol=1e-4)
    assert abs(float(torch.stack(scores).mean())) < 1.5, "0 is about an average picture"


def test_without_a_clip_one_picture_pleases_whatever_was_asked(
    dino_folder: Path, clip_folder: Path, pictures: tuple[torch.Tensor, PromptGroups], tmp_path: Path
) -> None:
    images, groups = pictures
    one = images[:1].expand(len(images), -1, -1, -1)
    for clip, apart in ((None, False), (clip_folder, True)):
        folder = tmp_path / str(apart)
        folder.mkdir()
        config = registry.find("rewards", "preference").Config(
            type="preference", path=write_preference(folder, dino_folder, clip)
        )
        scores = registry.build("rewards", config, CPU).score(one, groups)
        assert (float(scores.std()) > 1e-4) == apart


def test_a_model_survives_saving_and_wrong_files_are_named(
    dino_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    folder = (
        write_preference(tmp_path / "here", dino_folder, clip_folder)
        if (tmp_path / "here").mkdir() is None
        else tmp_path
    )
    model = PreferenceModel.load(folder, CPU)
    model.mean.fill_(0.25)
    model.save(folder, "")
    again = PreferenceModel.load(folder, CPU)
    assert all(torch.equal(x, again.kept()[n]) for n, x in model.kept().items()) and again.design == model.design
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(FileNotFoundError, match=r"lacks preference\.safetensors and preference\.json"):
        PreferenceModel.load(tmp_path, CPU)
    with pytest.raises(ValueError, match="neither is there"):
        PreferenceModel(Design(), None, None, CPU)
    content = json.loads((folder / "preference.json").read_text())
    (folder / "preference.json").write_text(json.dumps({**content, "hidden": 32}))
    with pytest.raises(ValueError, match="the weights differ, such as head"):
        PreferenceModel.load(folder, CPU)
    (folder / "preference.json").write_text(json.dumps({**content, "depth": 32}))
    with pytest.raises(ValueError, match="depth"):
        PreferenceModel.load(folder, CPU)


def test_training_says_what_is_wrong(judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(words: str, *options: str, source: Path = judged) -> None:
        out = tmp_path / "out"
        assert main(["prefs", "train", str(source), "--out", str(out), *options]) == 2
        assert words in capsys.readouterr().err and not out.exists()

    with pytest.raises(ConfigError, match="path is missing; give the folder"):
        registry.build("rewards", registry.find("rewards", "preference").Config(), CPU)
    with pytest.raises(DataError, match="not the folder of a preference model"):
        registry.build("rewards", registry.find("rewards", "preference").Config(path=tmp_path), CPU)
    fails("neither --backbone nor --clip")
    fails("expected one of overall", "--axis", "overall,quality", "--clip", str(CLIP))
    fails("there are some on overall", "--axis", "quality", "--clip", str(CLIP))
    fails(f"--clip {tmp_path}: not a CLIP model folder", "--clip", str(tmp_path))
    fails("expected cpu, cuda", "--device", "gpu", "--clip", str(CLIP))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(judged.read_text().splitlines(keepends=True)[:4]))
    fails("are too few, or use another seed", "--clip", str(CLIP), source=few)
    fails("no such file or folder", "--clip", str(CLIP), source=tmp_path / "nothing")
