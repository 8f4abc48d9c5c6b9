"""Tensors that cost something to compute and may be asked for again, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Key = TypeVar("Key", bound=Hashable)
EQUAL_BATCH = 8
"""Pictures in a batch of `in_equal_batches`."""


class Memory:
    """Tuples of tensors by key, one picture each; the ones not used for longest leave. `limit` in bytes."""

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self._entries: OrderedDict[Hashable, Tensors] = OrderedDict()

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """Which of `keys` are not there, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._entries]

    def get(self, key: Hashable) -> Tensors | None:
        """An entry, which then counts as just used."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, value: Tensors) -> None:
        """Keep a copy, so that a view does not hold what it is part of."""
        self.held -= _bytes(self._entries.pop(key, ()))
        self._entries[key] = tuple(x.clone() for x in value)
        self.held += _bytes(value)
        while self.held > self.limit:
            self.held -= _bytes(self._entries.popitem(last=False)[1])


class Recent:
    """Features of the batches that were scored last, for the adversary that learns from the same pictures."""

    def __init__(self, limit: int):
        self.limit = limit
        self._batches: list[tuple[Tensor, Tensors]] = []

    def add(self, images: Tensor, features: Tensors) -> None:
        """Remember a batch of pictures (B, 3, H, W) in [0, 1] and their features; the oldest batches leave."""
        self._batches.append((_eight_bit(images), features))
        while sum(_bytes((pixels, *found)) for pixels, found in self._batches) > self.limit:
            del self._batches[0]

    def take(self, images: Tensor) -> Tensors | None:
        """Features of `images` if the last batches were exactly these; everything is forgotten."""
        batches, self._batches = self._batches, []
        count, wanted = 0, []
        while batches and count < len(images):
            wanted.insert(0, batches.pop())
            count += len(wanted[0][0])
        if not wanted or count != len(images):
            return None
        shapes = {pixels.shape[1:] for pixels, _ in wanted}
        if shapes != {images.shape[1:]} or not torch.equal(torch.cat([x for x, _ in wanted]), _eight_bit(images)):
            return None
        return tuple(torch.cat(parts) for parts in zip(*(found for _, found in wanted), strict=True))


@torch.no_grad()
def in_equal_batches(function: Callable[[Tensor], Tensors], pictures: Sequence[Tensor]) -> list[Tensors]:
    """`function` of pictures (3, H, W), batch by batch: its row for each picture, contiguous, on the CPU.

    Every batch holds `EQUAL_BATCH` pictures of one size, the last one filled up by repeats: kernels are chosen by shape, so
    what comes out for a picture does not depend on what else is asked for, and a resumed run sees the same numbers.
    """
    rows: list[Tensors] = [()] * len(pictures)
    for shape in dict.fromkeys(picture.shape for picture in pictures):
        places = [k for k, picture in enumerate(pictures) if picture.shape == shape]
        for start in range(0, len(places), EQUAL_BATCH):
            part = places[start : start + EQUAL_BATCH]
            filled = [*part, *[part[-1]] * (EQUAL_BATCH - len(part))]
            found = tuple(x.cpu() for x in function(torch.stack([pictures[k] for k in filled])))
            for row, place in enumerate(part):
                rows[place] = tuple(x[row].contiguous() for x in found)
    return rows


def _eight_bit(images: Tensor) -> Tensor:
    return images.detach().mul(255).round().to(torch.uint8)


def _bytes(tensors: Tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
