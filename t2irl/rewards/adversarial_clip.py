"""A preference model that keeps learning: CLIP or PickScore as the adversary (Adv-GRPO, arXiv 2511.20256)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from reward_models.clip import ClipScorer
from reward_models.critics import ClipCritic
from t2irl.adversary.losses import LossKind
from t2irl.adversary.reward import AdversarialReward
from t2irl.models.base import DTYPES
from t2irl.rewards.base import reading
from t2irl.turns import AnyTurns, TriggerTurns


class AdversarialClip(AdversarialReward):
    """exp(logit_scale) x cosine of picture and prompt / scale, under an image tower whose last blocks learn.

    By default it learns only while the policy's images out-score the reference images. Hacked like any CLIP, by texture and
    repeated objects, until it has learned what they look like.
    """

    class Config(AdversarialReward.Config):
        """Settings."""

        type: Literal["adversarial_clip"] = "adversarial_clip"
        path: Path = Path("assets/tiny-clip")
        """Folder of a transformers CLIPModel with its tokenizer and preprocessor_config.json; PickScore with the files of its
        processor is one."""
        tune_layers: PositiveInt = 2
        """Last blocks of the image tower that learn. Published: 2 in the paper, 1 in the code."""
        tuned_precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of those blocks and their moments. bf16 only to repeat the published code: with its learning rate most
        weights then cannot move."""
        scale: PositiveFloat = 1.0
        """The score is divided by this. Published: 26 for PickScore."""
        loss: LossKind = "bt"
        """bt (published code), or bce and hinge around the middle between the two kinds of images."""
        turns: AnyTurns = TriggerTurns()
        """When the adversary learns, and whether the policy then does."""
        lr: PositiveFloat = 5e-6
        """Learning rate. Published."""

        @model_validator(mode="before")
        @classmethod
        def _not_of_a_clip(cls, data: Any) -> Any:
            # Known from adversarial_dino, so an unknown key would not be answer enough.
            if isinstance(data, dict) and data.get("condition") is not None:
                raise PydanticCustomError(
                    "adversary",
                    "condition is for adversarial_dino, which reads no prompt; this one reads it as text. Drop it",
                )
            if isinstance(data, dict) and "spectral_norm" in data:
                raise PydanticCustomError(
                    "adversary", "spectral_norm: {value} is for new weights, those of adversarial_dino's head; dividing the "
                    "trained matrices of a CLIP would make another model of it. Drop it; penalty (R1) keeps this one smooth",
                    {"value": str(data["spectral_norm"]).lower()},
                )  # fmt: skip
            return data

    def make_critic(self, seed: int) -> ClipCritic:
        """The CLIP of the folder; there are no new weights."""
        c = self.config
        with reading(c):
            return ClipCritic(ClipScorer.load(c.path, self.device), c.tune_layers, c.scale, DTYPES[c.tuned_precision])
