"""What flows through the loop, with shapes and units. B images, W trained timesteps, (C, h, w) latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PromptGroups:
    """The images of one process and the prompts they belong to. A group is all images of one prompt."""

    prompts: tuple[str, ...]
    """The different prompts, P of them."""
    index: tuple[int, ...]
    """Per image: its prompt's place in `prompts`."""
    ids: tuple[int, ...]
    """Per image: its prompt's line in the prompt file. Groups are keyed by it, never by text."""
    members: tuple[int, ...]
    """Per image: its number within the group."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def texts(self) -> list[str]:
        """The prompt of each image."""
        return [self.prompts[i] for i in self.index]

    def __getitem__(self, part: slice | Sequence[int]) -> PromptGroups:
        """Some of the images. All prompts are kept, so `index` stays valid."""
        rows = range(len(self))[part] if isinstance(part, slice) else part

        def take(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(values[i] for i in rows)

        return replace(self, index=take(self.index), ids=take(self.ids), members=take(self.members))

    @classmethod
    def of(cls, prompts: Sequence[str], ids: Sequence[int], members: Sequence[int]) -> PromptGroups:
        """Groups from line numbers into `prompts` (a whole prompt file) and member numbers, one per image."""
        used = list(dict.fromkeys(int(i) for i in ids))
        place = {line: k for k, line in enumerate(used)}
        texts = tuple(prompts[line] for line in used)
        return cls(texts, tuple(place[int(i)] for i in ids), tuple(int(i) for i in ids), tuple(int(m) for m in members))


@dataclass(frozen=True)
class TextEmbeds:
    """Encoded prompts: `tokens` (P, L, D) and `pooled` (P, E).

    `mask` (P, L) bool is there where prompts have different lengths: which tokens are text, all others are zeros behind it.
    """

    tokens: Tensor
    pooled: Tensor
    mask: Tensor | None = None

    def _each(self, function: Callable[[Tensor], Tensor]) -> TextEmbeds:
        mask = None if self.mask is None else function(self.mask)
        return TextEmbeds(function(self.tokens), function(self.pooled), mask)

    def __getitem__(self, rows: Any) -> TextEmbeds:
        return self._each(lambda x: x[rows])

    def to(self, *args: Any, **kwargs: Any) -> TextEmbeds:
        """As `Tensor.to`, for all of them; a mask stays one."""
        moved = self._each(lambda x: x.to(*args, **kwargs))
        return moved if moved.mask is None else replace(moved, mask=moved.mask.bool())

    def trimmed(self, length: int | None = None) -> TextEmbeds:
        """With `length` tokens a row, or as few as hold all the text. Without a mask nothing is cut."""
        if self.mask is None:
            return self
        length = int(self.mask.sum(1).max()) if length is None else length
        more = length - self.mask.shape[1]
        return replace(self, tokens=F.pad(self.tokens, (0, 0, 0, more)), mask=F.pad(self.mask, (0, more)))

    def padded(self, unit: int) -> TextEmbeds:
        """With a multiple of `unit` tokens a row. Without a mask, which says what is padding, nothing is added."""
        return self.trimmed(math.ceil(self.tokens.shape[1] / unit) * unit)

    @staticmethod
    def cat(parts: Sequence[TextEmbeds]) -> TextEmbeds:
        """Rows of several, in order; where they have masks, with as many tokens as the longest needs."""
        parts = [p.trimmed() for p in parts]
        masks = [p.mask for p in parts if p.mask is not None]
        if masks:
            longest = max(m.shape[1] for m in masks)
            parts = [p.trimmed(longest) for p in parts]
            masks = [p.mask for p in parts if p.mask is not None]
        tokens, pooled = torch.cat([p.tokens for p in parts]), torch.cat([p.pooled for p in parts])
        return TextEmbeds(tokens, pooled, torch.cat(masks) if masks else None)


@dataclass(frozen=True)
class Trajectory:
    """One process's rollout: the recorded window and the pictures it led to."""

    groups: PromptGroups
    latents: Tensor
    """(B, W + 1, C, h, w) float32: the window's states, from noisy to clean. Where the dynamics does not record transitions,
    the noise of W levels, then the clean latents."""
    log_probs: Tensor
    """(B, W) float32: log-density of each recorded transition, in the reduction that the algorithm uses; NaN where the
    dynamics records none."""
    levels: Tensor
    """(W + 1,) float32: noise levels of the states, in [0, 1]."""
    final: Tensor
    """(B, C, h, w) float32: clean latents."""
    images: Tensor
    """(B, 3, H, W) uint8."""


