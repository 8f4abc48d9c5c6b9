"""DreamSim (arXiv 2306.09344): how alike two pictures look to people, by vision transformers tuned on their judgements.

The folder is the one that the published package fills: weights of each transformer, and an adapter (LoRA) for all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.clip_weights import read_weights
from reward_models.fingerprint import fingerprint

SIZE = 224
"""Side of what the transformers see: pictures are squeezed into a square, not cut."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
"""File of the adapter: either will do."""
ADAPTER_KEY = re.compile(r"base_model\.model\.extractor_list\.(\d+)\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Branch:
    """One transformer of a variant."""

    file: str
    """Its weights; torch.hub keeps them in `checkpoints/`."""
    take: Literal["cls", "projected", "patches"]
    """The first token of the last block as it is, the same after normalisation and projection, or all tokens as they are."""
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    """Mean and standard deviation of pixels."""
    eps: float = 1e-6
    """Of normalisations."""
    quick: bool = False
    """x sigmoid(1.702 x) instead of GELU."""


def _dino(take: Literal["cls", "patches"]) -> Branch:
    return Branch("dino_vitbase16_pretrain.pth", take)


def _dinov2(take: Literal["cls", "patches"]) -> Branch:
    return Branch("dinov2_vitb14_pretrain.pth", take)


def _clip(name: str) -> Branch:
    return Branch(f"{name}_pretrain.pth.tar", "projected", CLIP, 1e-5, quick=not name.startswith("open"))


VARIANTS: dict[str, tuple[str, tuple[Branch, ...]]] = {
    "ensemble": ("ensemble_lora", (_dino("cls"), _clip("clip_vitb16"), _clip("open_clip_vitb16"))),
    "dino_vitb16": ("dino_vitb16_single_lora", (_dino("cls"),)),
    "dinov2_vitb14": ("dinov2_vitb14_single_lora", (_dinov2("cls"),)),
    "clip_vitb32": ("clip_vitb32_single_lora", (_clip("clip_vitb32"),)),
    "open_clip_vitb32": ("open_clip_vitb32_single_lora", (_clip("open_clip_vitb32"),)),
    "synclr_vitb16": ("synclr_vitb16_single_lora", (Branch("synclr_vit_b_16.pth", "cls"),)),
    "dino_vitb16_patch": ("dino_vitb16_patch_lora", (_dino("patches"),)),
    "dinov2_vitb14_patch": ("dinov2_vitb14_patch_lora", (_dinov2("patches"),)),
}
"""Name -> folder of its adapter, and its transformers in the order in which their features are joined."""


class DreamSim:
    """Embeddings whose cosine is the likeness: the published distance of two pictures is 1 - cosine."""

    def __init__(self, networks: list[tuple[Branch, VisionTransformer]], device: torch.device, dtype: torch.dtype):
        self.branches = [(branch, n.to(device, dtype).requires_grad_(False).eval()) for branch, n in networks]
        self.device, self.dtype = device, dtype

    @classmethod
    def load(
        cls, folder: Path, device: torch.device, variant: str = "ensemble", dtype: torch.dtype = torch.float32
    ) -> DreamSim:
        """Read the files of a variant. Raises OSError or ValueError saying what is missing or wrong."""
        adapter, branches = VARIANTS[variant]
        names = [branch.file for branch in branches] + [f"{adapter}/adapter_config.json", f"{adapter}/{ADAPTER[0]}"]
        files = [_find(folder, branch.file) for branch in branches]
        files += [_find(folder, names[-2]), _find(folder, *(f"{adapter}/{name}" for name in ADAPTER))]
        missing = [name for name, file in zip(names, files, strict=True) if file is None]
        if missing:
            raise FileNotFoundError(f"not the folder of DreamSim's {variant}: it lacks {', '.join(missing)}")
        *towers, config, tensors = (file for file in files if file is not None)
        try:
            settings = json.loads(config.read_text(encoding="utf-8"))
            changes = _adapter(settings, read_weights(tensors), len(branches))
            networks = [_network(*parts) for parts in zip(branches, towers, changes, strict=True)]
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"the files are not those of DreamSim's {variant}: {error}") from error
        return cls(networks, device, dtype)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, 224, 224) in [0, 1]; each transformer normalises them in its own way."""
        images = images.to(self.device).float()
        if images.shape[-2:] == (SIZE, SIZE):
            return images
        return F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)

    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) float32 of pictures (B, 3, H, W) in [0, 1]; differentiable."""
        seen, found = self.preprocess(images), []
        for branch, network in self.branches:
            mean, std = (torch.tensor(x, device=self.device).view(1, 3, 1, 1) for x in branch.pixels)
            found.append(network(((seen - mean) / std).to(self.dtype)).float())
        joined = torch.cat(found, -1)  # (B, D), or (B, tokens, D)
        joined = F.normalize(joined - joined.mean(-1, keepdim=True), dim=-1)
        if joined.dim() == 3:
            joined = F.normalize(torch.cat([joined[:, 0], joined[:, 1:].mean(1)], -1), dim=-1)
        return joined

    def fingerprint(self) -> str:
        """Names the function from pictures to embeddings."""
        weights = {f"{n}.{k}": v for n, (_, net) in enumerate(self.branches) for k, v in net.state_dict().items()}
        return fingerprint([branch for branch, _ in self.branches], weights)


