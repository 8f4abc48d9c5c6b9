"""What pairwise judgements say: win rates, tests, strengths, agreement. Pure functions of arrays, float64."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats
from scipy.sparse.csgraph import connected_components

ELO = 400 / math.log(10)
"""Points of the Elo scale for one unit of log-odds."""
RIDGE = 1e-2
"""Weight of a pull of strengths to 0 (a normal prior of deviation 10 in log-odds): keeps undefeated models finite."""
CHUNK = 512
"""Resamples drawn at a time."""
Interval = tuple[float, float]


def wilson(wins: float, count: float, level: float = 0.95) -> Interval:
    """Wilson score interval of a share; `wins` may hold halves. (0, 1) when nothing was counted."""
    if not count:
        return 0.0, 1.0
    z = float(stats.norm.ppf(0.5 + level / 2))
    share, spread = wins / count, z * z / count
    middle = share + spread / 2
    reach = z * math.sqrt(max(share * (1 - share), 0) / count + spread / (4 * count))
    return max((middle - reach) / (1 + spread), 0.0), min((middle + reach) / (1 + spread), 1.0)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p of the hypothesis that either side of a decisive pair is as likely; 1 without any."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[Hashable], seed: int, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile interval of the mean of values (N,), with whole clusters (prompts) drawn anew instead of single values."""
    numbers = np.asarray(values, np.float64)
    place = _places(clusters)
    sums, counts = (np.bincount(place, weights=w) for w in (numbers, np.ones_like(numbers)))
    n, rng, means = len(sums), np.random.default_rng(seed), []
    for start in range(0, resamples, CHUNK):
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(CHUNK, resamples - start)).astype(np.float64)
        means.append((drawn @ sums) / (drawn @ counts))
    low, high = np.quantile(np.concatenate(means), [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def _places(names: Sequence[Hashable]) -> np.ndarray:
    """Equal numbers from 0 for equal names."""
    table: dict[Hashable, int] = {}
    return np.array([table.setdefault(name, len(table)) for name in names], np.int64)


# ------------------------------------------------------------------------------------------------------ Bradley-Terry
@dataclass(frozen=True)
class Strengths:
    """Bradley-Terry strengths in log-odds, relative to the first model, with intervals: P(i beats j) = sigmoid(s_i - s_j)."""

    values: np.ndarray
    """(K,); the first is 0."""
    low: np.ndarray
    """(K,) lower ends."""
    high: np.ndarray
    """(K,) upper ends."""


def bradley_terry(
    first: Sequence[int], second: Sequence[int], outcome: ArrayLike, clusters: Sequence[Hashable], level: float = 0.95
) -> Strengths:
    """Fit strengths to games: `first` and `second` (N,) are model numbers from 0, `outcome` 1 where `first` wins, 0.5 for a tie.

    Intervals are by the sandwich formula with games clustered by prompt, and Student's t of the number of clusters. Raises
    ValueError when models fall into groups that were never compared with one another.
    """
    i, j, y = np.asarray(first), np.asarray(second), np.asarray(outcome, np.float64)
    k = int(max(i.max(), j.max())) + 1
    table = np.zeros((k, k))
    np.add.at(table, (i, j), 1.0)
    groups, member = connected_components(table + table.T, directed=False)
    if groups > 1:
        raise ValueError(f"models {np.flatnonzero(member != member[0]).tolist()} were never compared with the first")
    design = np.zeros((len(y), k))
    design[np.arange(len(y)), i] += 1
    design[np.arange(len(y)), j] -= 1

    def loss(s: np.ndarray) -> tuple[float, np.ndarray]:
        z = design @ s
        value = -(special.log_expit(z) * y + special.log_expit(-z) * (1 - y)).sum() + RIDGE / 2 * s @ s
        return value, design.T @ (special.expit(z) - y) + RIDGE * s

    def hessian(s: np.ndarray) -> np.ndarray:
        p = special.expit(design @ s)
        return design.T @ (design * (p * (1 - p))[:, None]) + RIDGE * np.eye(k)

    found = optimize.minimize(loss, np.zeros(k), jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-9})
    strengths = found.x
    place = _places(clusters)
    n = int(place.max()) + 1
    gradients = np.zeros((n, k))
    np.add.at(gradients, place, design * (special.expit(design @ strengths) - y)[:, None])
    bread = np.linalg.inv(hessian(strengths))
    spread = bread @ (gradients.T @ gradients) @ bread * (n / max(n - 1, 1))
    deviation = np.sqrt(np.maximum(np.diag(spread) + spread[0, 0] - 2 * spread[0], 0))
    reach = float(stats.t.ppf(0.5 + level / 2, max(n - 1, 1))) * deviation
    values = strengths - strengths[0]
    return Strengths(values, values - reach, values + reach)


# ---------------------------------------------------------------------------------------------------------- agreement
def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Agreement of two raters beyond chance, each with shares of their own: 1 always, 0 as by chance. NaN if undefined."""
    names = sorted({*first, *second}, key=repr)
    table = np.zeros((len(names), len(names)))
    for x, y in zip(first, second, strict=True):
        table[names.index(x), names.index(y)] += 1
    share = table / max(table.sum(), 1)
    chance = float(share.sum(0) @ share.sum(1))
    return (float(np.trace(share)) - chance) / (1 - chance) if chance < 1 else float("nan")


def fleiss_kappa(counts: ArrayLike) -> float:
    """Agreement beyond chance of equally many raters a unit: `counts` (units, categories) of answers. NaN if undefined."""
    table = np.asarray(counts, np.float64)
    raters = table.sum(1)
    if not len(table) or raters[0] < 2 or (raters != raters[0]).any():
        raise ValueError("Fleiss' kappa needs the same number of raters, two or more, for each unit")
    n = raters[0]
    observed = float(((table**2).sum(1) - n).mean() / (n * (n - 1)))
    chance = float(((table.sum(0) / table.sum()) ** 2).sum())
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def krippendorff_alpha(
    units: Sequence[Sequence[float]], metric: Literal["nominal", "ordinal", "interval"] = "nominal"
) -> float:
    """Krippendorff's alpha = 1 - D_o / D_e over units with any numbers of answers; units with fewer than two do not count.

    Answers are numbers; for `nominal` only their equality matters. NaN without pairs of answers or with one category alone.
    """
    pairable = [list(unit) for unit in units if len(unit) >= 2]
    values = sorted({value for unit in pairable for value in unit})
    if len(values) < 2:
        return float("nan")
    place = {value: k for k, value in enumerate(values)}
    coincidence = np.zeros((len(values), len(values)))
    for unit in pairable:
        counts = np.bincount([place[value] for value in unit], minlength=len(values)).astype(np.float64)
        coincidence += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    totals = coincidence.sum(1)
    if metric == "nominal":
        distance = 1 - np.eye(len(values))
    elif metric == "interval":
        distance = np.subtract.outer(values, values) ** 2
    else:
        # Ranks: everything up to and between two values, each counted half at its ends.
        middle = np.cumsum(totals) - totals / 2
        distance = np.subtract.outer(middle, middle) ** 2
    observed = (coincidence * distance).sum()
    chance = (np.outer(totals, totals) * distance).sum() / (totals.sum() - 1)
    return float(1 - observed / chance)
