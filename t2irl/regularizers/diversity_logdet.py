"""Log-determinant diversity (Submodular RL, arXiv 2307.13372, over the images of a group): credit for what the others lack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from t2irl.algebra.base import base_features
from t2irl.algebra.diversity import kernel, logdet_credit, median_distance
from t2irl.config import Run
from t2irl.guards.auxiliary import Passed, trained_problem
from t2irl.regularizers.base import PictureRegularizer
from t2irl.types import Rollout
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts


class DiversityLogdet(PictureRegularizer):
    """advantage + weight x z-score of D among the group's good images; D_i = log det(I + L) - log det(I + L without i).

    L_ij = q_i q_j k(f_i, f_j), k = exp(-(1 - cosine) / h): the determinant is the volume that the images span, so the credit of an
    image is what it adds to the others. Images that do not pass have q = 0, neither get nor give credit. The z-scores of a group sum to
    0. Hacked by backgrounds and textures that features see and people do not.
    """

    class Config(PictureRegularizer.Config):
        """Settings."""

        type: Literal["diversity_logdet"] = "diversity_logdet"
        weight: PositiveFloat = 0.2
        """What one standard deviation of the credit is worth, in units of the advantage."""
        only: Literal["all", "positive"] = "all"
        """Whose advantage changes: of all images that pass, or, multiplied by 1 + weight x z-score (at least 0), only of those that
        have a positive one."""
        passed: Passed | None = None
        """Which images count, by a reward trained on; needed unless `allow_on_failures`, since odd failures are the most diverse of all."""
        allow_on_failures: bool = False
        """All images count."""
        quality: Literal["equal", "advantage"] = "equal"
        """q of images that pass: 1, or exp(advantage / 2), so that better ones span more."""
        bandwidth: PositiveFloat | None = None
        """h, a cosine distance; null: the median distance of images of a prompt under the base model, measured once."""
        base_prompts: int = Field(default=16, ge=1)
        """Prompts for that, of as many images as a group has."""

        def problem(self, run: Run) -> str | None:
            """No gate and no leave to do without, or a gate that is not there."""
            if self.passed is None:
                needs = "needs passed: {reward: NAME, at: SCORE}, since odd failures are the most diverse images; or set allow_on_failures: true"
                return super().problem(run) if self.allow_on_failures else needs
            if self.allow_on_failures:
                return "has passed and allow_on_failures: true; keep one of them"
            return trained_problem(run, [self.passed.reward], "passed.reward") or super().problem(run)

    def prepare(self, name: str, parts: Parts) -> None:
        """Load the backbone."""
        super().prepare(name, parts)
        self.parts, self.bandwidth = parts, self.config.bandwidth
        self.found: dict[str, float] = {}

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Advantages with the credit added; groups may lie across processes."""
        c, device = self.config, self.device
        if self.bandwidth is None:
            features, ids = base_features(self.parts, self.features, c.base_prompts)
            self.bandwidth = median_distance(features, ids)
        features = distributed.gather_rows(self.features(rollout.trajectory.images), device)
        everyone = distributed.gather_rows(advantages, device).double()
        good = torch.ones(len(everyone), dtype=torch.bool)
        if c.passed is not None:
            good = rollout.scores[c.passed.reward].double() > c.passed.at  # NaN does not pass
        quality = (everyone / 2).exp() if c.quality == "advantage" else torch.ones_like(everyone)
        gain, z = logdet_credit(kernel(features, self.bandwidth), quality.where(good, 0.0), rollout.ids)
        if c.only == "all":
            shaped = everyone + c.weight * z
        else:
            shaped = everyone.where(everyone <= 0, everyone * (1 + c.weight * z).clamp_min(0))
        self.found = {
            "gain": float(gain[good].mean()) if good.any() else 0.0,
            "passed": float(good.double().mean()),
            "bandwidth": self.bandwidth,
        }
        return shaped[rollout.own].to(advantages)

    def metrics(self) -> dict[str, float]:
        """Mean credit of the images that pass, their share, and the bandwidth."""
        return self.found

    def state_dict(self) -> dict[str, Any]:
        """The bandwidth, once it was measured."""
        return {} if self.bandwidth is None else {"bandwidth": self.bandwidth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it, unless the config says another one."""
        self.bandwidth = self.config.bandwidth or state["bandwidth"]
