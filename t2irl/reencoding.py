"""Reference images as the policy's own model would have drawn them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from t2irl.adversary.memory import Memory, Tensors, in_equal_batches
from t2irl.errors import ConfigError
from t2irl.references import FeatureCache, ReferenceImages
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily

POOR = 22.0
"""Decibels (PSNR) below which the decoder is said not to know such pictures; photographs come back with 24 or more."""

COMPARED = 16
"""Pictures that are looked at for that: at full size a whole rollout's would take gigabytes."""


class Reencoded:
    """Pictures of reference images, with `reencode` put through the image encoder and decoder of `family`.

    What the decoder leaves in every picture then tells nothing. `limit`: bytes of re-encoded pictures, and of features, kept
    on the host. Warns, once, of pictures that come back as something else.
    """

    def __init__(self, images: ReferenceImages, family: ModelFamily, reencode: bool, key: str, limit: int = 2**30):
        """Raises ConfigError, naming `key`, for a model that encodes no images."""
        if reencode and not family.encodes_images:
            raise ConfigError(
                f"{key}: reencode: true needs a model that encodes images, and {family.config.type} does not; set it to false"
            )
        self.images, self.family, self.reencode, self.key = images, family, reencode, key
        self._limit, self._compared = limit, False
        self._redrawn = Memory(limit)

    def pictures(self, files: Sequence[Path], size: int) -> list[Tensor]:
        """(3, size, size) uint8 of each file."""
        if not self.reencode:
            return self.images.pictures(files, size)
        keys = [(file, size) for file in files]
        found = {key: row[0] for key in keys if (row := self._redrawn.get(key))}
        fresh = [file for file, _ in self._redrawn.missing(keys)]
        originals = self.images.pictures(fresh, size)
        drawn = in_equal_batches(lambda x: (self.family.redrawn(x),), originals)
        if fresh and not self._compared:
            self._compare(torch.stack(originals[:COMPARED]), torch.stack([row[0] for row in drawn[:COMPARED]]))
        for file, row in zip(fresh, drawn, strict=True):
            found[file, size] = row[0]
            self._redrawn.put((file, size), row)
        return [found[key] for key in keys]

    def _compare(self, originals: Tensor, drawn: Tensor) -> None:
        """Warn if most of what is in some pictures (B, 3, H, W) uint8 is lost."""
        self._compared = True
        error = (originals.float() - drawn.float()).div(255).square().flatten(1).mean(1)
        psnr = float(-10 * error.clamp_min(1e-10).log10().mean())
        if psnr < POOR and distributed.rank() == 0:
            warnings.warn(
                f"{self.key}: the model's own image encoder and decoder leave {psnr:.1f} dB of these reference images ({POOR:g} or more "
                "is usual). What its decoder cannot draw, no policy on it can learn: look for a model that knows such pictures",
                stacklevel=2,
            )

    def features(
        self, encode: Callable[[Tensor], Tensors], side: Callable[[], int], name: str = "", folder: Path | None = None
    ) -> FeatureCache:
        """What `encode` makes of them, each once; at the side that the policy's pictures turn out to have. See FeatureCache."""
        return FeatureCache(encode, name, lambda files: self.pictures(files, side()), folder, self._limit)
