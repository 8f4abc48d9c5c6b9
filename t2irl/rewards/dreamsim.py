"""DreamSim: do people take the picture and the reference images of its prompt for alike? (arXiv 2306.09344)"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reward_models.dreamsim import DreamSim
from t2irl.adversary.memory import Tensors
from t2irl.evaluation.settings import DreamSimVariant
from t2irl.likeness import LikenessReward
from t2irl.models.base import DTYPES
from t2irl.rewards.base import reading


class DreamSimReward(LikenessReward):
    """1 - DreamSim distance to the reference images of the prompt, in [-1, 1]; 1 is the same picture.

    Best held out: tuned on what people see, it notices layout, pose and subject, where DINO's own features notice texture.
    Hacked like any likeness, by copying a reference image.
    """

    class Config(LikenessReward.Config):
        """Settings."""

        type: Literal["dreamsim"] = "dreamsim"
        path: Path = Path("models/dreamsim")
        """Folder that the package `dreamsim` has filled, or the unpacked release with DINO's weights beside it."""
        variant: DreamSimVariant = "ensemble"
        """Which of the published models; the others are three times as fast as the ensemble and a little less right."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of the transformers."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        with reading(config):
            self.network = DreamSim.load(config.path, device, config.variant, DTYPES[config.precision])

    def features_name(self) -> str:
        """All weights."""
        return self.network.fingerprint()

    def reference_features(self, images: Tensor) -> Tensors:
        """Embeddings, one row each."""
        return (self.features(images),)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Embeddings (B, D)."""
        return self.network.embed(images)

    def compare(self, ours: Tensor, theirs: Tensors) -> Tensor:
        """1 - distance."""
        return ours @ theirs[0].T
