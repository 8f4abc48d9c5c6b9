"""From a rollout to micro-batches: which image serves which update, what is skipped, how rows are laid out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from t2irl.geometry import Geometry, even_chunks
from t2irl.policy import Policy
from t2irl.types import MicroBatch, TrainingImages, Trajectory
from t2irl.utils import distributed


def assigned(geometry: Geometry, seed: int, iteration: int, part: int) -> np.ndarray:
    """Global numbers of the images of one update of an iteration, `part` of `updates_per_iteration`.

    In rollout order, so that a micro-batch can have the composition it was sampled in.
    """
    order = np.random.default_rng([seed, 0x0DD, iteration]).permutation(geometry.images)
    size = geometry.images_per_update
    return np.sort(order[part * size : (part + 1) * size])


def updates(
    trajectory: Trajectory, advantages: Tensor, geometry: Geometry, seed: int, iteration: int, skip: bool
) -> Iterator[TrainingImages]:
    """This process's images for each update of an iteration.

    Images are assigned to updates by a permutation of their global numbers, so the assignment does not depend on the
    number of processes. With `skip`, images of advantage exactly 0 are left out; what remains is dealt out evenly over
    processes. The loss divides by the full count all the same, so the gradient stays exactly what it was.
    """
    n, device = len(trajectory.groups), trajectory.latents.device
    first = distributed.rank() * n
    prompt = torch.tensor(trajectory.groups.ids, device=device)
    number = torch.arange(first, first + n, device=device)
    everything = TrainingImages(
        trajectory.latents, trajectory.log_probs, advantages.to(device, torch.float32), prompt, number
    )
    keep = advantages != 0 if skip else torch.ones(n, dtype=torch.bool)
    for part in range(geometry.updates_per_iteration):
        chosen = assigned(geometry, seed, iteration, part) - first
        rows = [int(i) for i in chosen if 0 <= i < n and keep[i]]
        yield distributed.balance(everything[torch.tensor(rows, dtype=torch.long, device=device)], device)


def micro_batches(
    images: TrainingImages, levels: Tensor, policy: Policy, prompts: Sequence[str], size: int, share: float
) -> Iterator[MicroBatch]:
    """Forward and backward passes of an update: at most `size` images each, all their timesteps in one call.

    `levels`: (W + 1,) noise levels of the window. `share`: 1 / (images of the whole update x W).
    """
    steps = len(levels) - 1
    for chunk in even_chunks(len(images), size):
        part = images[chunk]
        lines: list[int] = part.prompt.tolist()
        different = list(dict.fromkeys(lines))
        place = {line: i for i, line in enumerate(different)}
        rows = [place[line] for line in lines for _ in range(steps)]
        x, x_next, t, t_next = policy.dynamics.rows(part.latents, levels)
        yield MicroBatch(
            x=x,
            x_next=x_next,
            t=t,
            t_next=t_next,
            log_prob=part.log_probs.flatten() if policy.dynamics.recorded else None,
            advantage=part.advantages.repeat_interleave(steps),
            text=policy.text([prompts[line] for line in different])[rows],
            share=share,
            image=part.image.repeat_interleave(steps),
        )
