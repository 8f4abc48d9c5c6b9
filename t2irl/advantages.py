"""From scores to advantages: pure functions in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from t2irl.config import Advantage
from t2irl.errors import RunError


def group_advantages(
    scores: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, config: Advantage
) -> Tensor:
    """Advantages of all images of an iteration, (N,) float64, clamped to +-`config.clip`.

    `scores`: reward name -> (N,), NaN where a reward does not apply; those of weight 0 are left out of everything. `groups`: (N,) int64, equal for images of a group.
    A group whose scores span no more than `config.floor` gets exactly 0. With `combine: scores` the weighted sum of all
    rewards is normalised, with `advantages` each reward by itself, and the weighted sum of those is taken. Raises RunError for
    an image that no reward applies to.
    """
    scores = trained(scores, weights)
    by_score = total_score(scores, weights)  # in both cases: it refuses images that no reward applies to
    if config.combine == "scores":
        return normalise(by_score, groups, config).clamp(-config.clip, config.clip)
    total = torch.zeros(len(groups), dtype=torch.float64)
    for name, values in scores.items():
        total += weights[name] * normalise(values.double(), groups, config)
    return total.clamp(-config.clip, config.clip)


def trained(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The scores of rewards that are trained on: all but those of weight 0."""
    return {name: values for name, values in scores.items() if weights[name] != 0}


def total_score(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Weighted sum of the rewards trained on, (N,) float64; a NaN counts as 'does not apply' and adds nothing.

    Raises RunError for an image that no reward applies to.
    """
    table = torch.stack([weights[name] * values.double() for name, values in trained(scores, weights).items()])
    refuse_unscored(table)
    return table.nansum(0)


def refuse_unscored(table: Tensor) -> None:
    """Raise RunError for an image, a column of (rewards, N) scores, that no reward applies to."""
    nothing = table.isnan().all(0)
    if nothing.any():
        raise RunError(f"no reward applies to image {int(nothing.nonzero()[0])} of the iteration: all scores are NaN")


def normalise(values: Tensor, groups: Tensor, config: Advantage) -> Tensor:
    """(value - group mean) / (std + eps), 0 where the value is NaN or its group carries no signal. (N,) float64.

    The standard deviation is the population's, of the group or, with `std: global`, of all images.
    """
    applies = ~values.isnan()
    kept = values.where(applies, 0.0)
    index = torch.unique(groups, return_inverse=True)[1]
    size = int(index.max()) + 1

    def per_group(x: Tensor) -> Tensor:
        return torch.zeros(size, dtype=torch.float64).index_add(0, index, x)

    count = per_group(applies.double()).clamp_min(1)
    apart = (kept - (per_group(kept) / count)[index]).where(applies, 0.0)
    if config.std == "group":
        scale = (per_group(apart**2) / count).sqrt()[index] + config.eps
    elif config.std == "global":
        valid = values[applies]
        scale = (valid - valid.mean()).square().mean().sqrt().expand(len(values)) + config.eps
    else:
        scale = torch.ones(len(values), dtype=torch.float64)
    flat = constant_groups(values, groups, config.floor)
    # The guard keeps 0 / 0 of a constant group with eps = 0 from becoming NaN.
    return torch.where(flat | ~applies, 0.0, apart / scale.clamp_min(torch.finfo(torch.float64).tiny))


def constant_groups(values: Tensor, groups: Tensor, floor: float) -> Tensor:
    """(N,) bool: images of groups whose values span no more than `floor`."""
    index = torch.unique(groups, return_inverse=True)[1]
    size = int(index.max()) + 1
    high = torch.full((size,), -torch.inf, dtype=torch.float64).scatter_reduce(
        0, index, values.nan_to_num(-torch.inf), "amax"
    )
    low = torch.full((size,), torch.inf, dtype=torch.float64).scatter_reduce(
        0, index, values.nan_to_num(torch.inf), "amin"
    )
    return (high - low <= floor)[index]


def within_group_std(values: Tensor, groups: Tensor) -> float:
    """Root of the mean within-group variance: what a group-relative method can learn from."""
    return float(centred(values, groups).square().mean().sqrt())


def centred(values: Tensor, groups: Tensor) -> Tensor:
    """Values without NaN minus the mean of their group, (N,) float64."""
    index = torch.unique(groups, return_inverse=True)[1]
    count = torch.bincount(index).double()
    mean = torch.zeros(len(count), dtype=torch.float64).index_add(0, index, values.double()) / count
    return values.double() - mean[index]
