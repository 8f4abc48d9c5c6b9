"""GARDO (arXiv 2512.24138): which images the KL divergence acts on, and when the policy it is measured to is renewed.

N images of an iteration, over all processes. Everything here depends on gathered tensors alone, so that all processes decide
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Ties = Literal["mid", "strict"]
Population = Literal["all", "positive"]
Statistic = Literal["positive", "mean"]


def win_rates(values: Tensor, groups: Tensor | None = None, ties: Ties = "mid") -> Tensor:
    """Share of the other images that each one beats, (N,) float64 in [0, 1]; NaN where `values` (N,) is NaN.

    mid: (number of less + half the number of equal others) / (others), so that the mean is 1/2 however many tie. strict: eq. 7
    as printed, number of less / images, where each of many equal winners gets a low rate. The others are all images, or
    those of the same group, that have a value. An image alone has a rate of 1/2.
    """
    values = values.double()
    valid = ~values.isnan()
    rival = valid[:, None] & valid[None, :]
    if groups is not None:
        rival &= groups[:, None] == groups[None, :]
    less = ((values[None, :] < values[:, None]) & rival).sum(1).double()
    count = rival.sum(1).double()
    if ties == "strict":
        rates = less / count
    else:
        equal = ((values[None, :] == values[:, None]) & rival).sum(1).double() - 1
        rates = torch.where(count > 1, (less + equal / 2) / (count - 1), 0.5)
    return rates.where(valid, torch.nan)


def uncertainty(
    proxy: Tensor, auxiliaries: Sequence[Tensor], groups: Tensor | None = None, ties: Ties = "mid"
) -> Tensor:
    """Eq. 7: win rate under the optimised proxy minus the mean win rate under auxiliaries, (N,) float64 in [-1, 1].

    Far above 0: the proxy ranks the image much higher than what was never optimised. It sums to 0 with mid ranks. An
    auxiliary that is NaN is left out of the image's mean; NaN where the proxy, or every auxiliary, is.
    """
    others = torch.stack([win_rates(values, groups, ties) for values in auxiliaries])
    return win_rates(proxy, groups, ties) - others.nanmean(0)


def gate(uncertain: Tensor, share: float, population: Population = "all") -> Tensor:
    """The most uncertain `share` of the images, (N,) bool: uncertainty at or above its quantile 1 - share, and above 0.

    positive: the quantile is taken over the uncertainties that are at least 0, as in the released code, which lets about
    half the share through. NaN is never chosen.
    """
    known = ~uncertain.isnan()
    sample = uncertain[known & (uncertain >= 0)] if population == "positive" else uncertain[known]
    if len(sample) == 0:
        return torch.zeros_like(known)
    return (uncertain >= sample.quantile(1 - share)) & (uncertain > 0)


def statistic(uncertain: Tensor, kind: Statistic = "positive") -> float:
    """What the share follows: mean of the uncertainties that are at least 0, or of all (which with mid ranks is always 0)."""
    known = uncertain[~uncertain.isnan()]
    chosen = known[known >= 0] if kind == "positive" else known
    return float(chosen.mean()) if len(chosen) else 0.0


@dataclass
class GateShare:
    """The share of images that are penalised, and the rule that moves it (section A.1).

    A statistic above all of its last `window` values raises the share by `factor`, one below all lowers it. It is compared,
    the share kept within `bounds`, and only then it joins the window.
    """

    share: float
    factor: float = 0.1
    window: int = 20
    warmup: int = 20
    """Values that the window must hold before the share moves."""
    bounds: tuple[float, float] = (0.02, 0.2)
    seen: list[float] = field(default_factory=list)
    """The last values, oldest first."""

    def update(self, value: float) -> float:
        """Take in an iteration's statistic; the share for this iteration."""
        if len(self.seen) >= max(self.warmup, 1):
            if value > max(self.seen):
                self.share *= 1 + self.factor
            elif value < min(self.seen):
                self.share *= 1 - self.factor
            self.share = min(max(self.share, self.bounds[0]), self.bounds[1])
        self.seen = [*self.seen, value][-self.window :]
        return self.share

    def state_dict(self) -> dict[str, Any]:
        """Share and window."""
        return {"share": self.share, "seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.share, self.seen = state["share"], list(state["seen"])


@dataclass
class ResetRule:
    """When an adaptive reference policy becomes the present policy (section 4.2): after an update whose mean divergence from
    it exceeds `threshold`, or `every` updates after the last time. None switches either off."""

    threshold: float | None
    every: int | None
    age: int = 0
    """Updates since the last time."""
    exceeded: bool = False
    """Whether a divergence has exceeded the threshold since then."""
    count: int = 0
    """How often it has happened."""

    def after_update(self, divergence: float | None) -> None:
        """Note an update and its mean divergence, None if nothing was measured."""
        self.age += 1
        if self.threshold is not None and divergence is not None:
            self.exceeded = self.exceeded or divergence > self.threshold

    @property
    def due(self) -> Literal["divergence", "age"] | None:
        """Why it is time, None while it is not."""
        if self.exceeded:
            return "divergence"
        return "age" if self.every is not None and self.age >= self.every else None

    def reset(self) -> None:
        """Note that it has been done."""
        self.age, self.exceeded, self.count = 0, False, self.count + 1

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        return {"age": self.age, "exceeded": self.exceeded, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.age, self.exceeded, self.count = state["age"], state["exceeded"], state["count"]
