"""Diversity within groups: how far the images of a prompt lie apart, and what that does to advantages.

N images of an iteration with features (N, D); everything is computed within groups, in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Literal["cosine", "euclidean"]
Factor = Literal["relative", "relative_positive", "raw"]


def distances(features: Tensor, kind: Distance = "cosine") -> Tensor:
    """Of all pairs, (N, N) float64: 1 - cosine in [0, 2], or the Euclidean distance."""
    x = features.double()
    if kind == "euclidean":
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    unit = F.normalize(x, dim=1)
    return 1 - (unit @ unit.T).clamp(-1, 1)


def neighbours(groups: Tensor) -> Tensor:
    """(N, N) bool: other images of the same group."""
    return (groups[:, None] == groups[None, :]) & ~torch.eye(len(groups), dtype=torch.bool)


def nearest(features: Tensor, groups: Tensor, kind: Distance = "cosine") -> Tensor:
    """Distance of each image to the most alike one of its group, (N,) float64 >= 0; 0 for an image alone in its group."""
    others = neighbours(groups)
    found = distances(features, kind).where(others, torch.inf).amin(1)
    return found.where(others.any(1), 0.0)


def pairwise(features: Tensor, groups: Tensor, kind: Distance = "cosine") -> float:
    """Eq. 9: mean distance of the pairs of a group, averaged over groups of two or more; 0 without any."""
    others = neighbours(groups)
    table = distances(features, kind)
    means = [float(table[rows][:, rows][others[rows][:, rows]].mean()) for rows in _rows(groups) if len(rows) > 1]
    return sum(means) / len(means) if means else 0.0


def factors(
    nearest: Tensor, groups: Tensor, advantages: Tensor, kind: Factor = "relative", eps: float = 1e-6
) -> Tensor:
    """What positive advantages are multiplied by, (N,) float64; 1 where the advantage is not positive.

    relative: d / (mean d of the group), as in the released code. relative_positive: over the mean d of the group's images of
    positive advantage, so that the sum of equal positive advantages stays. raw: d, eq. 8 as printed, which makes positive
    advantages small beside negative ones. `eps` is added to both d and its mean, so that identical images get 1.
    """
    positive = advantages > 0
    if kind == "raw":
        return nearest.double().where(positive, 1.0)
    found = torch.ones(len(nearest), dtype=torch.float64)
    for rows in _rows(groups):
        d = nearest[rows].double()
        counted = d[positive[rows]] if kind == "relative_positive" else d
        if len(counted):
            # With eps = 0 and identical images this would be 0 / 0.
            mean = counted.mean() + eps
            found[rows] = (d + eps) / mean if mean > 0 else 1.0
    return found.where(positive, 1.0)


def _rows(groups: Tensor) -> list[Tensor]:
    return [(groups == g).nonzero().flatten() for g in groups.unique()]
