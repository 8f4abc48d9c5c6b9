"""A learned proxy: cosine between picture and prompt under a CLIP that has seen few pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reward_models.clip import ClipScorer
from t2irl.errors import DataError
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups


class TinyClip(Reward):
    """Cosine in [-1, 1]. Hacked by adversarial texture and repeated objects."""

    class Config(Reward.Config):
        """Settings."""

        type: Literal["tiny_clip"] = "tiny_clip"
        path: Path = Path("assets/tiny-clip")
        """Folder of a transformers CLIPModel with its tokenizer and preprocessor_config.json."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        try:
            self.scorer = ClipScorer.load(config.path, device)
        except (OSError, ValueError) as error:
            raise DataError(f"reward tiny_clip: path = {config.path}: {error}") from error

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Cosine of each picture, of any size, and its prompt: (B,) float32."""
        return self.scorer.score(images, groups.texts)
