"""The interface of a regulariser: three hooks, each a no-op by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from t2irl.config import Run, Strict
from t2irl.policy import Policy
from t2irl.types import Clock, MicroBatch, Prediction, Rollout

if TYPE_CHECKING:
    from t2irl.train import Parts


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

        def problem(self, run: Run) -> str | None:
            """What in the rest of the run does not fit it, as the end of a sentence that its name begins; None if all does."""
            needs = "needs the running average of the policy: set policy.ema"
            return needs if self.needs_average and run.policy.ema is None else None

    comes_first = False
    """Whether its `shape` is called before that of others, because it replaces advantages instead of changing them."""

    needs_all_images = False
    """Whether its loss acts on images of zero advantage too, so that they must not be skipped."""

    def __init__(self, config: Any):
        self.config = config

    @classmethod
    def check(cls, name: str, config: Any, prompts: Sequence[str]) -> None:
        """Look, cheaply, at the files that belong to the `prompts` trained on, before anything is loaded; on all processes
        alike. Raises DataError as `prepare` would.
        """

    def prepare(self, name: str, parts: Parts) -> None:
        """Called once, before the state of a checkpoint is restored: its name in the config, and what the run is built from."""

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Change this process's advantages (B,) float32. Called once an iteration, on all processes alike; what depends on
        the whole rollout is decided on gathered tensors, as those of `rollout` are, so that all processes decide the same.
        """
        return advantages

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """A scalar to add: a sum over transitions times `batch.share`."""
        return None

    def after_update(self, policy: Policy, clock: Clock) -> None:
        """Called after every optimiser step."""

    def metrics(self) -> dict[str, float]:
        """Numbers of the iteration that just ended, equal on all processes; logged as `regularizer/<name>/<key>`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must be saved with the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
