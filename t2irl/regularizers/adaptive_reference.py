"""A reference policy that follows the policy in jumps (GARDO, arXiv 2512.24138, section 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from t2irl.config import Run
from t2irl.guards.gardo import ResetRule
from t2irl.policy import Policy
from t2irl.regularizers.base import Regularizer
from t2irl.types import Clock, Rollout
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts


class AdaptiveReference(Regularizer):
    """A copy of the trained weights that `kl` and `gated_kl` are measured to when their `anchor` is its name.

    It begins as the base model and becomes the present policy (its weights, not their average) when the policy has gone too
    far from it, or has been tied to it too long. That happens between the rollout and the first update of an iteration. Since
    it moves, distance from the base model has no bound: another `kl` with `anchor: reference` gives one.
    """

    class Config(Regularizer.Config):
        """Settings."""

        type: Literal["adaptive_reference"] = "adaptive_reference"
        threshold: PositiveFloat | None = 1e-4
        """Renewed after an update whose mean divergence from it exceeds this, in the unit of the `kind` that measures it; the mean
        is over measured transitions alone. Published: 1e-4 with no_dt; to be set for each task. null: never for this reason."""
        every: PositiveInt | None = 100
        """Renewed after so many updates, at the latest; published: 100. null: never for this reason."""

        def problem(self, run: Run) -> str | None:
            """Nothing that moves it, or nothing that is measured to it."""
            name = next(name for name, config in run.regularizers.items() if config is self)
            if name in ("reference", "average"):
                return "needs another name: as an anchor, reference and average mean other policies"
            if self.threshold is None and self.every is None:
                return (
                    "has neither threshold nor every, so it would never move: set one, or use kl with anchor: reference"
                )
            trees = [config.model_dump() for config in run.regularizers.values()]
            if not any(name in (tree.get("anchor"), (tree.get("trust") or {}).get("anchor")) for tree in trees):
                return f"is used by no regulariser: set anchor: {name} in one of type kl or gated_kl"
            return super().problem(run)

    def __init__(self, config: Any):
        super().__init__(config)
        self.rule = ResetRule(config.threshold, config.every)
        self.sums: list[Tensor] = []
        self.seen: list[float] = []

    def prepare(self, name: str, parts: Parts) -> None:
        """Start from the policy as it is before training."""
        self.name, self.policy = name, parts.policy
        self.policy.take_snapshot(name)

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Renew it if it is time; advantages stay."""
        self.seen = []
        if self.rule.due:
            self.policy.take_snapshot(self.name)
            self.rule.reset()
        return advantages

    def observe(self, divergence: Tensor) -> None:
        """Take in measured divergences from it, (n,)."""
        self.sums.append(torch.stack([divergence.double().sum(), divergence.new_tensor(len(divergence)).double()]))

    def after_update(self, policy: Policy, clock: Clock) -> None:
        """The mean divergence of the update, over all processes, and what follows from it."""
        total, count = distributed.totals(self.sums, 2, policy.family.device)
        self.sums = []
        if count:
            self.seen.append(total / count)
        self.rule.after_update(total / count if count else None)

    def metrics(self) -> dict[str, float]:
        """Mean divergence of the iteration's updates, if measured; renewals so far; updates since the last."""
        measured = {"divergence": sum(self.seen) / len(self.seen)} if self.seen else {}
        return {**measured, "resets": float(self.rule.count), "age": float(self.rule.age)}

    def state_dict(self) -> dict[str, Any]:
        """The rule's state; the weights are saved with the policy."""
        return self.rule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.rule.load_state_dict(state)
