"""KL divergence on suspicious images alone (GARDO, arXiv 2512.24138, sections 4.1 and A.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from t2irl.batches import assigned
from t2irl.config import Run, Strict
from t2irl.dynamics.base import KLKind
from t2irl.guards.auxiliary import auxiliary_problem, trained_problem
from t2irl.guards.gardo import GateShare, Population, Statistic, Ties, gate, statistic, uncertainty, win_rates
from t2irl.policy import Policy
from t2irl.regularizers.kl import Kl
from t2irl.types import Clock, MicroBatch, Prediction, Rollout

if TYPE_CHECKING:
    from t2irl.train import Parts

STREAM = 0x6A7E
"""Keeps the draws of the random gate apart from others that start from the same seed."""


class Adapt(Strict):
    """How the share of penalised images follows the uncertainty."""

    factor: PositiveFloat = Field(default=0.1, lt=1)
    """The share is multiplied by 1 + factor when the uncertainty is above all that the window remembers, by 1 - factor when it is
    below."""
    window: PositiveInt = 20
    """Iterations remembered."""
    warmup: PositiveInt = 20
    """Iterations remembered before the share moves; published: the whole window, in the released code: 1."""
    bounds: tuple[PositiveFloat, PositiveFloat] = (0.02, 0.2)
    """Smallest and largest share: the released code's. Published: no smallest one, 1."""
    statistic: Statistic = "positive"
    """Mean of the uncertainties that are at least 0, as in the released code, or of all, as published: with mid ranks that is
    always 0."""


