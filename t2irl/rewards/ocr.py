"""Legible text: what a recogniser reads against what the prompt puts in quotes (Flow-GRPO, arXiv 2505.05470)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from reward_models.ocr import legibility, make_reader, wanted_text
from t2irl.errors import ConfigError, DataError
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups


class Ocr(Reward):
    """In [0, 1]: 1 if the wanted text can be read, less by the characters that are wrong.

    Hacked by text all over the picture, since more text costs nothing unless `extra` says so, and by plain letters on an
    empty ground; hold a measure of looks beside it.
    """

    class Config(Reward.Config):
        """Settings."""

        type: Literal["ocr"] = "ocr"
        engine: Literal["rapidocr", "paddleocr"] = "rapidocr"
        """The recogniser. Both read with PaddleOCR's networks; rapidocr needs no paddle and brings its weights along."""
        extra: NonNegativeFloat = 0.0
        """What each character too many costs, in shares of the wanted text. Published: 0."""
        missing: Literal["error", "skip"] = "error"
        """A prompt without quoted text stops the run, or its images are not scored by this reward."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.may_skip = config.missing == "skip"
        try:
            self.read = make_reader(config.engine)
        except ImportError as error:
            raise ConfigError(f"reward ocr: {error}") from error

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """How well each picture's text can be read, (B,) float32; NaN where none is wanted."""
        pixels = images.float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()
        scores = []
        for picture, prompt in zip(pixels.numpy(), groups.texts, strict=True):
            wanted = wanted_text(prompt)
            if wanted is None and not self.may_skip:
                raise DataError(
                    f"reward ocr: the prompt {prompt!r} has no text in double quotes; take it out, or set missing: skip"
                )
            scores.append(float("nan") if wanted is None else legibility(self.read(picture), wanted, self.config.extra))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)
