"""Advantages from rewards that are known with an uncertainty: Ctrl-U (arXiv 2410.11236) carried over to GRPO.

A reward is evaluated K times on slightly different versions of an image. N images of an iteration in groups; values (N,) and
evaluations (N, K); NaN means that the reward does not apply. All float64. Weights are constants: no gradient flows through
them, so unlike in Ctrl-U nothing is gained by inflating them, and no term +lambda U is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from t2irl.advantages import constant_groups

Std = Literal["group", "global", "none"]
Control = Literal["none", "shuffled", "inverse"]


@dataclass(frozen=True)
class Groups:
    """Sums and means within groups of the images that `applies` chooses."""

    index: Tensor
    """(N,) int64: 0 .. groups - 1."""
    applies: Tensor
    """(N,) bool."""

    @classmethod
    def of(cls, ids: Tensor, applies: Tensor) -> Groups:
        """Groups from ids of any kind."""
        return cls(torch.unique(ids, return_inverse=True)[1], applies)

    def sum(self, x: Tensor) -> Tensor:
        """(N,): the sum of each image's group."""
        total = torch.zeros(int(self.index.max()) + 1, dtype=torch.float64)
        return total.index_add(0, self.index, x.double().where(self.applies, 0.0))[self.index]

    @property
    def count(self) -> Tensor:
        """(N,): images of each image's group, at least 1."""
        return self.sum(torch.ones(len(self.index), dtype=torch.float64)).clamp_min(1)

    def mean(self, x: Tensor) -> Tensor:
        """(N,): the mean of each image's group, 0 where nothing applies."""
        return self.sum(x) / self.count


def spread(evaluations: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of a sample: over K - 1) of the evaluations of each image, both (N,).

    One evaluation has no spread: 0. Both are NaN where any evaluation is.
    """
    values = evaluations.double()
    mean = values.mean(1)
    return mean, values.std(1) if values.shape[1] > 1 else torch.zeros_like(mean).where(~mean.isnan(), torch.nan)


def noise_and_signal(mean: Tensor, deviation: Tensor, evaluations: int, groups: Groups) -> tuple[Tensor, Tensor]:
    """Variance of an image's mean score from the scorer's noise, and that from the images themselves, of each image's group.

    noise = mean of deviation^2 / K; signal = max(variance within the group - noise, a tenth of that variance). The variance is
    that of a sample (over G - 1), since only then noise may be subtracted.
    """
    noise = groups.mean(deviation**2) / evaluations
    variance = groups.sum((mean - groups.mean(mean)) ** 2) / (groups.count - 1).clamp_min(1)
    return noise, torch.maximum(variance - noise, 0.1 * variance)


def reliability(noise: Tensor, signal: Tensor) -> Tensor:
    """V3: signal / (signal + noise), in [0, 1]; 1 where both are 0."""
    return torch.where(signal + noise > 0, signal / (signal + noise), 1.0)


def exponential_weights(uncertain: Tensor, temperature: float, lowest: float) -> Tensor:
    """V1: exp(-u / temperature) clamped to [lowest, 1]; `uncertain` (N,) >= 0, 1 for the median image."""
    return (-uncertain / temperature).exp().clamp(lowest, 1)


def wiener_weights(deviation: Tensor, evaluations: int, signal: Tensor) -> Tensor:
    """V2: signal / (signal + deviation^2 / K), the weight of the best linear estimate; 1 where both are 0."""
    return reliability(deviation**2 / evaluations, signal)


def normalised(weights: Tensor, groups: Groups) -> Tensor:
    """Weights divided by their group's mean; 0 where nothing applies. A group without any weight gets 1."""
    mean = groups.mean(weights)
    return torch.where(mean > 0, weights / mean, 1.0).where(groups.applies, 0.0)


