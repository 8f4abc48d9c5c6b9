"""One reward by itself: a change of scale, then a bound. Pure functions of (N,) scores in float64; NaN stays NaN.

`base`: (M,) scores of the same reward on the base model's images, measured once and never on the current group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from t2irl.algebra import config as c
from t2irl.errors import RunError


def level(where: c.Level, base: Tensor | None) -> float:
    """The number that a level stands for."""
    return where.at if where.at is not None else float(quantiles(base, [where.quantile])[0])  # type: ignore[list-item]


def quantiles(base: Tensor | None, shares: list[float]) -> Tensor:
    """Quantiles of the base model's scores, linear between neighbours, (len(shares),) float64."""
    assert base is not None, "nothing was measured on the base model"
    return torch.quantile(base.double(), torch.tensor(shares, dtype=torch.float64))


def transform(how: c.Transform | None, scores: Tensor, base: Tensor | None, anchors: Tensor | None = None) -> Tensor:
    """`scores` on another scale. `anchors`: (N,) of `log_sigmoid`, each its own prompt's, instead of one for all."""
    x = scores.double()
    if how is None:
        return x
    if isinstance(how, c.LogProbability):
        return x.clamp_min(how.floor).log()
    if isinstance(how, c.LogSigmoid):
        if anchors is None:
            anchor = how.at if how.at is not None else float(quantiles(base, [how.quantile])[0])
            anchors = torch.full_like(x, anchor)
        return log_sigmoid(x, anchors, temperature(how, base))
    assert base is not None, "nothing was measured on the base model"
    if isinstance(how, c.CentredSigmoid):
        return centred_sigmoid(x, base.double(), temperature(how, base))
    if isinstance(how, c.Unit):
        low, high = quantiles(base, [how.low, how.high]).tolist()
        return ((x - low) / (high - low)).clamp_min(0)
    n = standardise(x, base.double())
    if isinstance(how, c.Tanh):
        return n.tanh()
    return n if how.limit is None else n.clamp(-how.limit, how.limit)


def temperature(how: c.LogSigmoid | c.CentredSigmoid, base: Tensor | None) -> float:
    """The temperature in the unit of the score."""
    if how.unit == "score":
        return how.temperature
    assert base is not None, "nothing was measured on the base model"
    return how.temperature * float(base.double().std(correction=0))


def log_sigmoid(scores: Tensor, anchors: Tensor, temperature: float = 1.0) -> Tensor:
    """log sigmoid((r - anchor) / temperature), below 0 (Transforming and Combining Rewards, arXiv 2402.00742).

    For a Bradley-Terry reward this is the log-probability of beating an image that scores the anchor, so that a sum over
    rewards is the log-probability of being good by all of them. Its slope 1 - sigmoid fades once the reward is satisfied.
    """
    return F.logsigmoid((scores - anchors) / temperature)


def standardise(scores: Tensor, base: Tensor) -> Tensor:
    """(r - m) / s, with mean and population deviation of the base model's scores."""
    return (scores - base.mean()) / base.std(correction=0)


def centred_sigmoid(scores: Tensor, base: Tensor, temperature: float = 1.0) -> Tensor:
    """mean over base scores b of sigmoid((r - b) / temperature), in (0, 1) (PAR, arXiv 2502.18770)."""
    return ((scores[:, None] - base[None]) / temperature).sigmoid().mean(1)


def clip(scores: Tensor, threshold: float | Tensor) -> Tensor:
    """min(r, threshold): the Clip of "On Designing Effective RL Reward" (arXiv 2410.15115), min(r - threshold, 0), up to a
    constant, which a group's baseline takes away and which would turn a factor below 1 into a reward."""
    return scores.clamp_max(threshold)


def tiers(scores: Tensor, edges: Tensor) -> Tensor:
    """Number of ascending `edges` that r has reached / their number, in {0, 1/K, ..., 1}; a NaN stays one."""
    zone = (scores[:, None] >= edges[None]).sum(1).double() / len(edges)
    return zone.where(~scores.isnan(), torch.nan)


def check_base(name: str, how: c.Transform | None, base: Tensor) -> None:
    """Raise RunError where the base model's scores give no scale."""
    if len(base) < 2:
        raise RunError(
            f"reward {name!r}: it applies to {len(base)} of the base model's images, too few for a scale; raise "
            "combine.base_images, or leave out what compares it with the base model"
        )
    spread = base.double().std(correction=0)
    if isinstance(how, c.Unit):
        low, high = quantiles(base, [how.low, how.high])
        spread = high - low
    scaled = isinstance(how, c.LogSigmoid | c.CentredSigmoid) and how.unit == "deviation"
    if (scaled or isinstance(how, c.Standardise | c.Tanh | c.Unit)) and not spread > 0:
        assert how is not None
        raise RunError(
            f"combine.rewards.{name}.transform.type = {how.type}: the base model's images all score {float(base.median()):g} by it, "
            "which gives no scale; use another transform (log_sigmoid or centred_sigmoid with unit: score), or combine.aggregate: {type: sum}"
        )
