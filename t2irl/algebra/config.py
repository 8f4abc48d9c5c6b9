"""The `combine` section of a run: what each stage between scores and advantages does. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from t2irl.algebra.config_gates import (
    Disagreement,
    HardGate,
    HingeGate,
    Level,
    Penalty,
    ProductGate,
    PromptLevel,
    Quantile,
    RampGate,
)
from t2irl.strict import Strict


# ---------------------------------------------------------------------------------------------------------- transforms
class LogSigmoid(Strict):
    """log sigmoid((score - anchor) / temperature): the log-probability of beating the anchor. A sum of these is a logical
    AND of the rewards, and a reward that is satisfied stops pulling."""

    type: Literal["log_sigmoid"] = "log_sigmoid"
    at: float | None = None
    """The anchor, in the unit of the score; null: the quantile below."""
    quantile: Quantile = 0.85
    """The anchor, without `at`: that quantile of the base model's scores. Published: 0.85."""
    temperature: PositiveFloat = 1.0
    """Score difference that counts as one nat: 1 for a Bradley-Terry reward on its own scale."""
    unit: Literal["score", "deviation"] = "score"
    """What the temperature is counted in: `deviation`, standard deviations of the base model's scores, for a reward whose own
    scale means nothing."""
    per_prompt: NonNegativeInt = 0
    """Base-model images drawn for each prompt, when it is first met, whose quantile is its own anchor, as published; 0: one
    anchor for all prompts, from `combine.base_images`."""


class LogProbability(Strict):
    """log max(score, floor), for scores that are probabilities already, in [0, 1]."""

    type: Literal["log_probability"] = "log_probability"
    floor: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Scores below it count as this."""


class Standardise(Strict):
    """(score - mean) / std of the base model's scores."""

    type: Literal["standardise"] = "standardise"
    limit: PositiveFloat | None = None
    """Clamp to so many standard deviations; null: no limit."""


class Unit(Strict):
    """(score - low) / (high - low), at least 0: the base model's range becomes [0, 1]; better images exceed 1."""

    type: Literal["unit"] = "unit"
    low: Quantile = 0.01
    """Quantile of the base model's scores that becomes 0."""
    high: Quantile = 0.99
    """Quantile of the base model's scores that becomes 1."""

    @model_validator(mode="after")
    def _ordered(self) -> Unit:
        if self.low >= self.high:
            raise PydanticCustomError(
                "unit", "low = {low} should be below high = {high}", {"low": self.low, "high": self.high}
            )
        return self


class Tanh(Strict):
    """tanh of the standardised score, in (-1, 1): saturates on both sides."""

    type: Literal["tanh"] = "tanh"


class CentredSigmoid(Strict):
    """Mean over the base model's scores s of sigmoid((score - s) / temperature): the chance of beating a base image, in [0, 1]."""

    type: Literal["centred_sigmoid"] = "centred_sigmoid"
    temperature: PositiveFloat = 1.0
    """Score difference that counts as one nat."""
    unit: Literal["score", "deviation"] = "score"
    """What the temperature is counted in: `deviation`, standard deviations of the base model's scores."""


Transform = Annotated[
    LogSigmoid | LogProbability | Standardise | Unit | Tanh | CentredSigmoid, Field(discriminator="type")
]


# -------------------------------------------------------------------------------------------------------------- bounds
class Clip(PromptLevel):
    """min(score, level): what is above earns nothing more. Applied after the transform, in its unit."""

    type: Literal["clip"] = "clip"


class Tiers(Strict):
    """zone / number of zones: the score counts only by the zone it lies in, and the highest zone is flat."""

    type: Literal["tiers"] = "tiers"
    quantiles: tuple[Quantile, ...] = Field((0.25, 0.5, 0.75, 0.95), min_length=1)
    """Edges between zones, ascending: quantiles of the base model's scores."""

    @model_validator(mode="after")
    def _ascending(self) -> Tiers:
        if sorted(set(self.quantiles)) != list(self.quantiles):
            raise PydanticCustomError(
                "tiers", "quantiles should ascend without repeats, not {given}", {"given": list(self.quantiles)}
            )
        return self


class Limit(Level):
    """A constraint on the mean score: in the unit of the score itself, before transform and bound."""

    sense: Literal["at_least", "at_most", "equal"] = "at_least"
    """The mean score should be at least the level, at most (for costs), or equal to it: then a reward that overshoots is
    pulled back."""


class Head(Strict):
    """What happens to one reward before it meets the others."""

    transform: Transform | None = None
    """Change of scale; null: the score as it is, except where `aggregate` compares rewards: then `standardise`."""
    bound: Annotated[Clip | Tiers, Field(discriminator="type")] | None = None
    """What limits it, after the transform."""
    constraint: Limit | None = None
    """What its mean must satisfy, with `aggregate: {type: constraints}`."""


# ---------------------------------------------------------------------------------------------------------- aggregation
class Sum(Strict):
    """Weighted sum."""

    type: Literal["sum"] = "sum"


class Mean(Strict):
    """Weighted mean of the standardised rewards."""

    type: Literal["mean"] = "mean"