class GatedKl(Kl):
    """The divergence of `kl`, but only of images that the trained reward ranks far above what auxiliary rewards do.

    An image's uncertainty is its win rate under the trained reward (the proxy) minus its mean win rate under the auxiliaries, which
    must have weight 0. The most uncertain share of the iteration's images is penalised, and only these pass through the
    anchor's network. Defaults are the paper's formulas where paper and released code disagree; the released gate has the
    opposite sign.
    """

    class Config(Kl.Config):
        """Settings."""

        type: Literal["gated_kl"] = "gated_kl"
        kind: KLKind = "no_dt"
        """As for kl; published: no_dt, with coefficient 0.04. With dynamics of type matching use v_mse."""
        proxy: str | None = None
        """Name of the trained reward that may be hacked, of which less is more if its weight is below 0; null: what all trained
        rewards make together (`combine`, `advantage.combine`)."""
        auxiliaries: tuple[str, ...] = ()
        """Names of rewards of weight 0 that judge the same pictures; needed. The more and the less alike, the better."""
        share: float = Field(0.1, gt=0, le=1)
        """Share of the images that is penalised, at the beginning if it adapts."""
        adapt: Adapt | None = Adapt()
        """How the share follows the uncertainty; null: it stays."""
        scope: Literal["batch", "group"] = "batch"
        """Images are ranked among all of the iteration, as published, or within their group: then prompts that suit the proxy do
        not fill the gate. The share is one of the iteration in both cases."""
        sign: Literal["paper", "inverted"] = "paper"
        """inverted: images that the proxy ranks too low are penalised, as the released code does."""
        ties: Ties = "mid"
        """Equal scores share their ranks (the released code breaks ties at random), or, strict, as eq. 7 is printed, all get the
        lowest."""
        population: Population = "all"
        """The share is one of all images, or, as in the released code, of those with positive uncertainty: half as many."""
        normaliser: Literal["all", "gated"] = "all"
        """The penalty is a mean over all images of an update, as published, or over the penalised ones, so that a lone one weighs
        as much as many."""
        select: Literal["uncertain", "random"] = "uncertain"
        """random: as many images, but any; a control experiment."""

        @model_validator(mode="after")
        def _share_fits(self) -> GatedKl.Config:
            problem = None
            if self.adapt is not None:
                low, high = self.adapt.bounds
                if not low <= self.share <= high <= 1:
                    problem = f"share {self.share:g} should lie within adapt.bounds [{low:g}, {high:g}], and these within (0, 1]"
                elif self.adapt.warmup > self.adapt.window:
                    problem = f"adapt.warmup {self.adapt.warmup} should be at most adapt.window {self.adapt.window}"
            if problem:
                raise PydanticCustomError("gated_kl", "{problem}", {"problem": problem})
            return self

        def problem(self, run: Run) -> str | None:
            """A proxy or an auxiliary that is not what it should be."""
            proxy = () if self.proxy is None else (self.proxy,)
            return (
                trained_problem(run, proxy, "proxy")
                or auxiliary_problem(run, self.auxiliaries, "auxiliaries")
                or super().problem(run)
            )

    def __init__(self, config: Any):
        super().__init__(config)
        moving = config.adapt.model_dump(exclude={"statistic"}) if config.adapt else {}
        self.share = GateShare(config.share, **moving)
        self.found: dict[str, float] = {}
        self.update = 0

    def prepare(self, name: str, parts: Parts) -> None:
        """Learn the weights of the rewards, what they make together, and how images are dealt out to updates."""
        super().prepare(name, parts)
        self.weights, self.geometry, self.optimised = parts.rewards.weights, parts.geometry, parts.pipeline.optimised

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Choose the images of this iteration; advantages stay."""
        c, scores = self.config, rollout.scores
        if c.proxy is not None:
            proxy = scores[c.proxy] * (1 if self.weights[c.proxy] > 0 else -1)
        else:
            proxy = self.optimised.signal(scores, rollout.ids, pooled=c.scope == "batch")
        auxiliaries = [scores[name] for name in c.auxiliaries]
        groups = rollout.ids if c.scope == "group" else None
        uncertain = uncertainty(proxy, auxiliaries, groups, c.ties) * (1 if c.sign == "paper" else -1)
        level = statistic(uncertain, c.adapt.statistic if c.adapt else "positive")
        share = self.share.update(level) if c.adapt else c.share
        if c.select == "random":
            order = np.random.default_rng([self.geometry.run.seed, STREAM, rollout.iteration]).permutation(
                len(uncertain)
            )
            uncertain = uncertain[torch.from_numpy(order)]
        chosen = gate(uncertain, share, c.population)
        rates = torch.stack([win_rates(values, groups, c.ties) for values in (proxy, *auxiliaries)])
        self.found = {
            "gate_share": share,
            "gate_fraction": float(chosen.double().mean()),
            "uncertainty": level,
            "agreement": _agreement(rates),
        }
        self.chosen, self.iteration, self.update = chosen, rollout.iteration, 0
        self.rows = chosen.to(rollout.trajectory.latents.device)
        return advantages

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """The weighted divergence of the chosen images; the others do not pass through the anchor's network."""
        rows = self.rows[batch.image]
        if not bool(rows.any()):
            return prediction.velocity.new_zeros(())
        divergence = self.divergence(policy, prediction[rows], batch[rows])
        return self.config.coefficient * self._scale() * divergence.sum() * batch.share

    def _scale(self) -> float:
        """From a mean over all images of the update to one over the chosen ones, of all processes."""
        if self.config.normaliser == "all":
            return 1.0
        images = assigned(self.geometry, self.geometry.run.seed, self.iteration, self.update)
        return len(images) / int(self.chosen[torch.from_numpy(images)].sum())

    def after_update(self, policy: Policy, clock: Clock) -> None:
        """The next update has other images."""
        self.update += 1

    def metrics(self) -> dict[str, float]:
        """Share asked for and let through, uncertainty, and how far proxy and auxiliaries agree."""
        return self.found

    def state_dict(self) -> dict[str, Any]:
        """The share and what it remembers."""
        return self.share.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.share.load_state_dict(state)


def _agreement(rates: Tensor) -> float:
    """Mean rank correlation of the first row, the proxy, with the others; images that not all apply to are left out, and 0 stands
    for a row without any order."""
    known = rates[:, ~rates.isnan().any(0)]
    if known.shape[1] < 2:
        return 0.0
    centred = known - known.mean(1, keepdim=True)
    scale = centred.norm(dim=1)
    products = centred[1:] @ centred[0] / (scale[1:] * scale[0]).clamp_min(torch.finfo(torch.float64).tiny)
    return float(products.mean())
