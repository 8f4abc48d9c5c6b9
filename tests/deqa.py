"""A small random mPLUG-Owl2 in the format of DeQA-Score, and what it should say, in float64 and by parts of torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaTokenizer

WIDTH, HEADS, HIDDEN, LAYERS = 32, 4, 48, 2
SEEN, SEEN_HEADS, SEEN_HIDDEN, SIZE, PATCH, GRID = 24, 3, 40, 56, 14, 4
QUERIES, QUERY_HIDDEN = 5, 36
EPS = 1e-5


def tokenizer() -> LlamaTokenizer:
    """Single letters; the five levels begin with tokens of their own."""
    letters = ["▁", *map(chr, range(33, 127))]
    firsts = [f"▁{word[0]}" for word in ("excellent", "good", "fair", "poor", "bad")]
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *firsts]
    return LlamaTokenizer(
        vocab={symbol: k for k, symbol in enumerate(symbols)}, merges=[(first[0], first[1]) for first in firsts],
        add_bos_token=True, add_eos_token=False, legacy=False,
    )  # fmt: skip


class Drawn(dict[str, Tensor]):
    """Random tensors by name."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(8)

    def table(self, name: str, *shape: int, scale: float = 1.0) -> None:
        """Any tensor."""
        self[name] = scale * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, wide: int, narrow: int, bias: bool = True) -> None:
        """Of a linear layer."""
        self.table(f"{name}.weight", narrow, wide, scale=1.5 / wide**0.5)
        if bias:
            self.table(f"{name}.bias", narrow, scale=0.2)

    def norm(self, name: str, width: int, bias: bool = True) -> None:
        """Of a normalisation."""
        self.linear(name, 1, width, bias)
        self[f"{name}.weight"] = 1 + 0.2 * self[f"{name}.weight"][:, 0]


def weights(vocabulary: int) -> dict[str, Tensor]:
    """Every tensor of the published file, small."""
    w = Drawn()
    w.table("model.embed_tokens.weight", vocabulary, WIDTH)
    w.linear("lm_head", WIDTH, vocabulary, bias=False)
    w.norm("model.norm", WIDTH, bias=False)
    for n in range(LAYERS):
        at = f"model.layers.{n}"
        for part in ("q_proj", "o_proj", *(f"{x}_proj.multiway.{k}" for x in "kv" for k in (0, 1))):
            w.linear(f"{at}.self_attn.{part}", WIDTH, WIDTH, bias=False)
        for part in ("input", "post_attention"):
            w.norm(f"{at}.{part}_layernorm.multiway.0", WIDTH, bias=False)
            w.norm(f"{at}.{part}_layernorm.multiway.1", WIDTH, bias=False)
        w.linear(f"{at}.mlp.gate_proj", WIDTH, HIDDEN, bias=False)
        w.linear(f"{at}.mlp.up_proj", WIDTH, HIDDEN, bias=False)
        w.linear(f"{at}.mlp.down_proj", HIDDEN, WIDTH, bias=False)
        at = f"model.vision_model.encoder.layers.{n}"
        w.linear(f"{at}.self_attn.query_key_value", SEEN, 3 * SEEN)
        w.linear(f"{at}.self_attn.dense", SEEN, SEEN)
        w.norm(f"{at}.input_layernorm", SEEN)
        w.norm(f"{at}.post_attention_layernorm", SEEN)
        w.linear(f"{at}.mlp.fc1", SEEN, SEEN_HIDDEN)
        w.linear(f"{at}.mlp.fc2", SEEN_HIDDEN, SEEN)
        at = f"model.visual_abstractor.encoder.layers.{n}.crossattention"
        for part in ("attention.query", "attention.key", "attention.value", "output.out_proj"):
            w.linear(f"{at}.{part}", SEEN, SEEN)
        w.table(f"{at}.attention.q_pos_embed", QUERIES, SEEN)
        w.table(f"{at}.attention.k_pos_embed", GRID * GRID + 1, SEEN)
        for part in ("norm1", "normk", "output.norm2"):
            w.norm(f"{at}.{part}", SEEN)
        w.linear(f"{at}.output.mlp.w1", SEEN, QUERY_HIDDEN)
        w.linear(f"{at}.output.mlp.w3", SEEN, QUERY_HIDDEN)
        w.linear(f"{at}.output.mlp.w2", QUERY_HIDDEN, SEEN)
        w.norm(f"{at}.output.mlp.ffn_ln", QUERY_HIDDEN)
    at = "model.vision_model"
    w.norm(f"{at}.embeddings.pre_layernorm", SEEN)
    w.norm(f"{at}.post_layernorm", SEEN)
    w.table(f"{at}.embeddings.cls_token", 1, 1, SEEN)
    w.table(f"{at}.embeddings.position_embedding", 1, GRID * GRID + 1, SEEN)
    w.table(f"{at}.embeddings.patch_embed.weight", SEEN, 3, PATCH, PATCH, scale=0.1)
    w.table("model.visual_abstractor.query_embeds", 1, QUERIES, SEEN)
    w.linear("model.visual_abstractor.visual_fc", SEEN, WIDTH)
    w.table("model.visual_abstractor.vit_eos", 1, 1, WIDTH)
    return dict(w)


