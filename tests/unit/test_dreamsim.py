"""DreamSim on small weights in its published format, against layers of torch and the adapter as peft reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from reward_models.dreamsim import CLIP, IMAGENET, VARIANTS, DreamSim
from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.distances import within_prompts
from t2irl.evaluation.features import extractor
from t2irl.evaluation.settings import DreamSimVariant, Evaluated, Perceptual
from t2irl.rewards.base import Reward
from t2irl.rewards.dreamsim import DreamSimReward
from t2irl.types import PromptGroups
from tests.dreamsim import adapted, quick_gelu, tokens, tower_weights, write_adapter, write_ensemble

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ensemble(tmp_path_factory.mktemp("dreamsim"))


def pixels(count: int = 3, side: int = 224) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(9))


def normalised(images: Tensor, numbers: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in numbers)
    return (images - mean) / std


def centred(x: Tensor) -> Tensor:
    return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)


def test_the_ensemble_joins_three_towers(folder: Path) -> None:
    """DINO's first token as the last block leaves it, CLIP's normalised and projected; mean taken off, unit length."""
    images = pixels()
    towers = [tower_weights(1), tower_weights(2, clip=True), tower_weights(3, clip=True)]
    dino, clip, open_clip = adapted(folder / "ensemble_lora", towers)
    parts = [tokens(dino, normalised(images, IMAGENET), 1e-6)[:, 0]]
    for weights, act in ((clip, quick_gelu), (open_clip, F.gelu)):
        whole = tokens(weights, normalised(images, CLIP), 1e-5, act)[:, 0]
        parts.append(
            F.layer_norm(whole, whole.shape[1:], weights["norm.weight"], weights["norm.bias"], 1e-5) @ weights["proj"]
        )
    expected = centred(torch.cat(parts, -1))
    found = DreamSim.load(folder, CPU).embed(images)
    assert found.shape == (3, 128 + 48 + 48)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    without = centred(torch.cat([tokens(towers[0], normalised(images, IMAGENET), 1e-6)[:, 0], *parts[1:]], -1))
    assert (found - without).abs().max() > 0.01, "the adapter does something"


@pytest.mark.parametrize("patches", [False, True])
def test_single_towers(patches: bool, tmp_path: Path) -> None:
    """DINOv2 for another size, with layer scales; the patch variant compares the first token and the mean of the others."""
    variant, images = "dinov2_vitb14_patch" if patches else "dinov2_vitb14", pixels()
    weights = tower_weights(4, scaled=True, side=11)
    torch.save(weights, tmp_path / "dinov2_vitb14_pretrain.pth")
    adapter = tmp_path / ("dinov2_vitb14_patch_lora" if patches else "dinov2_vitb14_single_lora")
    write_adapter(adapter, 1, binary=True)
    (plain,) = adapted(adapter, [weights])
    grid = weights["pos_embed"][:, 1:].reshape(1, 11, 11, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(7.1 / 11, 7.1 / 11), mode="bicubic")  # as DINOv2 resizes them
    plain["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], 1)
    for n in range(2):
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = weights[f"blocks.{n}.{scale}.gamma"]
            plain[f"blocks.{n}.{layer}.weight"] = torch.diag(gamma) @ weights[f"blocks.{n}.{layer}.weight"]
            plain[f"blocks.{n}.{layer}.bias"] = gamma * weights[f"blocks.{n}.{layer}.bias"]
    seen = tokens(plain, normalised(images, IMAGENET), 1e-6)
    each = centred(seen)
    expected = torch.cat([each[:, 0], each[:, 1:].mean(1)], -1) if patches else centred(seen[:, 0])
    found = DreamSim.load(tmp_path, CPU, variant).embed(images)
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), rtol=0, atol=2e-6)


def test_other_layouts_of_files(folder: Path, tmp_path: Path) -> None:
    """SynCLR's checkpoint has a prefix and settings beside the weights; half precision is read as it is."""
    import argparse

    weights = {f"module.visual.{name}": x.half() for name, x in tower_weights(5).items()}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "synclr_vit_b_16.pth")
    write_adapter(tmp_path / "synclr_vitb16_single_lora", 1)
    assert DreamSim.load(tmp_path, CPU, "synclr_vitb16").embed(pixels(1)).shape == (1, 128)
    exact, half = (DreamSim.load(folder, CPU, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.embed(pixels()).dtype == torch.float32
    assert (exact.embed(pixels()) * half.embed(pixels())).sum(-1).min() > 0.99
    assert exact.fingerprint() != half.fingerprint() and exact.fingerprint() == DreamSim.load(folder, CPU).fingerprint()


def test_pictures_are_squeezed_as_published(folder: Path) -> None:
    """Against Pillow's bicubic resize to 224 x 224 without keeping the aspect, which the package uses."""
    generator = np.random.default_rng(3)
    small = generator.integers(0, 256, (24, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((300, 420), Image.Resampling.BILINEAR)
    theirs = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    ours = DreamSim.load(folder, CPU).preprocess(images)[0].permute(1, 2, 0)
    assert (ours - torch.from_numpy(theirs)).abs().max() < 1.5 / 255  # Pillow rounds to 8 bits twice
    exact = pixels(1)
    assert torch.equal(DreamSim.load(folder, CPU).preprocess(exact), exact)


def test_the_reward_is_one_minus_the_distance(
    folder: Path, make: Callable[..., Reward], pictures: tuple[Tensor, PromptGroups]
) -> None:
    images, groups = pictures
    rows = [0, 5, 30]
    reward = make("dreamsim", path=folder, over="max")
    assert isinstance(reward, DreamSimReward)
    network, expected = DreamSim.load(folder, CPU), []
    for k in rows:
        theirs = torch.stack([reward.images.picture(file) for file in reward.images.of(groups.texts[k])]).float() / 255
        distances = 1 - F.cosine_similarity(network.embed(images[k : k + 1]), network.embed(theirs), dim=-1)
        expected.append(1 - distances.min())
    torch.testing.assert_close(reward.score(images[rows], groups[rows]), torch.stack(expected), rtol=0, atol=1e-5)
    same = torch.stack([reward.images.picture(reward.images.of(t)[1]) for t in groups[rows].texts]).float() / 255
    torch.testing.assert_close(reward.score(same, groups[rows]), torch.ones(3), rtol=0, atol=1e-5)


def test_diversity_of_an_evaluation_is_its_distance(folder: Path) -> None:
    """Mean pairwise distance within prompts is 1 - cosine of what `features: {x: {type: dreamsim}}` extracts."""
    config = Evaluated.model_validate(
        {"suite": {"type": "shapes"}, "features": {"seen": {"type": "dreamsim", "path": folder}}}
    )
    images = pixels(4, 64).mul(255).round().to(torch.uint8)
    rows = extractor("seen", config.features["seen"], CPU)(images)
    within = within_prompts(rows.numpy().reshape(2, 2, -1))
    x = DreamSim.load(folder, CPU).embed(images.float() / 255)
    np.testing.assert_allclose(within.pairwise, [1 - float(x[0] @ x[1]), 1 - float(x[2] @ x[3])], atol=1e-5)
    with pytest.raises(DataError, match=r"features\.seen\.path = nowhere.*lacks"):
        extractor("seen", Perceptual(path=Path("nowhere")), CPU)


def test_variants_are_those_of_the_network() -> None:
    assert set(get_args(DreamSimVariant)) == set(VARIANTS)


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path, make: Callable[..., Reward]) -> None:
    with pytest.raises(
        DataError, match=r"reward dreamsim: path = .*lacks dino_vitbase16_pretrain\.pth, .*adapter_config"
    ):
        make("dreamsim", path=tmp_path)
    with pytest.raises(ConfigError, match="reward dreamsim: references is missing"):
        DreamSimReward(DreamSimReward.Config(path=folder), CPU)
    write_ensemble(tmp_path / "copy")
    adapter = tmp_path / "copy" / "ensemble_lora"
    whole = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(whole))
    for tensors, message in (
        ({k: v for k, v in whole.items() if k != name}, "the adapter is not complete"),
        ({k: v for k, v in whole.items() if ".2.model." not in k}, "the adapter is not complete"),
        (whole | {"base_model.model.mlp.weight": torch.zeros(1)}, "base_model.model.mlp.weight, which is none"),
    ):
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(DataError, match=message):
            make("dreamsim", path=tmp_path / "copy")
    save_file(whole, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 4}))
    with pytest.raises(DataError, match="lora_alpha"):
        make("dreamsim", path=tmp_path / "copy")
    write_adapter(tmp_path / "odd" / "dino_vitb16_single_lora", 1)
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "odd" / "dino_vitbase16_pretrain.pth")
    with pytest.raises(DataError, match="not those of DreamSim's dino_vitb16"):
        make("dreamsim", path=tmp_path / "odd", variant="dino_vitb16")
