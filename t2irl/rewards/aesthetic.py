"""LAION's aesthetic predictor: a linear head on CLIP ViT-L/14."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reward_models.aesthetic import AestheticScorer
from t2irl.errors import ConfigError, DataError
from t2irl.models.base import DTYPES
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups


class Aesthetic(Reward):
    """About 1 to 10, 5 to 7 for good pictures. It does not read the prompt, so it is best held out.

    Hacked at once: painterly haze, warm light, faces and landscapes whatever was asked for.
    """

    class Config(Reward.Config):
        """Settings."""

        type: Literal["aesthetic"] = "aesthetic"
        path: Path = Path("assets/tiny-clip")
        """Folder of openai/clip-vit-large-patch14 in transformers format."""
        head: Path | None = None
        """File of the head, `sac+logos+ava1-l14-linearMSE.pth`; needed."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of the CLIP; the head is float32."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        if config.head is None:
            raise ConfigError("reward aesthetic: head is missing; give head: sac+logos+ava1-l14-linearMSE.pth")
        try:
            self.scorer = AestheticScorer.load(config.path, config.head, device, DTYPES[config.precision])
        except (OSError, ValueError) as error:
            raise DataError(f"reward aesthetic: path = {config.path}, head = {config.head}: {error}") from error

    @torch.no_grad()
    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """How each picture looks, (B,) float32."""
        return self.scorer.score(images)
