"""The tiny SD3 of the tests, and what they must know of it."""

from scripts.tiny_models.sd3 import VAE_SCALE, make_sd3
from scripts.tiny_models.text import CLIP_TOKENS, CLIP_WIDTHS, JOINT_WIDTH, WORDS, clip_tokenizer, t5_tokenizer

__all__ = [
    "CLIP_TOKENS", "CLIP_WIDTHS", "JOINT_WIDTH", "VAE_SCALE", "WORDS", "clip_tokenizer", "make_sd3", "t5_tokenizer"
]  # fmt: skip
