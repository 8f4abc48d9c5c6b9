"""The interface of a regulariser: three hooks, each a no-op by default."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from t2irl.config import Strict
from t2irl.policy import Policy
from t2irl.types import Clock, MicroBatch, Prediction, Trajectory


class Regularizer:
    """Built as `Regularizer(config)`."""

    class Config(Strict):
        """Settings that every regulariser has."""

        type: str
        """File name in `t2irl/regularizers/`, or `package.module:Class`."""

        @property
        def needs_average(self) -> bool:
            """Whether it needs the running average of the policy, `policy.ema`."""
            return False

    needs_all_images = False
    """Whether its loss acts on images of zero advantage too, so that they must not be skipped."""

    def __init__(self, config: Any):
        self.config = config

    def shape(self, advantages: Tensor, trajectory: Trajectory) -> Tensor:
        """Change this process's advantages (B,) float32."""
        return advantages

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """A scalar to add: a sum over transitions times `batch.share`."""
        return None

    def after_update(self, policy: Policy, clock: Clock) -> None:
        """Called after every optimiser step."""

    def state_dict(self) -> dict[str, Any]:
        """What must be saved with the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
