"""One optimiser step of an adversary, its gradient that of all processes together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2irl.adversary.augment import augment
from t2irl.adversary.losses import gradient_penalty, pair_loss
from t2irl.adversary.memory import Tensors
from t2irl.config import Strict
from t2irl.data import noise_seed
from t2irl.errors import RunError
from t2irl.geometry import even_chunks
from t2irl.utils import distributed


class Penalty(Strict):
    """R1: keeps the adversary's slope at reference images small, so that it does not become a cliff."""

    on: Literal["features", "inputs"] = "features"
    """Slope with respect to the frozen part's features (cheap), or to the pixels (a backward pass through everything)."""
    weight: PositiveFloat = 1.0
    """Factor of half the squared norm of the gradient."""


class Critic(Protocol):
    """A network that judges pictures, in two parts: a frozen one, `embed`, and one that learns."""

    @property
    def trained(self) -> Mapping[str, torch.nn.Parameter]:
        """What learns."""
        ...

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Parts of the judgement that the loss looks at, and their weights."""
        ...

    @property
    def has_zero(self) -> bool:
        """Whether a logit of 0 means undecided; otherwise the middle between policy and reference images does."""
        ...

    def embed(self, images: Tensor) -> Tensors:
        """Frozen features of pictures (B, 3, H, W) in [0, 1], each (B, ...); differentiable."""
        ...

    def judge(self, features: Tensors, texts: Sequence[str], seeds: Sequence[int]) -> Mapping[str, Tensor]:
        """Logits for the loss, (B, n) for each part; `seeds` of random choices, one a picture."""
        ...

    def score(self, features: Tensors, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The reward, (B,) float32."""
        ...

    def fingerprint(self) -> str:
        """Names the function `embed`."""
        ...

    def settings(self) -> dict[str, Any]:
        """What the reward depends on besides the trained parameters, as JSON."""
        ...


@dataclass(frozen=True)
class Batch:
    """Pairs of a reference image and a rollout image on this process."""

    real: Sequence[Path]
    fake: Tensor
    """(n, 3, H, W) float32 in [0, 1]."""
    fake_features: Tensors
    """Frozen features of `fake`."""
    texts: Sequence[str]
    keys: Sequence[tuple[int, int]]
    """Prompt and member number of the rollout image, from which seeds are made."""
    companions: Sequence[Path] = ()
    """With a condition: the reference image that both are judged beside."""
    strangers: Sequence[Path] = ()
    """Reference images of other prompts, which should not pass beside the companion; none without that loss."""
    spoilt: Tensors = ()
    """Frozen features of `real` spoilt on purpose; none without that loss."""

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, part: slice) -> Batch:
        features, spoilt = (tuple(x[part] for x in group) for group in (self.fake_features, self.spoilt))
        others = self.companions[part], self.strangers[part], spoilt
        return Batch(self.real[part], self.fake[part], features, self.texts[part], self.keys[part], *others)


