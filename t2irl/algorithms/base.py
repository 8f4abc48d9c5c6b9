"""The interface of an algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from t2irl.config import Strict
from t2irl.dynamics.base import Reduction
from t2irl.types import MicroBatch, Prediction


@dataclass(frozen=True)
class Loss:
    """What a micro-batch of n transitions gives."""

    terms: dict[str, Tensor]
    """Scalars with gradient; their sum is minimised. Each is a sum over transitions times `batch.share`."""
    metrics: dict[str, Tensor]
    """Per transition, (n,) float32, without gradient; logged as the mean of the update."""


class Algorithm:
    """Turns predictions and advantages into loss terms. Built as `Algorithm(config)`."""

    class Config(Strict):
        """Settings that every algorithm has."""

        type: str
        """File name in `t2irl/algorithms/`, or `package.module:Class`."""

    reduction: Reduction = "mean"
    """How log-densities are reduced over latent elements, in rollout and update alike."""

    clip_range: tuple[float, float] | None = None
    """How far below and above 1 a ratio may be; None for algorithms without ratios."""

    def __init__(self, config: Any):
        self.config = config

    def loss(self, prediction: Prediction, batch: MicroBatch) -> Loss:
        """Loss terms of a micro-batch."""
        raise NotImplementedError
