"""DeQA-Score (arXiv 2501.11561): mPLUG-Owl2 is asked how good a picture looks, and the word that it would say is weighed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaTokenizerFast

from reward_models.clip_weights import read_weights
from reward_models.mplug_owl2 import Multiway, mplug_owl2
from reward_models.pixels import fit_square
from reward_models.vlm_scores import LEVELS

BEFORE, AFTER = "USER: How would you rate the quality of this image?\n", "\nASSISTANT: The quality of the image is"
"""What stands before and behind the picture."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class DeqaScorer:
    """Expected level, 1 (bad) to 5 (excellent)."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device):
        self.model, self.device = model.to(device).requires_grad_(False).eval(), device
        self.size: int = model.model.vision_model.size
        before, after = tokenizer(BEFORE).input_ids, tokenizer(AFTER).input_ids
        # The two halves are read apart, as published; only the first begins with the token of a beginning.
        self.before, self.after = (torch.tensor(ids, device=device) for ids in (before, after[1:]))
        words = [tokenizer(word).input_ids[1] for word in LEVELS]
        if before[0] != tokenizer.bos_token_id or len(set(words)) < len(words):
            raise ValueError("its tokenizer is not Llama's: it should begin with <s> and tell the five levels apart")
        self.words = torch.tensor(words, device=device)
        start, tokens = len(before), model.model.visual_abstractor.tokens
        for module in model.modules():
            if isinstance(module, Multiway):
                module.picture = slice(start, start + tokens)

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> DeqaScorer:
        """Read a folder of DeQA-Score-Mix3. Raises OSError or ValueError saying what is missing or wrong."""
        missing = [] if (folder / "config.json").is_file() else ["config.json"]
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            missing.append("tokenizer.model")
        files = weight_files(folder)
        missing += ["its weights (*.safetensors or pytorch_model*.bin)"] if not files else []
        missing += [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"not the folder of DeQA-Score: it lacks {', '.join(missing)}")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != "mplug_owl2":
            raise ValueError(
                f"config.json says model_type = {config.get('model_type')!r}, but DeQA-Score is an mplug_owl2"
            )
        if not (folder / "tokenizer.json").is_file() and importlib.util.find_spec("sentencepiece") is None:
            raise ValueError("its tokenizer.model needs the package sentencepiece: pip install 't2irl[deqa]'")
        tokenizer = LlamaTokenizerFast.from_pretrained(folder, local_files_only=True)
        weights = {name: value.to(dtype) for file in files for name, value in read_weights(file).items()}
        try:
            model = mplug_owl2(config, weights)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the weights do not fit config.json: {error}") from error
        return cls(model, tokenizer, device)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, 448, 448): grey beside the picture until it is a square, resized, normalised."""
        images = images.to(self.device).float()
        side = max(images.shape[-2:])
        grey = torch.tensor([int(255 * x) / 255 for x in MEAN], device=self.device).view(1, 3, 1, 1)
        canvas = grey.expand(len(images), 3, side, side).clone()
        top, left = ((side - n) // 2 for n in images.shape[-2:])
        canvas[..., top : top + images.shape[-2], left : left + images.shape[-1]] = images
        mean, std = (torch.tensor(x, device=self.device).view(1, 3, 1, 1) for x in (MEAN, STD))
        return ((fit_square(canvas, self.size) - mean) / std).to(self.model.dtype)

    @torch.no_grad()
    def score(self, images: Tensor) -> Tensor:
        """(B,) float32; the prompt is not read."""
        parts = self.model.model
        seen = parts.visual_abstractor(parts.vision_model(self.preprocess(images)))
        before, after = (parts.embed_tokens(ids).expand(len(images), -1, -1) for ids in (self.before, self.after))
        last = self.model(inputs_embeds=torch.cat([before, seen, after], 1), use_cache=False, logits_to_keep=1)
        levels = torch.arange(len(LEVELS), 0, -1, dtype=torch.float32, device=self.device)
        return last.logits[:, -1, self.words].float().softmax(-1) @ levels


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a transformers folder, by its index if it has one; some may not be there."""
    for pattern, index in (
        ("*.safetensors", "model.safetensors.index.json"), ("pytorch_model*.bin", "pytorch_model.bin.index.json")
    ):  # fmt: skip
        if (folder / index).is_file():
            table = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
            return [folder / name for name in sorted(set(table.values()))]
        if found := sorted(folder.glob(pattern)):
            return found
    return []
