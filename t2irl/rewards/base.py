"""The interface of a reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from t2irl.config import Strict
from t2irl.types import PromptGroups


class Reward:
    """Scores images for their prompts; higher is better.

    A subclass stands alone in `t2irl/rewards/<type>.py`, brings its own `Config` and is built as
    `Reward(config, device)`. Nothing is loaded before that.
    """

    class Config(Strict):
        """Settings that every reward has."""

        type: str
        """File name in `t2irl/rewards/`, or `package.module:Class`."""
        weight: float = 1.0
        """Factor of this reward in the sum that is trained on; ignored for held-out rewards."""

    may_skip = False
    """Whether NaN is a legal score, meaning 'does not apply to this image'."""

    def __init__(self, config: Any, device: torch.device):
        self.config, self.device = config, device

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Score `images`, (B, 3, H, W) float32 in [0, 1] on `device`, for `groups.texts`: (B,) float32."""
        raise NotImplementedError

    def update(self, images: Tensor, groups: PromptGroups) -> dict[str, float]:
        """Learn from a rollout (adversaries only); returns metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must be saved with the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
