"""Tokenizers that are trained on a few words, and text encoders with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_TOKENS = 16
"""Length of a CLIP prompt; 77 in a real model."""
CLIP_WIDTHS = (16, 24)
"""Widths of the two CLIP text encoders, different as those of CLIP-L and CLIP-G are."""
JOINT_WIDTH = 48
"""Width of the text tokens that the transformer sees: at least the two CLIP widths together, equal to T5's."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""The part of Qwen3's chat template that a text prompt meets."""
WORDS = ("a red circle", "a large blue square", "two green triangles on a white background", "a photo of the night sky")


def clip(width: int, tokenizer: CLIPTokenizer, projection: bool = True) -> nn.Module:
    """A CLIP text encoder of two layers, with or without the projection of its pooled output."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CLIP_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5() -> T5EncoderModel:
    """A T5 encoder of two layers."""
    config = T5Config(
        vocab_size=160, d_model=JOINT_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Move biases and norm scales away from 0 and 1, so that outputs depend on every parameter and on every input."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.mul_(1.5)


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of the 256 bytes and a few words, written to `folder`. Any text gives tokens."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(WORDS, trainer)
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    vocab = {s: i for i, s in enumerate(dict.fromkeys([*symbols, "<|startoftext|>", "<|endoftext|>"]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=CLIP_TOKENS, pad_token="<|endoftext|>")


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer whose pieces are the printable ASCII characters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(i) for i in range(33, 127))]
    unigram = Tokenizer(models.Unigram([(p, -2.0 if i > 2 else 0.0) for i, p in enumerate(pieces)], unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.add_special_tokens([AddedToken(p, special=True) for p in pieces[:3]])
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=unigram, extra_ids=0)


def qwen_tokenizer() -> Qwen2TokenizerFast:
    """A Qwen tokenizer of the 256 bytes, with the marks of a conversation and the template of a Qwen3."""
    vocab = {symbol: k for k, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2TokenizerFast(vocab=vocab, merges=[], chat_template=TEMPLATE)
    tokenizer.add_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def qwen_settings(width: int, tokenizer: Qwen2TokenizerFast) -> dict[str, Any]:
    """What the language models of Qwen2.5-VL and Qwen3 have in common."""
    return {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": width // 2, "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip


def write(folder: Path, pipeline: type, networks: Callable[[], Mapping[str, nn.Module]], **others: Any) -> Path:
    """Save a pipeline of random networks and other parts; equal arguments give equal weights. Returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = networks()
        for part in parts.values():
            randomise(part)
    pipeline(**parts, **others).save_pretrained(folder)
    return folder
