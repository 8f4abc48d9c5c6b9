"""How different the pictures of one prompt are. Pure; any features will do, and coarse pixels need no network."""

from __future__ import annotations

import torch
from torch import Tensor

from t2irl.evaluation.distances import DUPLICATE as ALIKE

SIDE = 16
"""Pictures are compared at this size: layout and colour, not texture."""
DUPLICATE = 0.05
"""Pictures of one prompt whose coarse pixels differ by less (root mean square, of values in 0..1) are duplicates."""


def coarse_pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3 x 16 x 16) float64 in [0, 1], scaled so that Euclidean distance is root-mean-square."""
    small = torch.nn.functional.adaptive_avg_pool2d(images.double() / 255, SIDE).flatten(1)
    return small / small.shape[1] ** 0.5


def pair_distances(features: Tensor, groups: Tensor) -> Tensor:
    """Euclidean distances of all pairs within groups, (pairs,) float64. `features` (N, D), `groups` (N,) int64."""
    parts = [torch.nn.functional.pdist(features.double()[groups == group]) for group in torch.unique(groups)]
    return torch.cat([torch.empty(0, dtype=torch.float64), *parts])


def diversity(features: Tensor, groups: Tensor, cosine: bool = False) -> tuple[float, float]:
    """Mean distance of pairs within groups, and the share of those pairs that are duplicates; NaN without any pair.

    `cosine`: the distance is 1 - cosine, as for features of a network, and duplicates are as in `distances.py`.
    """
    if cosine:
        # Between unit vectors, half the square of the Euclidean distance.
        distances = pair_distances(torch.nn.functional.normalize(features.double(), dim=1), groups).square() / 2
    else:
        distances = pair_distances(features, groups)
    alike = 1 - ALIKE if cosine else DUPLICATE
    return float(distances.mean()), float((distances < alike).double().mean())
