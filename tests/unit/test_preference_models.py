"""Published reward models in their own formats: loading, what they see, and their scores against their formulas."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from reward_models.clip import MEAN, STD, ClipScorer
from reward_models.clip_weights import clip_from_open_clip
from reward_models.image_reward import ImageRewardScorer
from reward_models.pixels import fit_square, pad_square
from t2irl.errors import ConfigError, DataError
from t2irl.rewards.aesthetic import Aesthetic
from t2irl.rewards.base import Reward
from t2irl.rewards.clip_score import ClipScore
from t2irl.rewards.image_reward import ImageReward
from t2irl.types import PromptGroups
from tests.reward_weights import as_open_clip, head_weights, wide_clip, write_hps, write_image_reward

CPU = torch.device("cpu")
Pictures = tuple[Tensor, PromptGroups]


def cosine_by_hand(folder: Path, images: Tensor, texts: list[str]) -> tuple[Tensor, CLIPModel]:
    """By transformers' own feature functions; pictures are of the network's size already."""
    model = CLIPModel.from_pretrained(folder).float().eval()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(settings[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    words = CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(input_ids=words.input_ids, pixel_values=(images - mean) / std)
    return (out.image_embeds * out.text_embeds).sum(-1), model


# -------------------------------------------------------------------------------------------------------------- CLIPs
def test_clip_score_and_pickscore_are_their_formulas(
    make: Callable[..., Reward], pictures: Pictures, clip_folder: Path
) -> None:
    images, groups = pictures
    cosine, model = cosine_by_hand(clip_folder, images, groups.texts)
    torch.testing.assert_close(make("clip_score").score(images, groups), 2.5 * cosine.clamp(min=0), rtol=0, atol=1e-5)
    assert make("clip_score")._of(torch.tensor([-0.5, 0.2])).tolist() == [0, 0.5]  # type: ignore[attr-defined]
    found = make("pickscore").score(images, groups)
    torch.testing.assert_close(found, math.exp(model.logit_scale.item()) * cosine, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(make("pickscore", factor=1 / 26).score(images, groups), found / 26)


def test_hpsv2_is_the_cosine_of_open_clips_weights(
    make: Callable[..., Reward], pictures: Pictures, clip_folder: Path
) -> None:
    images, groups = pictures
    model = wide_clip(clip_folder).half().float()  # the file is in half precision
    words = CLIPTokenizer.from_pretrained(clip_folder)(
        groups.texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    with torch.no_grad():
        out = model(input_ids=words.input_ids, pixel_values=(images - mean) / std)
    expected = (out.image_embeds * out.text_embeds).sum(-1)
    torch.testing.assert_close(make("hpsv2").score(images, groups), expected, rtol=0, atol=1e-5)


def test_the_layouts_of_a_clip_agree(clip_folder: Path, tmp_path: Path, pictures: Pictures) -> None:
    """The same network in either folder: equal features; weights that lack or add something are refused."""
    model = wide_clip(clip_folder)
    again = clip_from_open_clip(as_open_clip(model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    weights = as_open_clip(model)
    for change in ("drop", "add", "shape"):
        bad = dict(weights)
        if change == "drop":
            del bad["visual.ln_post.bias"]
        elif change == "add":
            bad["visual.attn_pool.query"] = torch.zeros(1)
        else:
            bad["visual.proj"] = torch.zeros(64, 5)
        with pytest.raises(ValueError, match="not the weights of a"):
            clip_from_open_clip(bad)
    folder = write_hps(tmp_path / "hps", clip_folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(DataError, match="lacks a tokenizer"):
        ClipScore(ClipScore.Config(path=folder, layout="open_clip"), CPU)
    (folder / "HPS_v2.1_compressed.pt").write_bytes(b"no weights")
    with pytest.raises(DataError, match=r"HPS_v2.1_compressed.pt cannot be read|lacks a tokenizer"):
        ClipScore(ClipScore.Config(path=folder, layout="open_clip"), CPU)
    with pytest.raises(ValidationError, match="quick_gelu belongs to layout: open_clip"):
        ClipScore.Config(quick_gelu=True)


def test_open_clip_itself_agrees(clip_folder: Path, pictures: Pictures) -> None:
    """Where it is installed: its own network with the same weights gives the same features of pictures and texts."""
    open_clip = pytest.importorskip("open_clip", exc_type=ImportError)
    model = wide_clip(clip_folder)
    vision, text = model.config.vision_config, model.config.text_config
    theirs = open_clip.CLIP(
        16, {"image_size": vision.image_size, "layers": 2, "width": 64, "patch_size": 8, "head_width": 64, "mlp_ratio": 2.0},
        {"context_length": 77, "vocab_size": text.vocab_size, "width": 64, "heads": 1, "layers": 2, "mlp_ratio": 2.0},
    )  # fmt: skip
    report = theirs.load_state_dict(as_open_clip(model), strict=False)
    assert not report.missing_keys and not report.unexpected_keys
    scorer = ClipScorer(
        clip_from_open_clip(as_open_clip(model)), CLIPTokenizer.from_pretrained(clip_folder), MEAN, STD, CPU
    )
    images, groups = pictures
    ids = scorer.tokenizer(groups.texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            scorer.image_features(images),
            theirs.eval().encode_image(scorer.preprocess(images), normalize=True),
            rtol=0,
            atol=1e-5,
        )
        torch.testing.assert_close(
            scorer.text_features(groups.texts), theirs.encode_text(ids, normalize=True), rtol=0, atol=1e-5
        )


def test_half_precision_is_near(make: Callable[..., Reward], pictures: Pictures) -> None:
    images, groups = pictures
    for name in ("clip_score", "pickscore", "hpsv2", "aesthetic", "image_reward"):
        full, half = (make(name, precision=p).score(images, groups) for p in ("fp32", "bf16"))
        assert half.dtype == torch.float32 and not torch.equal(full, half)
        assert (full - half).abs().max() < 0.1 * full.abs().max() + 0.05, name


# ---------------------------------------------------------------------------------------------------- what they see
def smooth(height: int, width: int) -> Image.Image:
    """Waves of colour."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([127 + 120 * np.sin(x / a + y / b) for a, b in ((9, 17), (13, 7), (5, 29))], -1).astype(np.uint8)
    )


