"""Sana."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

from .text import write

WIDTH = 16
"""Of the text encoder."""


def make_sana(folder: Path) -> Path:
    """A SanaPipeline with the multistep scheduler and the shift of the genuine one."""
    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *(chr(k) for k in range(33, 127))]
    symbols += sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(symbols))
    tokenizer = GemmaTokenizerFast(vocab={s: k for k, s in enumerate(symbols)}, merges=[])

    def networks() -> dict[str, Any]:
        transformer = SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
            sample_size=32,
        )  # fmt: skip
        decoder = AutoencoderDC(
            latent_channels=4, attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
            scaling_factor=0.41,
        )  # fmt: skip
        text = {
            "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048,
            "query_pre_attn_scalar": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        }  # fmt: skip
        return {"transformer": transformer, "vae": decoder, "text_encoder": Gemma2Model(Gemma2Config(**text))}

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++", solver_order=2
    )  # fmt: skip
    return write(folder, SanaPipeline, networks, scheduler=scheduler, tokenizer=tokenizer)
