"""Vision backbones: every kind of folder, one preprocessing, which parts are trained, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from reward_models.vision import Features, VisionBackbone, l2

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"num_register_tokens": 3}),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 2, "intermediate_size": 64}),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", {"intermediate_size": 64}),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", {"intermediate_size": 64}),
}


def write(folder: Path, kind: str) -> Any:
    """A random network of one kind in a folder; returns it."""
    torch.manual_seed(0)
    if kind in ("siglip", "clip"):
        name = {"siglip": "Siglip", "clip": "CLIP"}[kind]
        config = getattr(transformers, f"{name}Config")(
            vision_config=SMALL | {"intermediate_size": 64}, text_config=TEXT, projection_dim=16
        )
        model = getattr(transformers, f"{name}Model")(config).eval()
    else:
        model_class, config_class, more = KINDS[kind]
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**SMALL, **more)).eval()
    model.save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def pixels(n: int = 2, size: int = 32) -> Tensor:
    """Random pictures in [0, 1]."""
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Dinov2Model of three blocks."""
    folder = tmp_path_factory.mktemp("dinov2")
    write(folder, "dinov2")
    return folder


@pytest.mark.parametrize("kind", [*KINDS, "siglip", "clip"])
def test_features_are_the_librarys_own(kind: str, tmp_path: Path) -> None:
    model = write(tmp_path, kind)
    backbone = VisionBackbone.load(tmp_path, CPU)
    vision = model.vision_model if kind in ("siglip", "clip") else model
    x = (pixels() - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.2]).view(3, 1, 1)
    with torch.no_grad():
        found, expected = backbone(pixels()), vision(pixel_values=x)
    assert (backbone.size, backbone.patch_size, backbone.width) == (32, 8, 32)
    torch.testing.assert_close(found.cls, expected.pooler_output, rtol=0, atol=1e-5)
    tokens = expected.last_hidden_state
    if "clip" in kind:  # the library normalises CLS alone
        tokens = dict(vision.named_modules())["post_layernorm"](tokens) if kind == "clip" else None
    if tokens is not None:
        torch.testing.assert_close(found.patches, tokens[:, -16:], rtol=0, atol=1e-5)
    assert found.patches.shape == (2, 16, 32)  # neither CLS nor registers among them


def test_layers_are_normalised_and_joined(dinov2: Path) -> None:
    both, first, last = (VisionBackbone.load(dinov2, CPU, layers)(pixels()) for layers in ((0, -1), (0,), (2,)))
    assert torch.equal(both.cls, torch.cat([first.cls, last.cls], -1)) and both.cls.shape == (2, 64)
    assert torch.equal(both.patches, torch.cat([first.patches, last.patches], -1))
    assert torch.allclose(first.patches.mean(-1), torch.zeros(2, 16), atol=1e-5)  # a fresh LayerNorm leaves mean 0
    with pytest.raises(ValueError, match=r"layers = \[3\]: the network has 3 blocks, so use -3 to 2"):
        VisionBackbone.load(dinov2, CPU, (3,))
    with pytest.raises(ValueError, match="twice"):
        VisionBackbone.load(dinov2, CPU, (-1, 2))


def test_any_size_goes_through_one_preprocessing(dinov2: Path) -> None:
    backbone = VisionBackbone.load(dinov2, CPU)
    image = pixels(1)
    wide = torch.cat([torch.zeros(1, 3, 32, 20), image, torch.zeros(1, 3, 32, 20)], -1)
    assert torch.equal(backbone.preprocess(wide), backbone.preprocess(image))
    small, large = (F.interpolate(image[..., :4, :4], side, mode="bicubic").clamp(0, 1) for side in (32, 128))
    assert (backbone.preprocess(large) - backbone.preprocess(small)).abs().mean() < 0.05
    bigger = VisionBackbone.load(dinov2, CPU, size=48)
    assert bigger(image).patches.shape == (1, 36, 32)
    with pytest.raises(ValueError, match="size = 50: patches are 8 pixels wide, so use a multiple such as 48"):
        VisionBackbone.load(dinov2, CPU, size=50)


