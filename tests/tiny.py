"""A random StableDiffusion3Pipeline folder that is made in a moment: everything of a real one, only small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
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
VAE_SCALE = 2
"""Pixels by latent."""
WORDS = ("a red circle", "a large blue square", "two green triangles on a white background", "a photo of the night sky")


def make_sd3(
    folder: Path,
    *,
    t5: bool = False,
    drop: tuple[str, ...] = (),
    shift: float = 1.0,
    dynamic_shift: bool = False,
    sample_size: int = 8,
    width: int = 24,
    layers: int = 2,
    qk_norm: Literal["rms_norm"] | None = None,
    dual_attention: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a pipeline with random weights and return its folder; equal arguments give equal weights.

    `drop` names text encoders to leave out ("text_encoder", "text_encoder_2"), with their tokenizers. `sample_size` is the
    side of the latents, a picture's side is twice that. `width` (of the transformer) must be a multiple of 8.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(folder / "tokenizer")
        parts = {
            "transformer": _transformer(sample_size, width, layers, qk_norm, dual_attention),
            "vae": _vae(sample_size),
            "text_encoder": _clip(CLIP_WIDTHS[0], tokenizer),
            "text_encoder_2": _clip(CLIP_WIDTHS[1], tokenizer),
            "text_encoder_3": _t5() if t5 else None,
        }
        for part in parts.values():
            if part is not None:
                _randomise(part)
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": t5_tokenizer() if t5 else None}
    for name in drop:
        parts[name] = tokenizers[name.replace("text_encoder", "tokenizer")] = None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic_shift)
    pipe = StableDiffusion3Pipeline(scheduler=scheduler, **parts, **tokenizers)
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.save_pretrained(folder)
    return folder


def _transformer(
    sample_size: int, width: int, layers: int, qk_norm: str | None, dual_attention: tuple[int, ...]
) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=sample_size, patch_size=2, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=8,
        num_attention_heads=width // 8, joint_attention_dim=JOINT_WIDTH, caption_projection_dim=width,
        pooled_projection_dim=sum(CLIP_WIDTHS), pos_embed_max_size=sample_size, qk_norm=qk_norm,
        dual_attention_layers=dual_attention,
    )  # fmt: skip


def _vae(sample_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=VAE_SCALE * sample_size, scaling_factor=1.5,
        shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip


def _clip(width: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CLIP_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=160, d_model=JOINT_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
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
