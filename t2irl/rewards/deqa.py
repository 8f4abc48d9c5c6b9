"""DeQA-Score: how good a picture looks, by a vision-language model tuned on the opinions of many (arXiv 2501.11561)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reward_models.deqa import DeqaScorer
from t2irl.models.base import DTYPES
from t2irl.rewards.base import Reward, reading
from t2irl.types import PromptGroups


class Deqa(Reward):
    """1 (bad) to 5 (excellent). It does not read the prompt, so it is best held out. Seven billion parameters: often best behind
    `t2irl serve-reward`.

    Hacked by pictures with little in them, sharp and evenly lit, where there is nothing to find fault with.
    """

    class Config(Reward.Config):
        """Settings."""

        type: Literal["deqa"] = "deqa"
        path: Path = Path("models/DeQA-Score-Mix3")
        """Folder of zhiyuanyou/DeQA-Score-Mix3; no code in it is run."""
        precision: Literal["fp32", "bf16"] = "bf16"
        """Dtype of the network. Published: half precision of the other kind, fp16."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        with reading(config):
            self.scorer = DeqaScorer.load(config.path, device, DTYPES[config.precision])

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """The expected level of each picture, (B,) float32."""
        return self.scorer.score(images)
