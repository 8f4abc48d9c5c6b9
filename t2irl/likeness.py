"""What rewards share that compare a picture with reference images: finding those, and likeness to the prompt's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from t2irl.adversary.memory import Tensors
from t2irl.errors import ConfigError
from t2irl.reencoding import Reencoded
from t2irl.references import FeatureCache, ReferenceImages
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily


class ReferenceReward(Reward):
    """A reward that compares with reference images."""

    class Config(Reward.Config):
        """Settings that all of them have."""

        references: ReferenceImages.Config | None = None
        """Reference images of the prompts; needed."""

    references_advice = "give references: {index: FILE} or references: {folder: FOLDER}"
    """What a message says when there are none."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self._demand(config)

    @classmethod
    def _demand(cls, config: Any) -> None:
        if cls.compares(config) and config.references is None:
            raise ConfigError(f"reward {config.type}: references is missing; {cls.references_advice}")

    @classmethod
    def check(cls, config: Any, prompts: Sequence[str]) -> None:
        """The reference images."""
        cls._demand(config)
        if cls.compares(config):
            cls.look_up(config, prompts)

    @classmethod
    def compares(cls, config: Any) -> bool:
        """Whether these settings look at reference images at all."""
        return True

    @classmethod
    def may_lack(cls, config: Any) -> bool:
        """Whether a prompt without reference images is fine."""
        return False

    @classmethod
    def look_up(cls, config: Any, prompts: Sequence[str]) -> ReferenceImages:
        """The reference images of `prompts`. Called on all processes; raises DataError with all that is wrong with them."""
        key = f"reward {config.type}: references"
        return ReferenceImages.load(config.references, prompts, key, cls.may_lack(config))

    def redrawn(self, images: ReferenceImages, family: ModelFamily, limit: int = 2**30) -> Reencoded:
        """Those images as the policy's own model would have drawn them, with `reencode`."""
        return Reencoded(images, family, self.config.reencode, f"reward {self.config.type}", limit)


class LikenessReward(ReferenceReward):
    """Likeness of a picture to the reference images of its prompt, under features of a frozen network."""

    class Config(ReferenceReward.Config):
        """Settings that all of them have."""

        references: ReferenceImages.Config | None = None
        """Reference images of the prompts, held-out ones included unless `missing: skip`; needed."""
        missing: Literal["error", "skip"] = "error"
        """A prompt without reference images is refused at the start, or its images are not scored by this reward."""
        over: Literal["mean", "max"] = "mean"
        """Over the reference images of the prompt: their mean, or the most alike one."""
        feature_cache: Path | None = None
        """Folder in which features of reference images are kept from run to run, by the content of the files; null: they are
        kept in memory only."""
        memory_gib: PositiveFloat = 1.0
        """Host memory for features of reference images, per process."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.may_skip = self.may_lack(config)

    @classmethod
    def may_lack(cls, config: Any) -> bool:
        """With `missing: skip`."""
        return config.missing == "skip"

    def features_name(self) -> str:
        """Changes whenever `reference_features` does."""
        raise NotImplementedError

    def reference_features(self, images: Tensor) -> Tensors:
        """What is kept of reference images (B, 3, H, W) in [0, 1]: tensors of B rows."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Any:
        """The same of pictures to be scored, in whatever form `compare` takes; it can be indexed by rows."""
        raise NotImplementedError

    def compare(self, ours: Any, theirs: Tensors) -> Tensor:
        """Likeness of n pictures of a prompt to its R reference images: (n, R)."""
        raise NotImplementedError

    def prepare(self, prompts: Sequence[str], family: ModelFamily) -> None:
        """Look up the reference images. Their features are computed when a prompt first needs them."""
        c = self.config
        self.images = self.look_up(c, prompts)
        self.cache = FeatureCache(
            self.reference_features, self.features_name(), self.images.pictures, c.feature_cache, round(c.memory_gib * 2**30)
        )  # fmt: skip

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Likeness of each image to the reference images of its own prompt, (B,); NaN where there are none."""
        ours = self.features(images)
        scores = torch.full((len(images),), float("nan"), device=images.device)
        for place in dict.fromkeys(groups.index):
            files = self.images.of(groups.prompts[place])
            if files:
                rows = [k for k, other in enumerate(groups.index) if other == place]
                each = self.compare(ours[rows], tuple(x.to(self.device) for x in self.cache.of(files)))
                scores[rows] = each.mean(1) if self.config.over == "mean" else each.amax(1)
        return scores
