"""Small trainable networks on top of frozen features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchHead(nn.Module):
    """Linear(width, hidden), GELU, Linear(hidden, 1), applied to each vector alike: that of a picture or of a patch.

    With `spectral_norm` each weight matrix is divided by its largest singular value, computed exactly: the head keeps no
    state besides its parameters, and scoring and training see the same function. Gives float32 whatever the dtype of the
    parameters.
    """

    def __init__(self, width: int, hidden: int = 512, spectral_norm: bool = False, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.first, self.last, self.spectral_norm = nn.Linear(width, hidden), nn.Linear(hidden, 1), spectral_norm
        self.to(dtype)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw the parameters anew, uniformly within one over the root of the number of inputs."""
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.first, self.last):
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in (layer.weight, layer.bias):
                values = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
                parameter.copy_(values)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (...) float32 of vectors (..., width)."""
        hidden = F.gelu(self._linear(self.first, features.to(self.first.weight.dtype)))
        return self._linear(self.last, hidden).squeeze(-1).float()

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        weight = layer.weight
        if self.spectral_norm:
            weight = weight / torch.linalg.matrix_norm(weight.float(), 2).to(weight.dtype)
        return F.linear(x, weight, layer.bias)
