"""HPSv2.1: human preference as the cosine of a CLIP ViT-H/14 tuned on rankings (arXiv 2306.09341)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from reward_models.clip import ClipScorer
from reward_models.pixels import pad_square
from t2irl.rewards.clip_score import ClipScore


class Hpsv2(ClipScore):
    """factor x cosine, about 0.2 to 0.35; published tables multiply by 100. Compare pictures of one prompt only.

    Hacked by exaggerated colour and contrast, showy backgrounds and gloss.
    """

    class Config(ClipScore.Config):
        """Settings. The folder holds `HPS_v2.1_compressed.pt`, and vocab.json and merges.txt of a CLIP tokenizer."""

        type: Literal["hpsv2"] = "hpsv2"  # type: ignore[assignment]
        layout: Literal["transformers", "open_clip"] = "open_clip"
        """How the folder is laid out; the published file is open_clip's."""
        factor: PositiveFloat = 1.0
        """Of the cosine. Published: 1 in code, 100 in tables."""

    def _load(self) -> ClipScorer:
        scorer = super()._load()
        scorer.fit = pad_square
        return scorer

    def _of(self, cosine: Tensor) -> Tensor:
        return self.config.factor * cosine
