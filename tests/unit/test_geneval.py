"""GenEval: its rules on objects given by hand, its detector against transformers, its colours, the reward around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from reward_models.clip import ClipScorer
from reward_models.geneval import COLORS, GenEvalScorer, check_entry, relations, soft, strict
from reward_models.instances import Detector, Instance, by_name
from t2irl.errors import ConfigError, DataError
from t2irl.rewards.geneval import Geneval
from t2irl.types import PromptGroups

CPU = torch.device("cpu")
EMPTY = torch.zeros(1, 1, dtype=torch.bool)


def thing(name: str, score: float = 0.95, box: tuple[int, int, int, int] = (0, 0, 10, 10)) -> Instance:
    return Instance(name, score, box, EMPTY)


def judge(entry: dict[str, Any], *things: Instance, colors: dict[float, str] | None = None) -> tuple[float, float]:
    """Strict and soft; the colour of an object is looked up by its score."""
    table = by_name(things, 0.3, 16)
    told = lambda objects, name: [(colors or {}).get(o.score, "red") for o in objects]  # noqa: E731 - a table, no rule
    return strict(table, entry, told), soft(table, entry, told)


# ------------------------------------------------------------------------------------------------------------- rules
@given(st.integers(1, 4), st.integers(0, 9))
@settings(deadline=None, derandomize=True)
def test_numbers(wanted: int, found: int) -> None:
    """Strict: at least so many, and the benchmark's `exclude` for no more. Soft never goes below 0."""
    entry = {"include": [{"class": "cat", "count": wanted}], "exclude": [{"class": "cat", "count": wanted + 1}]}
    right, partly = judge(entry, *[thing("cat") for _ in range(found)])
    assert right == float(found == wanted)
    assert partly == pytest.approx((max(1 - abs(found - wanted) / wanted, 0) + float(found <= wanted)) / 2)
    assert (partly == 1) == (found == wanted) and 0 <= partly <= 1


def test_colours_are_asked_of_the_surest_objects() -> None:
    entry = {"include": [{"class": "cat", "count": 1, "color": "blue"}]}
    cats = thing("cat", 0.9), thing("cat", 0.8)
    assert judge(entry, *cats, colors={0.9: "blue", 0.8: "red"}) == (1, 0.5)  # soft: one too many, one is blue
    assert judge(entry, *cats, colors={0.9: "red", 0.8: "blue"})[0] == 0
    assert judge(entry, cats[0], colors={0.9: "red"}) == (0, 0.5)
    assert judge(entry) == (0, 0)


def test_a_wrong_place_earns_nothing_for_the_place() -> None:
    entry = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
    dog, left, right = (
        thing("dog", box=(50, 0, 60, 10)),
        thing("cat", box=(0, 0, 10, 10)),
        thing("cat", box=(90, 0, 99, 9)),
    )
    assert judge(entry, dog, left) == (1, 1)
    assert judge(entry, dog, right) == (0, 0.75)
    assert judge(entry, left) == (0, 0.25)  # nothing to be left of
    assert judge(entry, dog) == (0, 0.5)


def test_relations_of_boxes() -> None:
    """By hand: ten pixels wide each, so centres must be more than two pixels apart in a direction."""
    here = (20, 20, 30, 30)
    assert relations((0, 20, 10, 30), here) == {"left of"}
    assert relations((40, 20, 50, 30), here) == {"right of"}
    assert relations((20, 0, 30, 10), here) == {"above"}
    assert relations((40, 40, 50, 50), here) == {"right of", "below"}
    assert relations((22, 20, 32, 30), here) == set() == relations(here, here)
    # 20 left and 9 above: (18, 7) of a length of 21.9 is (0.82, 0.32)
    assert relations((0, 11, 10, 21), here) == {"left of"}


