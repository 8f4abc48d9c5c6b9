"""The interface of a regulariser: three hooks, each a no-op by default; and what those share that look at pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from reward_models.vision import VisionBackbone
from t2irl.config import Run, Strict
from t2irl.errors import DataError
from t2irl.geometry import even_chunks
from t2irl.models.base import DTYPES
from t2irl.policy import Policy
from t2irl.types import Clock, MicroBatch, Prediction, Rollout

if TYPE_CHECKING:
    from t2irl.train import Parts

PIXEL_SIDE = 16
"""Side that pictures are shrunk to where their pixels are the features."""


class Regularizer:
    """Built as `Regularizer(config)`."""

    class Config(Strict):
        """Settings that every regulariser has."""

        type: str
        """File name in `t2irl/regularizers/`, or `package.module:Class`."""

        @property
        def needs_average(self) -> bool:
            """Whether it needs the running average of the policy, `policy.ema`."""
            return False

        def problem(self, run: Run) -> str | None:
            """What in the rest of the run does not fit it, as the end of a sentence that its name begins; None if all does."""
            needs = "needs the running average of the policy: set policy.ema"
            return needs if self.needs_average and run.policy.ema is None else None

    comes_first = False
    """Whether its `shape` is called before that of others, because it replaces advantages instead of changing them."""

    needs_all_images = False
    """Whether its loss acts on images of zero advantage too, so that they must not be skipped."""

    def __init__(self, config: Any):
        self.config = config

    @classmethod
    def check(cls, name: str, config: Any, prompts: Sequence[str]) -> None:
        """Look, cheaply, at the files that belong to the `prompts` trained on, before anything is loaded; on all processes
        alike. Raises DataError as `prepare` would.
        """

    def prepare(self, name: str, parts: Parts) -> None:
        """Called once, before the state of a checkpoint is restored: its name in the config, and what the run is built from."""

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Change this process's advantages (B,) float32. Called once an iteration, on all processes alike; what depends on
        the whole rollout is decided on gathered tensors, as those of `rollout` are, so that all processes decide the same.
        """
        return advantages

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """A scalar to add: a sum over transitions times `batch.share`."""
        return None

    def after_update(self, policy: Policy, clock: Clock) -> None:
        """Called after every optimiser step."""

    def metrics(self) -> dict[str, float]:
        """Numbers of the iteration that just ended, equal on all processes; logged as `regularizer/<name>/<key>`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must be saved with the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class PictureRegularizer(Regularizer):
    """A regulariser that looks at features of the pictures."""

    class Config(Regularizer.Config):
        """Settings that all of them have."""

        path: Path | None = Path("assets/tiny-dinov2")
        """Folder of a vision transformer: DINOv2, DINOv3, SigLIP or CLIP, of transformers, timm or open_clip; published
        for `diversity`: DINOv3 ViT-L/16. null: the pixels themselves, shrunk to 16 x 16."""
        layers: tuple[int, ...] = Field((-1,), min_length=1)
        """Blocks whose outputs are the features, joined; negative ones count from the end."""
        size: PositiveInt | None = None
        """Side of the backbone's input in pixels; null: the folder's own."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of the backbone's blocks."""
        token: Literal["patches", "cls"] = "patches"
        """The mean of the patches, as published for `diversity`, or the vector of the whole picture."""

    def prepare(self, name: str, parts: Parts) -> None:
        """Load the backbone."""
        c, device = self.config, parts.family.device
        self.device, self.batch_size = device, parts.geometry.run.rollout.batch_size
        try:
            self.backbone = c.path and VisionBackbone.load(
                c.path, device, c.layers, size=c.size, dtype=DTYPES[c.precision]
            )
        except (OSError, ValueError) as error:
            raise DataError(f"regularizers.{name}: path = {c.path}: {error}") from error

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Of pictures (B, 3, H, W) uint8: (B, D) float32."""
        parts = []
        for chunk in even_chunks(len(images), self.batch_size):
            pictures = images[chunk].to(self.device).float().div(255)
            if self.backbone is None:
                parts.append(F.adaptive_avg_pool2d(pictures, PIXEL_SIDE).flatten(1) - 0.5)
            else:
                found = self.backbone(pictures)
                parts.append(found.cls if self.config.token == "cls" else found.patches.mean(1))
        return torch.cat(parts)
