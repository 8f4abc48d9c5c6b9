"""Every model family with its tiny checkpoint: what all their tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.tiny_models.flux import make_flux
from scripts.tiny_models.flux2 import make_flux2_klein
from scripts.tiny_models.qwen_image import make_qwen_image
from scripts.tiny_models.sana import make_sana
from scripts.tiny_models.sd3 import make_sd3
from scripts.tiny_models.unet import make_sd, make_sdxl
from scripts.tiny_models.z_image import make_z_image


@dataclass(frozen=True)
class Case:
    """One kind of checkpoint."""

    make: Callable[..., Path]
    """Writes it to a folder."""
    model: dict[str, Any]
    """The `model` settings that go with it; pictures of 16 x 16 pixels, the least of Sana are 32."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `make`."""


FLUX = {"type": "flux", "max_sequence_length": 12, "resolution": 16}
CASES = {
    "sd3": Case(make_sd3, {"type": "sd3", "max_sequence_length": 12}, {"t5": True}),
    "flux_dev": Case(make_flux, {**FLUX, "embedded_guidance": 2.5}),
    "flux_schnell": Case(make_flux, FLUX, {"schnell": True}),
    "sd15": Case(make_sd, {"type": "sd"}),
    "sd21": Case(make_sd, {"type": "sd"}, {"version": "2.1"}),
    "sdxl": Case(make_sdxl, {"type": "sdxl"}),
    "qwen_image": Case(make_qwen_image, {"type": "qwen_image", "resolution": 16}),
    "sana": Case(make_sana, {"type": "sana", "max_sequence_length": 24, "resolution": 32}),
    "z_image": Case(make_z_image, {"type": "z_image", "resolution": 16}),
    "flux2_klein": Case(make_flux2_klein, {"type": "flux2_klein", "max_sequence_length": 24, "resolution": 16}),
}
