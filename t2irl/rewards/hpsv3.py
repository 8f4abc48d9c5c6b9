"""HPSv3: human preference by a vision-language model with a head (arXiv 2508.03789)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from reward_models.hpsv3 import HpsV3Scorer
from reward_models.judges import to_pictures
from t2irl.errors import DataError
from t2irl.models.base import DTYPES
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups


class Hpsv3(Reward):
    """Mean rating, about -2 to 12. Seven billion parameters: often best behind `t2irl serve-reward`.

    Hacked by detail and drama everywhere, and by looks at the price of what was asked for.
    """

    class Config(Reward.Config):
        """Settings."""

        type: Literal["hpsv3"] = "hpsv3"
        path: Path = Path("models/HPSv3")
        """Folder of Qwen2-VL-7B-Instruct (config, tokenizer, preprocessor) with `HPSv3.safetensors` in place of its weights, and
        `question.txt`: the text of the published package, with {text_prompt} where the prompt goes."""
        caution: NonNegativeFloat = 0.0
        """Standard deviations that are taken off the mean, where the model is unsure. Published: 0."""
        precision: Literal["fp32", "bf16"] = "bf16"
        """Dtype of the network; the head is float32."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        try:
            self.scorer = HpsV3Scorer.load(config.path, device, DTYPES[config.precision])
        except (OSError, ValueError) as error:
            raise DataError(f"reward hpsv3: path = {config.path}: {error}") from error

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """The rating of each picture for its prompt, (B,) float32."""
        mean, std = self.scorer.score(to_pictures(images), groups.texts)
        return mean - self.config.caution * std
