"""What the policy is trained to raise, as one number a picture, for monitors and guards.

Some combinations have no total that could be followed: constraints and `advantage.combine: advantages` normalise each reward by
itself, a win rate compares the pictures of a group. What they make of an iteration has the same mean whatever the policy does.
Rewards that are normalised by themselves are strands here: a weight, and the scores that it weighs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2irl.advantages import total_score, within_group_std
from t2irl.algebra.base import BaseScores
from t2irl.algebra.config import Aggregate, Combine, WinRate
from t2irl.algebra.ensembles import aggregate, vote
from t2irl.algebra.rules import main_rewards
from t2irl.config import Advantage

if TYPE_CHECKING:
    from t2irl.algebra.pipeline import Pipeline

OBJECTIVE = ""
"""The strand of all rewards without a constraint; no reward is called so."""
Strands = dict[str, tuple[float, Tensor]]
First = dict[str, Tensor]
"""Strand, or place of a judge -> scores of the first pictures that were seen, which the base model drew: float64, without NaN."""


class Optimised:
    """The score that a pipeline's advantages are made of, on any pictures. Asking moves no multiplier.

    Arguments and errors of its methods are those of `Pipeline.credit`, but pictures that no reward applies to are let through.
    `heldout`: `ids` number other prompts than the run's, so that what is taken from a prompt's own base images (`per_prompt`)
    is taken from those of all prompts met.
    """

    def __init__(self, pipeline: Pipeline, learning: set[str]):
        """`learning`: names of the rewards trained on that learn, whose scale moves."""
        self.pipeline, self.learning = pipeline, learning
        self.first: First = {}

    @property
    def relative(self) -> bool:
        """Whether the total of an iteration has the same mean whatever the policy does."""
        return self.pipeline.multipliers is not None or self._votes or self._apart

    def signal(self, scores: Mapping[str, Tensor], ids: Tensor, heldout: bool = False, pooled: bool = False) -> Tensor:
        """What pictures are ranked by in training: (N,) float64, NaN where no trained reward applies.

        The total that is normalised, by the present multipliers; rewards that are normalised by themselves are weighed in the
        present spread of each (`in_present_spread`). `pooled`: a win rate is over all pictures instead of those of the prompt.
        """
        pipeline, found = self._view(heldout), torch.full((len(ids),), torch.nan, dtype=torch.float64)
        rows = self._rows(scores)
        if not rows.any():
            return found
        mine, lines = {name: values[rows] for name, values in scores.items()}, ids[rows]
        if parts := self._strands(pipeline, mine, lines):
            found[rows] = in_present_spread(parts, lines, pipeline.run.advantage)
        else:
            found[rows] = self._total(
                self._with(pipeline, everybody) if self._votes and pooled else pipeline, mine, lines
            )
        return found

    def level(self, scores: Mapping[str, Tensor], ids: Tensor, heldout: bool = False) -> Tensor | None:
        """How high pictures stand by what is optimised, (N,) like `signal`, on a scale that does not move: for curves.

        Where one total is, it is that. Rewards that are normalised by themselves count in deviations of the base model's scores
        (`in_base_deviations`), and a win rate is the one over the base model's pictures (`against_base`). The first pictures
        that this is asked about stand for the base model's. Rewards that learn are left out, since their scale moves; None
        where nothing is left, or where `combine` makes of them what cannot be taken apart.
        """
        pipeline, found = self._view(heldout), torch.full((len(ids),), torch.nan, dtype=torch.float64)
        whole = pipeline.combine is not None and not (self._apart or pipeline.multipliers)
        if self.learning >= set(pipeline.names) or (self.learning and whole):
            return None
        rows = self._rows(scores, self.learning)
        if not rows.any():
            return found
        mine, lines = {name: values[rows] for name, values in scores.items()}, ids[rows]
        mine |= {name: torch.full_like(mine[name], torch.nan) for name in self.learning}
        if parts := self._strands(pipeline, mine, lines):
            self._remember({name: values for name, (_, values) in parts.items()})
            found[rows] = in_base_deviations(parts, self.first)
        else:
            found[rows] = self._total(
                self._with(pipeline, self._against_first) if self._votes else pipeline, mine, lines
            )
        return found

    def curve(self, scores: Mapping[str, Tensor], ids: Tensor) -> dict[str, float]:
        """`reward/total/mean` of an iteration where the mean of the total itself would say nothing; else, or without a level, empty."""
        level = self.level(scores, ids) if self.relative else None
        return {} if level is None else {"reward/total/mean": float(level.nanmean())}

    @property
    def _apart(self) -> bool:
        # Undivided they are summed as they are.
        advantage = self.pipeline.run.advantage
        return advantage.combine == "advantages" and advantage.std != "none"

    @property
    def _votes(self) -> bool:
        combine = self.pipeline.combine
        return combine is not None and isinstance(combine.aggregate, WinRate)

    def _rows(self, scores: Mapping[str, Tensor], without: Collection[str] = ()) -> Tensor:
        """Pictures (N,) bool that something applies to."""
        run = self.pipeline.run
        names = self.pipeline.names if run.combine is None else main_rewards(run)
        return ~torch.stack([scores[name] for name in names if name not in without]).isnan().all(0)

    def _strands(self, pipeline: Pipeline, scores: Mapping[str, Tensor], ids: Tensor) -> Strands:
        """Weight and (N,) scores, after transform and bound, of all that is normalised by itself; empty where one total is.

        Weights of constraints are those of the present multipliers, in the reward's own direction: below 0 for a cost.
        """
        weights, duals = pipeline.weights, pipeline.multipliers
        if duals is None and not self._apart:
            return {}
        ready = scores if pipeline.combine is None else pipeline.transformed(scores, ids, {})
        ready = {name: ready[name] for name in pipeline.names}
        if duals is None:
            return {name: (weights[name], values) for name, values in ready.items()}
        objective, limited = duals.weights()
        free = [weights[name] * values for name, values in ready.items() if name not in limited]
        found = {name: (weight, ready[name]) for name, weight in limited.items()}
        return found | ({OBJECTIVE: (objective, torch.stack(free).nansum(0))} if free else {})

    @staticmethod
    def _total(pipeline: Pipeline, scores: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        if pipeline.combine is None:
            return total_score(scores, pipeline.weights)
        return pipeline.total(scores, ids, {})

    def _view(self, heldout: bool) -> Pipeline:
        """The pipeline, or one for prompts that the base model was not asked about."""
        pipeline = self.pipeline
        if not heldout or pipeline.combine is None:
            return pipeline
        view = copy.copy(pipeline)
        view.combine = Combine.model_validate(_of_all(pipeline.combine.model_dump()))
        view.run = pipeline.run.model_copy(update={"combine": view.combine})
        view.base = BaseScores()
        met = list(pipeline.base.by_prompt.values())
        for name in dict.fromkeys(name for table in met for name in table):
            values = torch.cat([table[name] for table in met if name in table])
            view.base.pooled[name] = values[~values.isnan()]
        view.base.pooled |= pipeline.base.pooled
        return view

    @staticmethod
    def _with(pipeline: Pipeline, function: Callable[[Aggregate, Tensor, Tensor, Tensor], Tensor]) -> Pipeline:
        """The pipeline with another function in the place of `ensembles.aggregate`."""
        view = copy.copy(pipeline)
        view.aggregate = function
        return view

    def _against_first(self, how: Aggregate, table: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
        assert isinstance(how, WinRate), "only a win rate needs opponents"
        self._remember({str(k): row for k, row in enumerate(table)})
        return against_base(
            table, weights, how.temperature, [self.first.get(str(k), table[k]) for k in range(len(table))]
        )

    def _remember(self, scores: Mapping[str, Tensor]) -> None:
        """Keep the first scores of each."""
        for name, values in scores.items():
            known = values[~values.isnan()].double()
            if len(known):
                self.first.setdefault(name, known.clone())


def in_present_spread(parts: Strands, ids: Tensor, config: Advantage) -> Tensor:
    """sum of weight x (score - mean) / spread over strands, (N,) float64; means and spreads are those of these pictures.

    The spread is what advantages are divided by, but one for all groups: with `std: group` the root of the mean variance within
    groups, with `global` the deviation of all pictures. Means are of all pictures, so that prompts keep their order. A score
    that is NaN adds nothing, nor does a reward without any spread.
    """
    total = torch.zeros(len(ids), dtype=torch.float64)
    for weight, values in parts.values():
        known = ~values.isnan()
        kept = values[known].double()
        if not len(kept):
            continue
        spread = within_group_std(kept, ids[known]) if config.std == "group" else float(kept.std(correction=0))
        if spread > config.floor:
            total[known] += weight * (kept - kept.mean()) / (spread + config.eps)
    return total


def in_base_deviations(parts: Strands, first: First) -> Tensor:
    """The same with the mean and the deviation of the base model's scores, which never move, (N,) float64.

    A reward that was the same on all of the base model's pictures counts in its own unit.
    """
    total = torch.zeros(len(next(iter(parts.values()))[1]), dtype=torch.float64)
    for name, (weight, values) in parts.items():
        if name in first:
            base = first[name]
            total += (weight * (values.double() - base.mean()) / (float(base.std(correction=0)) or 1.0)).nan_to_num(0.0)
    return total


def against_base(table: Tensor, weights: Tensor, temperature: float, base: Sequence[Tensor]) -> Tensor:
    """The chance of beating a picture of the base model, (N,) in [0, 1]: `win_rate` with these as the other pictures.

    `table`: (K, N), NaN where a judge does not apply; `base`: the base model's scores by each judge.
    """
    rates = torch.stack([vote(x[:, None] - b[None], temperature).mean(1) for x, b in zip(table, base, strict=True)])
    w = weights[:, None].expand_as(rates).where(~rates.isnan(), 0.0)
    return (w * rates.nan_to_num(0.0)).sum(0) / w.sum(0)


def everybody(how: Aggregate, table: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
    """`aggregate` as if all pictures were of one group."""
    return aggregate(how, table, weights, torch.zeros_like(groups))


def _of_all(tree: Any) -> Any:
    """Settings without levels of single prompts."""
    if isinstance(tree, dict):
        return {key: 0 if key == "per_prompt" else _of_all(value) for key, value in tree.items()}
    return tree
