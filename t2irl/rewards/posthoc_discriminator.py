"""Held out only: how well a discriminator that starts from nothing tells reference images from the policy's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from reward_models.vision import VisionBackbone
from t2irl.evaluation.posthoc import posthoc_auc
from t2irl.geometry import even_chunks
from t2irl.likeness import ReferenceReward
from t2irl.references import ReferenceImages
from t2irl.rewards.base import reading
from t2irl.types import PromptGroups
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily


class PosthocDiscriminator(ReferenceReward):
    """1 - AUC, in [0, 1]: how often a fresh discriminator prefers a picture of the policy to a reference image.

    A logistic regression on frozen features, trained anew at each evaluation on other prompts than it is measured on. 0: it
    always knows. 0.5: nothing tells the two apart; more than that is chance.
    """

    per_image = False
    references_advice = "give references: {index: FILE} or {folder: FOLDER}, with images for the held-out prompts"

    class Config(ReferenceReward.Config):
        """Settings."""

        type: Literal["posthoc_discriminator"] = "posthoc_discriminator"
        path: Path = Path("assets/tiny-dinov2")
        """Folder of a vision transformer; another one than the adversary's is the stricter judge."""
        layers: tuple[int, ...] = Field((-1,), min_length=1)
        """Blocks whose outputs are the features, joined; negative ones count from the end."""
        references: ReferenceImages.Config | None = None
        """Reference images of the held-out prompts; needed."""
        reencode: bool = True
        """Put reference images through the policy's image encoder and decoder first, so that the decoder's traces do not
        count. A model that encodes no images needs false."""
        batch_size: PositiveInt = 64
        """Pictures in one call of the backbone."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        with reading(config):
            self.backbone = VisionBackbone.load(config.path, device, config.layers)

    def prepare(self, prompts: Sequence[str], family: ModelFamily) -> None:
        """Look up the reference images."""
        self.references = self.look_up(self.config, prompts)
        redrawn = self.redrawn(self.references, family)
        self._known = redrawn.features(lambda x: self._encode(x.to(self.device)), lambda: self._side)

    @torch.no_grad()
    def measure(self, images: Tensor, groups: PromptGroups) -> float:
        """1 - AUC over the pictures of all processes; each stands beside a reference image of its prompt."""
        files = [list(self.references.of(text)) for text in groups.texts]
        rows = [k for k, found in enumerate(files) if found]
        self._side = images.shape[-1]
        chosen = [files[k][groups.members[k] % len(files[k])] for k in rows]
        fake = [
            self._encode(images[rows][c].to(self.device).float().div(255))[0].cpu() for c in self._chunks(len(rows))
        ]
        mine = (
            torch.cat([torch.empty(0, 2 * self.backbone.width), *fake]),
            self._known.of(chosen)[0] if chosen else torch.empty(0, 2 * self.backbone.width),
            [groups.ids[k] for k in rows],
        )
        fake, real, prompts = zip(*distributed.gather_objects(mine), strict=True)
        return 1 - posthoc_auc(torch.cat(real), torch.cat(fake), sum(prompts, []))  # noqa: RUF017 - one list a process

    def _chunks(self, count: int) -> list[slice]:
        return even_chunks(count, self.config.batch_size)

    def _encode(self, images: Tensor) -> tuple[Tensor]:
        """CLS and the mean of the patches of pictures (B, 3, H, W) in [0, 1]: (B, 2 D) float32."""
        found = self.backbone(images)
        return (torch.cat([found.cls, found.patches.mean(1)], -1),)