@given(st.permutations(range(4)))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_the_order_of_objects_does_not_matter(order: list[int]) -> None:
    entry = {"include": [{"class": "cat", "count": 2, "color": "blue"}]}
    cats = [thing("cat", 0.5 + k / 10) for k in order]
    assert judge(entry, *cats, colors={0.8: "blue", 0.7: "blue"}) == judge(
        entry, *cats[::-1], colors={0.8: "blue", 0.7: "blue"}
    )


def test_objects_by_name_are_the_best_ones() -> None:
    table = by_name([thing("cat", s / 100) for s in range(20, 60)] + [thing("dog", 0.1)], 0.3, 16)
    assert [round(i.score, 2) for i in table["cat"]] == [s / 100 for s in range(59, 43, -1)] and "dog" not in table


@pytest.mark.parametrize(
    "change, words",
    [
        ({"include": []}, "`include`"), ({"include": [{"class": "cat"}]}, "count"), ({"prompt": 1}, "`prompt`"),
        ({"include": [{"class": "cat", "count": 0}]}, "from 1"),
        ({"include": [{"class": "cat", "count": 1, "color": "beige"}]}, "beige"),
        ({"include": [{"class": "cat", "count": 1, "position": ["left of", 1]}]}, "earlier clause"),
        ({"include": [{"class": "cat", "count": 1, "position": ["beside", 0]}]}, "beside"),
    ],
)  # fmt: skip
def test_bad_metadata_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_entry({"prompt": "a cat", "include": [{"class": "cat", "count": 1}]} | change)


# ---------------------------------------------------------------------------------------------------------- detector
@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mask2Former on Swin with the names of a genuine one, two classes."""
    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=8,
        id2label={0: "cat", 1: "mouse"}, use_pretrained_backbone=False, init_xavier_std=1.0, init_std=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(1)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_objects_are_those_of_transformers(mask2former: Path) -> None:
    """Its own post-processing of the same network on pictures that need no resizing: classes, scores and masks."""
    from transformers.models.mask2former.image_processing_pil_mask2former import (
        Mask2FormerImageProcessorPil as Processor,
    )

    detector = Detector.load(mask2former, CPU, short=384)
    images = torch.rand(2, 3, 384, 384, generator=torch.Generator().manual_seed(3))
    found = detector.find(images, 0.2)
    with torch.no_grad():
        outputs = detector.model(pixel_values=(images - detector.mean) / detector.std)
    theirs = Processor().post_process_instance_segmentation(
        outputs, 0.2, target_sizes=[(384, 384)] * 2, return_binary_maps=True
    )
    names = ["cat", "computer mouse"]
    for ours, other in zip(found, theirs, strict=True):
        assert len(ours) == len(other["segments_info"]) > 2
        rows = sorted(other["segments_info"], key=lambda s: -s["score"])
        assert [i.name for i in ours] == [names[s["label_id"]] for s in rows]
        assert [i.score for i in ours] == pytest.approx([s["score"] for s in rows], abs=1e-5)
        for instance, segment in zip(ours, rows, strict=True):
            mask = other["segmentation"][segment["id"]].bool()
            assert (instance.mask != mask).float().mean() < 0.001
            left, top, right, bottom = instance.box
            assert instance.mask[top:bottom, left:right].sum() == instance.mask.sum()
            assert instance.mask[top, left:right].any() and instance.mask[top:bottom, right - 1].any()


def test_wide_pictures_are_shown_whole(mask2former: Path) -> None:
    """Masks come back in the picture's own size, whatever padding the network saw."""
    for size in ((40, 90), (90, 40), (64, 64)):
        found = Detector.load(mask2former, CPU, short=64).find(torch.rand(1, 3, *size), 0.0)[0]
        assert found and all(i.mask.shape == size and 0 <= i.box[0] < i.box[2] <= size[1] for i in found)


