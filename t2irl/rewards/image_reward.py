"""ImageReward: BLIP-large tuned on rankings of pictures for a prompt (arXiv 2304.05977)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reward_models.image_reward import ImageRewardScorer
from t2irl.errors import DataError
from t2irl.models.base import DTYPES
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups


class ImageReward(Reward):
    """About -2.3 to 2, standardised over the published data. Reads 35 tokens of the prompt and the middle square.

    Hacked by repeating what the prompt names, and, alone, by pictures that fall apart.
    """

    class Config(Reward.Config):
        """Settings."""

        type: Literal["image_reward"] = "image_reward"
        path: Path = Path("models/ImageReward")
        """Folder with `ImageReward.pt`, `med_config.json`, and vocab.txt of bert-base-uncased."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of BLIP; the head is float32."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        try:
            self.scorer = ImageRewardScorer.load(config.path, device, DTYPES[config.precision])
        except (OSError, ValueError) as error:
            raise DataError(f"reward image_reward: path = {config.path}: {error}") from error

    @torch.no_grad()
    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """How well each picture serves its prompt, (B,) float32."""
        return self.scorer.score(images, groups.texts)
