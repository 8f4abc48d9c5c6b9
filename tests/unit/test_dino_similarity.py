"""Likeness to the prompt's own reference images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from reward_models.vision import VisionBackbone
from t2irl import registry
from t2irl.errors import ConfigError, DataError
from t2irl.rewards.base import Reward
from t2irl.rewards.dino_similarity import DinoSimilarity, best_match, same_place
from t2irl.types import PromptGroups

CPU = torch.device("cpu")
Pictures = tuple[Tensor, PromptGroups]


def unit(*rows: tuple[float, float]) -> Tensor:
    """Unit vectors of two numbers."""
    return F.normalize(torch.tensor(rows), dim=-1)


def test_patches_at_the_same_place_and_the_best_match() -> None:
    right, up = (1.0, 0.0), (0.0, 1.0)
    ours = torch.stack([unit(right, up), unit(right, right)])
    assert same_place(ours, unit(up, right)).tolist() == [0.0, 0.5]
    assert best_match(ours, unit(up, right)).tolist() == [1.0, 0.75]  # the second leaves `up` out


@pytest.mark.parametrize("over", ["mean", "max"])
@pytest.mark.parametrize("features", ["cls", "patches", "both"])
def test_scores_are_cosines_to_the_own_prompts_images(
    features: str, over: str, make: Callable[..., Reward], pictures: Pictures, dino_folder: Path
) -> None:
    """Compared with a plain computation; never with another prompt's reference images, which the published code does."""
    images, groups = pictures
    rows = [0, 5, 24, 30]
    reward = make(
        "dino_similarity", features=features, over=over, patches="place", cls_weight=0.75, patches_weight=0.25
    )
    assert isinstance(reward, DinoSimilarity)
    backbone, expected = VisionBackbone.load(dino_folder, CPU), []
    for k in rows:
        files = reward.images.of(groups.texts[k])
        theirs = backbone(torch.stack([reward.images.picture(file) for file in files]).float() / 255)
        ours = backbone(images[k : k + 1])
        cls = F.cosine_similarity(ours.cls, theirs.cls, dim=-1)
        patches = F.cosine_similarity(ours.patches, theirs.patches, dim=-1).mean(1)
        each = {"cls": cls, "patches": patches, "both": 0.75 * cls + 0.25 * patches}[features]
        expected.append(each.mean() if over == "mean" else each.max())
    torch.testing.assert_close(reward.score(images[rows], groups[rows]), torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("patches", ["match", "place"])
def test_a_reference_image_itself_scores_one(patches: str, make: Callable[..., Reward], pictures: Pictures) -> None:
    reward = make("dino_similarity", features="both", patches=patches, over="max")
    assert isinstance(reward, DinoSimilarity)
    groups = pictures[1][[0, 1]]
    same = torch.stack([reward.images.picture(reward.images.of(t)[2]) for t in groups.texts]).float() / 255
    assert torch.allclose(reward.score(same, groups), torch.ones(2), atol=1e-5)


def test_features_of_reference_images_are_computed_once(
    make: Callable[..., Reward], pictures: Pictures, tmp_path: Path
) -> None:
    images, groups = pictures
    reward = make("dino_similarity", feature_cache=tmp_path)
    assert isinstance(reward, DinoSimilarity)
    first = reward.score(images, groups)
    assert reward.cache.computed == 24 * 4
    assert torch.equal(reward.score(images, groups), first) and reward.cache.computed == 24 * 4
    other = make("dino_similarity", feature_cache=tmp_path)
    assert isinstance(other, DinoSimilarity)
    assert torch.equal(other.score(images, groups), first) and other.cache.computed == 0
    patches = make("dino_similarity", feature_cache=tmp_path, features="both")  # keeps more, so it has its own
    assert patches.score(images[:1], groups[:1]).isfinite().all()


def test_prompts_without_reference_images(
    make: Callable[..., Reward], pictures: Pictures, tmp_path: Path, reference_index: Path
) -> None:
    images, groups = pictures
    entries = json.loads(reference_index.read_text())
    del entries[groups.texts[3]]
    index = tmp_path / "index.json"
    index.write_text(json.dumps(entries))
    references = {"index": index, "root": reference_index.parent}
    with pytest.raises(
        DataError, match=r"reward dino_similarity: references\.index = .*no reference images for the prompt"
    ):
        make("dino_similarity", references=references)
    skipping = make("dino_similarity", references=references, missing="skip")
    assert skipping.may_skip and not make("dino_similarity").may_skip
    missing = skipping.score(images, groups).isnan()
    assert missing.nonzero().flatten().tolist() == [3, 27]


def test_bad_settings_are_named(make: Callable[..., Reward], tmp_path: Path) -> None:
    config = registry.find("rewards", "dino_similarity").Config
    with pytest.raises(ConfigError, match="references is missing"):
        registry.build("rewards", config(), CPU)
    with pytest.raises(ValidationError, match="cls_weight and patches_weight are both 0"):
        config(features="both", cls_weight=0, patches_weight=0)
    with pytest.raises(DataError, match=r"reward dino_similarity: path = .*: no such folder"):
        make("dino_similarity", path=tmp_path / "nowhere")
    with pytest.raises(DataError, match="size = 63: patches are 8 pixels wide"):
        make("dino_similarity", size=63)


def test_it_is_hacked_by_copying_one_reference_image(make: Callable[..., Reward], pictures: Pictures) -> None:
    """All images of a prompt the same copy: the likeness is higher than that of honest drawings, the variety is gone."""
    images, groups = pictures
    reward = make("dino_similarity", over="max")
    assert isinstance(reward, DinoSimilarity)
    copies = torch.stack([reward.images.picture(reward.images.of(text)[0]) for text in groups.texts]).float() / 255
    assert (reward.score(copies, groups) >= reward.score(images, groups)).all()
    assert torch.equal(copies[:24], copies[24:])
