"""What people prefer, learned beforehand from their judgements: fixed during RL."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reward_models.preference import PreferenceModel
from t2irl.errors import ConfigError, DataError
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups


class Preference(Reward):
    """Log-odds by which a picture is preferred to an average one of those that were judged; unbounded.

    Hacked by pictures unlike any that was judged: the head is sure of itself where nobody looked. Without a CLIP it does not
    read the prompt, and is hacked by the one picture that it likes best, whatever was asked for. Collect judgements of the
    trained policy's pictures and train it anew (docs/preferences.md).
    """

    class Config(Reward.Config):
        """Settings."""

        type: Literal["preference"] = "preference"
        path: Path | None = None
        """Folder that `t2irl prefs train` wrote; needed."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        if config.path is None:
            raise ConfigError(f"reward {config.type}: path is missing; give the folder that `t2irl prefs train` wrote")
        try:
            self.model = PreferenceModel.load(config.path, device)
        except (OSError, ValueError) as error:
            raise DataError(f"reward {config.type}: path = {config.path}: {error}") from error

    @torch.no_grad()
    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Score of each picture for its prompt, (B,) float32."""
        return self.model.score(images, groups.texts)
