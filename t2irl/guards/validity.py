"""Whether a reward is unsure where it is wrong: to be looked at before anything is trained with its uncertainty.

On pictures outside training, so only for estimators that need no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from t2irl.evaluation.agreement import standardised
from t2irl.guards import credit, estimators
from t2irl.guards.evaluations import perturbed
from t2irl.guards.gardo import win_rates
from t2irl.rewards.combine import RewardSet
from t2irl.types import PromptGroups

if TYPE_CHECKING:
    from t2irl.regularizers.uncertainty import Uncertainty

NEEDS_POLICY = ("steps", "tails")
"""Estimators that draw pictures anew."""
ENOUGH = 0.15
"""Rank correlation of uncertainty and error from which weights by uncertainty are worth trying."""


def errors(scores: Tensor, gold: Tensor, ids: Tensor) -> Tensor:
    """|z(score) - z(gold)|, (N,) float64; NaN where either is NaN.

    z: `evaluation.agreement.standardised`. `ids` (N,): equal for pictures of a prompt.
    """
    known = ~(scores.isnan() | gold.isnan())
    said, truth = (standardised(values[known], ids[known]) for values in (scores, gold))
    apart = said - truth
    return torch.full(scores.shape, torch.nan, dtype=torch.float64).masked_scatter(known, apart.abs())


def foretells(uncertain: Tensor, scores: Tensor, gold: Tensor, ids: Tensor) -> float:
    """Spearman's rank correlation of uncertainty and error within prompts, -1 to 1; 0 where one of them is constant. (N,) each.

    Ranks are among the pictures of a prompt, as weights are, so that hard prompts do not count as foresight. Below `ENOUGH` do not
    weigh by this uncertainty.
    """
    error = errors(scores, gold, ids).where(~uncertain.isnan(), torch.nan)
    known = ~error.isnan()
    ranks = [win_rates(values[known], ids[known]) for values in (uncertain, error)]
    return credit.correlation(*ranks)


def uncertain(
    c: Uncertainty.Config, names: Sequence[str], rewards: RewardSet, images: Tensor, groups: PromptGroups, seed: int = 0
) -> dict[str, Tensor]:
    """u of pictures (N, 3, H, W) uint8 by the rewards `names` under the settings `c`: name -> (N,) float64 >= 0, median 1.

    `rewards` has those and all that `c` names. NaN where a reward does not apply. Raises ValueError for estimators that need the policy.
    """
    if c.estimator in NEEDS_POLICY:
        raise ValueError(f"estimator {c.estimator} draws pictures anew, which takes the policy; expected another one")
    needed = rewards.only({*names, *c.members, *([c.doubt.reward] if c.doubt else [])})
    scores, own = needed.score(images, groups), rewards.only(names)

    def again(number: int) -> dict[str, Tensor]:
        return own.score(perturbed(images, groups, c.perturbations, seed, 0, number), groups)

    found = {}
    for name, table in estimators.evaluations(c, names, scores, needed.each, again).items():
        size = estimators.sizes(c, table, scores, -1 if rewards.weights[name] < 0 else 1)[2]
        found[name] = estimators.relative(c, size, estimators.median_size(c, size), scores)
    return found
