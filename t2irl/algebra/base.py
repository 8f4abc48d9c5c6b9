"""Scores of the base model, measured once: means, deviations and quantiles that no later policy can move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


Change = Callable[[Tensor, Tensor], Tensor]
"""Scores (n,) and the lines of their prompts (n,) -> those scores on another scale, (n,)."""


class BaseScores:
    """Raw scores of the frozen base model's images. `pooled`: reward -> (M,) float64, over many prompts, without NaN.

    `by_prompt`: prompt's line -> reward -> (n,) float64, for prompts met so far. `versions`: reward -> the `Reward.version` that
    its scores are of.
    """

    def __init__(self) -> None:
        self.pooled: dict[str, Tensor] = {}
        self.by_prompt: dict[int, dict[str, Tensor]] = {}
        self.versions: dict[str, int] = {}
        self.pictures = torch.empty(0)
        """(M, 3, H, W) uint8 in host memory: the pictures that `pooled` is of, if a reward scores them again when it has changed."""
        self.places: list[tuple[int, int]] = []
        """Line of the prompt, and member, of each of them."""

    def measure(self, parts: Parts, names: Sequence[str], images: int) -> None:
        """Score by the rewards `names` `images` images, over all processes, of as many prompts as there are; drawn if they are not kept."""
        run, kept = parts.geometry.run, []
        keep = any(parts.rewards.rewards[name].learns for name in names) and not self.places
        if self.places:
            batches = self._again(parts)
        else:
            order = np.random.default_rng([run.seed, BASE_STREAM]).permutation(len(parts.prompts)).tolist()
            places = [(order[i % len(order)], i // len(order)) for i in range(images)]
            batches = base_images(parts, *zip(*places, strict=True))
            if keep:
                self.places, batches = places, keeping(batches, kept)
        scores = base_scores(parts, names, batches)
        if keep:
            self.pictures = torch.cat([x for process in distributed.gather_objects(kept) for x in process])
        self.pooled |= {name: values[~values.isnan()] for name, values in scores.items()}

    def _again(self, parts: Parts) -> Iterator[tuple[PromptGroups, Tensor]]:
        """This process's part of the kept pictures, in the batches in which they were drawn."""
        for rows in own_rows(len(self.places), parts.geometry.run.rollout.batch_size):
            lines, members = zip(*(self.places[i] for i in rows), strict=True)
            yield PromptGroups.of(parts.prompts, lines, members), self.pictures[rows.start : rows.stop]

    def meet(self, parts: Parts, names: Sequence[str], lines: Sequence[int], images: int) -> None:
        """Draw `images` images for each prompt that some of the rewards `names` were not measured on, and score them by those."""
        missing = {line: self.unmet(names, line) for line in dict.fromkeys(lines)}
        missing = {line: those for line, those in missing.items() if those}
        if missing:
            rows, those = [line for line in missing for _ in range(images)], sorted(set().union(*missing.values()))
            scores = base_scores(parts, those, base_images(parts, rows, [k % images for k in range(len(rows))]))
            for place, line in enumerate(missing):
                part = slice(place * images, (place + 1) * images)
                self.by_prompt.setdefault(line, {}).update({n: scores[n][part].clone() for n in missing[line]})

    def unmet(self, names: Sequence[str], line: int) -> list[str]:
        """Which of the rewards were not measured on that prompt."""
        return [name for name in names if name not in self.by_prompt.get(line, {})]

    def forget(self, name: str) -> None:
        """Drop all scores of a reward, since it has changed; those of others stay."""
        for table in (self.pooled, *self.by_prompt.values()):
            table.pop(name, None)

    def anchors(self, name: str, lines: Tensor, share: float) -> Tensor:
        """That quantile of each image's own prompt, (N,) float64; NaN where the reward applies to none of its base images."""
        return self._quantiles(name, lines, share, lambda values, _: values)

    def levels(self, name: str, lines: Tensor, share: float, change: Change) -> Tensor:
        """As `anchors`, of scores after `change`; where it is NaN, the quantile of all prompts met so far, NaN where those have none."""
        found = self._quantiles(name, lines, share, change)
        if found.isnan().any():
            met = [self._changed(name, line, change) for line in self.by_prompt if name in self.by_prompt[line]]
            found = found.where(~found.isnan(), torch.nanquantile(torch.cat(met), share))
        return found

    def _quantiles(self, name: str, lines: Tensor, share: float, change: Change) -> Tensor:
        of = {x: float(torch.nanquantile(self._changed(name, x, change), share)) for x in lines.unique().tolist()}
        return torch.tensor([of[line] for line in lines.tolist()], dtype=torch.float64)

    def _changed(self, name: str, line: int, change: Change) -> Tensor:
        values = self.by_prompt[line][name]
        return change(values, torch.full((len(values),), line))

    def state_dict(self) -> dict[str, Any]:
        """Everything that was measured."""
        state = {"pooled": self.pooled, "by_prompt": self.by_prompt, "versions": self.versions}
        return state | ({"pictures": self.pictures, "places": self.places} if self.places else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; tensors of it may have come back on a device."""
        self.pooled = {name: values.cpu() for name, values in state["pooled"].items()}
        self.by_prompt = {
            line: {name: values.cpu() for name, values in table.items()} for line, table in state["by_prompt"].items()
        }
        self.versions = dict(state.get("versions", {}))
        self.pictures = state.get("pictures", torch.empty(0)).cpu()
        self.places = [(line, member) for line, member in state.get("places", ())]


def keeping(
    batches: Iterable[tuple[PromptGroups, Tensor]], kept: list[Tensor]
) -> Iterator[tuple[PromptGroups, Tensor]]:
    """`batches` as they come, each of whose pictures are put into `kept` on the CPU as well."""
    for groups, images in batches:
        kept.append(images.cpu())
        yield groups, images


def base_scores(
    parts: Parts, names: Sequence[str], batches: Iterable[tuple[PromptGroups, Tensor]]
) -> dict[str, Tensor]:
    """Scores (N,) float64 by the rewards `names` of the pictures that all processes have, in the order of processes.

    Raises ConfigError for a reward that compares images of a group, to which the base model's images do not belong.
    """
    for name in names:
        if parts.rewards.rewards[name].whole_groups:
            raise ConfigError(
                f"combine: rewards.{name}: type {parts.rewards.rewards[name].config.type} compares the images of a group, so it has "
                "no scores of the base model's images; leave out what measures it against them"
            )
    table: dict[str, list[float]] = {name: [] for name in names}
    rewards = parts.rewards.only(names)
    with distributed.together(rewards.device):
        for groups, images in batches:
            for name, values in rewards.score(images, groups).items():
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
    batch = run.rollout.batch_size
    levels = parts.family.levels(run.rollout.steps)
    window = parts.geometry.trained_timesteps(0, run.seed) if parts.geometry.recorded else range(0)
    for rows in own_rows(len(lines), batch):
        groups = PromptGroups.of(parts.prompts, [lines[i] for i in rows], [members[i] for i in rows])
        with policy.reference():
            images = rollout(
                policy, groups, levels, window, Noise(run.seed, "base", run.rollout.same_noise), batch
            ).images
        yield groups, images


def own_rows(count: int, batch: int) -> Iterator[range]:
    """This process's part of so many rows, in batches; consecutive parts go to the processes in order."""
    shares = even_chunks(count, -(-count // distributed.world_size()))
    mine = range(count)[shares[distributed.rank()]] if distributed.rank() < len(shares) else range(0)
    for chunk in even_chunks(len(mine), batch):
        yield mine[chunk]
