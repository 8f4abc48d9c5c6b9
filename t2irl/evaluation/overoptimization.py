"""Over-optimisation: gold against the distance from the base model, and best-of-k from samples. Pure, float64.

Gao, Schulman and Hilton 2023, "Scaling laws for reward model overoptimization": with d = sqrt(KL) and R the gold gained,
best-of-n R(d) = d (a - b d) and reinforcement learning R(d) = d (a - b log d).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["best_of_n", "rl"]


@dataclass(frozen=True)
class Fit:
    """R(d) = d (a - b d) or d (a - b log d)."""

    kind: Kind
    a: float
    b: float

    @property
    def peak(self) -> float | None:
        """d at which gold is highest: a / 2b or exp(a / b - 1); None for a curve that does not turn (b <= 0 or a <= 0)."""
        if self.b <= 0:
            return None
        if self.kind == "rl":
            return math.exp(min(self.a / self.b - 1, 700.0))
        return self.a / (2 * self.b) if self.a > 0 else None

    def gold(self, d: float) -> float:
        """Gold gained at a distance d > 0."""
        return d * (self.a - self.b * (math.log(d) if self.kind == "rl" else d))


def fit(d: Tensor, gained: Tensor, kind: Kind) -> Fit:
    """Least squares on R / d, which is linear in a and b. `d` (N,) > 0, at least two different; `gained` (N,)."""
    d, gained = d.double(), gained.double()
    assert bool((d > 0).all()) and len(d.unique()) > 1, "a fit takes two different distances above 0"
    columns = torch.stack([torch.ones_like(d), -(d.log() if kind == "rl" else d)], 1)
    a, b = torch.linalg.lstsq(columns, (gained / d)[:, None]).solution[:, 0].tolist()
    return Fit(kind, a, b)


def best_of_k(proxy: Tensor, gold: Tensor) -> Tensor:
    """Expected gold of the best of k by proxy, k = 1..n, unbiased, from n scored samples: (P, n) each -> (n,) float64.

    For samples sorted by proxy, sum over i >= k of C(i - 1, k - 1) / C(n, k) x gold_(i); the mean over P prompts. Samples of
    equal proxy score are each as likely to be picked, so they get the mean of their gold.

    Samples with a score that is NaN are left out: k beyond the number that is left of a prompt picks among all of these.
    Prompts of which none is left do not count; NaN where that is so of all.
    """
    curve, prompts = torch.zeros(proxy.shape[1], dtype=torch.float64), 0
    for scores, truth in zip(proxy.double(), gold.double(), strict=True):
        known = ~(scores.isnan() | truth.isnan())
        n = int(known.sum())
        if n == 0:
            continue
        values, place = torch.unique(scores[known], return_inverse=True)  # ascending
        shared = torch.zeros(len(values), dtype=torch.float64).index_add(0, place, truth[known]) / torch.bincount(place)
        picked = _pick_probabilities(n) @ shared[place.sort().values]
        curve += torch.cat([picked, picked[-1:].expand(len(curve) - n)])
        prompts += 1
    return curve / prompts


@cache
def _pick_probabilities(n: int) -> Tensor:
    """(k - 1, i - 1): the chance that the sample of rank i of n is the best of k drawn without replacement."""
    return torch.tensor(
        [[math.comb(i - 1, k - 1) / math.comb(n, k) for i in range(1, n + 1)] for k in range(1, n + 1)],
        dtype=torch.float64,
    )


def best_of_n_kl(n: int) -> float:
    """Upper bound of the divergence of best-of-n from what it picks from, in nats: log n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n
