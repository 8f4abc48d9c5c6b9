"""An adversary on frozen features: a small head tells reference images from the policy's (Adv-GRPO, arXiv 2511.20256)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from reward_models.critics import DinoCritic
from reward_models.heads import PatchHead
from reward_models.vision import VisionBackbone
from t2irl.adversary.reward import AdversarialReward
from t2irl.models.base import DTYPES
from t2irl.rewards.base import reading


class AdversarialDino(AdversarialReward):
    """0.7 h(whole picture) + 0.3 mean of h(patch): the logits of one head on a frozen vision backbone.

    Without a `condition` it does not read the prompt, so a policy that draws good pictures of something else is not punished: hold
    a measure of prompt following beside it. Hacked, between two steps of the head, by any texture that it has not yet learned.
    """

    class Config(AdversarialReward.Config):
        """Settings."""

        type: Literal["adversarial_dino"] = "adversarial_dino"
        path: Path = Path("assets/tiny-dinov2")
        """Folder of a vision transformer: DINOv2, DINOv3, SigLIP or CLIP, of transformers, timm or open_clip."""
        layers: tuple[int, ...] = Field((-1,), min_length=1)
        """Blocks whose outputs are the features, joined; negative ones count from the end."""
        size: PositiveInt | None = None
        """Side of the backbone's input in pixels; null: the folder's own."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of the frozen backbone."""
        hidden: PositiveInt = 512
        """Hidden width of the head."""
        head_precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of the head and its moments. bf16 only to repeat the published code: most steps are then lost to rounding."""
        spectral_norm: bool = False
        """Divide the head's matrices by their largest singular value."""
        feature_norm: Literal["l2", "none"] = "l2"
        """Whether features have unit length, for the loss and for the score."""
        score_feature_norm: Literal["l2", "none"] | None = None
        """The same for the score alone; null: as the loss. Published: none in the loss, l2 in the score."""
        patch_sampling: Literal["all", "random"] = "all"
        """Look at all patches, or at some drawn at random (published), which adds noise within a group."""
        patches: PositiveInt = 64
        """Patches drawn with `patch_sampling: random`, with replacement."""
        global_weight: NonNegativeFloat = 0.7
        """Weight of the whole picture in the score."""
        local_weight: NonNegativeFloat = 0.3
        """Weight of the patches in the score."""
        global_loss_weight: NonNegativeFloat | None = None
        """Weight of the whole picture in the loss; null: as in the score. Published: 1."""
        local_loss_weight: NonNegativeFloat | None = None
        """Weight of the patches in the loss; null: as in the score. Published: 0.3."""

        @property
        def loss_weights(self) -> tuple[float, float]:
            """Whole picture and patches."""
            own = (self.global_loss_weight, self.local_loss_weight)
            both = zip(own, (self.global_weight, self.local_weight), strict=True)
            return tuple(weight if mine is None else mine for mine, weight in both)  # type: ignore[return-value]

        @model_validator(mode="after")
        def _something_is_weighed(self) -> AdversarialDino.Config:
            for pair, names in (
                ((self.global_weight, self.local_weight), "global_weight and local_weight"),
                (self.loss_weights, "global_loss_weight and local_loss_weight"),
            ):
                if not any(pair):
                    raise PydanticCustomError("adversary", "{names} are both 0; one must be above", {"names": names})
            return self

    def make_critic(self, seed: int) -> DinoCritic:
        """Backbone and head."""
        c = self.config
        with reading(c):
            backbone = VisionBackbone.load(c.path, self.device, c.layers, size=c.size, dtype=DTYPES[c.precision])
        width = backbone.width * (1 if c.condition is None else 2)
        head = PatchHead(width, c.hidden, c.spectral_norm, DTYPES[c.head_precision])
        head.reset(seed)
        return DinoCritic(
            backbone, head.to(self.device), (c.global_weight, c.local_weight), c.loss_weights, c.feature_norm,
            c.score_feature_norm or c.feature_norm, c.patches if c.patch_sampling == "random" else None,
        )  # fmt: skip

    def reset(self, seed: int) -> None:
        """A new head."""
        assert isinstance(self.critic, DinoCritic)
        self.critic.head.reset(seed)
