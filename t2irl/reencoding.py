"""Reference images as the policy's own model would have drawn them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from t2irl.adversary.memory import Memory, Tensors, in_equal_batches
from t2irl.errors import ConfigError
from t2irl.references import FeatureCache, ReferenceImages

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily


class Reencoded:
    """Pictures of reference images, with `reencode` put through the image encoder and decoder of `family`.

    What the decoder leaves in every picture then tells nothing. `limit`: bytes of re-encoded pictures, and of features, kept
    on the host.
    """

    def __init__(self, images: ReferenceImages, family: ModelFamily, reencode: bool, key: str, limit: int = 2**30):
        """Raises ConfigError, naming `key`, for a model that encodes no images."""
        if reencode and not family.encodes_images:
            raise ConfigError(
                f"{key}: reencode: true needs a model that encodes images, and {family.config.type} does not; set it to false"
            )
        self.images, self.family, self.reencode = images, family, reencode
        self._limit = limit
        self._redrawn = Memory(limit)

    def pictures(self, files: Sequence[Path], size: int) -> list[Tensor]:
        """(3, size, size) uint8 of each file."""
        if not self.reencode:
            return self.images.pictures(files, size)
        keys = [(file, size) for file in files]
        found = {key: row[0] for key in keys if (row := self._redrawn.get(key))}
        fresh = [file for file, _ in self._redrawn.missing(keys)]
        drawn = in_equal_batches(lambda x: (self.family.redrawn(x),), self.images.pictures(fresh, size))
        for file, row in zip(fresh, drawn, strict=True):
            found[file, size] = row[0]
            self._redrawn.put((file, size), row)
        return [found[key] for key in keys]

    def features(
        self, encode: Callable[[Tensor], Tensors], side: Callable[[], int], name: str = "", folder: Path | None = None
    ) -> FeatureCache:
        """What `encode` makes of them, each once; at the side that the policy's pictures turn out to have. See FeatureCache."""
        return FeatureCache(encode, name, lambda files: self.pictures(files, side()), folder, self._limit)
