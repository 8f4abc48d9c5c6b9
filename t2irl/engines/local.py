"""The rollout in the trainer's own process."""

from __future__ import annotations

from typing import Literal

from t2irl.engines.base import Request, RolloutEngine
from t2irl.rollout import Finished, rollout
from t2irl.types import Trajectory


class Local(RolloutEngine):
    """Draws with the weights that are trained, by the functions that updates use: every first ratio is 1."""

    class Config(RolloutEngine.Config):
        """No settings of its own."""

        type: Literal["local"] = "local"

    here = True

    def generate(self, request: Request, finished: Finished) -> Trajectory:
        """The rollout."""
        r = request
        return rollout(
            self.policy, r.groups, r.levels, r.window, r.noise, r.batch_size, self.policy.guidance_scale, finished
        )
