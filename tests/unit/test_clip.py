"""CLIP as a judge: loading, preprocessing, text cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from reward_models.clip import ClipScorer
from t2irl import registry
from t2irl.errors import DataError
from t2irl.rewards.base import Reward
from t2irl.shapes.render import SIZE
from t2irl.shapes.verify import verify
from t2irl.types import PromptGroups

CPU = torch.device("cpu")


def test_clip_score_is_the_models_cosine(clip_folder: Path, pictures: tuple[Tensor, PromptGroups]) -> None:
    images, groups = pictures
    scorer = ClipScorer.load(clip_folder, CPU)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in scorer.model.parameters())
    texts = groups.texts[:6]
    ids = [scorer.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        expected = torch.cat(
            [
                scorer.model(input_ids=i, pixel_values=image[None] * 2 - 1).logits_per_image[0]
                for i, image in zip(ids, images, strict=False)
            ]
        )
    expected = expected / scorer.model.logit_scale.exp()
    torch.testing.assert_close(scorer.score(images[:6], texts), expected, rtol=0, atol=1e-5)


def test_clip_encodes_each_text_once(clip_folder: Path, pictures: tuple[Tensor, PromptGroups]) -> None:
    images, groups = pictures
    scorer = ClipScorer.load(clip_folder, CPU)
    encoded: list[int] = []
    scorer.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = scorer.score(images, groups.texts)
    assert encoded == [24]
    assert torch.equal(scorer.score(images, groups.texts), first)
    assert encoded == [24]
    scorer.text_features(["something new", groups.texts[0]])
    assert encoded == [24, 1]
    assert scorer.text_features(["red " * 500]).isfinite().all()


def test_clip_has_one_preprocessing(clip_folder: Path) -> None:
    scorer = ClipScorer.load(clip_folder, CPU)
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scorer.preprocess(image), (image - 0.5) / 0.5)
    smooth = F.interpolate(image[..., :4, :4], SIZE, mode="bicubic").clamp(0, 1)
    large = F.interpolate(image[..., :4, :4], 4 * SIZE, mode="bicubic").clamp(0, 1)
    assert (scorer.preprocess(large) - scorer.preprocess(smooth)).abs().mean() < 0.02
    wide = torch.cat([torch.zeros(1, 3, SIZE, 20), image, torch.zeros(1, 3, SIZE, 20)], -1)
    assert torch.equal(scorer.preprocess(wide), scorer.preprocess(image))
    assert scorer.preprocess(torch.rand(2, 3, 97, 30)).shape == (2, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match="1 images but 2 texts"):
        scorer.score(image, ["a", "b"])


@pytest.mark.skipif(not Path(__file__).parents[2].joinpath("assets/tiny-clip").is_dir(), reason="assets are not built")
def test_shipped_clip_prefers_the_right_caption(pictures: tuple[Tensor, PromptGroups]) -> None:
    images, groups = pictures
    texts, right = groups.texts, verify(images, groups.texts)["correct"] == 1
    reward = registry.build("rewards", registry.find("rewards", "tiny_clip").Config(), CPU)
    own = reward.score(images, groups)[right]
    other = reward.scorer.score(images, texts[5:] + texts[:5])[right]
    assert (own > other).float().mean() > 0.8


def test_unusable_clip_folders_are_named(clip_folder: Path, make: Callable[..., Reward], tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in clip_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    with pytest.raises(DataError, match=r"nowhere.*lacks config\.json, preprocessor_config\.json, a tokenizer"):
        make("tiny_clip", path=tmp_path / "nowhere")
    other = copy("other")
    (other / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(DataError, match="model_type = 'siglip'"):
        make("tiny_clip", path=other)
    unscaled = copy("unscaled")
    (unscaled / "preprocessor_config.json").write_text("{}")
    with pytest.raises(DataError, match="image_mean and image_std"):
        make("tiny_clip", path=unscaled)
    cut = copy("cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot be read"):
        make("tiny_clip", path=cut)
    partial = copy("partial")
    tensors = load_file(partial / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lack 1 tensors, such as visual_projection\.weight"):
        make("tiny_clip", path=partial)
    empty = copy("empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(DataError, match="empty"):
        make("tiny_clip", path=empty)
