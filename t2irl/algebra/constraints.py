"""Lagrange multipliers: the weight of a constrained reward follows how well its mean keeps to its limit.

Constrained RLHF (arXiv 2310.04373): multipliers minimise J = sum_k squash(multiplier_k) (E[r_k] - limit_k), so that the weight
of a reward falls while it is above its limit and rises while it is below. Costs enter as -r and -limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from t2irl.algebra.config import Constraints

Sense = Literal["at_least", "at_most", "equal"]


@dataclass
class Multiplier:
    """State of one constraint."""

    sense: Sense
    value: float
    velocity: float = 0.0
    mean: float = 0.0
    """Exponential running mean of the reward, begun at 0."""
    weight: float = 0.0
    """What the weights in `mean` add up to: 0 before the first iteration, towards 1 later."""

    @property
    def average(self) -> float:
        """Running mean of the reward, corrected for its start at 0; NaN before the first one."""
        return self.mean / self.weight if self.weight else math.nan


@dataclass
class Multipliers:
    """The multipliers of a run."""

    config: Constraints
    senses: Mapping[str, Sense]
    steps: int = 0
    """Iterations seen."""
    table: dict[str, Multiplier] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.table = {name: Multiplier(sense, self.config.initial) for name, sense in self.senses.items()}

    def weights(self) -> tuple[float, dict[str, float]]:
        """Weight of the objective, and of each constrained reward's advantage, in the reward's own direction.

        squashed: w_k = sigmoid(multiplier) in (0, 1), tanh in (-1, 1) for `equal`; w_0 = K - sum w_k. free: the multipliers
        and 1. Both are divided by the sum of their sizes (K, or 1 + sum |w_k|), so that the scale of advantages stays.
        """
        raw = {name: squash(m.value, m.sense, self.config.multipliers) for name, m in self.table.items()}
        squashed = self.config.multipliers == "squashed"
        objective = len(raw) - sum(raw.values()) if squashed else 1.0
        scale = len(raw) if squashed else 1 + sum(abs(w) for w in raw.values())
        signs = {name: -1.0 if m.sense == "at_most" else 1.0 for name, m in self.table.items()}
        return objective / scale, {name: signs[name] * w / scale for name, w in raw.items()}

    def gaps(self, limits: Mapping[str, float]) -> dict[str, float]:
        """How far the running mean is on the right side of its limit: above 0 where it is kept (`equal`: above it)."""
        return {
            name: (limits[name] - m.average) if m.sense == "at_most" else (m.average - limits[name])
            for name, m in self.table.items()
        }

    def step(self, means: Mapping[str, float], limits: Mapping[str, float]) -> None:
        """Take in an iteration's mean scores (NaN where a reward applied to no image), then one step of descent on J."""
        share, self.steps = self.config.average, self.steps + 1
        for name, m in self.table.items():
            if not math.isnan(means[name]):
                m.mean, m.weight = share * m.mean + (1 - share) * means[name], share * m.weight + 1 - share
        if self.steps <= self.config.warmup:
            return
        gradients = {
            name: 0.0 if math.isnan(gap) else slope(m.value, m.sense, self.config.multipliers) * gap
            for (name, gap), m in zip(self.gaps(limits).items(), self.table.values(), strict=True)
        }
        norm = math.hypot(*gradients.values())
        shrink = min(1.0, self.config.max_grad_norm / norm) if norm else 1.0
        for name, m in self.table.items():
            m.velocity = self.config.momentum * m.velocity + shrink * gradients[name]
            m.value -= self.config.rate * m.velocity
            if self.config.multipliers == "free" and m.sense != "equal":
                m.value = max(m.value, 0.0)

    def forget(self, name: str) -> None:
        """Begin the running mean of a reward anew, if it has a constraint: its scores are on another scale now."""
        if name in self.table:
            self.table[name].mean = self.table[name].weight = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves."""
        moving = ("value", "velocity", "mean", "weight")
        return {"steps": self.steps, "table": {n: {k: getattr(m, k) for k in moving} for n, m in self.table.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. A constraint that is new starts afresh."""
        self.steps = state["steps"]
        for name in set(self.table) & set(state["table"]):
            for key, value in state["table"][name].items():
                setattr(self.table[name], key, value)


def squash(value: float, sense: Sense, kind: Literal["squashed", "free"]) -> float:
    """From a multiplier to a weight."""
    if kind == "free":
        return value
    # sigmoid(x) = (1 + tanh(x / 2)) / 2, which does not overflow
    return math.tanh(value) if sense == "equal" else (1 + math.tanh(value / 2)) / 2


def slope(value: float, sense: Sense, kind: Literal["squashed", "free"]) -> float:
    """Derivative of `squash`."""
    if kind == "free":
        return 1.0
    w = squash(value, sense, kind)
    return 1 - w**2 if sense == "equal" else w * (1 - w)


def senses_of(heads: Mapping[str, Any], names: Sequence[str]) -> dict[str, Sense]:
    """The sense of each constraint among the rewards `names`, in their order."""
    return {name: heads[name].constraint.sense for name in names if name in heads and heads[name].constraint}
