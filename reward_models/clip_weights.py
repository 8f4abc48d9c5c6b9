"""Weights of open_clip (and of OpenAI's CLIP) as a transformers CLIPModel, so that one forward pass serves all of them."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
"""Width of an image tower -> width of its attention heads, where that is not 64: ViT-H, ViT-g, ViT-bigG."""
PARTS = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("ln_final.", "text_model.final_layer_norm."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
)
"""Names there -> names here."""
WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "logit_scale": "logit_scale",
}


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a torch checkpoint, from which no code is run. Raises OSError or ValueError."""
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            # Many checkpoints keep their settings beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{file.name} cannot be read as weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(f"{file.name} holds {type(found).__name__}, expected weights by name")
    return {str(k).removeprefix("module."): v for k, v in found.items() if isinstance(v, Tensor)}


def clip_from_open_clip(weights: Mapping[str, Tensor], quick_gelu: bool = False) -> CLIPModel:
    """A CLIPModel with these weights; its shape is read off them. Raises ValueError when some are absent or do not fit.

    `quick_gelu`: the activation of OpenAI's own models; those trained with open_clip mostly have the plain one.
    """
    try:
        config = _config(weights, quick_gelu)
        model = CLIPModel(config)
        missing, unexpected = model.load_state_dict(_renamed(weights), strict=False)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"not the weights of a CLIP with a plain vision transformer: {error}") from error
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing or unexpected:
        odd = sorted([*missing, *unexpected])
        raise ValueError(f"not the weights of a plain CLIP: {len(odd)} tensors do not fit, such as {odd[0]}")
    return model


def _config(weights: Mapping[str, Tensor], quick_gelu: bool) -> CLIPConfig:
    def layers(prefix: str) -> int:
        return 1 + max(
            int(m[1]) for key in weights if (m := re.match(rf"{prefix}transformer\.resblocks\.(\d+)\.", key))
        )

    conv, text = weights["visual.conv1.weight"], weights["token_embedding.weight"]
    width, patch, act = conv.shape[0], conv.shape[-1], "quick_gelu" if quick_gelu else "gelu"
    side = round((weights["visual.positional_embedding"].shape[0] - 1) ** 0.5) * patch
    vision_config = {
        "hidden_size": width, "intermediate_size": weights["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": layers(r"visual\."), "num_attention_heads": max(width // HEAD_WIDTHS.get(width, 64), 1),
        "image_size": side, "patch_size": patch, "hidden_act": act,
    }  # fmt: skip
    text_config = {
        "vocab_size": text.shape[0], "hidden_size": text.shape[1], "max_position_embeddings": weights["positional_embedding"].shape[0],
        "intermediate_size": weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0], "num_hidden_layers": layers(""),
        "num_attention_heads": max(text.shape[1] // 64, 1), "hidden_act": act,
        "bos_token_id": text.shape[0] - 2, "eos_token_id": text.shape[0] - 1,
    }  # fmt: skip
    return CLIPConfig(
        text_config=text_config, vision_config=vision_config, projection_dim=weights["text_projection"].shape[1]
    )


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key
        for there, here in PARTS:
            name = name.replace(there, here) if there.startswith(".") else re.sub(rf"^{re.escape(there)}", here, name)
        if key in WHOLE:
            found[WHOLE[key]] = value
        elif key in ("visual.proj", "text_projection"):
            found["visual_projection.weight" if key == "visual.proj" else "text_projection.weight"] = (
                value.T.contiguous()
            )
        elif ".attn.in_proj_" in name:
            start, _, kind = name.partition(".attn.in_proj_")
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[f"{start}.self_attn.{part}_proj.{kind}"] = rows
        elif key not in ("attn_mask", "input_resolution", "context_length", "vocab_size"):
            found[name] = value
    return found
