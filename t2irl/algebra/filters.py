"""Which images of a group are trained on, and how much (PF-PPO, arXiv 2409.06957): those whose rank by reward is reliable.

Advantages come from the whole group, before anything is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from t2irl.algebra import config as c


def filter_factors(how: c.Best | c.BestRandom | c.BestWorst | c.Power, scores: Tensor, groups: Tensor) -> Tensor:
    """What advantages are multiplied by, (N,) float64 >= 0 with mean 1: N f / sum f.

    So a loss that is a mean over all N images becomes sum f x loss / sum f. `scores`: (N,) without NaN. `groups`: (N,) int64.
    """
    kept = torch.zeros(len(scores), dtype=torch.float64)
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        kept[rows] = keep_weights(how, scores[rows].double())
    total = kept.sum()
    return kept * len(kept) / total if total > 0 else torch.ones_like(kept)


def keep_weights(how: c.Best | c.BestRandom | c.BestWorst | c.Power, scores: Tensor) -> Tensor:
    """f of one group's images, (G,). Images of equal score share what their ranks have, so that order does not matter."""
    size = len(scores)
    if isinstance(how, c.Power):
        return scores.abs() ** how.exponent
    by_rank = torch.zeros(size, dtype=torch.float64)  # from the best
    if isinstance(how, c.Best):
        by_rank[: how.count] = 1
    elif isinstance(how, c.BestWorst):
        by_rank[: how.count] = by_rank[size - how.count :] = 1
    else:
        by_rank[0] = how.best
        by_rank[1:] = (1 - how.best) / max(size - 1, 1)
    weights = torch.empty(size, dtype=torch.float64)
    weights[scores.argsort(descending=True, stable=True)] = by_rank
    equal = (scores[:, None] == scores[None]).double()
    return (equal @ weights) / equal.sum(1)
