"""A light classifier of artifacts, trained beforehand: fixed during RL."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reward_models.artifact import ArtifactClassifier
from t2irl.errors import DataError
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups


class Artifact(Reward):
    """Calibrated probability that a picture shows no artifact: in [0, 1], 1 is clean. The prompt does not matter.

    Hacked by clean pictures of something else: an empty canvas is clean. Hold a measure of prompt following beside it, or let it
    gate (docs/artifact_reward.md), so that nothing is paid for being cleaner than the base model.
    """

    class Config(Reward.Config):
        """Settings."""

        type: Literal["artifact"] = "artifact"
        path: Path = Path("assets/tiny-artifact")
        """Folder that `reward_models/recipes/train_artifact.py` wrote, or that a run with `artifact_adaptive` exported."""
        output: Literal["probability", "logit"] = "probability"
        """The probability, or its log-odds, which still tell very clean from clean where the probability is flat."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        try:
            self.classifier = ArtifactClassifier.load(config.path, device)
        except (OSError, ValueError) as error:
            raise DataError(f"reward {config.type}: path = {config.path}: {error}") from error

    @torch.no_grad()
    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """How clean each picture is, (B,) float32."""
        logits = -self.classifier.logits(images) / self.classifier.design.temperature
        return logits if self.config.output == "logit" else torch.sigmoid(logits)
