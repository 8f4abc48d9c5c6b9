"""Schedules and packed latents of flow matching models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def flow_levels(
    scheduler: Any, steps: int, patches: int, device: torch.device, asked: Any = None, mu: float | None = None
) -> Tensor:
    """`steps` + 1 noise levels of a FlowMatchEulerDiscreteScheduler, float32: static shift, or dynamic by `patches`.

    `asked`: the levels that the pipeline asks for, before the shift (None: the scheduler's own). `mu`: its own amount of
    dynamic shift.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    fresh, extra, c = type(scheduler).from_config(scheduler.config), {}, scheduler.config
    if c.use_dynamic_shifting:
        extra["mu"] = (
            mu
            if mu is not None
            else calculate_shift(patches, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
        )
    if asked is not None:
        extra["sigmas"] = asked
    fresh.set_timesteps(steps, device=device, **extra)
    return fresh.sigmas.to(device, torch.float32)


def even(steps: int) -> np.ndarray:
    """1, 1 - 1 / steps, ..., 1 / steps."""
    return np.linspace(1.0, 1 / steps, steps)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h / 2 * w / 2, 4 C): each token is a square of 2 x 2 latents, channel by channel."""
    b, c, h, w = latents.shape
    squares = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, to latents of `height` x `width`."""
    b, _, c = tokens.shape
    squares = tokens.view(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(b, c // 4, height, width)
