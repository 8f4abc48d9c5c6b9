"""Intervals over prompts, paired tests and Holm's correction. Pure, float64.

The pictures of a prompt are alike, so the prompt is the unit that is drawn again, never the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

BATCH = 2**22
"""Numbers that a resampling holds at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; NaN limits where there are too few prompts for one."""

    mean: float
    low: float
    high: float
    prompts: int
    """Prompts that it is a mean of."""


@dataclass(frozen=True)
class Difference:
    """A paired comparison of two rows on the same prompts."""

    mean: Interval
    """Of the differences, second minus first."""
    p: float
    """Two-sided, by changing the signs of the differences; NaN where there is nothing to test."""
    wilcoxon: float
    """Two-sided p of Wilcoxon's signed-rank test, beside it."""


def by_prompt(scores: np.ndarray) -> np.ndarray:
    """(P, n) scores, NaN where a measure does not apply -> (P,) means over the pictures of a prompt, NaN where there are none."""
    known = ~np.isnan(scores)
    total = np.where(known, scores, 0.0).sum(1)
    counts = known.sum(1)
    return np.divide(total, counts, out=np.full(len(scores), np.nan), where=counts > 0)


def interval(prompts: np.ndarray, confidence: float, resamples: int, seed: int) -> Interval:
    """Mean over prompts (P,) with a BCa bootstrap interval; prompts that are NaN are left out."""
    values = prompts[~np.isnan(prompts)].astype(np.float64)
    if len(values) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan, len(values))
    if np.ptp(values) == 0:  # nothing varies, and the bootstrap would divide by it
        return Interval(mean, mean, mean, len(values))
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=confidence, n_resamples=resamples, method="BCa", vectorized=True,
        batch=max(1, BATCH // len(values)), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(mean, float(found.low), float(found.high), len(values))


def difference(first: np.ndarray, second: np.ndarray, confidence: float, resamples: int, seed: int) -> Difference:
    """Second minus first, (P,) each, on prompts that both have a value for.

    p: under the hypothesis of no difference, each prompt's difference is as likely to have the other sign. All sign changes where
    there are few prompts, else `resamples` of them.
    """
    change = second - first
    change = change[~np.isnan(change)].astype(np.float64)
    mean = interval(change, confidence, resamples, seed)
    if len(change) < 2:
        return Difference(mean, math.nan, math.nan)
    if not change.any():
        return Difference(mean, 1.0, 1.0)
    test = stats.permutation_test(
        (change,), _mean, permutation_type="samples", n_resamples=resamples, vectorized=True,
        batch=max(1, BATCH // len(change)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return Difference(mean, float(test.pvalue), float(stats.wilcoxon(change, zero_method="zsplit").pvalue))


def _mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return values.mean(axis=axis)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the k-th smallest of m times m - k + 1, never falling, at most 1.

    NaN is no test: it stays, and is not counted.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected = list(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[place] = highest
    return corrected
