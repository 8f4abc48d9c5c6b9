"""Reference images that a picture is compared with, for an adversary that judges how well the two go together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from t2irl.adversary.memory import Tensors
from t2irl.adversary.pairs import Pairs
from t2irl.config import Strict
from t2irl.data import noise_seed
from t2irl.types import PromptGroups

Judge = Callable[[Tensors, PromptGroups], Tensor]
Key = tuple[int, int]
T = TypeVar("T")


class Condition(Strict):
    """The adversary sees a second reference image of the prompt beside each picture, its companion, and judges the pair.

    So it reads the prompt, in pictures: Reed et al., arXiv 1605.05396, condition and mismatch a discriminator in this way by text.
    """

    images: PositiveInt = 4
    """Companions of a picture at most; its score is the mean over them."""
    mismatched: NonNegativeFloat = 1.0
    """Weight of a second loss, which asks for reference images of other prompts of the rollout to be known as such; 0: without."""
    missing: Literal["error", "skip"] = "error"
    """A prompt without reference images, held-out ones included, is refused at the start, or its images are not scored."""


class Companions:
    """Companions by seed, and judgements with them. `features` gives frozen features of reference images by file."""

    def __init__(self, config: Condition, pairs: Pairs, features: Callable[[Sequence[Path]], Tensors], seed: int):
        self.config, self.pairs, self.features, self.seed = config, pairs, features, seed
        self._order: dict[str, list[Path]] = {}

    def of(self, prompt: str, shown: Path | None) -> list[Path]:
        """The companions of a picture of a prompt; never `shown`, the file that the picture itself is from."""
        if prompt not in self._order:
            files = self.pairs.parts(prompt)[0]
            order = np.random.default_rng(noise_seed(self.seed, f"companions {prompt}", 0, 0)).permutation(len(files))
            self._order[prompt] = [files[k] for k in order]
        return [file for file in self._order[prompt] if file != shown][: self.config.images]

    def mean(self, judge: Judge, features: Tensors, groups: PromptGroups, shown: Sequence[Path | None]) -> Tensor:
        """Mean judgement of pictures with each of their companions, (B,); NaN for a picture that has none."""
        theirs = [self.of(text, file) for text, file in zip(groups.texts, shown, strict=True)]
        total = torch.zeros(len(groups), device=features[0].device)
        for number in range(max(map(len, theirs), default=0)):
            rows = [k for k, files in enumerate(theirs) if len(files) > number]
            beside = self.features([theirs[k][number] for k in rows])
            total[rows] += judge((*(x[rows] for x in features), *beside), groups[rows])
        return total / torch.tensor([len(files) for files in theirs], device=total.device)

    def draw(self, texts: Sequence[str], keys: Sequence[Key], shown: Sequence[Path], iteration: int) -> list[Path]:
        """One companion for each pair of a rollout image and the reference image `shown`."""
        return [
            self._pick(self.of(text, file), "companion", key, iteration)
            for text, key, file in zip(texts, keys, shown, strict=True)
        ]

    def strangers(
        self, texts: Sequence[str], keys: Sequence[Key], present: Sequence[str], iteration: int
    ) -> list[Path]:
        """A reference image of another prompt for each pair, out of the prompts `present` in all of the rollout; none at all if
        there is one prompt only or the loss does without.
        """
        known = sorted({text for text in present if self.pairs.parts(text)[0]})
        if not self.config.mismatched or len(known) < 2:
            return []
        others = [
            self._pick([other for other in known if other != text], "other prompt", key, iteration)
            for text, key in zip(texts, keys, strict=True)
        ]
        return [
            self._pick(self.of(other, None), "stranger", key, iteration)
            for other, key in zip(others, keys, strict=True)
        ]

    def _pick(self, among: Sequence[T], stream: str, key: Key, iteration: int) -> T:
        rng = np.random.default_rng(noise_seed(self.seed, f"{stream} {iteration}", *key))
        return among[int(rng.integers(len(among)))]
