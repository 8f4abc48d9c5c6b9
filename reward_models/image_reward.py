"""ImageReward v1: BLIP-large reads picture and prompt together, a linear stack rates what it has read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizerFast, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from reward_models.clip_weights import read_weights
from reward_models.linear_stack import LinearStack
from reward_models.pixels import fit_square

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw score over the published data: it is standardised by them."""
TOKENS = 35
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
)
"""Names of BLIP's own code -> names of transformers."""


class ImageRewardScorer:
    """About -2.3 to 2. Pictures are cut to a square of 224 pixels, so that a wide one's sides are not seen."""

    def __init__(
        self, vision: Any, text: Any, head: LinearStack, tokenizer: Any, device: torch.device, dtype: torch.dtype
    ):
        self.vision, self.text = (x.to(device, dtype).requires_grad_(False).eval() for x in (vision, text))
        self.head, self.tokenizer, self.device, self.dtype = head.to(device), tokenizer, device, dtype
        self.size: int = vision.config.image_size
        self.mean, self.std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> ImageRewardScorer:
        """A folder with `ImageReward.pt`, `med_config.json` and the files of BERT's tokenizer. Raises OSError or ValueError."""
        missing = [n for n in ("ImageReward.pt", "med_config.json") if not (folder / n).is_file()]
        if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
            missing.append("vocab.txt of bert-base-uncased")
        if missing:
            raise FileNotFoundError(f"not the folder of ImageReward: it lacks {', '.join(missing)}")
        weights = read_weights(folder / "ImageReward.pt")
        med = json.loads((folder / "med_config.json").read_text(encoding="utf-8"))
        try:
            vision, text = (
                _vision(_below(weights, "blip.visual_encoder.")),
                _text(_below(weights, "blip.text_encoder."), med),
            )
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"ImageReward.pt is not ImageReward v1: {error}") from error
        return cls(
            vision,
            text,
            LinearStack.of(_below(weights, "mlp.")),
            BertTokenizerFast.from_pretrained(folder),
            device,
            dtype,
        )

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> what BLIP sees."""
        images = fit_square(images.to(self.device).float(), self.size)
        return ((images - self.mean) / self.std).to(self.dtype)

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(B,) float32. The prompt is cut after 35 tokens."""
        words = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        seen = self.vision(pixel_values=self.preprocess(images)).last_hidden_state
        read = self.text(
            input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        )  # fmt: skip
        return (self.head(read.last_hidden_state[:, 0].float()) - MEAN) / STD


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _vision(weights: Mapping[str, Tensor]) -> BlipVisionModel:
    conv = weights["patch_embed.proj.weight"]
    width, patch = conv.shape[0], conv.shape[-1]
    config = BlipVisionConfig(
        hidden_size=width, intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0], patch_size=patch,
        image_size=round((weights["pos_embed"].shape[1] - 1) ** 0.5) * patch, num_attention_heads=max(width // 64, 1),
        num_hidden_layers=1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        layer_norm_eps=1e-6,
    )  # fmt: skip
    model, renamed = BlipVisionModel(config), {}
    for key, value in weights.items():
        for there, here in VISION:
            key = re.sub(there, here, key)
        renamed[key] = value
    model.load_state_dict(renamed)
    return model


def _text(weights: Mapping[str, Tensor], med: Mapping[str, Any]) -> BlipTextModel:
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps",
        "max_position_embeddings",
    )  # fmt: skip
    config = BlipTextConfig(
        **{name: med[name] for name in names}, vocab_size=weights["embeddings.word_embeddings.weight"].shape[0],
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BlipTextModel(config, add_pooling_layer=False)
    # Files of older versions hold the numbers of the positions as well.
    model.load_state_dict({k: v for k, v in weights.items() if not k.endswith("position_ids")})
    return model
