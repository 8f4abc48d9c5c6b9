"""Model folders of vision transformers, read into one form.

Three layouts, told apart by their files:

- transformers: `config.json` with a `model_type` of `MODEL_TYPES`, weights, `preprocessor_config.json`;
- timm: `config.json` with an `architecture`, `model.safetensors` (needs the package timm);
- open_clip: `open_clip_config.json`, `open_clip_model.safetensors` (needs the package open_clip_torch).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

MODEL_TYPES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
}
"""`model_type` in config.json -> class of transformers."""
LAYOUTS = "a transformers, timm or open_clip vision model"


@dataclass(frozen=True)
class Network:
    """A vision transformer and where its parts are."""

    model: nn.Module
    """All of it."""
    run: Callable[[Tensor], Any]
    """Puts preprocessed pictures through all blocks; the result is not used."""
    blocks: Sequence[nn.Module]
    """First to last; each gives (B, tokens, width)."""
    norm: nn.Module
    """The final normalisation."""
    pool: Callable[[Tensor], Tensor] | None
    """Normalised tokens -> (B, width), for networks without a CLS token; None: the first token is CLS."""
    prefix: int
    """Tokens before the patches: CLS and registers."""
    width: int
    patch_size: int
    size: int
    """Side of the input in pixels, a multiple of `patch_size`."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_network(folder: Path, size: int | None) -> Network:
    """Read a model folder. `size`: side of the input, None for the folder's own.

    Raises OSError or ValueError saying what is missing or wrong.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder; expected {LAYOUTS}")
    if (folder / "open_clip_config.json").is_file():
        return _open_clip(folder, size)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"not {LAYOUTS}: it has no config.json")
    config = _json(folder / "config.json")
    if "architecture" in config and "model_type" not in config:
        return _timm(folder, config, size)
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"config.json says model_type = {kind!r}; known: {', '.join(MODEL_TYPES)}")
    return _transformers(folder, kind, size)


def _transformers(folder: Path, kind: str, size: int | None) -> Network:
    settings = _json(folder / "preprocessor_config.json")
    mean, std = _normalisation(settings, "image_mean", "image_std", "preprocessor_config.json")
    whole = _from_pretrained(getattr(transformers, MODEL_TYPES[kind]), folder)
    config = whole.config
    model = whole
    if kind in ("clip", "siglip"):
        model, config = whole.vision_model, whole.config.vision_config
    blocks = _part(model, "encoder.layer", "encoder.layers", "model.layer", "layer")
    norm = _part(model, "layernorm", "norm", "post_layernorm")
    pool, prefix = None, 1
    if kind.startswith("siglip"):
        pool, prefix = (_part(model, "head") if config.vision_use_head else _mean), 0
    elif kind in ("dinov2_with_registers", "dinov3_vit"):
        prefix += config.num_register_tokens
    # Position embeddings of the other kinds fit any size by themselves.
    more = {"interpolate_pos_encoding": True} if kind.startswith(("clip", "siglip")) else {}
    own = _side(settings.get("crop_size")) or _side(settings.get("size")) or config.image_size
    return Network(
        model, lambda x: model(pixel_values=x, **more), blocks, norm, pool, prefix, config.hidden_size, config.patch_size,
        _fitting(size, own, config.patch_size), mean, std,
    )  # fmt: skip


def _from_pretrained(model_class: Any, folder: Path) -> Any:
    """The network with all its weights. Raises ValueError when some are absent or do not fit."""
    try:
        model, report = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights cannot be read: {error}") from error
    _refuse_missing(report["missing_keys"])
    return model


def _timm(folder: Path, config: dict[str, Any], size: int | None) -> Network:
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("this is a timm checkpoint, and timm is not installed: pip install 't2irl[timm]'") from error
    name, settings = config["architecture"], config.get("pretrained_cfg") or {}
    mean, std = _normalisation(settings, "mean", "std", "config.json (pretrained_cfg)")
    try:
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **(config.get("model_args") or {}))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"timm cannot build architecture = {name!r} as a vision transformer: {error}") from error
    if not isinstance(model, (timm.models.VisionTransformer, timm.models.Eva)):
        raise ValueError(f"architecture = {name!r} is no plain vision transformer of timm")
    _load_weights(model, folder / "model.safetensors")
    patch, own, prefix = (
        model.patch_embed.patch_size[0],
        settings.get("input_size", (3, 224, 224))[-1],
        model.num_prefix_tokens,
    )
    pool = model.attn_pool if model.attn_pool is not None else _mean
    return Network(
        model, model.forward_features, list(model.blocks),
        model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm,
        None if model.cls_token is not None else lambda tokens: pool(tokens[:, prefix:]),
        prefix, model.embed_dim, patch, _fitting(size, own, patch), mean, std,
    )  # fmt: skip


def _open_clip(folder: Path, size: int | None) -> Network:
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "this is an open_clip checkpoint, and open_clip is not installed: pip install 't2irl[open-clip]'"
        ) from error
    config = _json(folder / "open_clip_config.json")
    model_config, settings = config.get("model_cfg") or {}, config.get("preprocess_cfg") or {}
    mean, std = _normalisation(settings, "mean", "std", "open_clip_config.json (preprocess_cfg)")
    vision = model_config.get("vision_cfg") or {}
    if not isinstance(vision.get("layers", 12), int) or vision.get("timm_model_name") or vision.get("attentional_pool"):
        raise ValueError(
            "open_clip_config.json describes an image tower that is no plain vision transformer of open_clip"
        )
    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}  # built, and thrown away
    quick = bool(model_config.get("quick_gelu", False))
    visual = open_clip.CLIP(model_config["embed_dim"], vision, text, quick_gelu=quick).visual
    _load_weights(visual, folder / "open_clip_model.safetensors", "visual.")
    patch, own = visual.patch_size[0], visual.image_size[0]
    if size not in (None, own):
        raise ValueError(f"size = {size}: position embeddings of open_clip are fixed, here for {own} pixels")
    return Network(
        visual, visual, list(visual.transformer.resblocks), visual.ln_post, None, 1, visual.transformer.width, patch,
        _fitting(None, own, patch), mean, std,
    )  # fmt: skip


def _load_weights(model: nn.Module, file: Path, prefix: str = "") -> None:
    """Fill all of a network from a safetensors file; what else the file holds is left out."""
    if not file.is_file():
        raise FileNotFoundError(f"it has no {file.name}")
    try:
        weights = {k.removeprefix(prefix): v for k, v in load_file(file).items() if k.startswith(prefix)}
        report = model.load_state_dict(weights, strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights cannot be read: {error}") from error
    _refuse_missing(report.missing_keys)


def _refuse_missing(keys: Sequence[str]) -> None:
    if keys:
        raise ValueError(f"the weights lack {len(keys)} tensors, such as {sorted(keys)[0]}")


def _part(model: nn.Module, *names: str) -> Any:
    """The first of several modules that a network has; versions of transformers nest them differently."""
    found = dict(model.named_modules())
    for name in names:
        for full, module in found.items():
            if full == name or full.endswith(f".{name}"):
                return module
    raise ValueError(f"this version of transformers has none of {', '.join(names)} in {type(model).__name__}")


def _mean(tokens: Tensor) -> Tensor:
    return tokens.mean(1)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"it has no {file.name}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds {type(content).__name__}, expected an object")
    return content


def _normalisation(
    settings: dict[str, Any], mean: str, std: str, file: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    absent = [key for key in (mean, std) if len(settings.get(key) or ()) != 3]
    if absent:
        raise ValueError(f"{file} needs three numbers for {' and '.join(absent)}")
    return tuple(settings[mean]), tuple(settings[std])


def _side(value: Any) -> int | None:
    """The side that a `size` of preprocessor_config.json means: a number, height and width, or the shortest edge."""
    if isinstance(value, dict):
        value = value.get("height", value.get("shortest_edge"))
    return int(value) if value else None


def _fitting(wanted: int | None, own: int, patch: int) -> int:
    """The side to use; the folder's own is cut to whole patches, another one must be whole."""
    if wanted is None:
        return max(own // patch, 1) * patch
    if wanted <= 0 or wanted % patch:
        near = max(round(wanted / patch), 1) * patch
        raise ValueError(f"size = {wanted}: patches are {patch} pixels wide, so use a multiple such as {near}")
    return wanted
