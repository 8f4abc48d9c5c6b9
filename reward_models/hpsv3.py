"""HPSv3: Qwen2-VL-7B reads picture and prompt, a small head on one token gives mean and spread of how people rate it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2VLModel

from reward_models.clip_weights import read_weights
from reward_models.judges import chat_template, with_room

QUESTION = "question.txt"
"""In the folder: the text that the published package puts behind a picture, word for word; other words are another model."""
PROMPT = "{text_prompt}"
"""Stands for the prompt in it."""
REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28
"""Every picture is brought to about so many pixels."""
WEIGHTS = "HPSv3.safetensors"


class HpsV3Scorer:
    """About -2 to 12; the mean, and the logarithm of the standard deviation."""

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        tokenizer: Any,
        image_processor: Any,
        template: str | None,
        question: str,
        device: torch.device,
    ):
        self.model = model.to(device).requires_grad_(False).eval()
        self.head = head.to(device).float().requires_grad_(False).eval()
        self.tokenizer, self.image_processor, self.template, self.device = tokenizer, image_processor, template, device
        self.question = question
        self.pad: int = model.config.image_token_id
        self.special: int = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        self._typed = "mm_token_type_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16, pixels: int = PIXELS
    ) -> HpsV3Scorer:
        """A folder of Qwen2-VL-7B-Instruct (config, tokenizer, preprocessor) in which `HPSv3.safetensors` replaces its weights.

        Beside them, `question.txt`. Raises OSError or ValueError saying what is missing or wrong.
        """
        needed = (WEIGHTS, "config.json", "preprocessor_config.json", QUESTION)
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"not the folder of HPSv3: it lacks {', '.join(missing)}")
        question = (folder / QUESTION).read_text(encoding="utf-8")
        if any(question.count(part) != 1 for part in (PROMPT, REWARD_TOKEN)):
            raise ValueError(
                f"{QUESTION} should hold {PROMPT} and {REWARD_TOKEN} once each, as the published text does"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        config, weights = AutoConfig.from_pretrained(folder, local_files_only=True), read_weights(folder / WEIGHTS)
        if config.model_type != "qwen2_vl":
            raise ValueError(f"config.json says model_type = {config.model_type!r}, but HPSv3 is a qwen2_vl")
        body, head_weights = _renamed(weights)
        try:
            config.text_config.vocab_size = body["language_model.embed_tokens.weight"].shape[0]
            model, head = Qwen2VLModel._from_config(config, dtype=dtype), _head(head_weights)
            model.load_state_dict(body)
        except (KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"{WEIGHTS} does not fit this Qwen2-VL: {error}") from error
        if len(tokenizer) > config.text_config.vocab_size:
            raise ValueError(f"{WEIGHTS} has {config.text_config.vocab_size} words, but the tokenizer {len(tokenizer)}")
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, min_pixels=pixels, max_pixels=pixels
        )
        return cls(model, head, tokenizer, processor, chat_template(folder), question, device)

    @torch.no_grad()
    def score(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation for each picture and its prompt, (B,) float32 each."""
        seen = self.image_processor(images=list(pictures), return_tensors="pt")
        counts = (seen["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        rows = [with_room(self._words(text), self.pad, [n]) for text, n in zip(texts, counts, strict=True)]
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        inputs = {
            "input_ids": ids, "attention_mask": mask, "image_grid_thw": seen["image_grid_thw"],
            "pixel_values": seen["pixel_values"].to(self.model.dtype),
        }  # fmt: skip
        if self._typed:
            inputs["mm_token_type_ids"] = (ids == self.pad).int()
        states = self.model(**{name: x.to(self.device) for name, x in inputs.items()}).last_hidden_state
        found = self.head(states[(ids == self.special).to(self.device)].float())
        return found[:, 0], found[:, 1].exp()

    def _words(self, text: str) -> list[int]:
        """Tokens of the question about one picture, which comes first."""
        # A prompt that contains the token would be rated twice.
        asked = self.question.replace(PROMPT, text.replace(REWARD_TOKEN, " "))
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}],
            chat_template=self.template, add_generation_prompt=True, return_dict=False,
        )  # fmt: skip


def _renamed(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Names of transformers 4.45, in which the file was written -> today's, without the head of words; and the new head."""
    body: dict[str, Tensor] = {}
    for key, value in weights.items():
        key = re.sub(r"^model\.(visual|language_model)\.", r"\1.", key)
        if not key.startswith(("lm_head.", "rm_head.")):
            body[re.sub(r"^model\.", "language_model.", key)] = value
    return body, {k.removeprefix("rm_head."): v for k, v in weights.items() if k.startswith("rm_head.")}


def _head(weights: Mapping[str, Tensor]) -> nn.Module:
    """Three linear layers with ReLU in between, under the numbers that they have in the file."""
    first, second, last = (weights[f"{n}.weight"].shape for n in (0, 3, 5))
    head = nn.Sequential(
        nn.Linear(first[1], first[0]), nn.ReLU(), nn.Identity(), nn.Linear(second[1], second[0]), nn.ReLU(),
        nn.Linear(last[1], last[0]),
    )  # fmt: skip
    head.load_state_dict(weights)
    return head
