"""Floating-point operations of a denoiser's forward pass, of an iteration, and what devices can do at most.

An operation is one multiplication or addition: a product of matrices (m, k) x (k, n) has 2 m k n of them. Only the blocks are
counted, in closed form; embeddings, modulation and output head are less than 0.5 % at full size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

BACKWARD = {"full": 3.0, "lora": {"sd3": 2.15, "flux": 2.12, "qwen_image": 2.14}}
"""Forward and backward pass over the forward pass alone: frozen weights have no gradient. LoRA of the families' usual layers."""
PEAKS = {
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "H200": (989.4, 494.7, 66.9),
    "GH200": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.2, 91.6),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.2, 35.6, 35.6),
}
"""Part of a device's name -> its maker's TFLOP/s, dense: 16 bits with float32 sums, TF32, float32. The first name that fits holds."""


def forward_flops(family: str, denoiser: Mapping[str, Any], image_tokens: int, text_tokens: int) -> float:
    """F: operations of the forward pass of one image, one branch. `denoiser`: its config.json."""
    width = denoiser["num_attention_heads"] * denoiser["attention_head_dim"]
    total, layers = image_tokens + text_tokens, denoiser["num_layers"]
    if family == "sd3":
        # Some blocks attend to the image a second time; the last one has keys, values and queries of the text and no more.
        twice = len(denoiser["dual_attention_layers"])
        linear = (12 * layers + 4 * twice) * image_tokens + (12 * (layers - 1) + 3) * text_tokens
        return 2 * width**2 * linear + 4 * width * (layers * total**2 + twice * image_tokens**2)
    if family == "flux":
        layers += denoiser["num_single_layers"]
    elif family != "qwen_image":
        raise KeyError(f"no count for the family {family!r}; known: {', '.join(BACKWARD['lora'])}")
    return layers * (24 * width**2 * total + 4 * width * total**2)


def backward_factor(family: str, tune: str) -> float:
    """(Forward + backward) / forward of one image and timestep, without anything computed again."""
    return BACKWARD["full"] if tune == "full" else BACKWARD["lora"][family]


def known_peak(device: str, precision: str, tf32: bool) -> float | None:
    """FLOP/s of a device by its name, None for one that is not in the table."""
    column = 0 if precision != "fp32" else 1 if tf32 else 2
    return next((values[column] * 1e12 for name, values in PEAKS.items() if name in device), None)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices on a device: what can be sustained."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
