"""KL divergence to another policy, in closed form per transition (two Gaussians of equal variance)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from t2irl.dynamics.base import KLKind, kl
from t2irl.policy import Policy
from t2irl.regularizers.base import Regularizer
from t2irl.types import MicroBatch, Prediction


class Kl(Regularizer):
    """coefficient x mean over transitions of the divergence named by `kind` (see `t2irl.dynamics.base.kl`)."""

    class Config(Regularizer.Config):
        """Settings."""

        type: Literal["kl"] = "kl"
        coefficient: PositiveFloat = 0.04
        """Weight. Published with `no_dt`: 0.04 for GenEval and OCR, 0.01 for PickScore."""
        anchor: Literal["reference", "average"] = "reference"
        """Distance from what: the reference policy, or the running average of the policy itself (AWM's proximal term), which
        slows the policy down without tying it to where it began."""
        kind: KLKind = "exact"
        """exact: the divergence. no_dt: times the step's length (Flow-GRPO's code). mean_mse, v_mse: squared distance of the
        transition means or of the velocities."""

        @property
        def needs_average(self) -> bool:
            """Whether it measures the distance from the average."""
            return self.anchor == "average"

    needs_all_images = True

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """The weighted divergence; one more forward pass, without gradient."""
        with torch.no_grad(), policy.reference() if self.config.anchor == "reference" else policy.averaged():
            anchor = policy.predict(batch)
        divergence = kl(
            self.config.kind, prediction.mean, anchor.mean, prediction.std, batch.t - batch.t_next,
            prediction.velocity, anchor.velocity,
        )  # fmt: skip
        return self.config.coefficient * divergence.sum() * batch.share
