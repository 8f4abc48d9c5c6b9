"""What a run's numbers say: measures before and after, the sentence at the top of the report, and its alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2irl.evaluation.charts import Points, number
from t2irl.evaluation.rules import ERRORS, standard_error

FALL = 0.1
"""Where the spread of a measure is not known, this share of its base value is a fall that counts."""
_UNCHANGED = 5e-4


@dataclass(frozen=True)
class Measure:
    """One held-out measure, before training and at the end (or at the newest evaluation)."""

    name: str
    trained: bool
    """Whether it is one of the rewards trained on."""
    base: float
    final: float

    @property
    def change(self) -> float:
        """Final minus base; higher is better."""
        return self.final - self.base

    @property
    def trend(self) -> str:
        """up, down or level."""
        return "level" if abs(self.change) < _UNCHANGED else "up" if self.change > 0 else "down"


@dataclass(frozen=True)
class Alarm:
    """Something to look at, and the metric it was seen in."""

    text: str
    metric: str | None = None


def measures(summary: Mapping[str, Any], points: Mapping[str, Points], rewards: Sequence[str]) -> list[Measure]:
    """Measures of the summary, or of an unfinished run's first and newest evaluation; held-out ones first."""
    seen = {n.removeprefix("heldout/"): p for n, p in points.items() if n.startswith("heldout/")}
    base = summary.get("base") or {name: p[0][1] for name, p in seen.items()}
    final = summary.get("final") or {name: p[-1][1] for name, p in seen.items()}
    found = [
        Measure(name, name in rewards, base[name], final[name])
        for name in final
        if _finite(base.get(name), final[name])
    ]
    return sorted(found, key=lambda m: m.trained)


def _finite(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)


def headline(found: Sequence[Measure], images: int | None) -> str:
    """One sentence on what changed; empty when nothing was measured."""
    if not found:
        return ""
    said = []
    for m in found:
        verb = {"up": "rose", "down": "fell", "level": "stayed"}[m.trend]
        said.append(
            f"{m.name} stayed at {m.final:.3f}"
            if m.trend == "level"
            else f"{m.name} {verb} from {m.base:.3f} to {m.final:.3f}"
        )
    where = f"On {images} held-out pictures" if images else "On held-out pictures"
    return f"{where}, " + (said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}") + "."


def alarms(points: Mapping[str, Points], found: Sequence[Measure], images: int | None = None) -> list[Alarm]:
    """What a reader should look at before trusting the run. `images`: pictures of an evaluation."""
    return [*_parted(points, found, images), *_out_of_range(points)]


def _fell(m: Measure, points: Mapping[str, Points], images: int | None) -> bool:
    """By more than two standard errors, from the spread of the score on the monitors' pictures before training and now; the mean of
    a measure without one, by a tenth of what it was."""
    spread = [{f"monitor/{m.name}/std": y} for _, y in points.get(f"monitor/{m.name}/std", [])]
    error = standard_error(spread[0], spread[-1], m.name, images) if spread and images else None
    return -m.change > (FALL * abs(m.base) if error is None else ERRORS * error)


def _parted(points: Mapping[str, Points], found: Sequence[Measure], images: int | None) -> list[Alarm]:
    """Training reward up, held-out measure down. The score of a reward that learns falls by itself: its judge moves."""
    reward = [y for _, y in points.get("reward/total/mean", [])]
    if len(reward) < 2:
        return []
    size = max(1, len(reward) // 10)
    first, last = sum(reward[:size]) / size, sum(reward[-size:]) / size
    if last <= first:
        return []
    return [
        Alarm(
            f"{m.name} fell by {-m.change:.3f} on held-out prompts while the training reward rose by "
            f"{last - first:.3f}: the policy may be exploiting the reward.",
            f"heldout/{m.name}",
        )
        for m in found
        if _fell(m, points, images) and f"reward/{m.name}/reference_mean" not in points
    ]


def _out_of_range(points: Mapping[str, Points]) -> list[Alarm]:
    """Metrics that are far outside the glossary's healthy range over the last tenth of the run."""
    limits = (
        ("advantage/zero_variance_groups", 0.5, "groups carry no signal: their images all score the same."),
        (
            "policy/clip_fraction_high",
            0.4,
            "transitions with a positive advantage are clipped: the steps are too large.",
        ),
        (
            "policy/clip_fraction_low",
            0.4,
            "transitions with a negative advantage are clipped: the steps are too large.",
        ),
    )
    raised = []
    for metric, limit, text in limits:
        values = [y for _, y in points.get(metric, [])]
        late = values[-max(1, len(values) // 10) :]
        mean = sum(late) / max(1, len(late))
        if mean > limit:
            raised.append(Alarm(f"Towards the end, {mean:.0%} of the {text}", metric))
    worst = max((abs(y - 1) for _, y in points.get("policy/ratio_first", [])), default=0.0)
    if worst > 0.01:
        raised.append(
            Alarm(
                f"At a first update the ratio was off 1 by {number(worst)}: rollout and update disagree.",
                "policy/ratio_first",
            )
        )
    return raised
