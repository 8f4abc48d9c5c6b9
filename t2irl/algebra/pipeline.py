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
from t2irl.algebra.config import Aggregate, Clip, Constraints, LogSigmoid, Sum, Tiers, WinRate
from t2irl.algebra.config_gates import HardGate, HingeGate, Level, ProductGate, PromptLevel
from t2irl.algebra.constraints import Multipliers, senses_of
from t2irl.algebra.ensembles import aggregate, disagreement
from t2irl.algebra.filters import filter_factors
from t2irl.algebra.gates import check_range, hard_gate, penalised, product, ramp_gate, shortfall, violations
from t2irl.algebra.rules import (
    aggregated,
    head_of,
    main_rewards,
    needs_base,
    needs_own,
    needs_pooled,
    only_gates,
    transform_of,
)
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
        """Raises ConfigError where scores of the base model would be the scale of a reward that changes without saying so."""
        self.run, self.combine, self.weights = run, run.combine, rewards.weights
        self.names = [name for name, weight in self.weights.items() if weight != 0]
        self.base, self.needed, self.pooled, self.own = BaseScores(), needs_base(run), needs_pooled(run), needs_own(run)
        for name in self.needed:
            if rewards.rewards[name].version is None:
                raise ConfigError(
                    f"rewards.{name} learns without a `version`, so that scores of the base model's images would soon be of another "
                    "scale; use `at` instead of quantiles, and combine.aggregate: {type: sum} or {type: win_rate, temperature: 0}"
                )
        self.aggregate: Callable[[Aggregate, Tensor, Tensor, Tensor], Tensor] = aggregate
        self.optimised = Optimised(self, {name for name in self.names if rewards.rewards[name].learns})
        how = None if self.combine is None else self.combine.aggregate
        self.multipliers = None
        if self.combine is not None and isinstance(how, Constraints):
            self.multipliers = Multipliers(how, senses_of(self.combine.rewards, self.names))

    # ------------------------------------------------------------------------------------------------ base-model scores
    def meet(self, ctx: Context, parts: Parts) -> None:
        """Measure the base model where this iteration needs it: once for all, for prompts with levels of their own, and again by
        rewards that have changed since."""
        if self.combine is None:
            return
        self._forget_changed(parts.rewards)
        pooled = [name for name in self.pooled if name not in self.base.pooled]
        ids = prompt_ids(parts.clock.iteration, len(parts.prompts), self.run.rollout.prompts, self.run.seed).tolist()
        if not pooled and not any(self.base.unmet(list(self.own), line) for line in ids):
            return
        with ctx.timed("base", 1):
            if pooled:
                self.base.measure(parts, pooled, self.combine.base_images)
            if self.own:
                self.base.meet(parts, list(self.own), ids, max(self.own.values()))
        for name in pooled:
            heads.check_base(name, transform_of(self.run, name), self.base.pooled[name])

    def _forget_changed(self, rewards: RewardSet) -> None:
        """Drop what was measured by earlier versions of rewards, running means of constraints included."""
        for name in self.names:
            version = rewards.rewards[name].version
            if version is None:
                continue
            if self.base.versions.get(name, version) != version:
                self.base.forget(name)
                if self.multipliers is not None:
                    self.multipliers.forget(name)
            self.base.versions[name] = version

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
        main = self._main(ready)
        total, table = self._gated(main, scores, ids, metrics)
        total = self._penalised(total, ready, metrics)
        gate, apart = self.combine.gate, self.combine.disagreement
        if isinstance(gate, HingeGate):
            missing = shortfall(scores[gate.reward].double(), self._level(gate, gate.reward, ids))
            metrics["combine/gate_open"] = float((missing == 0).double().mean())
            total = total - self.weights[gate.reward] * missing
        if apart is not None:
            cost = apart.cost * (disagreement(table, apart.measure) - apart.tolerance).clamp_min(0)
            metrics["combine/disagreement_cost"] = float(cost.mean())
            total = total - cost
        return total

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
            x, limit, base = self._rescaled(name, scores[name], ids), head_of(self.combine, name).bound, None
            if limit is not None:
                if name in self.base.pooled:
                    # The base model's images are of many prompts, so their transform has the anchor of all.
                    base = heads.transform(transform_of(self.run, name), self.base.pooled[name], self.base.pooled[name])
                if isinstance(limit, Tiers):
                    x, top = heads.tiers(x, heads.quantiles(base, list(limit.quantiles))), 1.0
                else:
                    top = self._level(limit, name, ids, base).nan_to_num(torch.inf)
                    x = heads.clip(x, top)
                metrics[f"reward/{name}/at_bound"] = float((x >= top)[~x.isnan()].double().mean())
            ready[name] = x
        return ready

    def _rescaled(self, name: str, values: Tensor, lines: Tensor) -> Tensor:
        """Scores (n,) of pictures of the prompts `lines` after the reward's transform."""
        how, anchors = transform_of(self.run, name), None
        if isinstance(how, LogSigmoid) and how.per_prompt and how.at is None:
            anchors = self.base.anchors(name, lines, how.quantile)
        return heads.transform(how, values, self.base.pooled.get(name), anchors)

    def _level(self, where: Level, name: str, ids: Tensor, base: Tensor | None = None) -> Tensor:
        """The level for each image, (N,): on the scale after the transform if it is a bound's, else of the score.

        `base`: pooled scores on that scale. NaN where a level of the prompt's own has nothing to be taken from.
        """
        if isinstance(where, PromptLevel) and where.per_prompt and where.quantile is not None:
            bound = isinstance(where, Clip)
            change = (lambda x, lines: self._rescaled(name, x, lines)) if bound else (lambda x, _: x)
            return self.base.levels(name, ids, where.quantile, change)
        pooled = self.base.pooled.get(name) if base is None else base
        return torch.full((len(ids),), heads.level(where, pooled), dtype=torch.float64)

    def _gated(
        self, main: Scores, scores: Mapping[str, Tensor], ids: Tensor, metrics: dict[str, float]
    ) -> tuple[Tensor, Tensor]:
        """The rewards that are aggregated, made one and behind the gate, (N,); and the table of them (K, N)."""
        assert self.combine is not None
        gate, how = self.combine.gate, self.combine.aggregate
        others = {name: main[name] for name in aggregated(self.run)}
        table = torch.stack(list(others.values()))
        if not isinstance(how, Sum | WinRate):
            metrics["combine/disagreement"] = float(disagreement(table).mean())
        if not isinstance(how, Sum):
            refuse_unscored(table)
        weights = torch.tensor([self.weights[name] for name in others], dtype=torch.float64)
        total = self.aggregate(how, table, weights, ids)
        if gate is None or isinstance(gate, HingeGate):
            return total, table
        where = f"combine.gate.type = {gate.type} multiplies it by a factor below 1, so"
        if isinstance(gate, ProductGate):
            first = main[gate.reward]
            check_range(gate.reward, first, 0, torch.inf, where, [unit_of(gate.reward)])
            return (self.weights[gate.reward] * product(first, total, gate.strength)).nan_to_num(0.0), table
        for name, values in others.items() if isinstance(how, Sum) else ():
            check_range(name, values, 0, torch.inf, where, [unit_of(name)])
        refuse_negative(total, f"combine.gate.type = {gate.type}")
        threshold, primary = self._level(gate, gate.reward, ids).nan_to_num(-torch.inf), scores[gate.reward].double()
        if isinstance(gate, HardGate):
            open_ = hard_gate(primary, threshold)
        else:
            open_ = ramp_gate(primary, threshold, gate.width)
        metrics["combine/gate_open"] = float(open_.mean())
        total = open_ * total
        if not only_gates(self.combine):
            total = total + (self.weights[gate.reward] * main[gate.reward]).nan_to_num(0.0)
        return total, table

    def _penalised(self, total: Tensor, ready: Scores, metrics: dict[str, float]) -> Tensor:
        assert self.combine is not None
        penalty = self.combine.penalty
        if penalty is None:
            return total
        for name in penalty.rewards:
            ways = [f"combine.rewards.{name}.transform: {{type: centred_sigmoid}}", "a bound of type tiers"]
            check_range(name, ready[name], 0, 1, "as a factor", ways)
        refuse_negative(total, "combine.penalty")
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
        means = {name: mean_of(scores[name].double()) for name in duals.table}
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


def mean_of(values: Tensor) -> float:
    """Mean of (N,) scores without their NaN."""
    return float(values[~values.isnan()].mean())


def unit_of(name: str) -> str:
    """The transform after which a reward is at least 0."""
    return f"combine.rewards.{name}.transform: {{type: unit}}"


def refuse_negative(total: Tensor, where: str) -> None:
    """Raise RunError for an image whose score (N,) is below 0, where factors are to multiply it."""
    worst = int(total.argmin())
    if total[worst] < 0:
        raise RunError(
            f"{where}: the other rewards of image {worst} give {float(total[worst]):g}, but what factors multiply must be at "
            "least 0; use combine.rewards.NAME.transform: {type: unit} for those that can be below 0"
        )


def sum_of(parts: Mapping[str, Tensor]) -> Tensor:
    """Sum over rewards of (N,) scores, a NaN adding nothing."""
    return torch.stack(list(parts.values())).nansum(0)
