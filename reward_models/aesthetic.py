"""LAION's aesthetic predictor v2: a linear stack on the image vector of CLIP ViT-L/14. It reads no prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from reward_models.clip import ClipScorer
from reward_models.clip_weights import read_weights
from reward_models.linear_stack import LinearStack


class AestheticScorer:
    """How much people like the look of a picture, about 1 to 10."""

    def __init__(self, clip: ClipScorer, head: LinearStack):
        self.clip, self.head = clip, head.to(clip.device)

    @classmethod
    def load(
        cls, folder: Path, head: Path, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> AestheticScorer:
        """`folder`: a transformers CLIPModel; `head`: `sac+logos+ava1-l14-linearMSE.pth`. Raises OSError or ValueError."""
        clip, stack = ClipScorer.load(folder, device, dtype), LinearStack.of(read_weights(head))
        width, wanted = clip.model.config.projection_dim, stack.width
        if width != wanted:
            raise ValueError(f"the head takes vectors of {wanted}, but this CLIP gives {width}; it belongs to ViT-L/14")
        return cls(clip, stack)

    def score(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,) float32."""
        return self.head(self.clip.image_features(images))
