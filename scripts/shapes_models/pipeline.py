"""A trained base model as a folder that StableDiffusion3Pipeline loads, and what the stock pipeline draws with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from shapes_models.sd3 import SHIFT, Policy
from shapes_models.text import TEXT_WIDTH
from t2irl.shapes.captions import sample_captions
from t2irl.shapes.verify import verify


def null_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder whose output is exactly zero, and a tokenizer for it.

    StableDiffusion3Pipeline.from_pretrained wants a T5 unless told otherwise in the call; this one gives what the pipeline
    would put in its place. Its last normalisation has weight 0.
    """
    letters = [(chr(c), -2.0) for c in range(ord("a"), ord("z") + 1)]
    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *letters], extra_ids=0
    )
    config = T5Config(vocab_size=32, d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def write_sd3(folder: Path, policy: Policy, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
    """The pipeline folder, weights in float16."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    t5, t5_tokenizer = null_t5()
    pipe = StableDiffusion3Pipeline(
        transformer=policy.transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=vae,
        text_encoder=policy.text_encoder, tokenizer=tokenizer, text_encoder_2=policy.text_encoder_2, tokenizer_2=tokenizer,
        text_encoder_3=t5, tokenizer_3=t5_tokenizer,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    # Read without a dtype, transformers would keep float16 where diffusers takes float32.
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def stock_pictures(folder: Path, t5_zeros: int, guidance: float, n: int) -> tuple[Tensor, list[str]]:
    """Pictures (n, 3, 64, 64) of held-out captions, four kinds with equal chance, by the stock pipeline in 10 steps; the captions."""
    absent = {} if t5_zeros else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    texts = [c.text for c in sample_captions(n, np.random.default_rng(13), heldout=True)]
    generator, pictures = torch.Generator().manual_seed(17), []
    for i in range(0, n, 128):
        call = dict(num_inference_steps=10, guidance_scale=guidance, max_sequence_length=t5_zeros, output_type="pt")
        pictures.append(pipe(texts[i : i + 128], generator=generator, **call).images)
    return torch.cat(pictures), texts


def measure(folder: Path, t5_zeros: int, guidance: float, n: int = 1024) -> dict[str, float]:
    """Mean gold scores of `stock_pictures`."""
    return {
        name: values.mean().item() for name, values in verify(*stock_pictures(folder, t5_zeros, guidance, n)).items()
    }
