"""Five linear layers in a row: the head of LAION's aesthetic predictor and of ImageReward, with the names of their files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class LinearStack(nn.Module):
    """(B, width) -> (B,). Dropout stood between the layers in training; nothing else does."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        skip = nn.Identity
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), skip(), nn.Linear(1024, 128), skip(), nn.Linear(128, 64), skip(), nn.Linear(64, 16),
            nn.Linear(16, 1),
        )  # fmt: skip

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> LinearStack:
        """With the weights of a file: `layers.0.weight` and so on. Raises ValueError when they do not fit."""
        try:
            stack = cls(weights["layers.0.weight"].shape[1])
            stack.load_state_dict(weights)
        except (KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"not the head of an aesthetic predictor (layers 0, 2, 4, 6, 7): {error}") from error
        return stack.float().requires_grad_(False).eval()

    def forward(self, features: Tensor) -> Tensor:
        """One number each."""
        return self.layers(features)[:, 0]