class VisionTransformer(nn.Module):
    """A plain vision transformer under the names of DINO's files, in which DreamSim keeps CLIP as well."""

    def __init__(self, weights: Mapping[str, Tensor], branch: Branch):
        """Its shape is read off the weights. Raises KeyError, RuntimeError or ValueError when they do not fit."""
        super().__init__()
        self.take, weights = branch.take, _folded(weights)
        conv, hidden = weights["patch_embed.proj.weight"], weights["blocks.0.mlp.fc1.weight"].shape[0]
        width, patch = conv.shape[0], conv.shape[-1]
        depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
        if width % HEAD_WIDTH:
            raise ValueError(f"its width is {width}, no multiple of {HEAD_WIDTH}")
        weights["pos_embed"] = _positions(weights["pos_embed"], SIZE // patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token, self.pos_embed = (nn.Parameter(weights[n].clone()) for n in ("cls_token", "pos_embed"))
        # CLIP normalises before its blocks; the files have that under this name.
        clip = branch.take == "projected"
        self.pos_drop = nn.LayerNorm(width, branch.eps) if clip else nn.Identity()
        self.blocks = nn.ModuleList([Block(width, hidden, branch.eps, branch.quick) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, branch.eps)
        if clip:
            self.proj = nn.Parameter(weights["proj"].clone())
        self.load_state_dict(weights)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, 3, 224, 224) -> (B, D), or (B, tokens, D) for `patches`."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = self.pos_drop(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        if self.take == "patches":
            return x
        return self.norm(x[:, 0]) @ self.proj if self.take == "projected" else x[:, 0]


class Block(nn.Module):
    """Attention and two layers, each after a normalisation and added to what came in."""

    def __init__(self, width: int, hidden: int, eps: float, quick: bool):
        super().__init__()
        self.heads, self.quick = width // HEAD_WIDTH, quick
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> the same shape."""
        parts = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, HEAD_WIDTH))
        seen = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        x = x + self.attn["proj"](seen.transpose(1, 2).flatten(2))
        y = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y))


def _find(folder: Path, *names: str) -> Path | None:
    places = (place / name for name in names for place in (folder, folder / "checkpoints"))
    return next((file for file in places if file.is_file()), None)


def _network(branch: Branch, file: Path, change: Mapping[str, Tensor]) -> tuple[Branch, VisionTransformer]:
    """A transformer with its adapter worked in."""
    # SynCLR's file has a word before each name.
    weights = {k.removeprefix("visual."): v.float() for k, v in read_weights(file).items()}
    for name, added in change.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + added
    return branch, VisionTransformer(weights, branch)


def _adapter(config: Mapping[str, Any], tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """What is added to the weights of each transformer, by layer. Raises ValueError."""
    pairs: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(count)]
    for key, value in tensors.items():
        match = ADAPTER_KEY.fullmatch(key)
        if match is None or int(match[1]) >= count:
            raise ValueError(f"the adapter holds {key}, which is none of DreamSim's")
        pairs[int(match[1])].setdefault(match[2], {})[match[3]] = value.float()
    if not all(pairs) or any(len(pair) != 2 for found in pairs for pair in found.values()):
        raise ValueError(
            "the adapter is not complete: it lacks the layers of a transformer, or one of a layer's matrices"
        )
    factor = config["lora_alpha"] / config["r"]
    return [{name: factor * (pair["B"] @ pair["A"]) for name, pair in found.items()} for found in pairs]


def _folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2 scales what each half of a block adds: the same as scaling the last layer of that half."""
    found = {k: v for k, v in weights.items() if ".ls" not in k and k != "mask_token"}
    for key, scale in weights.items():
        for there, layer in ((".ls1.gamma", ".attn.proj"), (".ls2.gamma", ".mlp.fc2")):
            if key.endswith(there):
                name = key.removesuffix(there) + layer
                found[f"{name}.weight"] = found[f"{name}.weight"] * scale[:, None]
                found[f"{name}.bias"] = found[f"{name}.bias"] * scale
    return found


def _positions(table: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n, D) for side x side patches, resized as DINO and DINOv2 do where they are others."""
    own = round((table.shape[1] - 1) ** 0.5)
    if own == side:
        return table
    grid = table[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)
    factor = (side + 0.1) / own  # theirs: so that rounding never loses a row
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)
