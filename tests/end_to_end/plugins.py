"""Rewards and a regulariser that runs under test plug in by `tests.end_to_end.plugins:Name`."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from t2irl.errors import RunError
from t2irl.policy import Policy
from t2irl.regularizers.base import Regularizer
from t2irl.rewards.base import Reward
from t2irl.types import Clock, MicroBatch, Prediction, PromptGroups, Rollout
from t2irl.utils import distributed


class Brightness(Reward):
    """Mean of the picture."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """In [0, 1]."""
        return images.mean((1, 2, 3))


class Darkness(Brightness):
    """What training on brightness loses; does not apply to prompts with the word 'sky'."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """In [0, 1]."""
        sky = torch.tensor(["sky" in text for text in groups.texts], device=images.device)
        return (1 - super().score(images, groups)).masked_fill(sky, torch.nan)

    may_skip = True


class Band(Reward):
    """1 for a picture of which a fifth is black, as under a caption, else 0."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """0 or 1."""
        return ((images.amax(1) == 0).double().mean((1, 2)) > 0.2).float()


class WholeSet(Reward):
    """Mean of all pictures of a set, of which each process holds a part."""

    per_image = False

    def measure(self, images: Tensor, groups: PromptGroups) -> float:
        """In [0, 255], equal on all processes."""
        mine = torch.tensor([images.double().sum(), images.numel() if len(groups) else 0], dtype=torch.float64)
        total, count = distributed.totals([mine], 2, self.device)
        return total / count


class PartlyFlat(Brightness):
    """The same, but 0 for prompts with the word 'flat': their groups carry no signal."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """In [0, 1]."""
        flat = torch.tensor(["flat" in text for text in groups.texts], device=images.device)
        return super().score(images, groups).masked_fill(flat, 0.0)


class Moody(Brightness):
    """Learns a picture that it then wants to see no more; all of its state is in the checkpoint."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.seen = torch.zeros(3, 16, 16, device=device)
        self.updates = 0

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Distance from what was seen."""
        return (images - self.seen).square().mean((1, 2, 3))

    def update(self, images: Tensor, groups: PromptGroups) -> dict[str, float]:
        """Remember the rollout's mean picture."""
        self.seen = 0.5 * self.seen + 0.5 * images.mean(0)
        self.updates += 1
        return {"updates": float(self.updates)}

    def state_dict(self) -> dict[str, Any]:
        """The picture and the number of updates."""
        return {"seen": self.seen, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.seen, self.updates = state["seen"], state["updates"]


class Growing(Brightness):
    """Learns, and says when: every second update its scores grow by a picture."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.updates = 0

    @property
    def version(self) -> int:
        """Half of the updates."""
        return self.updates // 2

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Brightness, and from each version on more of the red."""
        return (1 + self.version) * (super().score(images, groups) + self.version * images[:, 0].mean((1, 2)))

    def update(self, images: Tensor, groups: PromptGroups) -> dict[str, float]:
        """Count."""
        self.updates += 1
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The number of updates."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.updates = state["updates"]


class Interrupting(Brightness):
    """Sends this process a signal while it scores for the `call`-th time; once, as `done` remembers."""

    class Config(Reward.Config):
        """Which signal, when, and the file that says that it was sent."""

        signal: Literal["SIGINT", "SIGTERM"] = "SIGTERM"
        call: int
        done: Path

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.calls = 0

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Brightness."""
        self.calls += 1
        if self.calls == self.config.call and not self.config.done.exists():
            self.config.done.write_text("sent")
            os.kill(os.getpid(), getattr(signal, self.config.signal))
        return super().score(images, groups)


class FailsOnOne(Brightness):
    """Fails on the second process, in the thread that scores while pictures are drawn."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Brightness."""
        if distributed.rank() == 1 and threading.current_thread() is not threading.main_thread():
            raise RunError("the judge has gone home")
        return super().score(images, groups)


class Fading(Regularizer):
    """Scales advantages by a factor that every update lowers, and holds velocities down by the same factor."""

    class Config(Regularizer.Config):
        """No settings of its own."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.factor = torch.tensor(1.0)

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Advantages times the factor."""
        return advantages * self.factor.to(advantages)

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """A small multiple of the squared velocity."""
        return 0.01 * self.factor * prediction.velocity.square().mean((1, 2, 3)).sum() * batch.share

    def after_update(self, policy: Policy, clock: Clock) -> None:
        """Fade."""
        self.factor = self.factor * 0.9

    def state_dict(self) -> dict[str, Any]:
        """The factor."""
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.factor = state["factor"]


class Mute(Brightness):
    """Fails, and not by an error of the user's."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Does not return."""
        raise RuntimeError("nothing to say")


class Deadly(Brightness):
    """Ends its process by a signal, as the kernel does where memory is short."""

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Does not return."""
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still there")
