"""Whose turn is it, the adversary's or the policy's: pure, no torch.

By default a rollout serves both: the policy learns from scores given before the adversary's step. With `skip_policy` an
iteration in which the adversary learns brings no policy update, as in the published code.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from t2irl.config import Strict


class Schedule(Strict):
    """What all schedules have."""

    updates: PositiveInt = 1
    """Optimiser steps of the adversary in an iteration in which it learns."""
    warmup: NonNegativeInt = 0
    """First iterations, in which the adversary learns whatever the schedule says and the policy does not."""
    skip_policy: bool = False
    """The policy learns only in iterations in which the adversary does not (published), instead of in all of them."""


class FixedTurns(Schedule):
    """Iterations in which the adversary learns and in which it rests, in a fixed cycle. Published: learn 9, rest 1, skip_policy."""

    type: Literal["fixed"] = "fixed"
    learn: PositiveInt = 1
    """Iterations at the beginning of a cycle in which the adversary learns."""
    rest: NonNegativeInt = 0
    """Iterations at its end in which it does not."""

    @model_validator(mode="after")
    def _policy_gets_a_turn(self) -> FixedTurns:
        if self.skip_policy and self.rest == 0:
            raise PydanticCustomError(
                "turns",
                "skip_policy with rest: 0 never lets the policy learn; set rest to 1 or more (published: learn 9, rest 1)",
            )
        return self


class TriggerTurns(Schedule):
    """The adversary learns while the policy's images out-score the reference images on the mean."""

    type: Literal["trigger"] = "trigger"
    margin: float = 0.0
    """The policy's mean must exceed that of the reference images by more than this."""
    cap: PositiveInt | None = 10
    """Most iterations in a row in which the adversary learns; null: no limit (published), so that with skip_policy an adversary
    that cannot keep up stops the policy for good."""
    cooldown: PositiveInt = 1
    """Iterations that it then rests."""


class AccuracyTurns(Schedule):
    """Keeps the adversary's accuracy in a band: it starts to learn below `low` and rests above `high`."""

    type: Literal["accuracy"] = "accuracy"
    low: float = Field(0.6, ge=0, le=1)
    """Accuracy below which it starts to learn."""
    high: float = Field(0.8, ge=0, le=1)
    """Accuracy above which it stops; in between it goes on with what it did."""
    cap: PositiveInt | None = None
    """Most iterations in a row in which it learns; null: no limit."""
    cooldown: PositiveInt = 1
    """Iterations that it then rests."""

    @model_validator(mode="after")
    def _band_is_ordered(self) -> AccuracyTurns:
        if self.low > self.high:
            raise PydanticCustomError(
                "turns", "low = {low} is above high = {high}; the band is [low, high], such as [0.6, 0.8]",
                {"low": self.low, "high": self.high},
            )  # fmt: skip
        return self


AnyTurns = Annotated[FixedTurns | TriggerTurns | AccuracyTurns, Field(discriminator="type")]
"""A schedule by its `type`."""


@dataclass(frozen=True)
class Observation:
    """What is known of a rollout before anybody learns from it; means over all processes. NaN: not known."""

    policy: float
    """Mean score of the policy's images."""
    reference: float
    """Mean score of reference images of the same prompts."""
    accuracy: float
    """The adversary's accuracy, in [0, 1]."""


@dataclass(frozen=True)
class Turn:
    """Who learns from a rollout."""

    adversary: bool
    policy: bool


@dataclass
class Turns:
    """A schedule as it runs. Its fields, but for the schedule, are its state."""

    schedule: FixedTurns | TriggerTurns | AccuracyTurns
    iteration: int = 0
    """Iterations so far."""
    in_a_row: int = 0
    """Iterations in which the adversary has learned without a rest."""
    resting: int = 0
    """Iterations that are left of a cool-down."""
    catching_up: bool = True
    """Accuracy band: whether the adversary was last seen below it."""

    def next(self, seen: Observation) -> Turn:
        """Decide about an iteration, and move on to the next one."""
        warming = self.iteration < self.schedule.warmup
        learns = self._wants(seen)
        if warming:
            learns = True
        elif self.resting:
            self.resting -= 1
            learns = False
        self.iteration += 1
        self.in_a_row = self.in_a_row + 1 if learns and not warming else 0
        cap = None if isinstance(self.schedule, FixedTurns) else self.schedule.cap
        if cap is not None and self.in_a_row >= cap and not isinstance(self.schedule, FixedTurns):
            self.in_a_row, self.resting = 0, self.schedule.cooldown
        return Turn(learns, policy=not (warming or (learns and self.schedule.skip_policy)))

    def _wants(self, seen: Observation) -> bool:
        schedule = self.schedule
        if isinstance(schedule, FixedTurns):
            place = (self.iteration - schedule.warmup) % (schedule.learn + schedule.rest)
            return place < schedule.learn
        if isinstance(schedule, TriggerTurns):
            return seen.policy > seen.reference + schedule.margin
        if not math.isnan(seen.accuracy):
            limit = schedule.high if self.catching_up else schedule.low
            self.catching_up = seen.accuracy <= limit if self.catching_up else seen.accuracy < limit
        return self.catching_up

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands."""
        return {name: value for name, value in asdict(self).items() if name != "schedule"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in self.state_dict():
            setattr(self, name, state[name])
