"""Held-out measurement: fixed prompts, fixed noise, every reward of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from t2irl.config import Run
from t2irl.geometry import even_chunks
from t2irl.policy import Policy
from t2irl.rewards.combine import RewardSet
from t2irl.rollout import Noise, rollout
from t2irl.types import PromptGroups, Trajectory
from t2irl.utils import distributed


def sample_fixed(
    policy: Policy,
    run: Run,
    prompts: Sequence[str],
    count: int,
    noise: Noise,
    advance: Callable[[int], None] = lambda images: None,
    part: tuple[int, int] = (0, 1),
) -> Trajectory:
    """Part `part[0]` of `part[1]` of `count` deterministic pictures, image i showing prompt i modulo their number.

    The trajectory has no recorded window, and may be of no picture at all. Steps and guidance are the evaluation's.
    """
    chunks = even_chunks(count, -(-count // part[1]))
    mine = range(count)[chunks[part[0]]] if part[0] < len(chunks) else range(0)
    groups = PromptGroups.of(prompts, [i % len(prompts) for i in mine], [i // len(prompts) for i in mine])
    if not mine:
        empty = torch.empty(0)
        return Trajectory(groups, empty, empty, empty, empty, torch.empty(0, 3, 1, 1, dtype=torch.uint8))
    levels = policy.family.levels(run.evaluation.steps or run.rollout.steps)
    guidance = policy.guidance_scale if run.evaluation.guidance_scale is None else run.evaluation.guidance_scale
    return rollout(
        policy, groups, levels, range(0), noise, run.rollout.batch_size, guidance, lambda rows, images: advance(len(images))
    )  # fmt: skip


def evaluate(
    policy: Policy,
    run: Run,
    prompts: Sequence[str],
    rewards: Sequence[RewardSet],
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, float]:
    """Mean of every measure over `run.evaluation.images` pictures, of the averaged weights. Equal on all processes.

    A reward that measures whole sets gives its own number instead.
    """
    part = (distributed.rank(), distributed.world_size())
    with policy.averaged():
        noise = Noise(run.seed, "evaluation")
        sampled = sample_fixed(policy, run, prompts, run.evaluation.images, noise, advance, part)
    groups, images = sampled.groups, sampled.images
    means: dict[str, float] = {}
    for reward_set in rewards:
        with distributed.together(policy.family.device):
            scores = reward_set.score(images, groups)
        for name, values in scores.items():
            applies = values[~values.isnan()].double()
            table = distributed.gather_rows(
                torch.stack([applies.sum(), torch.tensor(float(len(applies)), dtype=torch.float64)])[None],
                policy.family.device,
            )
            total, number = table.sum(0).tolist()
            means[name] = total / number if number else float("nan")
        means |= reward_set.measure(images, groups)
    return means