@pytest.mark.parametrize("size", [(512, 512), (300, 200), (64, 128), (64, 64)])
def test_the_middle_square_is_that_of_the_published_processor(size: tuple[int, int]) -> None:
    """transformers' CLIP processor on the file: Pillow's bicubic, in 8 bits, so a level of difference is allowed."""
    from transformers import CLIPImageProcessorPil

    picture = smooth(*size)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64)(picture, return_tensors="pt")[
        "pixel_values"
    ]
    ours = fit_square(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255, 64)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    difference = ((ours - mean) / std - theirs).mul(std).mul(255).abs()
    assert difference.median() < 1 and difference.max() < (2 if size[0] == size[1] else 30), difference.max()


def test_hps_sees_the_whole_of_a_wide_picture() -> None:
    picture = smooth(100, 300)
    small = torch.from_numpy(np.array(picture.resize((96, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    found = pad_square(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255, 96)
    assert found.shape == (1, 3, 96, 96)
    assert not found[..., :32, :].any() and not found[..., 64:, :].any()
    torch.testing.assert_close(found[0, :, 32:64], small, rtol=0, atol=2 / 255)
    square = torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(pad_square(square, 32), fit_square(square, 32))


# ------------------------------------------------------------------------------------------------------------- heads
def stack_by_hand(weights: dict[str, Tensor], x: Tensor, prefix: str = "") -> Tensor:
    for place in (0, 2, 4, 6, 7):
        x = x @ weights[f"{prefix}layers.{place}.weight"].T + weights[f"{prefix}layers.{place}.bias"]
    return x[:, 0]


def test_aesthetic_is_a_stack_on_unit_vectors(
    make: Callable[..., Reward], pictures: Pictures, clip_folder: Path
) -> None:
    images, groups = pictures
    model = CLIPModel.from_pretrained(clip_folder).float().eval()
    with torch.no_grad():
        vision = model.vision_model(pixel_values=(images - 0.5) / 0.5).pooler_output
        features = model.visual_projection(vision)
    expected = stack_by_hand(head_weights(16), features / features.norm(dim=-1, keepdim=True))
    found = make("aesthetic").score(images, groups)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(found, make("aesthetic").score(images, PromptGroups.of(["else"], [0] * 48, range(48))))


def test_a_head_of_another_width_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head is missing"):
        Aesthetic(Aesthetic.Config(path=clip_folder), CPU)
    file = tmp_path / "head.pth"
    torch.save(head_weights(20), file)
    with pytest.raises(DataError, match="takes vectors of 20, but this CLIP gives 16"):
        Aesthetic(Aesthetic.Config(path=clip_folder, head=file), CPU)
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(DataError, match="not the head of an aesthetic predictor"):
        Aesthetic(Aesthetic.Config(path=clip_folder, head=file), CPU)


# -------------------------------------------------------------------------------------------------------- ImageReward
def image_reward_by_hand(w: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """BLIP with one head of 64 for pictures and two of 16 for words, and the standardised head, tensor by tensor."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if seen is not None:
            scores = scores.masked_fill(seen[:, None, None] == 0, -1e9)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    v = "blip.visual_encoder."
    x = (
        F.conv2d(pixels, w[f"{v}patch_embed.proj.weight"], w[f"{v}patch_embed.proj.bias"], stride=8)
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat([w[f"{v}cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{v}pos_embed"]
    for n in range(2):
        block = f"{v}blocks.{n}"
        x = x + linear(
            attend(*linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1), 1), f"{block}.attn.proj"
        )
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    x = norm(x, f"{v}norm", 1e-6)
    e = "blip.text_encoder.embeddings."
    h = w[f"{e}word_embeddings.weight"][ids] + w[f"{e}position_embeddings.weight"][: ids.shape[1]]
    h = norm(h, f"{e}LayerNorm", 1e-12)
    for n in range(2):
        layer = f"blip.text_encoder.encoder.layer.{n}"
        for kind, source, seen in (("attention", None, mask), ("crossattention", x, None)):
            place, other = f"{layer}.{kind}", h if source is None else source
            parts = (
                linear(h, f"{place}.self.query"),
                linear(other, f"{place}.self.key"),
                linear(other, f"{place}.self.value"),
            )
            h = norm(h + linear(attend(*parts, 2, seen), f"{place}.output.dense"), f"{place}.output.LayerNorm", 1e-12)
        middle = F.gelu(linear(h, f"{layer}.intermediate.dense"))
        h = norm(h + linear(middle, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
    return (stack_by_hand(w, h[:, 0], "mlp.") - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_its_published_network(tmp_path: Path) -> None:
    folder = write_image_reward(tmp_path)
    scorer = ImageRewardScorer.load(folder, CPU)
    images, texts = torch.rand(5, 3, 32, 32), ["a cat", "two dogs on a hill", "x", "a cat", "abc " * 30]
    words = scorer.tokenizer(texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    weights = torch.load(folder / "ImageReward.pt")
    expected = image_reward_by_hand(weights, (images - mean) / std, words.input_ids, words.attention_mask)
    found = scorer.score(images, texts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert words.input_ids.shape == (5, 35) and found.std() > 1e-3


def test_image_reward_says_what_its_folder_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks ImageReward.pt, med_config.json, vocab.txt of bert-base-uncased"):
        ImageReward(ImageReward.Config(path=tmp_path), CPU)
    folder = write_image_reward(tmp_path)
    weights = torch.load(folder / "ImageReward.pt")
    del weights["blip.visual_encoder.norm.bias"]
    torch.save(weights, folder / "ImageReward.pt")
    with pytest.raises(DataError, match=r"(?s)is not ImageReward v1: .*post_layernorm.bias"):
        ImageReward(ImageReward.Config(path=folder), CPU)


# --------------------------------------------------------------------------------------------------------------- JPEG
def test_jpeg_size_is_the_size_of_the_file(make: Callable[..., Reward], pictures: Pictures) -> None:
    images, groups = pictures
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    expected = torch.tensor(sizes)
    assert torch.equal(make("jpeg_size").score(images, groups), -expected)
    assert torch.equal(make("jpeg_size", prefer="large").score(images, groups), expected)
    empty = torch.full((48, 3, 64, 64), 0.5)  # how it is hacked
    assert (make("jpeg_size").score(empty, groups) > -expected).all()