class Median(Strict):
    """Median of the standardised rewards."""

    type: Literal["median"] = "median"


class Wco(Strict):
    """Worst case: the lowest of the standardised rewards."""

    type: Literal["wco"] = "wco"


class Uwo(Strict):
    """Mean minus `coefficient` x variance over the standardised rewards, which should estimate the same quantity."""

    type: Literal["uwo"] = "uwo"
    coefficient: NonNegativeFloat = 0.5
    """What a unit of variance costs. Published: 0.1 to 1."""
    ddof: Literal[0, 1] = 0
    """0: the population's variance, as published for best-of-n; 1: the unbiased one, as in the PPO code."""


class MeanMinusStd(Strict):
    """Mean minus `coefficient` x standard deviation (of the population) over the standardised rewards."""

    type: Literal["mean_minus_std"] = "mean_minus_std"
    coefficient: NonNegativeFloat = 0.5
    """What a unit of standard deviation costs."""


class Softmin(Strict):
    """Mean of the standardised rewards, weighted by softmax(-reward / temperature): near 0 the lowest, far up the mean."""

    type: Literal["softmin"] = "softmin"
    temperature: PositiveFloat = 0.5
    """In standard deviations."""


class KlDro(Strict):
    """-temperature x log mean exp(-reward / temperature) over the standardised rewards: the worst case within a KL ball."""

    type: Literal["kl_dro"] = "kl_dro"
    temperature: PositiveFloat = 1.0
    """In standard deviations; large: the mean, small: the lowest."""


class WinRate(Strict):
    """Share of its group's other images that an image beats, each reward being a judge of every pair: in [0, 1], mean 1/2."""

    type: Literal["win_rate"] = "win_rate"
    temperature: NonNegativeFloat = 1.0
    """A judge gives sigmoid(difference / temperature), in standard deviations; 0: the better image wins, equal ones draw."""


class Constraints(Strict):
    """Lagrange multipliers: the weight of a reward with a `constraint` follows how well its mean satisfies it; all others
    are the objective. Each reward is normalised in its group by itself."""

    type: Literal["constraints"] = "constraints"
    multipliers: Literal["squashed", "free"] = "squashed"
    """squashed: weights sigmoid(multiplier), or tanh where the sense is `equal`, and what they leave goes to the objective.
    free: the multipliers themselves, at least 0 unless the sense is `equal`, and 1 for the objective."""
    rate: PositiveFloat = 0.1
    """Step of the multipliers, in each iteration."""
    momentum: float = Field(default=0.1, ge=0, lt=1)
    """Share of the last step that is repeated."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of the multipliers are scaled down to this norm."""
    average: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old value in the running mean of a constrained reward; one iteration alone is too noisy."""
    warmup: NonNegativeInt = 0
    """Iterations at the start in which the multipliers rest."""
    initial: float = 0.0
    """Multipliers at the start."""


Aggregate = Annotated[
    Sum | Mean | Median | Wco | Uwo | MeanMinusStd | Softmin | KlDro | WinRate | Constraints,
    Field(discriminator="type"),
]


# -------------------------------------------------------------------------------------------------------------- filters
class Best(Strict):
    """Only the best images of a group are trained on."""

    type: Literal["best"] = "best"
    count: PositiveInt = 1
    """So many of each group."""


class BestRandom(Strict):
    """The best image of a group has weight `best`, the others share the rest."""

    type: Literal["best_random"] = "best_random"
    best: float = Field(default=0.4, gt=0, lt=1)
    """Weight of the best image. Published: 0.4, with four others of 0.1."""


class BestWorst(Strict):
    """Only the best and the worst images of a group are trained on."""

    type: Literal["best_worst"] = "best_worst"
    count: PositiveInt = 1
    """So many at each end."""


class Power(Strict):
    """Images are weighted by |score|^exponent, whatever the zero of the score means."""

    type: Literal["power"] = "power"
    exponent: PositiveFloat = 2.0
    """Published: 2."""


class Combine(Strict):
    """The pipeline: transform, bound, aggregate, gate and penalties, (normalise and shape, elsewhere), filter."""

    rewards: dict[str, Head] = {}
    """Settings of single rewards, by their names in `rewards`."""
    gate: Annotated[HardGate | RampGate | ProductGate | HingeGate, Field(discriminator="type")] | None = None
    """A reward without which the others do not count."""
    penalty: Penalty | None = None
    """Rewards that multiply all others."""
    aggregate: Aggregate = Sum()
    """How the rewards of an image become one number."""
    disagreement: Disagreement | None = None
    """What images cost on which the members of an ensemble disagree."""
    filter: Annotated[Best | BestRandom | BestWorst | Power, Field(discriminator="type")] | None = None
    """Which images of a group are trained on; advantages come from the whole group."""
    base_images: int = Field(default=256, ge=2)
    """Images of the base model whose scores give means, deviations and quantiles, over all processes; drawn before the first
    iteration, as in the rollout, and only if something needs them. A reward that learns scores the same ones again, each time that it
    has changed."""
