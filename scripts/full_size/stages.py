"""Seconds and peak memory by stage. Stages may nest; what an inner one takes is not counted for the outer one."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

REST = "other"
"""What is in no stage."""


class Stages:
    """A stopwatch that knows which stage it is in. On a GPU by events, so that nothing waits at the borders."""

    def __init__(self, device: torch.device, tracked: Tracked | None = None):
        """`tracked`: where to read the memory of tensors from, if not from the GPU."""
        self.cuda, self.tracked = device.type == "cuda", tracked
        self.current = REST
        self.peak: dict[str, int] = {}
        """Stage -> bytes of tensors at most, since the start."""
        self.reserved: dict[str, int] = {}
        """Stage -> bytes that PyTorch's allocator held of the GPU at most; empty on a CPU."""
        self._marks: list[tuple[str, Any]] = []
        self._enter(REST)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside, time and memory count for `name`. After an error it stays the current one, to be asked for."""
        before = self.current
        self._enter(name)
        yield
        self._enter(before)

    def around(self, owner: Any, method: str, name: str) -> None:
        """Let a method of an object count for a stage from now on."""
        plain = getattr(owner, method)

        @wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return plain(*args, **kwargs)

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        self._enter(self.current)
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            took = start.elapsed_time(end) / 1000 if self.cuda else end - start
            seconds[name] = seconds.get(name, 0.0) + took
        self._marks = self._marks[-1:]
        return seconds

    def _enter(self, name: str) -> None:
        if self.cuda:
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._note(self.peak, torch.cuda.max_memory_allocated())
            self._note(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        else:
            mark = time.perf_counter()
            if self.tracked is not None:
                self._note(self.peak, self.tracked.take_peak())
        self._marks.append((name, mark))
        self.current = name

    def _note(self, sizes: dict[str, int], size: int) -> None:
        sizes[self.current] = max(sizes.get(self.current, 0), size)


class Tracked(TorchDispatchMode):
    """Inside, counts the bytes of all tensors that come into being, until they are freed: exact, and of tensors alone. Without a
    GPU there is no other way to tell them from libraries and from what the allocator keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self._peak = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def take_peak(self) -> int:
        """Bytes at most since the last call."""
        peak, self._peak = self._peak, self.held
        return peak

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            weakref.finalize(storage, self._free, size)
            self.held += size
            self._peak = max(self._peak, self.held)

    def _free(self, size: int) -> None:
        self.held -= size
