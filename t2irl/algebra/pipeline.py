"""From the scores of an iteration to its advantages: the stages of `combine` in order, and the state that they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2irl.advantages import constant_groups, group_advantages, normalise, refuse_unscored
from t2irl.algebra import heads
from t2irl.algebra.base import BaseScores
from t2irl.algebra.config import Aggregate, Constraints, HardGate, LogSigmoid, ProductGate, Sum, Tiers, WinRate
from t2irl.algebra.constraints import Multipliers, senses_of
from t2irl.algebra.ensembles import aggregate, disagreement
from t2irl.algebra.filters import filter_factors
from t2irl.algebra.gates import check_range, hard_gate, penalised, product, ramp_gate, violations
from t2irl.algebra.rules import head_of, main_rewards, needs_base, transform_of
from t2irl.algebra.signal import Optimised
from t2irl.config import Run
from t2irl.data import prompt_ids
from t2irl.errors import ConfigError, RunError
from t2irl.rewards.combine import RewardSet

if TYPE_CHECKING:
    from t2irl.launch import Context
    from t2irl.train import Parts

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Credit:
    """What the pipeline makes of an iteration, over all processes. N images."""

    advantages: Tensor
    """(N,) float64, of whole groups, before any image is left out."""
    factors: Tensor | None = None
    """(N,) float64: what the filter multiplies advantages by; None without a filter."""
    metrics: dict[str, float] = field(default_factory=dict)
    """By the names of the glossary."""

    def filtered(self, advantages: Tensor, rows: slice) -> Tensor:
        """This process's shaped advantages (B,) after the filter; `rows` are its rows among the N."""
        return advantages if self.factors is None else advantages * self.factors[rows].to(advantages)


