"""How large a picture is as JPEG: a measure without a network, for which it is plain what it rewards."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from reward_models.judges import to_pictures


def jpeg_kilobytes(images: Tensor, quality: int = 95) -> Tensor:
    """Thousands of bytes of (B, 3, H, W) pictures in [0, 1] as JPEG: (B,) float32 on their device."""
    sizes = []
    for picture in to_pictures(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)
