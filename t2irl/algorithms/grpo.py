"""GRPO for flow models (Flow-GRPO, arXiv 2505.05470, eq. 5): the clipped PPO objective on each recorded transition."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveFloat

from t2irl.algorithms.base import Algorithm, Loss
from t2irl.dynamics.base import Reduction
from t2irl.types import MicroBatch, Prediction


class Grpo(Algorithm):
    """loss = mean of max(-A ratio, -A clip(ratio, 1 - low, 1 + high)), ratio = exp(log_prob - old log_prob)."""

    class Config(Algorithm.Config):
        """Settings."""

        type: Literal["grpo"] = "grpo"
        clip_range: PositiveFloat | tuple[PositiveFloat, PositiveFloat] = 1e-4
        """How far the ratio may move from 1 before the gradient stops; one number, or [below, above]. In units of
        `logprob_reduction`: with mean, 1e-4 is D x 1e-4 nats of the transition's true likelihood, D latent elements. Without
        effect with dynamics of type matching, whose ratios are 1."""
        logprob_reduction: Reduction = "mean"
        """Mean (as published) or sum of the log-density over latent elements."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.reduction = config.logprob_reduction
        both = config.clip_range
        self.clip_range = both if isinstance(both, tuple) else (both, both)

    def loss(self, prediction: Prediction, batch: MicroBatch) -> Loss:
        """The policy term; metrics are the ratio, its logarithm's square and the clipped shares."""
        assert self.clip_range is not None
        below, above = self.clip_range
        old = prediction.log_prob.detach() if batch.log_prob is None else batch.log_prob
        log_ratio = prediction.log_prob - old
        ratio = log_ratio.exp()
        advantage = batch.advantage
        clipped = ratio.clamp(1 - below, 1 + above)
        loss = (-advantage * ratio).maximum(-advantage * clipped).sum() * batch.share
        ratio, log_ratio = ratio.detach(), log_ratio.detach()
        metrics = {
            "ratio": ratio,
            "log_ratio_abs": log_ratio.abs(),
            "approx_kl": 0.5 * log_ratio**2,
            "clip_fraction_high": ((ratio > 1 + above) & (advantage > 0)).float(),
            "clip_fraction_low": ((ratio < 1 - below) & (advantage < 0)).float(),
        }
        return Loss({"policy": loss}, metrics)
