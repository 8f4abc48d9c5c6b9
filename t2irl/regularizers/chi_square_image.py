"""Chi-square divergence of finished pictures from the base model's (Correlated Proxies, arXiv 2403.03185, by a discriminator)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from reward_models.heads import PatchHead
from t2irl.advantages import centred
from t2irl.adversary.losses import auc, pair_loss
from t2irl.algebra.base import base_images
from t2irl.regularizers.base import PictureRegularizer
from t2irl.regularizers.chi_square import soft_exp
from t2irl.types import Rollout
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts

TRIM = 0.01
"""Share of the pictures left out at either end of the mean that chi2 is."""


class ChiSquareImage(PictureRegularizer):
    """advantage - coefficient x (p - mean of p in the group), p = (e^d - 1) / sqrt(chi2): off the base model's pictures costs.

    d is the logit by which a head on frozen features tells the policy's pictures from the base model's of the same prompts,
    so it estimates the log of the ratio of their densities, and chi2 = mean of e^d - 1 over the policy's pictures their divergence,
    at most that of whole paths (`chi_square`). Needs no densities of transitions. The head learns after it has judged, so
    that it never judges pictures that it knows by heart; the paper's learns first. Hacked by what the features do not see.
    """

    class Config(PictureRegularizer.Config):
        """Settings."""

        type: Literal["chi_square_image"] = "chi_square_image"
        coefficient: PositiveFloat = 0.1
        """What p = 1 costs, in units of the advantage; tune it."""
        base_images: PositiveInt = 4
        """Pictures that the base model draws of each prompt when it is first met; their features are kept."""
        hidden: PositiveInt = 128
        """Hidden width of the head."""
        steps: PositiveInt = 10
        """Steps of the head in an iteration, each on all pictures."""
        lr: PositiveFloat = 1e-3
        """Its learning rate."""
        weight_decay: NonNegativeFloat = 0.01
        """Its decoupled weight decay, which keeps d small where there is little to tell."""
        limit: float = Field(default=5.0, gt=0, le=80)
        """Where d exceeds it, the exponential goes on as its tangent line, so that no single picture is all of chi2."""

    def prepare(self, name: str, parts: Parts) -> None:
        """Load the backbone. The head is made when the width of features is known."""
        super().prepare(name, parts)
        self.parts, self.seed = parts, parts.geometry.run.seed
        self.base: dict[int, Tensor] = {}  # prompt's line -> features (base_images, D) of the base model's pictures
        self.head: PatchHead | None = None
        self.found: dict[str, float] = {}

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Advantages with the centred penalty subtracted; then the head learns. Groups may lie across processes."""
        c, groups = self.config, rollout.trajectory.groups
        self._meet(rollout.ids.tolist())
        ours = self._normal(self.features(rollout.trajectory.images))
        rows = [
            self.base[i][(m + rollout.iteration) % c.base_images]
            for i, m in zip(groups.ids, groups.members, strict=True)
        ]
        theirs = self._normal(torch.stack(rows).to(self.device))
        head = self.head or self._make(ours.shape[1])
        with torch.no_grad():
            ratio, other = (distributed.gather_rows(head(x), self.device).double() for x in (ours, theirs))
        self._learn(head, ours, theirs, len(rollout.ids))
        penalty, chi2 = penalties(ratio, c.limit)
        self.found = {"chi2": chi2, "auc": auc(ratio, other)}
        return advantages - c.coefficient * centred(penalty, rollout.ids)[rollout.own].to(advantages)

    def _meet(self, lines: list[int]) -> None:
        """Have the base model draw prompts that were not met before; all processes then know the features of all."""
        new, each = [line for line in dict.fromkeys(lines) if line not in self.base], self.config.base_images
        if not new:
            return
        rows, members = [line for line in new for _ in range(each)], list(range(each)) * len(new)
        mine = [self.features(images).cpu() for _, images in base_images(self.parts, rows, members)]
        everyone = torch.cat([x for process in distributed.gather_objects(mine) for x in process])
        self.base |= {line: everyone[k * each : (k + 1) * each].clone() for k, line in enumerate(new)}

    def _normal(self, features: Tensor) -> Tensor:
        return F.layer_norm(features, features.shape[-1:])

    def _make(self, width: int) -> PatchHead:
        self.head = PatchHead(width, self.config.hidden)
        self.head.reset(self.seed)
        torch.nn.init.zeros_(self.head.last.weight)  # before it has learned all ratios are 1
        torch.nn.init.zeros_(self.head.last.bias)
        self.head.to(self.device)
        self.adamw = torch.optim.AdamW(self.head.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay)
        return self.head

    @torch.enable_grad()
    def _learn(self, head: PatchHead, ours: Tensor, theirs: Tensor, total: int) -> None:
        """Steps of the head on pairs of this process, (B, D) each, of `total` of all processes; gradients are summed over them."""
        for _ in range(self.config.steps):
            loss = pair_loss("bce", head(ours)[:, None], head(theirs)[:, None]).sum() / total
            loss.backward()
            distributed.sum_gradients(head.parameters())
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)

    def metrics(self) -> dict[str, float]:
        """The divergence, and how well the head tells the policy's pictures from the base model's."""
        return self.found

    def state_dict(self) -> dict[str, Any]:
        """Head, moments, and features of the base model's pictures."""
        if self.head is None:
            return {}
        return {"head": self.head.state_dict(), "adamw": self.adamw.state_dict(), "base": self.base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; tensors of it may have come back on a device."""
        self.base = {line: features.cpu() for line, features in state["base"].items()}
        self._make(state["head"]["first.weight"].shape[1]).load_state_dict(state["head"])
        self.adamw.load_state_dict(state["adamw"])


def penalties(ratio: Tensor, limit: float) -> tuple[Tensor, float]:
    """(e^d - 1) / sqrt(chi2) of log density ratios d (N,) float64, and chi2, the trimmed mean of e^d - 1; tangents beyond `limit`.

    Not divided where chi2 is 0 or below, as an estimate may be.
    """
    excess = soft_exp(ratio, limit) - 1
    out = int(TRIM * len(excess))
    chi2 = float(excess.sort().values[out : len(excess) - out].mean())
    return excess / chi2**0.5 if chi2 > 0 else excess, chi2
