"""The classifier of artifacts: learning, calibration, pairs, files; and the corruptions it is taught with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reward_models.artifact import ArtifactClassifier, Design, scores
from reward_models.recipes import train_artifact
from reward_models.recipes.labelled import PARTS, load_labelled, originals, part_of, pixels, split
from reward_models.recipes.train_artifact import Settings, calibrate, calibration_error, fit, pair_accuracy
from reward_models.vision import VisionBackbone
from t2irl.corruptions import FAMILIES, KINDS, corrupt
from t2irl.errors import DataError
from t2irl.rewards.artifact import Artifact
from t2irl.shapes.corruptions_extra import EXTRA, EXTRA_FAMILIES
from t2irl.shapes.verify import verify
from t2irl.types import PromptGroups
from tests.artifacts import labelled_pictures, write_classifier, write_labelled

CPU = torch.device("cpu")
SHIPPED = Path("assets/tiny-artifact")


def detail(seed: int = 0) -> ArtifactClassifier:
    torch.manual_seed(seed)
    return ArtifactClassifier(Design(64, detail=8), None, CPU)


# ----------------------------------------------------------------------------------------------------------- figures
def test_pairs_of_one_prompt_are_compared_and_ties_count_half() -> None:
    clean = torch.tensor([0.9, 0.2, 0.5, 0.5, 0.1, 0.7])
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    assert pair_accuracy(clean, labels, ["a", "a", "b", "b", "c", "c"]) == (pytest.approx(1.5 / 3), 3)
    # All pairs within one prompt: 0.9 beats three, 0.5 beats 0.2 and ties with 0.5, 0.1 beats none.
    assert pair_accuracy(clean, labels, ["a"] * 6) == (pytest.approx(4.5 / 9), 9)
    assert pair_accuracy(2 * clean - 7, labels, ["a"] * 6)[0] == pytest.approx(4.5 / 9)
    assert math.isnan(pair_accuracy(clean, labels, list("abcdef"))[0])


def test_calibration_finds_what_was_applied_whatever_the_share_of_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40_000, generator=generator, dtype=torch.float64)
    labels = (torch.rand(40_000, generator=generator, dtype=torch.float64) < torch.sigmoid(logits)).long()
    few = (labels == 1) | (torch.arange(40_000) % 4 == 0)
    for factor, offset in ((0.5, 0.0), (1.0, -2.0), (4.0, 3.0)):
        for rows in (few, torch.ones_like(few)):
            found = calibrate((factor * logits + offset)[rows], labels[rows])
            assert found == (pytest.approx(factor, rel=0.06), pytest.approx(offset, abs=0.12 * factor))


def test_a_moved_classifier_adds_the_same_to_every_logit(dino_folder: Path) -> None:
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backbone = VisionBackbone.load(dino_folder, CPU, (-1,))
    for design, network in ((Design(64, detail=8), None), (Design(64, 8, str(dino_folder), hidden=16), backbone)):
        model = ArtifactClassifier(design, network, CPU).requires_grad_(False)
        before = model.logits(images)
        model.move(-1.5)
        torch.testing.assert_close(model.logits(images), before - 1.5)


def test_calibration_error_is_the_distance_of_said_and_true() -> None:
    p, labels = torch.tensor([0.25] * 4 + [0.9] * 2), torch.tensor([1, 0, 0, 0, 1, 0])
    assert calibration_error(p, labels) == pytest.approx(2 / 6 * 0.4)
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([1, 0])) == 0


# ---------------------------------------------------------------------------------------------------------- learning
def test_it_learns_to_tell_broken_from_clean() -> None:
    kinds = ["grain", "mottle", "crumbs", "bands"]
    learn, seen = (labelled_pictures(n, kinds, seed) for n, seed in ((96, 1), (48, 2)))
    model = detail()
    before = pair_accuracy(-scores(model, seen[0]), seen[1], seen[2])[0]
    fit(model, *learn[:2], Settings(steps=60, batch=32), seed=0)
    after = pair_accuracy(-scores(model, seen[0]), seen[1], seen[2])[0]
    assert after > 0.85 and after > before


def test_originals_tell_where_the_artifact_is() -> None:
    """With them it learns in which half of a picture the artifact is, which labels of whole pictures do not say."""
    pictures, _, _ = labelled_pictures(32, ["grain"], 1)
    clean = pictures[:32]
    broken = clean.clone()
    noise = torch.randint(0, 256, clean[..., :32].shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    broken[..., :32] = noise
    labels, rows = torch.tensor([0] * 32 + [1] * 32), torch.cat([torch.full((32,), -1), torch.arange(32)])
    model = detail()
    settings = Settings(steps=40, batch=16, shift=0, mirror=False)
    fit(model, torch.cat([clean, broken]), labels, settings, seed=0, originals=rows)
    with torch.no_grad():
        places = model.judge(broken.float() / 255)[1][0]
    assert (places[..., :7] > 0).float().mean() > 0.95 and (places[..., 9:] < 0).float().mean() > 0.9


def test_a_broken_picture_like_its_original_teaches_nothing_about_labels() -> None:
    images, logits = torch.rand(8, 3, 16, 16), torch.zeros(8, requires_grad=True)
    images[4:] = images[:4]
    train_artifact._loss(logits, [], images, torch.ones(4, dtype=torch.bool), 0.06).backward()
    assert logits.grad is not None and (logits.grad[:4] > 0).all() and (logits.grad[4:] == 0).all()


def test_it_cannot_learn_labels_that_mean_nothing() -> None:
    learn, seen = (labelled_pictures(n, ["grain"], seed) for n, seed in ((48, 1), (48, 2)))
    shuffled = learn[1][torch.randperm(96, generator=torch.Generator().manual_seed(1))]
    model = detail()
    fit(model, learn[0], shuffled, Settings(steps=25, batch=32), seed=0)
    p = torch.sigmoid(scores(model, seen[0]))
    right = ((p > 0.5) == (seen[1] == 1)).double().mean()
    assert right < 0.75


def test_training_repeats_itself_and_leaves_nothing_open() -> None:
    pictures, labels, _ = labelled_pictures(16, ["warp"], 1)
    models = [detail(), detail()]
    for model in models:
        fit(model, pictures, labels, Settings(steps=3, batch=8), seed=5)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(scores(models[0], pictures), scores(models[1], pictures))


def test_heads_on_a_frozen_backbone_learn_and_the_backbone_does_not(dino_folder: Path, tmp_path: Path) -> None:
    backbone = VisionBackbone.load(dino_folder, CPU, (0, -1))
    torch.manual_seed(0)
    model = ArtifactClassifier(Design(64, backbone=str(dino_folder), layers=(0, -1), hidden=16), backbone, CPU)
    frozen = {n: p.clone() for n, p in backbone.named_parameters()}
    pictures, labels, prompts = labelled_pictures(48, ["mottle"], 1)
    fit(model, pictures, labels, Settings(steps=40, batch=32, lr=1e-2), seed=0)
    assert all(torch.equal(frozen[n], p) for n, p in backbone.named_parameters())
    assert pair_accuracy(-scores(model, pictures), labels, prompts)[0] > 0.65
    model.save(tmp_path)
    assert not any(name.startswith("backbone") for name in model.trained())
    assert torch.equal(scores(ArtifactClassifier.load(tmp_path, CPU), pictures), scores(model, pictures))


def test_the_command_line_writes_a_classifier_and_its_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = write_labelled(tmp_path / "set", *labelled_pictures(40, ["neon", "grain"], 3))
    arguments = [f"--images={index}", f"--out={tmp_path / 'out'}", "--detail=8", "--steps=5", "--device=cpu"]
    assert train_artifact.main([*arguments, "--base-kind=base"]) == 0
    assert "same-prompt pairs" in capsys.readouterr().out
    content, card = json.loads((tmp_path / "out/artifact.json").read_text()), (tmp_path / "out/README.md").read_text()
    assert (
        0 < content["base"]["median"] < 1
        and f"temperature {content['temperature']:.3f}" in card
        and "| same-prompt pairs |" in card
    )
    ArtifactClassifier.load(tmp_path / "out", CPU)
    assert train_artifact.main([*arguments, "--base-kind=other"]) == 1
    assert "no picture is of this kind; there are , base" in capsys.readouterr().err
    assert train_artifact.main([f"--images={index}", f"--out={tmp_path / 'no'}", "--device=cpu"]) == 1
    assert "a classifier needs a backbone, detail, or both" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ labelled sets
def test_labelled_sets_are_split_by_prompt(tmp_path: Path) -> None:
    items = load_labelled(write_labelled(tmp_path, *labelled_pictures(60, ["blur"], 4)))
    parts = split(items, 0)
    prompts = [{x.prompt for x in parts[name]} for name in PARTS]
    assert sum(map(len, parts.values())) == 120 and not (
        prompts[0] & prompts[1] | prompts[1] & prompts[2] | prompts[0] & prompts[2]
    )
    places = [part_of(f"prompt {k}", 3) for k in range(4000)]
    assert [places.count(name) / 4000 for name in PARTS] == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    with pytest.raises(ValueError, match="2 prompts are too few"):
        split([x for x in items if x.prompt in {items[0].prompt, items[1].prompt}], 0)


def test_a_box_cuts_the_picture_out_of_its_file(tmp_path: Path) -> None:
    index = write_labelled(tmp_path, *labelled_pictures(1, ["blur"], 4))
    entries = [json.loads(line) | {"box": [0, 0, 32, 16]} for line in index.read_text().splitlines()]
    whole = pixels(load_labelled(index))
    index.write_text("\n".join(map(json.dumps, entries)))
    assert torch.equal(pixels(load_labelled(index)), whole[..., :16, :32])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: .*expected"),
        ('{"path": "0.png", "prompt": "x"}', "line 1: KeyError"),
        ('{"path": "0.png", "prompt": "x", "label": 2}', "label = 2; expected 1"),
        ('{"path": "none.png", "prompt": "x", "label": 1}', "no such file"),
        ('{"path": "0.png", "prompt": "x", "label": 1, "box": [1, 2]}', r"box = \[1, 2\]"),
        ('{"path": "0.png", "prompt": "x", "label": 1}', "no picture has label 0"),
    ],
)
def test_bad_labelled_sets_are_refused(line: str, message: str, tmp_path: Path) -> None:
    index = write_labelled(tmp_path, *labelled_pictures(1, ["blur"], 4))
    index.write_text(line)
    with pytest.raises((ValueError, OSError), match=message):
        load_labelled(index)


def test_originals_are_found_in_the_part_that_their_pictures_are_in(tmp_path: Path) -> None:
    index = write_labelled(tmp_path, *labelled_pictures(3, ["blur"], 4))
    entries = [json.loads(line) for line in index.read_text().splitlines()]
    entries[4]["original"] = "1.png"
    index.write_text("\n".join(map(json.dumps, entries)))
    items = load_labelled(index)
    assert originals(items).tolist() == [-1, -1, -1, -1, 1, -1]
    assert originals(items[1:]).tolist() == [-1, -1, -1, 0, -1]
    for wrong in ("3.png", "none.png"):
        entries[4]["original"] = wrong
        index.write_text("\n".join(map(json.dumps, entries)))
        with pytest.raises(ValueError, match=rf"4\.png: original = {wrong}: expected a picture of label 0"):
            load_labelled(index)


# ------------------------------------------------------------------------------------------------------- corruptions
def test_every_corruption_breaks_and_repeats_itself() -> None:
    pictures, _, prompts = labelled_pictures(24, ["blur"], 6)
    images = pictures[:24].float() / 255
    for kind in KINDS:
        broken, again = (corrupt(images, [kind] * 24, torch.Generator().manual_seed(9)) for _ in range(2))
        assert torch.equal(broken, again) and broken.shape == images.shape and broken.min() >= 0 and broken.max() <= 1
        assert verify(broken, prompts[:24])["cleanliness"].mean() < 0.93, kind
    assert sorted(k for family in FAMILIES for k in family) == sorted(KINDS)


def test_every_further_corruption_breaks_and_has_a_family() -> None:
    pictures, _, prompts = labelled_pictures(24, ["blur"], 6)
    images = pictures[:24].float() / 255
    for kind in EXTRA:
        broken, again = (corrupt(images, [kind] * 24, torch.Generator().manual_seed(9), EXTRA) for _ in range(2))
        assert torch.equal(broken, again) and broken.shape == images.shape and broken.min() >= 0 and broken.max() <= 1
        assert verify(broken, prompts[:24])["cleanliness"].mean() < 0.93, kind
        assert torch.equal(
            corrupt(images[:1] * 0, [kind], torch.Generator().manual_seed(9), EXTRA).isnan().any(), torch.tensor(False)
        )
    assert sorted(k for family in EXTRA_FAMILIES for k in family) == sorted(EXTRA)
    assert len(EXTRA_FAMILIES) == len(FAMILIES) and not set(EXTRA) & set(KINDS)


# ------------------------------------------------------------------------------------------------------------ reward
def reward(**settings: Any) -> Artifact:
    return Artifact(Artifact.Config.model_validate(settings), CPU)


def test_probability_and_logit_agree_and_use_the_temperature(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    content = json.loads((folder / "artifact.json").read_text()) | {"temperature": 2.5}
    (folder / "artifact.json").write_text(json.dumps(content))
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    groups = PromptGroups.of(["a cat"], [0] * 6, list(range(6)))
    p, logit = (reward(path=folder, output=kind).score(images, groups) for kind in ("probability", "logit"))
    torch.testing.assert_close(p, torch.sigmoid(logit))
    torch.testing.assert_close(logit, -ArtifactClassifier.load(folder, CPU).logits(images) / 2.5)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks artifact\.safetensors and artifact\.json"):
        reward(path=tmp_path)
    folder = write_classifier(tmp_path / "one")
    content = json.loads((folder / "artifact.json").read_text())
    for change, message in (
        ({"detail": 16}, "the weights differ, such as detail"),
        ({"depth": 3}, "cannot be read"),
        ({"detail": 12}, "multiple of 8"),
    ):
        (folder / "artifact.json").write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=message):
            reward(path=folder)


def test_folders_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    save_file({"detail.head.last.weight": torch.zeros(1, 64)}, folder / "artifact.safetensors")
    with pytest.raises(DataError, match="an earlier version wrote it"):
        reward(path=folder)


# --------------------------------------------------------------------------------------------------- what is shipped
def pictures_of(kind: str, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    return labelled_pictures(48, [kind], seed)


def test_the_shipped_classifier_tells_clean_from_broken() -> None:
    model = ArtifactClassifier.load(SHIPPED, CPU)
    found = [
        pair_accuracy(-scores(model, x), y, prompts)[0] for x, y, prompts in (pictures_of(kind, 50) for kind in KINDS)
    ]
    assert sum(found) / len(found) > 0.9
    assert 0 < model.design.base["lower"] <= model.design.base["median"] <= model.design.base["upper"] < 1


def test_the_card_gives_kinds_that_were_never_seen() -> None:
    card = (SHIPPED / "README.md").read_text()
    rows = [line.split("|")[1:4] for line in card.splitlines() if line.startswith("| ") and line.count("|") == 7]
    unseen = {kind.strip(): float(value) for kind, value, _ in rows if kind.strip() in (*KINDS, "climbed")}
    assert set(unseen) == {*KINDS, "climbed"}
    mean = float(card.split("never seen: **")[1].split("**")[0])
    assert mean == pytest.approx(sum(unseen.values()) / len(unseen), abs=0.001) and mean > 0.9
    assert (SHIPPED / "artifact.safetensors").stat().st_size < 3 * 2**20


def test_the_shipped_examples_can_be_read() -> None:
    items = load_labelled(SHIPPED / "examples.jsonl")
    assert pixels(items).shape == (192, 3, 64, 64) and sum(x.label for x in items) == 96
