"""How uncertain a reward is of a picture: several evaluations of it, their spread, and that in units of the usual spread.

`c` is the settings of an `uncertainty` regulariser; N pictures, those of all processes. Nothing here needs a policy or a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from t2irl.errors import RunError
from t2irl.guards import credit
from t2irl.guards.gardo import uncertainty

if TYPE_CHECKING:
    from t2irl.regularizers.uncertainty import Uncertainty

AGAIN = ("augment", "steps", "tails")
"""Estimators for which pictures are scored again, each time in another version."""
TINY = 1e-8
"""Keeps the uncertainty finite where a reward has none."""


def evaluations(
    c: Uncertainty.Config, names: Sequence[str], scores: Mapping[str, Tensor], each: Mapping[str, Tensor],
    again: Callable[[int], Mapping[str, Tensor]],
) -> dict[str, Tensor]:  # fmt: skip
    """Of the rewards `names`: name -> (N, K) float64.

    `scores`: name -> (N,) of all rewards. `each`: name -> (judges, N), looked at where the reward is its own ensemble. `again`:
    the scores of another version of the pictures, by its number from 1; called only for estimators that score again.
    """
    columns = {name: [scores[name]] for name in names}
    if c.estimator == "ensemble" and c.members:
        columns[names[0]] += [scores[member] for member in c.members]
    elif c.estimator == "ensemble":
        columns = {name: list(each[name]) for name in names}
    for number in range(1, c.evaluations if c.estimator in AGAIN else 1):
        for name, values in again(number).items():
            columns[name].append(values)
    return {name: torch.stack(values, 1).double() for name, values in columns.items()}


def sizes(
    c: Uncertainty.Config, evaluations: Tensor, scores: Mapping[str, Tensor], sign: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one reward's evaluations (N, K): their mean, their standard deviation, and the size of the uncertainty, (N,) each.

    The size is the deviation; with cross_reward how much higher the reward ranks a picture than the members do, 0 to 1. `sign`:
    -1 for a reward of negative weight.
    """
    mean, deviation = credit.spread(evaluations)
    if c.estimator != "cross_reward":
        return mean, deviation, deviation
    witnesses = [sign * scores[member] for member in c.members]
    excess = uncertainty(sign * mean, witnesses).clamp_min(0).nan_to_num(0)
    return mean, deviation, excess.where(~mean.isnan(), torch.nan)


def median_size(c: Uncertainty.Config, size: Tensor) -> float:
    """Median of the known sizes, of the positive ones with cross_reward, since half of all are 0 there; 0 for none."""
    known = size[~size.isnan()]
    known = known[known > 0] if c.estimator == "cross_reward" else known
    return float(known.median()) if len(known) else 0.0


def relative(c: Uncertainty.Config, size: Tensor, scale: float, scores: Mapping[str, Tensor]) -> Tensor:
    """u = size / scale, (N,) >= 0, where a picture of the usual uncertainty has 1; with `doubt` + factor (1 - R).

    Raises RunError when the reward of `doubt` is not in [0, 1].
    """
    u = size / (scale + TINY)
    if c.doubt is None:
        return u
    clean = scores[c.doubt.reward].double()
    odd = clean[(clean < 0) | (clean > 1)]
    if len(odd):
        raise RunError(
            f"doubt.reward = {c.doubt.reward} gave {float(odd[0]):g}; expected a reward in [0, 1], 1 for a picture without "
            "fault, such as `artifact` with output: probability"
        )
    return u + c.doubt.factor * (1 - clean).nan_to_num(0)
