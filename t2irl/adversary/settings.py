"""Settings that all adversarial rewards have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from t2irl.adversary.augment import Augment
from t2irl.adversary.companions import Condition
from t2irl.adversary.learning import Penalty
from t2irl.adversary.losses import LossKind
from t2irl.adversary.negatives import Negatives
from t2irl.adversary.replay import Replay
from t2irl.likeness import ReferenceReward
from t2irl.references import ReferenceImages
from t2irl.turns import AnyTurns, FixedTurns


class AdversarialConfig(ReferenceReward.Config):
    """Settings that all adversarial rewards have."""

    references: ReferenceImages.Config | None = None
    """Reference images of the prompts trained on, with a `condition` of the held-out ones as well; needed unless `frozen`
    without a condition."""
    frozen: Path | None = None
    """A folder that an earlier run exported (`export/rewards/<name>`): score with it and do not learn. Every setting that
    the score depends on must be as it was."""
    turns: AnyTurns = FixedTurns()
    """When the adversary learns, and whether the policy then does."""
    loss: LossKind = "hinge"
    """hinge, bce (cross-entropy of reference or rollout), or bt (Bradley-Terry within each pair)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """bce and bt: share of the opposite label."""
    lr: PositiveFloat = 1e-4
    """Learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.999)
    """Decay rates of the two moments."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat | None = None
    """Gradients are scaled down to this norm; null: never."""
    batch_size: PositiveInt = 64
    """Pairs in one forward and backward pass, per process; an optimiser step takes all pairs of the rollout."""
    penalty: Penalty | None = None
    """R1 gradient penalty; null: none."""
    augment: Augment = Augment()
    """Changes of the pictures that it learns from."""
    replay: Replay | None = None
    """Older rollout images that it learns from as well; null: none."""
    reencode: bool = True
    """Put reference images through the policy's image encoder and decoder first, so that the decoder's traces tell
    nothing. They take the same 8-bit path as rollouts in any case. Published: false, which a model that encodes no
    images needs."""
    condition: Condition | None = None
    """Judge pictures beside reference images of their prompt (adversarial_dino); null: each by itself, as published."""
    negatives: Negatives | None = None
    """Reference images spoilt on purpose, to learn from as well; null: none, as published."""
    heldout: float = Field(0.125, ge=0, lt=1)
    """Share of the reference images that it never learns from: heldout_accuracy and heldout_auc are measured on them."""
    memory_gib: PositiveFloat = 1.0
    """Memory for features of reference images and for re-encoded ones on the host, and for features of the last rollout
    on the device, each, per process."""
    feature_cache: Path | None = None
    """Folder where features of reference images are kept from run to run, by content; null: in memory only. With the
    patches of a large backbone that is some MiB an image."""

    @model_validator(mode="after")
    def _settings_fit(self) -> AdversarialConfig:
        if self.label_smoothing and self.loss == "hinge":
            raise PydanticCustomError(
                "adversary", "label_smoothing = {value} has no meaning for loss: hinge; use bce or bt, or 0",
                {"value": self.label_smoothing},
            )  # fmt: skip
        if self.negatives is not None and self.augment.active:
            raise PydanticCustomError(
                "adversary",
                "negatives are not augmented as their pair is, which would tell them; remove negatives or augment",
            )
        if self.frozen is not None and self.references is not None and self.condition is None:
            raise PydanticCustomError(
                "adversary", "a frozen adversary does not learn, so it takes no references; remove one of the two"
            )
        if self.condition is not None and self.references is not None and self.references.folder is not None:
            raise PydanticCustomError(
                "adversary",
                "condition compares with reference images of the prompt, and those of a folder belong to none; give an index, "
                "or remove condition",
            )
        return self