def controlled(weights: Tensor, groups: Groups, control: Control, seed: list[int]) -> Tensor:
    """Weights as a control experiment wants them: as they are, permuted within groups, or inverted (1 / w)."""
    if control == "inverse":
        return 1 / weights.clamp_min(torch.finfo(torch.float64).tiny)
    if control == "none":
        return weights
    found, rng = weights.clone(), np.random.default_rng(seed)
    for group in range(int(groups.index.max()) + 1):
        rows = ((groups.index == group) & groups.applies).nonzero().flatten()
        found[rows] = weights[rows[torch.from_numpy(rng.permutation(len(rows)))]]
    return found


def most_uncertain(uncertain: Tensor, share: float) -> Tensor:
    """V6: (N,) bool, the `share` of images, over all groups, that are dropped: above the quantile 1 - share."""
    known = uncertain[~uncertain.isnan()]
    return uncertain > known.quantile(1 - share) if share > 0 and len(known) else torch.zeros_like(uncertain) > 0


def weighted_advantages(
    values: Tensor, weights: Tensor, groups: Groups, std: Std, eps: float, floor: float = 0.0
) -> Tensor:
    """w (value - weighted mean of the group) / scale, (N,); they sum to 0 within every group.

    Without the weighted mean, w x (an ordinary advantage) would push all log-densities of a group one way. scale is the
    standard deviation of the numerator over all images (global), the root of the weighted variance of the group (group),
    plus `eps`, or 1 (none). Groups whose values span no more than `floor` get 0, and so do images that do not apply.
    """
    kept = values.double().where(groups.applies, 0.0)
    w = weights.double().where(groups.applies, 0.0)
    total = groups.sum(w).clamp_min(torch.finfo(torch.float64).tiny)
    centred = kept - groups.sum(w * kept) / total
    product = w * centred
    if std == "global":
        scale = product[groups.applies].square().mean().sqrt().expand(len(w)) + eps
    elif std == "group":
        scale = (groups.sum(w * centred**2) / total).sqrt() + eps
    else:
        scale = torch.ones_like(w)
    flat = constant_groups(values.where(groups.applies, torch.nan), groups.index, floor)
    return torch.where(flat | ~groups.applies, 0.0, product / scale.clamp_min(torch.finfo(torch.float64).tiny))


def effective_share(weights: Tensor, groups: Groups) -> float:
    """(sum w)^2 / (n sum w^2), mean over images: the part of a group that still counts, in (0, 1]; 1 for equal weights."""
    w = weights.double().where(groups.applies, 0.0)
    square = groups.sum(w**2)
    each = groups.sum(w) ** 2 / (groups.count * square.clamp_min(torch.finfo(torch.float64).tiny))
    each = each[groups.applies & (square > 0)]
    return float(each.mean()) if len(each) else 0.0


def report(
    uncertain: Tensor, weights: Tensor, mean: Tensor, noise: Tensor, signal: Tensor, groups: Groups
) -> dict[str, float]:
    """What metrics say of one reward's uncertainty and weights, over the images that count; nothing when none does."""
    rows = groups.applies
    if not rows.any():
        return {}
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    u, w = (values[rows].double().quantile(quantiles).tolist() for values in (uncertain, weights))
    return {
        "uncertainty_p10": u[0],
        "uncertainty_p50": u[1],
        "uncertainty_p90": u[2],
        "weight_min": float(weights[rows].min()),
        "weight_p10": w[0],
        "weight_p90": w[2],
        "effective_share": effective_share(weights, groups),
        "noise_share": float((1 - reliability(noise, signal))[rows].mean()),
        "weight_score_correlation": correlation(weights[rows], mean[rows]),
    }


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's, of two (n,) where neither is NaN; 0 where one is constant."""
    known = ~(first.isnan() | second.isnan())
    pair = torch.stack([first[known].double(), second[known].double()])
    return float(torch.corrcoef(pair)[0, 1].nan_to_num(0)) if pair.shape[1] > 1 else 0.0