def test_a_backbone_stays_in_evaluation_mode(dinov2: Path) -> None:
    backbone = VisionBackbone.load(dinov2, CPU, trainable_blocks=1).train()
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_named_blocks_learn_and_in_float32(dinov2: Path, dtype: torch.dtype) -> None:
    backbone = VisionBackbone.load(dinov2, CPU, trainable_blocks=1, dtype=dtype)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    trained = backbone.trained()
    assert trained and all(".2." in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.dtype for p in backbone.blocks[0].parameters()} == {dtype}
    optimizer = torch.optim.Adam([p for p in backbone.parameters() if p.requires_grad], lr=5e-6)
    backbone(pixels()).cls.square().sum().backward()
    optimizer.step()
    moved = {name for name, p in backbone.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= set(trained) and any("fc1.weight" in name for name in moved)
    weight = next(name for name in moved if "fc1.weight" in name)
    assert (dict(backbone.named_parameters())[weight] != before[weight]).float().mean() > 0.9
    frozen = VisionBackbone.load(dinov2, CPU)
    assert not frozen.trained() and not frozen(pixels()).cls.requires_grad
    image = pixels().requires_grad_()
    frozen(image).patches.sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


def test_half_precision_is_close(dinov2: Path) -> None:
    exact, half = (VisionBackbone.load(dinov2, CPU, dtype=d)(pixels()) for d in (torch.float32, torch.bfloat16))
    assert half.cls.dtype == torch.float32 and half.patches.dtype == torch.float32
    assert F.cosine_similarity(exact.cls, half.cls).min() > 0.99


def test_unit_length() -> None:
    features = l2(Features(torch.tensor([[3.0, 4.0]]), torch.tensor([[[0.0, 2.0], [5.0, 0.0]]])))
    assert torch.allclose(features.cls, torch.tensor([[0.6, 0.8]]))
    assert torch.allclose(features.patches, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))


def test_a_fingerprint_names_the_function(dinov2: Path, tmp_path: Path) -> None:
    def fingerprint(folder: Path, **settings: Any) -> str:
        return VisionBackbone.load(folder, CPU, **settings).fingerprint()

    same = fingerprint(dinov2)
    assert fingerprint(dinov2) == same
    write(tmp_path, "dinov2")
    weights = load_file(tmp_path / "model.safetensors")
    weights["layernorm.bias"][0] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    others = [fingerprint(tmp_path), fingerprint(dinov2, layers=(0,)), fingerprint(dinov2, size=48)]
    assert len({same, *others}) == 4
    with pytest.raises(ValueError, match="no fixed features"):
        fingerprint(dinov2, trainable_blocks=1)


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    def load() -> None:
        VisionBackbone.load(tmp_path, CPU)

    with pytest.raises(OSError, match="no such folder"):
        VisionBackbone.load(tmp_path / "nowhere", CPU)
    with pytest.raises(OSError, match=r"no config\.json"):
        load()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list, expected an object"):
        load()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type = 'bert'; known: dinov2"):
        load()
    write(tmp_path, "dinov2")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match=r"preprocessor_config\.json needs three numbers for image_std"):
        load()
    write(tmp_path, "dinov2")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors, such as layernorm\.bias"):
        load()


# ------------------------------------------------------------------------------------------------- optional libraries
def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(ValueError, match="timm is not installed: pip install 't2irl"):
        VisionBackbone.load(tmp_path, CPU)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="pip install 't2irl"):
        VisionBackbone.load(tmp_path, CPU)


def test_timm_folder(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 28}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **sizes).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    settings = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 28, 28]}
    config = {"architecture": "vit_small_patch14_reg4_dinov2", "model_args": sizes, "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = VisionBackbone.load(tmp_path, CPU)(pixels(2, 28))
    expected = model.forward_features(pixels(2, 28) * 2 - 1)
    torch.testing.assert_close(found.cls, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.patches, expected[:, 5:], rtol=0, atol=1e-5)
    assert VisionBackbone.load(tmp_path, CPU, size=56)(pixels(1, 28)).patches.shape == (1, 16, 32)


def test_open_clip_folder(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, vision, text).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    backbone = VisionBackbone.load(tmp_path, CPU)
    found, visual = backbone(pixels()), model.visual
    torch.testing.assert_close(found.cls @ visual.proj, visual(pixels() * 2 - 1), rtol=0, atol=1e-5)
    assert found.patches.shape == (2, 16, 32)
    with pytest.raises(ValueError, match="size = 64: position embeddings of open_clip are fixed, here for 32 pixels"):
        VisionBackbone.load(tmp_path, CPU, size=64)
