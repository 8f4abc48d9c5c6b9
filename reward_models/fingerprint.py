"""Names for networks: a hash of their weights and settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(settings: object, weights: Mapping[str, Tensor]) -> str:
    """Changes whenever `repr(settings)`, or a tensor's name, dtype, shape or content, does."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
