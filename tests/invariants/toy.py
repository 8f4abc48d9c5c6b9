"""A model family and rewards of a few lines, plugged into a run by `tests.invariants.toy:Name`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor, nn

from t2irl import registry
from t2irl.advantages import group_advantages
from t2irl.batches import micro_batches, updates
from t2irl.config import Run
from t2irl.geometry import Geometry
from t2irl.models.base import ModelFamily
from t2irl.optimizer import Optimizer
from t2irl.policy import Policy
from t2irl.rewards.base import Reward
from t2irl.rewards.combine import RewardSet
from t2irl.rollout import Noise, rollout
from t2irl.train import Parts, own_groups
from t2irl.types import Clock, MicroBatch, PromptGroups, TextEmbeds, Trajectory
from t2irl.utils import distributed

PROMPTS = tuple(f"a picture of thing {k}" for k in range(24))


class ToyDenoiser(nn.Module, PeftAdapterMixin):
    """Three linear layers over latents, noise level and text."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.middle, self.last = nn.Linear(32 + 1 + 16, 48), nn.Linear(48, 48), nn.Linear(48, 32)

    def forward(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity (B, 2, 4, 4)."""
        x = torch.cat([latents.flatten(1), t[:, None], text.tokens.mean(1), text.pooled], 1)
        x = F.silu(self.middle(F.silu(self.first(x))))
        return self.last(x).view_as(latents)


class ToyFamily(ModelFamily):
    """Latents (2, 4, 4), text from the prompt's hash, pictures of 8 x 8 pixels."""

    class Config(ModelFamily.Config):
        """No settings of its own; `path` is not read."""

        type: Literal["tests.invariants.toy:ToyFamily"] = "tests.invariants.toy:ToyFamily"
        path: Path = Path("toy")

    lora_targets = ("first", "middle", "last")
    latent_shape = (2, 4, 4)

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.denoiser = ToyDenoiser().requires_grad_(False).to(device)

    def encode(self, prompts: Sequence[str]) -> TextEmbeds:
        """Normal numbers seeded by each prompt."""
        rows = []
        for prompt in prompts:
            seed = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=7).digest(), "little")
            rows.append(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
        table = torch.stack(rows).to(self.device)
        return TextEmbeds(table[:, :3], table[:, 3])

    def denoise(self, latents: Tensor, t: Tensor, text: TextEmbeds) -> Tensor:
        """Velocity."""
        return self.denoiser(latents, t, text)

    def decode(self, latents: Tensor) -> Tensor:
        """Three channels made of two, twice as large."""
        image = torch.cat([latents, latents.mean(1, keepdim=True)], 1).sigmoid()
        return F.interpolate(image, scale_factor=2)

    def levels(self, steps: int) -> Tensor:
        """A uniform schedule."""
        return torch.linspace(1, 0, steps + 1, device=self.device)


class Brightness(Reward):
    """Mean of the picture, plus a term that depends on the prompt."""

    class Config(Reward.Config):
        """No settings of its own."""

        type: Literal["tests.invariants.toy:Brightness"] = "tests.invariants.toy:Brightness"

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Brightness and the length of the prompt."""
        return images.mean((1, 2, 3)) + 0.01 * torch.tensor([len(text) for text in groups.texts], device=images.device)


class Broken(Reward):
    """Gives `value` for the prompt `prompt`, and 0 for all others."""

    class Config(Reward.Config):
        """What to give, as text since configs refuse such numbers, and for which prompt."""

        value: Literal["nan", "inf", "-inf"] = "nan"
        prompt: str

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """The bad score."""
        return torch.tensor([float(self.config.value) if text == self.config.prompt else 0.0 for text in groups.texts])


class Choosy(Broken):
    """The same, but NaN is declared to mean 'does not apply'."""

    may_skip = True


class Scalar(Reward):
    """Forgets the batch."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """One number for all images."""
        return images.mean()


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with nested `changes`; a value that is no mapping, or has a `type`, replaces what was there."""
    result = dict(tree)
    for key, value in changes.items():
        deep = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and "type" not in value
        result[key] = merged(result[key], value) if deep else value
    return result


def toy_run(changes: Mapping[str, Any] | None = None) -> Run:
    """A run of the toy family: 4 prompts x 4 images, 5 timesteps of which the first is trained, one update."""
    tree = {
        "model": {"type": "tests.invariants.toy:ToyFamily"},
        "policy": {"tune": {"type": "lora", "rank": 4, "alpha": 8}},
        "data": {"prompts": "prompts.txt", "heldout": "heldout.txt"},
        "rollout": {
            "prompts": 4, "group_size": 4, "steps": 5, "batch_size": 16,
            "dynamics": {"type": "cps", "noise_level": 0.8}, "window": {"type": "fixed", "start": 0, "size": 1},
        },
        "algorithm": {"type": "grpo", "clip_range": 1e-3},
        "rewards": {"brightness": {"type": "tests.invariants.toy:Brightness"}},
        "update": {"per_iteration": 1, "batch_size": 16},
        "optimizer": {"lr": 1e-2, "weight_decay": 0, "max_grad_norm": 1e9},
        "iterations": 4,
    }  # fmt: skip
    return Run.model_validate(merged(tree, changes or {}))


def toy_parts(run: Run, device: torch.device | str = "cpu", sharded: bool = False) -> Parts:
    """Everything that the loop needs, as `t2irl.train.build` makes it, without a run folder."""
    device = torch.device(device)
    geometry = Geometry.of(run, distributed.world_size())
    algorithm = registry.build("algorithms", run.algorithm)
    family = registry.build("models", run.model, device)
    policy = Policy(run, family, registry.build("dynamics", run.rollout.dynamics), algorithm.reduction, sharded)
    rewards, heldout = (RewardSet(configs, device, 16, family.work) for configs in (run.rewards, run.heldout_rewards))
    regularizers = {name: registry.build("regularizers", config) for name, config in run.regularizers.items()}
    optimizer = Optimizer(run, list(policy.trained.values()), geometry.total_updates, device, policy.company)
    return Parts(
        family, policy, algorithm, rewards, heldout, regularizers, optimizer, PROMPTS, PROMPTS, geometry, Clock()
    )


def toy_rollout(run: Run, parts: Parts, guidance: float | None = None) -> Trajectory:
    """This process's rollout of the present iteration."""
    iteration, size = parts.clock.iteration, run.rollout.batch_size
    window, noise = parts.geometry.trained_timesteps(iteration, run.seed), Noise(run.seed, iteration)
    levels = parts.family.levels(run.rollout.steps)
    return rollout(parts.policy, own_groups(run, parts), levels, window, noise, size, guidance)


def advantages_of(trajectory: Trajectory, parts: Parts, run: Run) -> Tensor:
    """Advantages of a rollout by the run's rewards."""
    scores = parts.rewards.score(trajectory.images, trajectory.groups)
    ids = torch.tensor(trajectory.groups.ids)
    return group_advantages(scores, parts.rewards.weights, ids, run.advantage).float()


def a_batch(run: Run, parts: Parts) -> MicroBatch:
    """All transitions of a rollout in one micro-batch, with alternating advantages."""
    trajectory = toy_rollout(run, parts)
    advantages = torch.tensor([1.0, -1.0] * (len(trajectory.groups) // 2))
    images = next(updates(trajectory, advantages, parts.geometry, run.seed, 0, skip=False))
    size = len(images)
    share = 1 / (size * parts.geometry.window_size)
    return next(micro_batches(images, trajectory.levels, parts.policy, PROMPTS, size, share))


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """A copy of the trained weights."""
    return {name: p.detach().clone() for name, p in policy.trained.items()}
