"""The interface of a reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2irl.config import Strict
from t2irl.errors import DataError
from t2irl.types import PromptGroups

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily


class Reward:
    """Scores images for their prompts; higher is better.

    A subclass stands alone in `t2irl/rewards/<type>.py`, brings its own `Config` and is built as
    `Reward(config, device)`. Nothing is loaded before that.
    """

    class Config(Strict):
        """Settings that every reward has."""

        type: str
        """File name in `t2irl/rewards/`, or `package.module:Class`."""
        weight: float = 1.0
        """Factor of this reward in the sum that is trained on; ignored for held-out rewards. 0: auxiliary, scored on every
        rollout for regularisers to see, but without any part in the advantages."""

    may_skip = False
    """Whether NaN is a legal score, meaning 'does not apply to this image'."""
    per_image = True
    """Whether `score` is defined. A measure of whole sets of pictures has `measure` instead and can only be held out."""
    whole_groups = False
    """Whether a score depends on the other images of the group. Such a reward is given all images of a group in one call, once
    the rollout is drawn. Pictures outside rollouts (evaluations, grids, the base model's) get NaN from it."""
    seed = 0
    """The run's seed; set before `prepare`."""
    name = ""
    """Its name in the config; set before `prepare`."""
    rollout_scores: Mapping[str, tuple[float, Tensor]] = {}
    """Weights and scores (B,) of all rewards, by name, for the rollout that `update` sees; set before it."""
    policy_turn = True
    """Whether the policy learns from the rollout that `update` last saw; a trainable reward may keep it for itself."""

    def __init__(self, config: Any, device: torch.device):
        self.config, self.device = config, device

    @classmethod
    def would_learn(cls, config: Any) -> bool:
        """Whether `update` changes a reward of these settings."""
        return cls.update is not Reward.update

    @property
    def learns(self) -> bool:
        """Whether `update` changes the reward."""
        return self.would_learn(self.config)

    @property
    def version(self) -> int | None:
        """How often it has changed since the run began: scores of different versions cannot be compared. It follows from `state_dict`, is
        the same on all processes, and changes in `update` alone. None: it learns and does not say.
        """
        return None if self.learns else 0

    @property
    def judges(self) -> int:
        """How many judges a score is the mean of. A reward that has several overrides this and `each`."""
        return 1

    @classmethod
    def check(cls, config: Any, prompts: Sequence[str]) -> None:
        """Look, cheaply, at the files that belong to `prompts`, before anything is loaded; on all processes alike.

        Raises ConfigError or DataError as building it and `prepare` would.
        """

    @classmethod
    def needs_heldout(cls, config: Any) -> bool:
        """Whether `prepare` wants the held-out prompts as well, which are scored at evaluation but never trained on."""
        return True

    @classmethod
    def prompts_of(cls, config: Any, prompts: Sequence[str], heldout: Sequence[str], trained: bool) -> list[str]:
        """Those of a run's prompts that it is given: `trained` on, or only measured on held-out ones."""
        return [*(prompts if trained else ()), *(heldout if cls.needs_heldout(config) else ())]

    @property
    def uses_policy(self) -> bool:
        """Whether scoring needs the policy's own networks, so that it cannot go on while pictures are drawn."""
        return False

    @property
    def elsewhere(self) -> bool:
        """Whether another program computes the scores, so that pictures can be drawn meanwhile at no cost."""
        return False

    def prepare(self, prompts: Sequence[str], family: ModelFamily) -> None:
        """Called once, on all processes alike, before the first score: load and check what belongs to the run's `prompts`.

        Those are the prompts trained on and, if `needs_heldout`, the held-out ones. `family` is the model that draws the
        pictures.
        """

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Score `images`, (B, 3, H, W) float32 in [0, 1] on `device`, for `groups.texts`: (B,) float32.

        With `rollout.overlap_scoring` a thread of its own calls it, never twice at once, while the next pictures are drawn. So
        it takes part in nothing that crosses processes, and leaves the policy's networks alone.
        """
        raise NotImplementedError

    def each(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """What each of the `judges` says, (judges, B); their mean is `score`, of which all that stands there holds here too."""
        return self.score(images, groups)[None]

    def measure(self, images: Tensor, groups: PromptGroups) -> float:
        """One number for a whole held-out set, of which each process holds a part, maybe none; equal on all of them.

        `images`: (B, 3, H, W) uint8. Only called where `per_image` is False.
        """
        raise NotImplementedError

    def update(self, images: Tensor, groups: PromptGroups) -> dict[str, float]:
        """Learn from a rollout, (B, 3, H, W) float32 in [0, 1] (trainable rewards only); returns metrics."""
        return {}

    def report(self) -> dict[str, float]:
        """Metrics of the scores given since the last call, once an iteration and on all processes alike."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must be saved with the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    def export(self, folder: Path) -> None:
        """Write what a later run can use of a reward that has learned into `folder`, which may not exist yet."""


@contextmanager
def reading(config: Any) -> Iterator[None]:
    """Loading of the model in `config.path`: what is missing or wrong becomes a DataError that names reward and folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"reward {config.type}: path = {config.path}: {error}") from error
