"""Small random weights in the format of DreamSim's releases, and what they should give, by layers of torch and peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH, DEPTH, PATCH, RANK = 128, 2, 32, 4
HIDDEN = 2 * WIDTH


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's."""
    return x * torch.sigmoid(1.702 * x)


def tower_weights(seed: int, clip: bool = False, scaled: bool = False, side: int = 224 // PATCH) -> dict[str, Tensor]:
    """A vision transformer under the published names: DINO's, CLIP's (normalised first, projected) or DINOv2's (scaled)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, around: float = 0.0) -> Tensor:
        return around + torch.randn(shape, generator=generator) * (0.2 if len(shape) == 1 else shape[-1] ** -0.5)

    found = {
        "cls_token": draw(1, 1, WIDTH), "pos_embed": 3 * draw(1, side * side + 1, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": draw(WIDTH),
    }  # fmt: skip
    norms, linear = ["norm"] + ["pos_drop"] * clip, {}
    for n in range(DEPTH):
        block = f"blocks.{n}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        linear |= {f"{block}.attn.qkv": (3 * WIDTH, WIDTH), f"{block}.attn.proj": (WIDTH, WIDTH)}
        linear |= {f"{block}.mlp.fc1": (HIDDEN, WIDTH), f"{block}.mlp.fc2": (WIDTH, HIDDEN)}
        if scaled:
            found |= {f"{block}.ls1.gamma": draw(WIDTH, around=1.0), f"{block}.ls2.gamma": draw(WIDTH, around=1.0)}
    for name in norms:
        found |= {f"{name}.weight": draw(WIDTH, around=1.0), f"{name}.bias": draw(WIDTH)}
    for name, shape in linear.items():
        found |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[0])}
    if clip:
        found["proj"] = draw(WIDTH, 48)
    return found | ({"mask_token": draw(1, WIDTH)} if scaled else {})


def write_adapter(folder: Path, towers: int, binary: bool = False) -> None:
    """An adapter of all attention layers, as peft saves one."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "task_type": None, "inference_mode": True, "r": RANK, "lora_alpha": 6, "lora_dropout": 0.3,
        "bias": "none", "target_modules": ["qkv"], "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator, tensors = torch.Generator().manual_seed(77), {}
    for tower in range(towers):
        for n in range(DEPTH):
            name = f"base_model.model.extractor_list.{tower}.model.blocks.{n}.attn.qkv"
            tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, WIDTH, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(3 * WIDTH, RANK, generator=generator)
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")


def write_ensemble(folder: Path) -> Path:
    """The files of the ensemble, where the published package leaves them."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(tower_weights(1), folder / "checkpoints" / "dino_vitbase16_pretrain.pth")
    for seed, name in ((2, "clip_vitb16"), (3, "open_clip_vitb16")):
        torch.save({"state_dict": tower_weights(seed, clip=True)}, folder / f"{name}_pretrain.pth.tar")
    write_adapter(folder / "ensemble_lora", 3)
    return folder


def adapted(adapter: Path, towers: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Weights with the adapter merged into them by peft."""

    def shell(weights: dict[str, Tensor]) -> nn.Module:
        blocks = nn.ModuleList()
        for n in range(DEPTH):
            qkv = nn.Linear(WIDTH, 3 * WIDTH)
            qkv.weight.data = weights[f"blocks.{n}.attn.qkv.weight"].clone()
            blocks.append(nn.ModuleDict({"attn": nn.ModuleDict({"qkv": qkv})}))
        return nn.ModuleDict({"model": nn.ModuleDict({"blocks": blocks})})

    model = nn.ModuleDict({"extractor_list": nn.ModuleList(map(shell, towers))})
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    names = [name for name in towers[0] if name.endswith("qkv.weight")]
    changed = [{name: merged[f"extractor_list.{k}.model.{name}"] for name in names} for k in range(len(towers))]
    return [weights | new for weights, new in zip(towers, changed, strict=True)]


def tokens(weights: dict[str, Tensor], pixels: Tensor, eps: float, act: Callable[[Tensor], Tensor] = F.gelu) -> Tensor:
    """Tokens (B, 1 + n, D) after the last block, by torch's own encoder layers."""
    x = F.conv2d(pixels, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], PATCH)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + weights["pos_embed"]
    if "pos_drop.weight" in weights:
        x = F.layer_norm(x, (WIDTH,), weights["pos_drop.weight"], weights["pos_drop.bias"], eps)
    names = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    for n in range(DEPTH):
        layer = nn.TransformerEncoderLayer(WIDTH, WIDTH // 64, HIDDEN, 0.0, act, eps, batch_first=True, norm_first=True)
        pairs = [(here + kind, there + kind) for here, there in names.items() for kind in ("weight", "bias")]
        layer.load_state_dict({here: weights[f"blocks.{n}.{there}"] for here, there in pairs})
        x = layer.train()(x)  # no dropout; in evaluation it takes a fused kernel with a gelu of its own
    return x.detach()
