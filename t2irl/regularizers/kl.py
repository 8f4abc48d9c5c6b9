"""KL divergence to another policy, in closed form per transition (two Gaussians of equal variance)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from t2irl import registry
from t2irl.config import Run
from t2irl.dynamics.base import KLKind, kl
from t2irl.policy import Policy
from t2irl.regularizers.adaptive_reference import AdaptiveReference
from t2irl.regularizers.base import Regularizer
from t2irl.types import MicroBatch, Prediction

if TYPE_CHECKING:
    from t2irl.train import Parts


class Kl(Regularizer):
    """coefficient x mean over transitions of the divergence named by `kind` (see `t2irl.dynamics.base.kl`)."""

    class Config(Regularizer.Config):
        """Settings."""

        type: Literal["kl"] = "kl"
        coefficient: PositiveFloat = 0.04
        """Weight. Published with `no_dt`: 0.04 for GenEval and OCR, 0.01 for PickScore."""
        anchor: str = "reference"
        """Distance from what: `reference`, the reference policy; `average`, the running average of the policy itself (AWM's
        proximal term), which slows the policy down without tying it to where it began; or the name of a regulariser of type
        adaptive_reference."""
        kind: KLKind = "exact"
        """exact: the divergence. no_dt: times the step's length (Flow-GRPO's code). mean_mse, v_mse: squared distance of the
        transition means or of the velocities."""

        @property
        def needs_average(self) -> bool:
            """Whether it measures the distance from the average."""
            return self.anchor == "average"

        def problem(self, run: Run) -> str | None:
            """An anchor that is not there, or a kind without meaning."""
            adaptive = [name for name, c in run.regularizers.items() if c.type == "adaptive_reference"]
            if self.anchor not in ("reference", "average", *adaptive):
                known = registry.did_you_mean(self.anchor, ["reference", "average", *adaptive])
                return (
                    f"has anchor {self.anchor!r}, which is neither reference nor average nor a regulariser of type "
                    f"adaptive_reference ({', '.join(adaptive) or 'there is none'}).{known}"
                )
            if self.kind == "no_dt" and not registry.find("dynamics", run.rollout.dynamics.type).recorded:
                return (
                    f"has kind no_dt, which needs the steps of a rollout, but rollout.dynamics.type = {run.rollout.dynamics.type} "
                    "trains on no steps: use kind: v_mse, or exact"
                )
            return super().problem(run)

    needs_all_images = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.adaptive: AdaptiveReference | None = None

    def prepare(self, name: str, parts: Parts) -> None:
        """Find the adaptive reference policy, if that is the anchor."""
        if self.config.anchor not in ("reference", "average"):
            self.adaptive = parts.regularizers[self.config.anchor]  # type: ignore[assignment]

    def divergence(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor:
        """Of each transition, (n,) float32; one more forward pass, without gradient."""
        with torch.no_grad(), policy.at(self.config.anchor):
            anchor = policy.predict(batch)
        found = kl(
            self.config.kind, prediction.mean, anchor.mean, prediction.std, batch.t - batch.t_next,
            prediction.velocity, anchor.velocity,
        )  # fmt: skip
        if self.adaptive is not None:
            self.adaptive.observe(found.detach())
        return found

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """The weighted divergence."""
        return self.config.coefficient * self.divergence(policy, prediction, batch).sum() * batch.share