class OneColor(ClipScorer):
    """A stand-in for what a trained CLIP knows: features of pictures and texts are colours."""

    def __init__(self) -> None:
        self.device, self.size, self.seen = CPU, 16, torch.empty(0)
        self.values = torch.nn.functional.normalize(torch.eye(len(COLORS)), dim=-1)

    def preprocess(self, images: Tensor) -> Tensor:
        self.seen = images
        return torch.nn.functional.interpolate(images, (16, 16))

    def seen_features(self, pixels: Tensor) -> Tensor:
        red = pixels.mean((2, 3))[:, 0] > pixels.mean((2, 3))[:, 2]
        return torch.stack([self.values[COLORS.index("red" if r else "blue")] for r in red])

    def text_features(self, texts: Any) -> Tensor:
        return torch.stack([self.values[next(k for k, c in enumerate(COLORS) if c in text)] for text in texts])


def test_colours_are_of_the_object_alone() -> None:
    """A red object before blue: cut out, with its surroundings grey."""
    image = torch.zeros(3, 20, 20)
    image[2] = 1
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[5:10, 5:10] = True
    image[:, 5:10, 5:10] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    clip = OneColor()
    scorer = GenEvalScorer(None, clip, 0.3, 0.9)  # type: ignore[arg-type]
    assert scorer.colors(image, [Instance("cat", 1, (4, 4, 11, 12), mask)], "cat") == ["red"]
    assert clip.seen.shape == (1, 3, 8, 7)
    grey = clip.seen[0, :, 0, 0]
    torch.testing.assert_close(grey, torch.full((3,), 0x99 / 255))


# ------------------------------------------------------------------------------------------------------------ reward
def write_metadata(file: Path, *entries: dict[str, Any]) -> Path:
    file.write_text("\n".join(json.dumps(e) for e in entries) + "\n")
    return file


def test_the_whole_reward(mask2former: Path, clip_folder: Path, tmp_path: Path) -> None:
    entries = [
        {"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]},
        {"prompt": "a red computer mouse", "tag": "colors", "include": [{"class": "computer mouse", "count": 3, "color": "red"}]},
    ]  # fmt: skip
    config = {
        "path": mask2former, "clip": clip_folder, "metadata": write_metadata(tmp_path / "m.jsonl", *entries),
        "threshold": 0.2, "counting_threshold": 0.25, "short_side": 64,
    }  # fmt: skip
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    groups = PromptGroups.of([e["prompt"] for e in entries], [0, 1] * 3, [0, 0, 1, 1, 2, 2])
    reward = Geneval(Geneval.Config.model_validate(config), CPU)
    reward.prepare(groups.prompts, None)  # type: ignore[arg-type]
    scores = reward.score(images, groups)
    assert scores.dtype == torch.float32 and scores.shape == (6,) and ((scores >= 0) & (scores <= 1)).all()
    torch.testing.assert_close(
        reward.score(images.flip(0), groups[[5, 4, 3, 2, 1, 0]]), scores.flip(0), rtol=0, atol=1e-5
    )
    firm = Geneval(Geneval.Config.model_validate(config | {"score": "strict"}), CPU)
    assert set(firm.score(images, groups).tolist()) <= {0.0, 1.0}
    other = PromptGroups.of(["a dog", "two cats"], [0, 1], [0, 0])
    with pytest.raises(DataError, match="says nothing of 1 prompts, such as 'a dog'"):
        reward.prepare(other.prompts, None)  # type: ignore[arg-type]
    lenient = Geneval(Geneval.Config.model_validate(config | {"missing": "skip"}), CPU)
    assert lenient.may_skip and lenient.score(images[:2], other).isnan().tolist() == [True, False]
    with pytest.raises(ConfigError, match="metadata is missing"):
        Geneval(Geneval.Config(), CPU)
    bad = write_metadata(tmp_path / "bad.jsonl", entries[0], {"prompt": "x", "include": [{"class": "cat"}]})
    with pytest.raises(DataError, match=r"bad.jsonl, line 2: include\[0\] needs"):
        Geneval(Geneval.Config.model_validate(config | {"metadata": bad}), CPU)
    with pytest.raises(DataError, match=r"lacks config\.json"):
        Geneval(Geneval.Config.model_validate(config | {"path": tmp_path}), CPU)
