"""CLIPScore: does the picture show what the prompt says, in the eyes of a CLIP?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from reward_models.clip import ClipScorer
from t2irl.errors import DataError
from t2irl.models.base import DTYPES
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups


class ClipScore(Reward):
    """factor x max(cosine, 0). Reads the first 77 tokens of a prompt.

    Hacked by written words, repeated objects and adversarial texture.
    """

    class Config(Reward.Config):
        """Settings."""

        type: Literal["clip_score"] = "clip_score"
        path: Path = Path("assets/tiny-clip")
        """Folder of the CLIP. transformers: a CLIPModel with tokenizer and preprocessor_config.json. open_clip: one file of
        weights, and vocab.json and merges.txt of a CLIP tokenizer."""
        layout: Literal["transformers", "open_clip"] = "transformers"
        """How the folder is laid out."""
        quick_gelu: bool = False
        """With `layout: open_clip`: the activation of OpenAI's own weights."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of the network."""
        factor: PositiveFloat = 2.5
        """Published: 2.5 for ViT-B/32; torchmetrics and DrawBench tables use 100."""

        @model_validator(mode="after")
        def _activation_is_of_open_clip(self) -> ClipScore.Config:
            if self.quick_gelu and self.layout != "open_clip":
                raise PydanticCustomError(
                    "clip", "quick_gelu belongs to layout: open_clip; a transformers folder says itself what it has"
                )
            return self

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        try:
            self.scorer = self._load()
        except (OSError, ValueError) as error:
            raise DataError(f"reward {config.type}: path = {config.path}: {error}") from error

    def _load(self) -> ClipScorer:
        c = self.config
        if c.layout == "open_clip":
            return ClipScorer.load_open_clip(c.path, self.device, DTYPES[c.precision], c.quick_gelu)
        return ClipScorer.load(c.path, self.device, DTYPES[c.precision])

    @torch.no_grad()
    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """The score of each picture, (B,) float32; a prompt is encoded once in a run."""
        return self._of(self.scorer.score(images, groups.texts))

    def _of(self, cosine: Tensor) -> Tensor:
        return self.config.factor * cosine.clamp(min=0)
