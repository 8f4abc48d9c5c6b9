"""mPLUG-Owl2 (arXiv 2311.04257), which transformers does not have, under the names of its published weights.

A Llama whose keys, values and normalisations are other ones for tokens of the picture than for words, behind an image encoder
whose tokens a few learned queries summarise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448,
    "patch_size": 14, "layer_norm_eps": 1e-6,
}  # fmt: skip
ABSTRACTOR = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_learnable_queries": 64, "encoder_hidden_size": 1024, "grid_size": 32, "layer_norm_eps": 1e-6,
}  # fmt: skip
"""Of the published network, where its config.json does not say."""

NOT_LLAMAS = ("model_type", "architectures", "auto_map", "visual_config", "torch_dtype", "transformers_version")


def mplug_owl2(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LlamaForCausalLM:
    """The network of a config.json, made of these tensors. Raises KeyError or RuntimeError when they do not fit.

    It takes embeddings of words and of the picture, which `model.vision_model` and then `model.visual_abstractor` give.
    """
    llama = LlamaConfig(**{k: v for k, v in config.items() if v is not None and k not in NOT_LLAMAS})
    visual = config.get("visual_config") or {}
    with torch.device("meta"):  # seven billion numbers need not be drawn first
        model: Any = LlamaForCausalLM(llama)
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj, attention.v_proj = Multiway(attention.k_proj), Multiway(attention.v_proj)
            layer.input_layernorm = Multiway(layer.input_layernorm)
            layer.post_attention_layernorm = Multiway(layer.post_attention_layernorm)
        model.model.vision_model = VisionModel(VISION | visual.get("visual_model", {}))
        model.model.visual_abstractor = Abstractor(ABSTRACTOR | visual.get("visual_abstractor", {}), llama.hidden_size)
    model.load_state_dict({k: v for k, v in weights.items() if not k.endswith(".inv_freq")}, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(llama)
    return model


class Multiway(nn.Module):
    """A module twice: the first for words, the second for the tokens of the picture."""

    picture = slice(0, 0)
    """Where the picture is, the same in every row."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.multiway = nn.ModuleList([module, copy.deepcopy(module)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, D) -> (B, tokens, D')."""
        words, picture = self.multiway
        a, b = self.picture.start, self.picture.stop
        return torch.cat([words(x[:, :a]), picture(x[:, a:b]), words(x[:, b:])], 1)


class VisionModel(nn.Module):
    """The image encoder: CLIP's layout, with one matrix for queries, keys and values of each head in turn."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.size: int = config["image_size"]
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = _Embeddings(width, config["patch_size"], self.size, eps)
        layers = (_VisionLayer(config) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, 1 + patches, D)."""
        x = self.embeddings(pixels)
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            x = layer(x)
        return self.post_layernorm(x)


class _Embeddings(nn.Module):
    def __init__(self, width: int, patch: int, size: int, eps: float):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width))
        self.pre_layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        return self.pre_layernorm(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.position_embedding)


class _VisionLayer(nn.Module):
    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        width, hidden, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.heads: int = config["num_attention_heads"]
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn = nn.ModuleDict(
            {"query_key_value": nn.Linear(width, 3 * width), "dense": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        parts = self.self_attn["query_key_value"](self.input_layernorm(x)).unflatten(-1, (self.heads, 3, -1))
        x = x + self.self_attn["dense"](_attend(*(part.transpose(1, 2) for part in parts.unbind(3))))
        y = self.mlp["fc1"](self.post_attention_layernorm(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))


class Abstractor(nn.Module):
    """Learned queries that look at the tokens of the encoder, and what the Llama sees of them."""

    def __init__(self, config: Mapping[str, Any], width: int):
        """`width`: of the Llama."""
        super().__init__()
        own, queries = config["hidden_size"], config["num_learnable_queries"]
        self.tokens: int = queries + 1
        """Tokens of a picture."""
        self.query_embeds = nn.Parameter(torch.empty(1, queries, own))
        layers = (nn.ModuleDict({"crossattention": _Cross(config)}) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.visual_fc = nn.Linear(own, width)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, width))

    def forward(self, seen: Tensor) -> Tensor:
        """(B, 1 + patches, D) -> (B, tokens, width)."""
        x = self.query_embeds.expand(len(seen), -1, -1)
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            x = layer["crossattention"](x, seen)
        return torch.cat([self.visual_fc(x), self.vit_eos.expand(len(x), -1, -1)], 1)


class _Cross(nn.Module):
    """Queries look at themselves and at the picture; what is added to them is added to their normalised form."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        width, theirs, hidden = config["hidden_size"], config["encoder_hidden_size"], config["intermediate_size"]
        self.heads: int = config["num_attention_heads"]
        self.norm1, self.normk = nn.LayerNorm(width), nn.LayerNorm(theirs)
        self.attention = nn.Module()
        self.attention.query = nn.Linear(width, width)
        self.attention.key, self.attention.value = nn.Linear(theirs, width), nn.Linear(theirs, width)
        places = {"q_pos_embed": config["num_learnable_queries"], "k_pos_embed": config["grid_size"] ** 2 + 1}
        for name, count in places.items():  # sines and cosines that the files hold
            self.attention.register_buffer(name, torch.empty(count, width))
        self.output = nn.Module()
        self.output.out_proj, self.output.norm2 = nn.Linear(width, width), nn.LayerNorm(width)
        self.output.mlp = nn.ModuleDict({f"w{k}": nn.Linear(width, hidden) for k in (1, 3)})
        self.output.mlp["w2"] = nn.Linear(hidden, width)
        self.output.mlp["ffn_ln"] = nn.LayerNorm(hidden, config["layer_norm_eps"])

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        look: Any = self.attention
        give: Any = self.output
        x, seen = self.norm1(x), torch.cat([self.norm1(x), self.normk(seen)], 1)
        places = torch.cat([look.q_pos_embed, look.k_pos_embed])
        parts = look.query(x + look.q_pos_embed), look.key(seen + places), look.value(seen)
        x = x + give.out_proj(_attend(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)))
        y = give.norm2(x)
        return x + give.mlp["w2"](give.mlp["ffn_ln"](F.silu(give.mlp["w1"](y)) * give.mlp["w3"](y)))


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(B, heads, tokens, d) each -> (B, tokens, heads x d)."""
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