class Learner:
    """A critic with its optimiser. `pictures` and `features` give reference images, by file: uint8, and frozen features."""

    def __init__(
        self,
        critic: Critic,
        config: Any,
        seed: int,
        pictures: Callable[[Sequence[Path]], Tensor],
        features: Callable[[Sequence[Path]], Tensors],
    ):
        self.critic, self.config, self.seed, self.pictures, self.features = critic, config, seed, pictures, features
        self.parameters = list(critic.trained.values())
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.centre = 0.0
        """What the loss takes for a logit of 0."""

    @property
    def on_pixels(self) -> bool:
        """Whether learning needs the pictures themselves instead of their features."""
        return self.config.augment.active or (self.config.penalty is not None and self.config.penalty.on == "inputs")

    def step(self, batch: Batch, total: int, iteration: int, number: int) -> dict[str, float]:
        """One optimiser step from pairs of all processes, `total` of them. Raises RunError for a gradient not finite."""
        sums = torch.zeros(2, dtype=torch.float64)
        for chunk in even_chunks(len(batch), self.config.batch_size):
            losses, penalties = self._losses(batch[chunk], f"{iteration} {number}")
            ((losses + penalties).sum() / total).backward()
            sums += torch.stack([losses.detach().sum(), penalties.detach().sum()]).double().cpu()
        distributed.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or float("inf"))
        if not bool(norm.isfinite()):
            raise RunError(
                f"the gradient of the adversary in iteration {iteration} is not finite. The last checkpoint is good. A smaller "
                f"lr of the reward (now {self.config.lr:g}), or a max_grad_norm for it, usually helps"
            )
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        loss, penalty = (sum(column) / total for column in zip(*distributed.gather_objects(sums.tolist()), strict=True))
        return {"loss": loss, "penalty": penalty, "grad_norm": float(norm)}

    def _losses(self, batch: Batch, stream: str) -> tuple[Tensor, Tensor]:
        """Loss and weighted penalty of each pair."""
        # A penalty is a gradient that is differentiated again, which fast attention kernels cannot do.
        with nullcontext() if self.config.penalty is None else sdpa_kernel(SDPBackend.MATH):
            return self._judged(batch, stream)

    def _judged(self, batch: Batch, stream: str) -> tuple[Tensor, Tensor]:
        real, fake, slope_at = self._inputs(batch, stream)
        beside = self.features(batch.companions) if batch.companions else ()

        def judge(features: Tensors, kind: str) -> Mapping[str, Tensor]:
            return self.critic.judge((*features, *beside), batch.texts, self._seeds(batch, f"{kind} {stream}"))

        logits = judge(real, "reference")
        losses = self._loss(logits, judge(fake, "rollout"))
        if batch.strangers:
            weight = self.config.condition.mismatched
            losses = losses + weight * self._loss(logits, judge(self._strangers(batch, stream), "stranger"))
        if batch.spoilt:
            losses = losses + self.config.negatives.weight * self._loss(logits, judge(batch.spoilt, "spoilt"))
        if self.config.penalty is None:
            return losses, torch.zeros_like(losses)
        return losses, self.config.penalty.weight * gradient_penalty(decision(self.critic, logits), slope_at)

    def _strangers(self, batch: Batch, stream: str) -> Tensors:
        """Features of the strangers, changed as their pair is: otherwise what `augment` leaves would tell them."""
        if not self.config.augment.active:
            return self.features(batch.strangers)
        pixels = self.pictures(batch.strangers).to(batch.fake).div(255)
        with torch.no_grad():
            return self.critic.embed(augment(pixels, self.config.augment, self._seeds(batch, f"augment {stream}")))

    def _loss(self, real: Mapping[str, Tensor], fake: Mapping[str, Tensor]) -> Tensor:
        """Loss of each pair, (B,), from the logits of all parts."""
        c, zero = self.config, self.centre
        parts = [
            weight * pair_loss(c.loss, real[n] - zero, fake[n] - zero, c.label_smoothing)
            for n, weight in self.critic.loss_weights.items()
        ]
        return torch.stack(parts).sum(0)

    def _inputs(self, batch: Batch, stream: str) -> tuple[Tensors, Tensors, Tensors]:
        """Features of reference and rollout images, and the tensors that the penalty's slope is taken at."""
        if not self.on_pixels:
            real = self.features(batch.real)
            if self.config.penalty is not None:
                real = tuple(x.detach().requires_grad_() for x in real)
            return real, batch.fake_features, real
        pixels, fake = self.pictures(batch.real).to(batch.fake).div(255), batch.fake
        if self.config.augment.active:
            seeds = self._seeds(batch, f"augment {stream}")
            pixels, fake = (augment(images, self.config.augment, seeds) for images in (pixels, fake))
        with torch.no_grad():
            fake_features = self.critic.embed(fake)
        if self.config.penalty is not None and self.config.penalty.on == "inputs":
            pixels.requires_grad_()
            return self.critic.embed(pixels), fake_features, (pixels,)
        with torch.no_grad():
            real = self.critic.embed(pixels)
        if self.config.penalty is not None:
            real = tuple(x.requires_grad_() for x in real)
        return real, fake_features, real

    def _seeds(self, batch: Batch, stream: str) -> list[int]:
        return [noise_seed(self.seed, f"adversary {stream}", *key) for key in batch.keys]

    @property
    def steps(self) -> int:
        """Optimiser steps so far, those before a resume included."""
        return max((int(state["step"]) for state in self.adamw.state.values()), default=0)

    def state_dict(self) -> dict[str, Any]:
        """Trained parameters and the optimiser's moments."""
        return {
            "parameters": {name: p.detach() for name, p in self.critic.trained.items()},
            "adamw": self.adamw.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the settings of the optimiser stay those of the config."""
        set_parameters(self.critic, state["parameters"])
        kept = [{k: v for k, v in g.items() if k != "params"} for g in self.adamw.param_groups]
        self.adamw.load_state_dict(state["adamw"])
        for group, settings in zip(self.adamw.param_groups, kept, strict=True):
            group.update(settings)


def decision(critic: Critic, logits: Mapping[str, Tensor]) -> Tensor:
    """One number a picture, (B,): the mean of the logits that the loss looks at, in its weights."""
    total = sum(critic.loss_weights.values())
    return torch.stack([weight / total * logits[n].mean(1) for n, weight in critic.loss_weights.items()]).sum(0)


@torch.no_grad()
def set_parameters(critic: Critic, values: Mapping[str, Tensor]) -> None:
    """Set what learns. Raises ValueError when names or shapes differ."""
    shapes = {name: tuple(p.shape) for name, p in critic.trained.items()}
    given = {name: tuple(x.shape) for name, x in values.items()}
    if shapes != given:
        odd = sorted({n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n)})
        raise ValueError(
            f"the adversary's parameters differ, such as {odd[0]}: {given.get(odd[0])} given, {shapes.get(odd[0])} needed"
        )
    for name, parameter in critic.trained.items():
        parameter.copy_(values[name])
