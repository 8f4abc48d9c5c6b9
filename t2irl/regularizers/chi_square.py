"""Chi-square divergence of whole paths from the reference policy (Correlated Proxies, arXiv 2403.03185)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from t2irl import registry
from t2irl.config import Run
from t2irl.dynamics.base import Reduction
from t2irl.policy import Policy
from t2irl.regularizers.base import Regularizer
from t2irl.types import Clock, MicroBatch, Prediction
from t2irl.utils import distributed

FLOOR = 1e-4
"""The root's derivative is taken at no less than this."""


class ChiSquare(Regularizer):
    """coefficient x sqrt(chi2), chi2 = mean over images of (e^H - 1) + (e^-H - 1), H = sum over trained timesteps of log p - log p_ref.

    Unlike a KL divergence it bounds how far any reward that correlates with the true one on the reference policy can be led astray.
    The second bracket has mean 0 under the policy and keeps every summand at 0 or above. The root needs chi2 of the whole
    update, which micro-batches do not have, so it is replaced by its tangent at the last update's chi2 c,
    sqrt(c) / 2 + chi2 / (2 sqrt(c)): an upper bound that touches there.
    """

    class Config(Regularizer.Config):
        """Settings."""

        type: Literal["chi_square"] = "chi_square"
        coefficient: PositiveFloat = 0.01
        """Weight; swept from 1 to 0.01 in the paper, whose theory says deviation of the reward x sqrt(1 - rho^2), rho its correlation
        with the true reward on the base model's images."""
        logprob_reduction: Reduction = "mean"
        """Of log-densities over latent elements. The true density is their sum, of which H is soon in the hundreds; so tune it."""
        limit: float = Field(default=10.0, gt=0, le=80)
        """Where |H| exceeds it, the exponential goes on as its tangent line."""

        def problem(self, run: Run) -> str | None:
            """Dynamics without densities."""
            kind = run.rollout.dynamics.type
            if not registry.find("dynamics", kind).recorded:
                return f"needs the densities of recorded transitions, which rollout.dynamics.type = {kind} has not; use flow_sde, cps or dance_sde, or kl"
            return super().problem(run)

    needs_all_images = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.last = 0.0  # chi2 of the last update
        self.sums: list[Tensor] = []
        self.seen: list[tuple[float, float]] = []

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """This micro-batch's part of the tangent; one more forward pass, without gradient."""
        c, reduction = self.config, self.config.logprob_reduction
        with torch.no_grad(), policy.reference():
            reference = policy.predict(batch)
        steps = int((batch.image == batch.image[0]).sum())
        ratio = policy.dynamics.log_prob(batch.x_next, prediction.mean, prediction.std, reduction)
        ratio = ratio - policy.dynamics.log_prob(batch.x_next, reference.mean, reference.std, reduction)
        path = ratio.view(-1, steps).sum(1)
        summands = chi_square(path, c.limit)
        with torch.no_grad():
            far = (path.abs() > c.limit).double().sum()
            self.sums.append(torch.stack([summands.double().sum(), far, far.new_tensor(len(path))]))
        root = max(self.last, FLOOR) ** 0.5
        # `share` counts transitions, and the divergence is a mean over images.
        return c.coefficient * (root / 2 + summands / (2 * root)).sum() * batch.share * steps

    def after_update(self, policy: Policy, clock: Clock) -> None:
        """chi2 of the update, over all processes: where the next tangent touches."""
        total, far, count = distributed.totals(self.sums, 3, policy.family.device)
        self.sums = []
        if count:
            self.last = total / count
            self.seen.append((self.last, far / count))

    def metrics(self) -> dict[str, float]:
        """chi2 and the share of images beyond the limit, means of the iteration's updates."""
        seen, self.seen = self.seen, []
        if not seen:
            return {}
        return {"chi2": sum(x for x, _ in seen) / len(seen), "far": sum(x for _, x in seen) / len(seen)}

    def state_dict(self) -> dict[str, Any]:
        """Where the tangent touches."""
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.last = state["last"]


def chi_square(path: Tensor, limit: float) -> Tensor:
    """(e^H - 1) + (e^-H - 1) >= 0 of path log-ratios H (n,), with gradient; exponentials go on as tangents beyond `limit`."""
    return soft_exp(path, limit) + soft_exp(-path, limit) - 2


def soft_exp(x: Tensor, limit: float) -> Tensor:
    """e^x up to `limit`, then its tangent e^limit (1 + x - limit)."""
    inside = x.clamp_max(limit)
    return inside.exp() * (1 + x - inside)
