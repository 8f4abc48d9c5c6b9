"""Sampling: a policy and prompts -> pictures and the recorded transitions of the trained window."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from t2irl.data import noise_seed
from t2irl.dynamics.ode import Ode
from t2irl.geometry import even_chunks
from t2irl.policy import Policy
from t2irl.types import PromptGroups, TextEmbeds, Trajectory

ODE = Ode(Ode.Config())
Finished = Callable[[slice, Tensor], None]
"""What is told of a finished batch: its rows and its (n, 3, H, W) uint8 pictures."""


class Noise:
    """Standard normal noise of each image, seeded by (seed, stream, prompt id, image number).

    So it depends neither on the batch size nor on the number of processes. `stream` is the iteration, or a name for
    pictures outside training. Drawn on the CPU, whose generator is the same everywhere.
    """

    def __init__(
        self, seed: int, stream: int | Literal["evaluation", "grid", "export", "base"], same_noise: bool = False
    ):
        self.seed, self.stream, self.same_noise = seed, stream, same_noise

    def draw(self, groups: PromptGroups, count: int, shape: tuple[int, ...]) -> Tensor:
        """(B, count, *shape) float32 on the CPU; `count` >= 1, the first is the initial latent."""
        generator = torch.Generator()
        noise = torch.empty(len(groups), count, *shape)
        for row, prompt, member in zip(noise, groups.ids, groups.members, strict=True):
            generator.manual_seed(noise_seed(self.seed, self.stream, prompt, member))
            torch.randn(row.shape, generator=generator, out=row)
            if self.same_noise:
                generator.manual_seed(noise_seed(self.seed, self.stream, prompt, -1))
                torch.randn(row[0].shape, generator=generator, out=row[0])
        return noise

    def of_groups(self, groups: PromptGroups, count: int, shape: tuple[int, ...]) -> Tensor:
        """(B, count, *shape) float32 on the CPU, equal for all images of a prompt."""
        generator, drawn = torch.Generator(), {}
        for prompt in dict.fromkeys(groups.ids):
            generator.manual_seed(noise_seed(self.seed, self.stream, prompt, -2))
            drawn[prompt] = torch.randn(count, *shape, generator=generator)
        return torch.stack([drawn[prompt] for prompt in groups.ids])

    def uniform(self, count: int) -> Tensor:
        """(count,) float32 in [0, 1), equal for all images and processes."""
        return torch.rand(count, generator=torch.Generator().manual_seed(noise_seed(self.seed, self.stream, -1, -1)))


@torch.no_grad()
def rollout(
    policy: Policy,
    groups: PromptGroups,
    levels: Tensor,
    window: range,
    noise: Noise,
    batch_size: int,
    guidance: float | None = None,
    finished: Finished = lambda rows, images: None,
) -> Trajectory:
    """Sample an image for each entry of `groups`.

    `levels`: (N + 1,) noise levels. Timesteps in `window` follow the policy's dynamics and are recorded, all others
    follow the ODE. An empty window gives plain deterministic pictures, and so do dynamics that record nothing: they get
    noise of as many levels as the window has places.
    """
    recorded, parts = window if policy.dynamics.recorded else range(0), []
    all_recorded = len(recorded) == len(levels) - 1
    with nullcontext() if all_recorded else policy.fused(recorded=len(recorded) > 0):
        for chunk in even_chunks(len(groups), batch_size):
            parts.append(_sample(policy, groups[chunk], levels, recorded, noise, guidance))
            finished(chunk, parts[-1][-1])
    latents, log_probs, final, images = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    trained = levels[recorded.start : recorded.stop + 1]
    trajectory = Trajectory(groups, latents, log_probs, trained, final, images)
    return trajectory if recorded == window else noised(policy, trajectory, window, noise)


def noised(policy: Policy, trajectory: Trajectory, window: range, noise: Noise) -> Trajectory:
    """Plain pictures with what dynamics that record nothing train on: noise of as many levels as the window has places."""
    final = trajectory.final
    fresh = noise.of_groups(trajectory.groups, len(window), policy.family.latent_shape).to(final.device)
    latents, log_probs = torch.cat([fresh, final[:, None]], 1), final.new_full(fresh.shape[:2], torch.nan)
    levels = policy.dynamics.levels(noise.uniform(len(window)).to(final.device))
    return replace(trajectory, latents=latents, log_probs=log_probs, levels=levels)


@torch.no_grad()
def log_densities(policy: Policy, trajectory: Trajectory, batch_size: int) -> Tensor:
    """Log-densities (B, W) of recorded transitions under the policy as it stands, by the calls that `rollout` makes for them."""
    found, levels = [], trajectory.levels
    for chunk in even_chunks(len(trajectory.groups), batch_size):
        latents, groups = trajectory.latents[chunk], trajectory.groups[chunk]
        text, steps = _text(policy, groups), []
        for step in range(len(levels) - 1):
            t, t_next = levels[step].expand(len(groups)), levels[step + 1].expand(len(groups))
            x, x_next = latents[:, step].contiguous(), latents[:, step + 1]
            v = _velocity(policy, x, t, text, None, recorded=True)
            mean, std = policy.dynamics.mean_std(x, v, t, t_next)
            steps.append(policy.dynamics.log_prob(x_next, mean, std, policy.reduction))
        found.append(torch.stack(steps, 1))
    return torch.cat(found)


def _sample(
    policy: Policy, groups: PromptGroups, levels: Tensor, window: range, noise: Noise, guidance: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One batch: recorded states (B, W + 1, C, h, w), log-densities (B, W), clean latents, uint8 pictures."""
    device, size = policy.family.device, len(groups)
    draws = noise.draw(groups, 1 + len(window), policy.family.latent_shape).to(device)
    text = _text(policy, groups)
    x = policy.family.start(draws[:, 0], levels[0])
    states, log_probs = [x] if 0 in window else [], []
    for step in range(len(levels) - 1):
        t, t_next = levels[step].expand(size), levels[step + 1].expand(size)
        v = _velocity(policy, x, t, text, guidance, recorded=step in window)
        if step in window:
            mean, std = policy.dynamics.mean_std(x, v, t, t_next)
            x = policy.dynamics.sample(mean, std, draws[:, 1 + step - window.start])
            log_probs.append(policy.dynamics.log_prob(x, mean, std, policy.reduction))
        else:
            x = ODE.mean_std(x, v, t, t_next)[0]
        if step + 1 in window or step in window:
            states.append(x)
    x = policy.family.finish(x, levels[-1])
    if not window:
        return x.new_empty(size, 0), x.new_empty(size, 0), x, policy.family.pictures(x)
    return torch.stack(states, 1), torch.stack(log_probs, 1), x, policy.family.pictures(x)


def _text(policy: Policy, groups: PromptGroups) -> TextEmbeds:
    """A row for each image. Groups keep all prompts of the rollout, a batch needs a few."""
    used = sorted(set(groups.index))
    return policy.text([groups.prompts[i] for i in used])[[used.index(i) for i in groups.index]]


def _velocity(policy: Policy, x: Tensor, t: Tensor, text: TextEmbeds, guidance: float | None, recorded: bool) -> Tensor:
    # Compiled, a call with gradient is another graph: recorded transitions must come from the update's, to the bit.
    with policy.apart() if recorded else nullcontext(), torch.set_grad_enabled(policy.family.compiled and recorded):
        return policy.velocity(x, t, text, guidance).detach()
