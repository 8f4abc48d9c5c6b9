"""Log-determinant diversity of a group's images: pure functions in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from t2irl.guards.diversity import distances, neighbours


def kernel(features: Tensor, bandwidth: float) -> Tensor:
    """exp(-(1 - cosine) / bandwidth) of all pairs, (N, N) in (0, 1], from features (N, D)."""
    return (-distances(features) / bandwidth).exp()


def median_distance(features: Tensor, groups: Tensor) -> float:
    """Median of 1 - cosine over pairs of different images of a group; at least 1e-6, for images that are all alike."""
    return max(float(distances(features)[neighbours(groups)].median()), 1e-6)


def leave_one_out_gains(table: Tensor) -> Tensor:
    """D_i = log det(I + L) - log det(I + L without i) = -log [(I + L)^-1]_ii >= 0, of a positive semi-definite L (n, n)."""
    inverse = torch.linalg.inv(table + torch.eye(len(table), dtype=torch.float64))
    return -inverse.diagonal().clamp(max=1.0).log()


def logdet_credit(similarity: Tensor, quality: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Gains D (N,) within groups, for L_ij = q_i q_j k_ij, and their z-scores among the group's images of positive quality.

    Images of quality 0 have gain 0 and z-score 0, and do not lower the gain of others. Where all gains of a group are equal, or only one
    image counts, z-scores are 0.
    """
    gains = torch.zeros(len(quality), dtype=torch.float64)
    z = torch.zeros_like(gains)
    for group in groups.unique():
        rows = ((groups == group) & (quality > 0)).nonzero().flatten()
        q = quality[rows]
        found = leave_one_out_gains(q[:, None] * q[None] * similarity[rows][:, rows])
        gains[rows] = found
        spread = found.std(correction=0) if len(rows) else torch.zeros(())
        if spread > 1e-9:
            z[rows] = (found - found.mean()) / spread
    return gains, z
