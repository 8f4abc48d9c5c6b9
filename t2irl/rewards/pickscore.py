"""PickScore: which picture would people pick for this prompt? A CLIP ViT-H/14 tuned on their choices (arXiv 2305.01569)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from t2irl.rewards.clip_score import ClipScore


class PickScore(ClipScore):
    """factor x exp(logit_scale) x cosine; about 18 to 24 with a factor of 1. Differences count: a softmax of two pictures'
    scores is the probability that one is picked.

    Hacked by glossy, centred, over-sharpened pictures with a shallow background, and by repeating the subject.
    """

    class Config(ClipScore.Config):
        """Settings."""

        type: Literal["pickscore"] = "pickscore"  # type: ignore[assignment]
        factor: PositiveFloat = 1.0
        """Of the score. Flow-GRPO and Adv-GRPO divide by 26, which is 0.03846; how likely one picture is to be picked before
        another, a softmax, is that of a factor of 1."""

    def _of(self, cosine: Tensor) -> Tensor:
        return self.config.factor * self.scorer.logit_scale * cosine
