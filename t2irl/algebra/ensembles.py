"""Several rewards -> one: pure functions of a table (K, N) in float64, K rewards by N images, NaN where one does not apply.

An image's rewards are those that apply to it, at least one. Scales must be comparable, which `standardise` sees to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from t2irl.algebra import config as c


def aggregate(how: c.Aggregate, table: Tensor, weights: Tensor, groups: Tensor) -> Tensor:
    """One score an image, (N,). `weights`: (K,), for those that have any. `groups`: (N,) int64."""
    if isinstance(how, c.Sum):
        return (weights[:, None] * table).nansum(0)
    if isinstance(how, c.Mean):
        return weighted_mean(table, weights)
    if isinstance(how, c.Median):
        return torch.nanquantile(table, 0.5, dim=0)
    if isinstance(how, c.Wco):
        return table.nan_to_num(torch.inf).amin(0)
    if isinstance(how, c.Uwo):
        return table.nanmean(0) - how.coefficient * variance(table, how.ddof)
    if isinstance(how, c.MeanMinusStd):
        return table.nanmean(0) - how.coefficient * variance(table).sqrt()
    if isinstance(how, c.Softmin):
        return softmin(table, how.temperature)
    if isinstance(how, c.KlDro):
        return kl_dro(table, how.temperature)
    assert isinstance(how, c.WinRate), f"{how.type} is no aggregate of scores"
    return win_rate(table, weights, groups, how.temperature)


def weighted_mean(table: Tensor, weights: Tensor) -> Tensor:
    """sum w n / sum w over the rewards that apply (reward-model ensembles, Coste et al., arXiv 2310.02743)."""
    w = weights[:, None].expand_as(table).where(~table.isnan(), 0.0)
    return (w * table.nan_to_num(0.0)).sum(0) / w.sum(0)


def variance(table: Tensor, ddof: int = 0) -> Tensor:
    """Variance over the rewards that apply; 0 for a single one. Coste et al. use ddof 0 in best-of-n and 1 in PPO."""
    applies = ~table.isnan()
    squares = (table - table.nanmean(0)).square().where(applies, 0.0).sum(0)
    return squares / (applies.sum(0) - ddof).clamp_min(1)


def disagreement(table: Tensor, measure: str = "std") -> Tensor:
    """How far apart each image's rewards are, (N,) >= 0, by a measure of `Disagreement`; 0 for a single one."""
    if measure in ("std", "variance"):
        found = variance(table)
        return found if measure == "variance" else found.sqrt()
    if measure == "max_pairwise":
        return table.nan_to_num(-torch.inf).amax(0) - table.nan_to_num(torch.inf).amin(0)
    assert measure == "leave_one_out", measure
    count = (~table.isnan()).sum(0).double()
    # n_k - mean of the others = K / (K - 1) (n_k - mean of all)
    return (table - table.nanmean(0)).abs().nan_to_num(0.0).amax(0) * count / (count - 1).clamp_min(1)


def softmin(table: Tensor, temperature: float) -> Tensor:
    """sum_k softmax(-n / T)_k n_k (PURE, arXiv 2504.15275): the mean for large T, the minimum for small."""
    weights = (-table / temperature).nan_to_num(-torch.inf).softmax(0)
    return (weights * table.nan_to_num(0.0)).sum(0)


def kl_dro(table: Tensor, temperature: float) -> Tensor:
    """-T log mean_k exp(-n_k / T): the lowest mean over reweightings, less T x their KL divergence from equal weights.

    Large T gives the mean, small T the minimum, and to second order mean - Var / (2 T), which is UWO.
    """
    count = (~table.isnan()).sum(0).double()
    return -temperature * ((-table / temperature).nan_to_num(-torch.inf).logsumexp(0) - count.log())


def vote(gap: Tensor, temperature: float) -> Tensor:
    """A judge's P(i beats j) from n_i - n_j: sigmoid(gap / T), or with T = 0 who is ahead, draws as halves."""
    return (gap / temperature).sigmoid() if temperature else gap.sign() / 2 + 0.5


def win_rate(table: Tensor, weights: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Mean over the other images j of the group of P(i beats j), in [0, 1] (arXiv 2404.03715 in its group form).

    P is the weighted mean of the judges sigmoid((n_i - n_j) / T), or of 1[n_i > n_j] with draws as halves where T is 0, over the
    judges that apply to both; 1/2 without any. P(i, j) + P(j, i) = 1, so that a group's mean is 1/2.
    """
    found = torch.full((table.shape[1],), 0.5, dtype=torch.float64)
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        if len(rows) == 1:
            continue
        gap = table[:, rows, None] - table[:, None, rows]
        judged = ~gap.isnan()
        wins = vote(gap, temperature)
        w = weights[:, None, None].expand_as(gap).where(judged, 0.0)
        total = w.sum(0)
        beats = (w * wins.nan_to_num(0.0)).sum(0) / total.where(total > 0, 1.0)
        beats = beats.where(total > 0, 0.5).fill_diagonal_(0.0)
        found[rows] = beats.sum(1) / (len(rows) - 1)
    return found