@dataclass(frozen=True)
class Rollout:
    """A scored rollout, as regularisers see it. N images over all processes, in process order."""

    trajectory: Trajectory
    """This process's images."""
    scores: Mapping[str, Tensor]
    """Reward name -> (N,) float32 of all processes, as scored: before weights, NaN where a reward does not apply. Rewards of
    weight 0 are among them."""
    ids: Tensor
    """(N,) int64: group of each image of all processes."""
    first: int
    """Row of this process's first image."""
    iteration: int
    """Number of the iteration, from 0."""

    @property
    def own(self) -> slice:
        """Rows of this process's images."""
        return slice(self.first, self.first + len(self.trajectory.groups))


@dataclass(frozen=True)
class TrainingImages:
    """What an update needs of images; travels between processes as a whole. n images."""

    latents: Tensor
    """(n, W + 1, C, h, w) float32."""
    log_probs: Tensor
    """(n, W) float32."""
    advantages: Tensor
    """(n,) float32."""
    prompt: Tensor
    """(n,) int64: line in the prompt file."""
    image: Tensor
    """(n,) int64: number within the iteration, over all processes."""

    def __len__(self) -> int:
        return len(self.advantages)

    def __getitem__(self, rows: Any) -> TrainingImages:
        return TrainingImages(*(getattr(self, f.name)[rows] for f in fields(self)))

    def tensors(self) -> list[Tensor]:
        """The fields in order, for sending."""
        return [getattr(self, f.name) for f in fields(self)]


@dataclass(frozen=True)
class MicroBatch:
    """Transitions of one forward and backward pass: n = images x trained timesteps, one row each."""

    x: Tensor
    """(n, C, h, w) float32: state before the transition."""
    x_next: Tensor
    """(n, C, h, w) float32: state after it."""
    t: Tensor
    """(n,) float32: noise level before."""
    t_next: Tensor
    """(n,) float32: noise level after."""
    log_prob: Tensor | None
    """(n,) float32: log-density under the weights that sampled it; None where the dynamics does not record it."""
    advantage: Tensor
    """(n,) float32."""
    text: TextEmbeds
    """n rows."""
    share: float
    """1 / number of transitions that the whole update was meant to have; loss terms are sums times this."""
    image: Tensor
    """(n,) int64: number of the image within the iteration, over all processes."""

    def __getitem__(self, rows: Tensor) -> MicroBatch:
        """Some of the transitions; the share stays."""
        taken = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in ("log_prob", "share")}
        log_prob = None if self.log_prob is None else self.log_prob[rows]
        return replace(self, **taken, log_prob=log_prob)


@dataclass(frozen=True)
class Prediction:
    """The policy's view of a micro-batch, with gradient."""

    velocity: Tensor
    """(n, C, h, w) float32, guided."""
    mean: Tensor
    """(n, C, h, w) float32: mean of x_next."""
    std: Tensor
    """(n, 1, 1, 1) float32: standard deviation of x_next."""
    log_prob: Tensor
    """(n,) float32."""

    def __getitem__(self, rows: Tensor) -> Prediction:
        """Some of the transitions."""
        return Prediction(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass
class Clock:
    """Where a run stands. Every clock that anything uses is here, and in the checkpoint."""

    iteration: int = 0
    """Iterations finished."""
    update: int = 0
    """Optimiser steps taken."""
    images: int = 0
    """Images sampled for training, over all processes."""