def write_deqa(folder: Path) -> Path:
    """config.json, tokenizer, and weights in two files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    words.save_pretrained(folder)
    visual = {
        "visual_model": {
            "model_type": "mplug_owl_vision_model", "hidden_size": SEEN, "intermediate_size": SEEN_HIDDEN, "image_size": SIZE,
            "num_hidden_layers": LAYERS, "num_attention_heads": SEEN_HEADS, "patch_size": PATCH, "layer_norm_eps": 1e-6,
        },
        "visual_abstractor": {
            "model_type": "mplug_owl_visual_abstract", "hidden_size": SEEN, "intermediate_size": QUERY_HIDDEN, "grid_size": GRID,
            "num_hidden_layers": LAYERS, "num_attention_heads": SEEN_HEADS, "num_learnable_queries": QUERIES,
            "encoder_hidden_size": SEEN, "layer_norm_eps": 1e-6,
        },
    }  # fmt: skip
    config = {
        "architectures": ["MPLUGOwl2LlamaForCausalLM"], "model_type": "mplug_owl2", "vocab_size": len(words),
        "auto_map": {"AutoModelForCausalLM": "modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM"}, "hidden_act": "silu",
        "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "max_position_embeddings": 256, "rms_norm_eps": EPS, "rope_theta": 10000.0,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "visual_config": visual,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights(len(words))
    names, table = list(tensors), {}
    for k, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{k:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


class Oracle:
    """The same network in float64: its own decoder, torch's layers for what looks at the picture."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.w = {name: x.double() for name, x in tensors.items()}

    def picture(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, 3, SIZE, SIZE) -> tokens (B, QUERIES + 1, WIDTH)."""
        seen = self._encoder(pixels.double())
        x = self.w["model.visual_abstractor.query_embeds"].expand(len(pixels), -1, -1)
        for n in range(LAYERS):
            x = self._cross(f"model.visual_abstractor.encoder.layers.{n}.crossattention", x, seen)
        end = self.w["model.visual_abstractor.vit_eos"].expand(len(pixels), -1, -1)
        return torch.cat([self._linear("model.visual_abstractor.visual_fc", x), end], 1)

    def logits(self, before: list[int], picture: Tensor, after: list[int]) -> Tensor:
        """Of the next token, (B, vocabulary)."""
        words = self.w["model.embed_tokens.weight"]
        x = torch.cat([torch.cat([words[before], row, words[after]])[None] for row in picture])
        is_picture = torch.zeros(x.shape[1], dtype=torch.bool)
        is_picture[len(before) : len(before) + picture.shape[1]] = True

        def pick(name: str, y: Tensor) -> Tensor:
            each = [y @ self.w[f"{name}.multiway.{k}.weight"].T for k in (0, 1)]
            return torch.where(is_picture[:, None], each[1], each[0])

        def norm(name: str, y: Tensor) -> Tensor:
            each = [self._rms(y, f"{name}.multiway.{k}") for k in (0, 1)]
            return torch.where(is_picture[:, None], each[1], each[0])

        for n in range(LAYERS):
            layer = f"model.layers.{n}"
            y = norm(f"{layer}.input_layernorm", x)
            q = y @ self.w[f"{layer}.self_attn.q_proj.weight"].T
            seen = self._causal(q, pick(f"{layer}.self_attn.k_proj", y), pick(f"{layer}.self_attn.v_proj", y))
            x = x + seen @ self.w[f"{layer}.self_attn.o_proj.weight"].T
            y = norm(f"{layer}.post_attention_layernorm", x)
            gate, up, down = (self.w[f"{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
        return self._rms(x[:, -1], "model.norm") @ self.w["lm_head.weight"].T

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention to what came before, with places turned into angles of complex numbers."""
        count, d = q.shape[1], WIDTH // HEADS
        angles = torch.arange(count)[:, None] / 10000 ** (torch.arange(0, d, 2).double() / d)
        turn = torch.polar(torch.ones_like(angles), angles)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (HEADS, d)).transpose(1, 2)

        def turned(x: Tensor) -> Tensor:
            first, second = heads(x).chunk(2, -1)
            z = torch.complex(first, second) * turn
            return torch.cat([z.real, z.imag], -1)

        scores = turned(q) @ turned(k).transpose(-1, -2) / d**0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf"))
        return (scores.softmax(-1) @ heads(v)).transpose(1, 2).flatten(2)

    def _encoder(self, pixels: Tensor) -> Tensor:
        at, d = "model.vision_model.embeddings", SEEN // SEEN_HEADS
        x = F.conv2d(pixels, self.w[f"{at}.patch_embed.weight"], stride=PATCH).flatten(2).transpose(1, 2)
        x = torch.cat([self.w[f"{at}.cls_token"].expand(len(x), -1, -1), x], 1) + self.w[f"{at}.position_embedding"]
        x = self._norm(f"{at}.pre_layernorm", x, 1e-6)
        for n in range(LAYERS):
            at = f"model.vision_model.encoder.layers.{n}"
            layer = nn.TransformerEncoderLayer(
                SEEN, SEEN_HEADS, SEEN_HIDDEN, 0.0, lambda y: y * torch.sigmoid(1.702 * y), 1e-6, True, True
            ).double()
            names = {
                "self_attn.out_proj": "self_attn.dense", "linear1": "mlp.fc1", "linear2": "mlp.fc2", "norm1": "input_layernorm",
                "norm2": "post_attention_layernorm",
            }  # fmt: skip
            state = {f"{a}.{kind}": self.w[f"{at}.{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
            for kind in ("weight", "bias"):  # there: head by head; here: all queries, all keys, all values
                mixed = self.w[f"{at}.self_attn.query_key_value.{kind}"].unflatten(0, (SEEN_HEADS, 3, d))
                state[f"self_attn.in_proj_{kind}"] = mixed.transpose(0, 1).flatten(0, 2)
            layer.load_state_dict(state)
            x = layer(x)
        return self._norm("model.vision_model.post_layernorm", x, 1e-6)

    def _cross(self, at: str, x: Tensor, seen: Tensor) -> Tensor:
        x = self._norm(f"{at}.norm1", x)
        both = torch.cat([x, self._norm(f"{at}.normk", seen)], 1)
        own, theirs = (self.w[f"{at}.attention.{name}_pos_embed"] for name in "qk")
        attention = nn.MultiheadAttention(SEEN, SEEN_HEADS, batch_first=True).double()
        parts = [f"{at}.attention.{part}" for part in ("query", "key", "value")]
        attention.load_state_dict(
            {f"in_proj_{kind}": torch.cat([self.w[f"{part}.{kind}"] for part in parts]) for kind in ("weight", "bias")}
            | {f"out_proj.{kind}": self.w[f"{at}.output.out_proj.{kind}"] for kind in ("weight", "bias")}
        )
        x = x + attention(x + own, both + torch.cat([own, theirs]), both)[0]
        y = self._norm(f"{at}.output.norm2", x)
        y = F.silu(self._linear(f"{at}.output.mlp.w1", y)) * self._linear(f"{at}.output.mlp.w3", y)
        return x + self._linear(f"{at}.output.mlp.w2", self._norm(f"{at}.output.mlp.ffn_ln", y, 1e-6))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def _rms(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.w[f"{name}.weight"]
