"""Older rollout images, so that an adversary does not forget what the policy drew before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from t2irl.config import Strict
from t2irl.data import noise_seed
from t2irl.utils import distributed


class Replay(Strict):
    """A store of older rollout images, the same on all processes and in the checkpoint."""

    size: PositiveInt = 1024
    """Images kept, over all processes; the oldest leave. In the checkpoint as 8-bit pictures."""
    add: PositiveInt = 16
    """Images of each iteration that are stored, over all processes, drawn at random."""
    share: float = Field(0.25, gt=0, le=4)
    """Stored images that an iteration learns from, as a share of its own images."""


@dataclass(frozen=True)
class Old:
    """A stored image."""

    picture: Tensor
    """(3, H, W) uint8 on the CPU."""
    text: str
    prompt: int
    """Line of its prompt."""
    member: int


class ReplayBuffer:
    """The store. Every process holds all of it, and learns from its own part of what is drawn."""

    def __init__(self, settings: Replay):
        self.settings = settings
        self.images: list[Old] = []

    def draw(self, count: int, seed: int, iteration: int) -> list[Old]:
        """This process's part of the stored images that an iteration learns from; `count`: its own images, all processes."""
        wanted = min(round(self.settings.share * count), len(self.images))
        rng = np.random.default_rng(noise_seed(seed, "replay draw", iteration, 0))
        places = rng.permutation(len(self.images))[:wanted]
        return [self.images[k] for k in places[distributed.rank() :: distributed.world_size()]]

    def add(self, mine: list[Old], seed: int, iteration: int) -> None:
        """Store some of the images that all processes have."""
        count = distributed.gather_objects(len(mine))
        chosen = np.random.default_rng(noise_seed(seed, "replay add", iteration, 0)).permutation(sum(count))
        first = sum(count[: distributed.rank()])
        kept = sorted(k for k in chosen[: self.settings.add].tolist() if first <= k < first + len(mine))
        for part in distributed.gather_objects([mine[k - first] for k in kept]):
            self.images += part
        del self.images[: -self.settings.size]

    def state_dict(self) -> dict[str, Any]:
        """The pictures in one tensor, and what belongs to them."""
        if not self.images:
            return {}
        return {
            "pictures": torch.stack([x.picture for x in self.images]),
            "rows": [[x.text, x.prompt, x.member] for x in self.images],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        rows = state.get("rows", [])
        self.images = [Old(state["pictures"][k].cpu(), *row) for k, row in enumerate(rows)]
