"""Scores of the base model, measured once: means, deviations and quantiles that no later policy can move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from t2irl.errors import ConfigError
from t2irl.geometry import even_chunks
from t2irl.rollout import Noise, rollout
from t2irl.types import PromptGroups
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts

BASE_STREAM = 0xBA5E
"""Keeps the choice of prompts apart from other draws that start from the same seed."""


class BaseScores:
    """Raw scores of the frozen base model's images. `pooled`: reward -> (M,) float64, over many prompts, without NaN.

    `by_prompt`: prompt's line -> reward -> (n,) float64, for prompts met so far.
    """

    def __init__(self) -> None:
        self.pooled: dict[str, Tensor] = {}
        self.by_prompt: dict[int, dict[str, Tensor]] = {}

    def measure(self, parts: Parts, names: Sequence[str], images: int) -> None:
        """Draw and score `images` images, over all processes, of as many prompts as there are."""
        run = parts.geometry.run
        order = np.random.default_rng([run.seed, BASE_STREAM]).permutation(len(parts.prompts)).tolist()
        lines = [order[i % len(order)] for i in range(images)]
        scores = base_scores(parts, names, lines, [i // len(order) for i in range(images)])
        self.pooled = {name: values[~values.isnan()] for name, values in scores.items()}

    def meet(self, parts: Parts, names: Sequence[str], lines: Sequence[int], images: int) -> None:
        """Draw and score `images` images for each prompt that was not met before."""
        new = [line for line in dict.fromkeys(lines) if line not in self.by_prompt]
        if new:
            rows = [line for line in new for _ in range(images)]
            scores = base_scores(parts, names, rows, [k % images for k in range(len(rows))])
            for place, line in enumerate(new):
                part = slice(place * images, (place + 1) * images)
                self.by_prompt[line] = {name: values[part].clone() for name, values in scores.items()}

    def anchors(self, name: str, lines: Tensor, share: float) -> Tensor:
        """That quantile of each image's own prompt, (N,) float64; NaN where the reward applies to none of its base images."""
        found = {}
        for line in lines.unique().tolist():
            values = self.by_prompt[line][name]
            values = values[~values.isnan()]
            found[line] = float(torch.quantile(values, share)) if len(values) else torch.nan
        return torch.tensor([found[line] for line in lines.tolist()], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {"pooled": self.pooled, "by_prompt": self.by_prompt}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; tensors of it may have come back on a device."""
        self.pooled = {name: values.cpu() for name, values in state["pooled"].items()}
        self.by_prompt = {
            line: {name: values.cpu() for name, values in table.items()} for line, table in state["by_prompt"].items()
        }


def base_scores(parts: Parts, names: Sequence[str], lines: Sequence[int], members: Sequence[int]) -> dict[str, Tensor]:
    """Scores (N,) float64 of base-model images of the prompts `lines`, of all processes, in order.

    Raises ConfigError for a reward that compares images of a group, to which the base model's images do not belong.
    """
    for name in names:
        if parts.rewards.rewards[name].whole_groups:
            raise ConfigError(
                f"combine: rewards.{name}: type {parts.rewards.rewards[name].config.type} compares the images of a group, so it has "
                "no scores of the base model's images; leave out what measures it against them"
            )
    table: dict[str, list[float]] = {name: [] for name in names}
    with distributed.together(parts.rewards.device):
        for groups, images in base_images(parts, lines, members):
            for name, values in parts.rewards.score(images, groups).items():
                if name in table:
                    table[name] += values.double().tolist()
    everyone = distributed.gather_objects(table)
    return {name: torch.tensor([x for part in everyone for x in part[name]], dtype=torch.float64) for name in names}


def base_features(parts: Parts, features: Callable[[Tensor], Tensor], prompts: int) -> tuple[Tensor, Tensor]:
    """Features (N, D) of base-model images, a group each of so many prompts, and the group of each (N,)."""
    run = parts.geometry.run
    order = np.random.default_rng([run.seed, BASE_STREAM]).permutation(len(parts.prompts)).tolist()[:prompts]
    size = run.rollout.group_size
    lines = [line for line in order for _ in range(size)]
    mine = [features(images).cpu() for _, images in base_images(parts, lines, [k % size for k in range(len(lines))])]
    parts_of_all = [x for process in distributed.gather_objects(mine) for x in process]
    return torch.cat(parts_of_all), torch.tensor(lines)


def base_images(parts: Parts, lines: Sequence[int], members: Sequence[int]) -> Iterator[tuple[PromptGroups, Tensor]]:
    """This process's part of base-model images of the prompts `lines`, in batches: groups and (n, 3, H, W) uint8 pictures.

    Consecutive parts go to the processes in order. Sampled as the first rollout is, with noise of its own.
    """
    run, policy = parts.geometry.run, parts.policy
    n, batch = len(lines), run.rollout.batch_size
    shares = even_chunks(n, -(-n // distributed.world_size()))
    mine = range(n)[shares[distributed.rank()]] if distributed.rank() < len(shares) else range(0)
    levels = parts.family.levels(run.rollout.steps)
    window = parts.geometry.trained_timesteps(0, run.seed) if parts.geometry.recorded else range(0)
    for chunk in even_chunks(len(mine), batch):
        rows = mine[chunk]
        groups = PromptGroups.of(parts.prompts, [lines[i] for i in rows], [members[i] for i in rows])
        with policy.reference():
            images = rollout(
                policy, groups, levels, window, Noise(run.seed, "base", run.rollout.same_noise), batch
            ).images
        yield groups, images