class Pipeline:
    """Turns gathered scores into advantages. Without a `combine` section this is `group_advantages`, and there is no state."""

    def __init__(self, run: Run, rewards: RewardSet):
        """Raises ConfigError for a reward that learns where scores of the base model would be its scale."""
        self.run, self.combine, self.weights = run, run.combine, rewards.weights
        self.names = [name for name, weight in self.weights.items() if weight != 0]
        self.base, self.needed = BaseScores(), needs_base(run)
        for name in self.needed:
            if rewards.rewards[name].learns:
                raise ConfigError(
                    f"rewards.{name} learns, so that scores of the base model's images would soon be of another scale; use `at` "
                    "instead of quantiles, and combine.aggregate: {type: sum} or {type: win_rate, temperature: 0}"
                )
        self.aggregate: Callable[[Aggregate, Tensor, Tensor, Tensor], Tensor] = aggregate
        self.optimised = Optimised(self, {name for name in self.names if rewards.rewards[name].learns})
        how = None if self.combine is None else self.combine.aggregate
        self.multipliers = None
        if self.combine is not None and isinstance(how, Constraints):
            self.multipliers = Multipliers(how, senses_of(self.combine.rewards, self.names))

    # ------------------------------------------------------------------------------------------------ base-model scores
    def meet(self, ctx: Context, parts: Parts) -> None:
        """Measure the base model where this iteration needs it: once for all, and for prompts with anchors of their own."""
        own = {name: how for name in self.needed if (how := self._own_anchor(name)) is not None}
        pooled = [name for name in self.needed if name not in own or self._quantile_elsewhere(name)]
        known = all(name in self.base.pooled for name in pooled)
        ids = prompt_ids(parts.clock.iteration, len(parts.prompts), self.run.rollout.prompts, self.run.seed).tolist()
        if known and (not own or all(line in self.base.by_prompt for line in ids)):
            return
        assert self.combine is not None
        with ctx.timed("base", 1):
            if not known:
                self.base.measure(parts, pooled, self.combine.base_images)
            if own:
                self.base.meet(parts, list(own), ids, max(how.per_prompt for how in own.values()))
        for name in pooled:
            heads.check_base(name, transform_of(self.run, name), self.base.pooled[name])

    def _own_anchor(self, name: str) -> LogSigmoid | None:
        how = transform_of(self.run, name)
        return how if isinstance(how, LogSigmoid) and how.per_prompt and how.at is None else None

    def _quantile_elsewhere(self, name: str) -> bool:
        """Whether a reward with anchors of its own needs scores of many prompts besides."""
        assert self.combine is not None
        head, gate = head_of(self.combine, name), self.combine.gate
        levels = [head.bound, head.constraint, gate if gate and gate.reward == name else None]
        scaled = getattr(head.transform, "unit", None) == "deviation"
        return scaled or any(getattr(x, "quantile", None) is not None or hasattr(x, "quantiles") for x in levels)

    # ------------------------------------------------------------------------------------------------------- the stages
    def credit(self, scores: Mapping[str, Tensor], ids: Tensor) -> Credit:
        """Advantages of an iteration, and what else became of its scores; multipliers move.

        `scores`: reward -> (N,) of all processes, NaN where one does not apply. `ids`: (N,) group of each image. Raises RunError for
        an image that no aggregated reward applies to, and for scores outside the range that a penalty or gate needs.
        """
        if self.combine is None:
            advantages = group_advantages(scores, self.weights, ids, self.run.advantage)
            return Credit(advantages, metrics=self.optimised.curve(scores, ids))
        metrics: dict[str, float] = {}
        curve = self.optimised.curve(scores, ids)  # by the multipliers that make these advantages
        if self.multipliers is not None:
            total = unclipped = self._constrained(scores, ids, metrics)
        elif self.run.advantage.combine == "advantages":
            main = self._main(self.transformed(scores, ids, metrics))
            total = unclipped = sum_of(
                {n: self.weights[n] * normalise(x, ids, self.run.advantage) for n, x in main.items()}
            )
        else:
            total = self.total(scores, ids, metrics)
            unclipped = normalise(total, ids, self.run.advantage)
        factors = None
        if self.combine.filter is not None:
            factors = filter_factors(self.combine.filter, total, ids)
            metrics["combine/kept"] = float((factors > 0).double().mean())
        metrics |= curve if self.optimised.relative else {"reward/total/mean": float(total.mean())}
        metrics["advantage/zero_variance_groups"] = float(
            constant_groups(total, ids, self.run.advantage.floor).double().mean()
        )
        return Credit(unclipped.clamp(-self.run.advantage.clip, self.run.advantage.clip), factors, metrics)

    def total(self, scores: Mapping[str, Tensor], ids: Tensor, metrics: dict[str, float]) -> Tensor:
        """The one score of each image, (N,) float64, before it is normalised; not defined with constraints.

        Arguments and errors as those of `credit`; what was seen on the way is put into `metrics`.
        """
        assert self.combine is not None and self.multipliers is None, "there is no single score"
        ready = self.transformed(scores, ids, metrics)
        main = self._gated(self._main(ready), scores, metrics)
        return self._penalised(self._aggregated(main, ids, metrics), ready, metrics)

    def _main(self, ready: Scores) -> Scores:
        """Those that the score is made of, some of which apply to every image."""
        main = {name: ready[name] for name in main_rewards(self.run)}
        refuse_unscored(torch.stack(list(main.values())))
        return main

    def transformed(self, scores: Mapping[str, Tensor], ids: Tensor, metrics: dict[str, float]) -> Scores:
        """Every reward trained on after its transform and bound, (N,) float64."""
        assert self.combine is not None
        ready = {}
        for name in self.names:
            values = scores[name].double()
            how, limit, base = (
                transform_of(self.run, name),
                head_of(self.combine, name).bound,
                self.base.pooled.get(name),
            )
            own = self._own_anchor(name)
            anchors = self.base.anchors(name, ids, own.quantile) if own else None
            x = heads.transform(how, values, base, anchors)
            if limit is not None:
                # The base model's images are of many prompts, so their transform has the anchor of all.
                below = None if base is None else heads.transform(how, base, base)
                x = heads.bound(limit, x, below)
                top = 1.0 if isinstance(limit, Tiers) else heads.level(limit, below)
                metrics[f"reward/{name}/at_bound"] = float((x[~x.isnan()] >= top).double().mean())
            ready[name] = x
        return ready

    def _gated(self, main: Scores, scores: Mapping[str, Tensor], metrics: dict[str, float]) -> Scores:
        assert self.combine is not None
        gate = self.combine.gate
        if gate is None:
            return main
        others = {name: x for name, x in main.items() if name != gate.reward}
        where = f"combine.gate.type = {gate.type} multiplies it by a factor below 1, so"
        remedy = (f"combine.rewards.{name}.transform: {{type: unit}}" for name in others)
        if isinstance(gate, ProductGate):
            check_range(
                gate.reward,
                main[gate.reward],
                0,
                torch.inf,
                where,
                [f"combine.rewards.{gate.reward}.transform: {{type: unit}}"],
            )
            side = sum_of({name: self.weights[name] * x for name, x in others.items()})
            return {gate.reward: product(main[gate.reward], side, gate.strength)}
        for (name, values), way in zip(others.items(), remedy, strict=True):
            check_range(name, values, 0, torch.inf, where, [way])
        threshold = heads.level(gate, self.base.pooled.get(gate.reward))
        primary = scores[gate.reward].double()
        open_ = (
            hard_gate(primary, threshold) if isinstance(gate, HardGate) else ramp_gate(primary, threshold, gate.width)
        )
        metrics["combine/gate_open"] = float(open_.mean())
        return {gate.reward: main[gate.reward], **{name: x * open_ for name, x in others.items()}}

    def _aggregated(self, main: Scores, ids: Tensor, metrics: dict[str, float]) -> Tensor:
        assert self.combine is not None
        how, table = self.combine.aggregate, torch.stack(list(main.values()))
        weights = torch.tensor([self.weights[name] for name in main], dtype=torch.float64)
        if not isinstance(how, Sum | WinRate):
            metrics["combine/disagreement"] = float(disagreement(table).mean())
        return self.aggregate(how, table, weights, ids)

    def _penalised(self, total: Tensor, ready: Scores, metrics: dict[str, float]) -> Tensor:
        assert self.combine is not None
        penalty = self.combine.penalty
        if penalty is None:
            return total
        for name in penalty.rewards:
            ways = [f"combine.rewards.{name}.transform: {{type: centred_sigmoid}}", "a bound of type tiers"]
            check_range(name, ready[name], 0, 1, "as a factor", ways)
        worst = int(total.argmin())
        if total[worst] < 0:
            raise RunError(
                f"combine.penalty: the other rewards of image {worst} give {float(total[worst]):g}, but what factors multiply must be at "
                "least 0; use combine.rewards.NAME.transform: {type: unit} for those that can be below 0"
            )
        factors = torch.stack([ready[name] ** self.weights[name] for name in penalty.rewards])
        metrics["combine/penalty"] = float(factors.nan_to_num(1.0).prod(0).mean())
        if penalty.violation_below is not None:
            metrics["combine/violations"] = float(violations(factors, penalty.violation_below).double().mean())
        return penalised(total, factors, penalty.violation_below, penalty.violation_cost)

    def _constrained(self, scores: Mapping[str, Tensor], ids: Tensor, metrics: dict[str, float]) -> Tensor:
        """Weighted sum of the advantages of the objective and of each constrained reward; then the multipliers move."""
        assert self.combine is not None and self.multipliers is not None
        main = self._main(self.transformed(scores, ids, metrics))
        duals, advantage = self.multipliers, self.run.advantage
        limits = {n: heads.level(self.combine.rewards[n].constraint, self.base.pooled.get(n)) for n in duals.table}  # type: ignore[arg-type]
        free = {name: self.weights[name] * x for name, x in main.items() if name not in duals.table}
        objective, weights = duals.weights()
        total = torch.zeros(len(ids), dtype=torch.float64)
        if free:
            total += objective * normalise(sum_of(free), ids, advantage)
        for name, weight in weights.items():
            total += weight * normalise(main[name], ids, advantage)
            metrics[f"constraint/{name}/weight"] = weight
        metrics["constraint/objective_weight"] = objective
        means = {name: float(scores[name].double().nanmean()) for name in duals.table}
        duals.step(means, limits)
        for name, gap in duals.gaps(limits).items():
            metrics |= {f"constraint/{name}/gap": gap, f"constraint/{name}/multiplier": duals.table[name].value}
        return total

    # ------------------------------------------------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Scores of the base model and multipliers; empty where nothing needs them."""
        first = {"first": self.optimised.first} if self.optimised.first else {}
        if self.combine is None:
            return first
        duals = {} if self.multipliers is None else {"multipliers": self.multipliers.state_dict()}
        return {"base": self.base.state_dict(), **duals, **first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. What is not there, since the section is new, starts afresh."""
        self.optimised.first = {name: values.cpu() for name, values in state.get("first", {}).items()}
        if self.combine is not None and "base" in state:
            self.base.load_state_dict(state["base"])
        if self.multipliers is not None and "multipliers" in state:
            self.multipliers.load_state_dict(state["multipliers"])


def sum_of(parts: Mapping[str, Tensor]) -> Tensor:
    """Sum over rewards of (N,) scores, a NaN adding nothing."""
    return torch.stack(list(parts.values())).nansum(0)
