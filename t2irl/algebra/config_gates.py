"""Places on a reward's scale, and what rewards do to others there: gates and penalties of `combine`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from pydantic_core import PydanticCustomError

from t2irl.strict import Strict

Quantile = Annotated[float, Field(gt=0, lt=1)]


class Level(Strict):
    """A place on a reward's scale. Exactly one of `at` and `quantile`."""

    at: float | None = None
    """A number, in the unit of the score."""
    quantile: Quantile | None = None
    """That quantile of the base model's scores, instead of a number."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Level:
        if (self.at is None) == (self.quantile is None):
            given = "neither" if self.at is None else "both"
            raise PydanticCustomError(
                "level", "Give either `at` (a score) or `quantile` (of the base model's scores); {given} is there", {"given": given}
            )  # fmt: skip
        return self


class PromptLevel(Level):
    """A level that may be another one on each prompt."""

    per_prompt: NonNegativeInt = 0
    """Base-model images drawn for each prompt, when it is first met, of whose scores the quantile is taken; 0: one level for all
    prompts, from `combine.base_images`. A prompt on none of whose images the reward applies takes that of all prompts met so far."""

    @model_validator(mode="after")
    def _of_a_quantile(self) -> PromptLevel:
        if self.per_prompt and self.at is not None:
            raise PydanticCustomError(
                "level", "per_prompt = {count} needs a quantile: at = {at} is the same on every prompt; use one of the two",
                {"count": self.per_prompt, "at": self.at},
            )  # fmt: skip
        return self


class HardGate(PromptLevel):
    """All other rewards count only for images whose `reward` is above the level."""

    type: Literal["hard"] = "hard"
    reward: str
    """Name of the reward that must be passed; the level is in the unit of its score."""


class RampGate(PromptLevel):
    """All other rewards are multiplied by sigmoid((score - level) / width) of `reward`: a gate without a cliff. They must be at
    least 0. Where `aggregate` is not `sum`, what it makes of the others is multiplied, and `reward` has no other part."""

    type: Literal["ramp"] = "ramp"
    reward: str
    """Name of the reward that must be passed; the level is in the unit of its score."""
    width: PositiveFloat
    """Score difference over which the gate opens."""


class HingeGate(PromptLevel):
    """Total - weight x max(0, level - score) of `reward`: it costs what it lacks, and earns nothing. Since nothing is multiplied, the
    others may be below 0."""

    type: Literal["hinge"] = "hinge"
    reward: str
    """Name of the reward, which has no other part; its `weight` is the cost of a unit of its score, in which the level is too."""


class ProductGate(Strict):
    """reward x (1 + strength x aggregate of the others, standardised): the others act through `reward` alone, which must be at
    least 0."""

    type: Literal["product"] = "product"
    reward: str
    """Name of the primary reward."""
    strength: PositiveFloat = 0.5
    """What one standard deviation of the others is worth, as a share of the primary reward."""


class Penalty(Strict):
    """Rewards in [0, 1] that multiply all others, each to the power of its weight. The others must be at least 0."""

    rewards: tuple[str, ...] = Field(min_length=1)
    """Names of the rewards that are factors."""
    violation_below: float | None = Field(default=None, gt=0, le=1)
    """A factor below this is a violation, which costs `violation_cost`; null: there are none."""
    violation_cost: PositiveFloat = 1.0
    """Subtracted from the score of an image with a violation."""


class Disagreement(Strict):
    """Total - cost x max(0, disagreement - tolerance) over the standardised rewards of an image."""

    measure: Literal["std", "variance", "max_pairwise", "leave_one_out"] = "std"
    """std and variance: of the population. max_pairwise: the largest difference of two rewards. leave_one_out: the largest distance
    of a reward from the mean of the others."""
    cost: PositiveFloat = 0.5
    """What a unit of it costs, in standard deviations of the base model's scores."""
    tolerance: NonNegativeFloat = 0
    """Disagreement that costs nothing yet; 0: all of it costs."""
