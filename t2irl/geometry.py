"""Counts: prompts x group size x processes -> batches, updates, denoiser calls. Every divisibility error lives here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from t2irl import registry
from t2irl.config import FixedWindow, RandomWindow, Run, SlidingWindow
from t2irl.errors import ConfigError

WINDOW_STREAM = 0x77
"""Keeps the draws of random windows apart from other draws that start from the same seed."""


def even_chunks(n: int, size: int) -> list[slice]:
    """`range(n)` cut into the fewest chunks of at most `size`, in order, their lengths within 1 of each other."""
    if n == 0:
        return []
    count = -(-n // size)
    short, longer = divmod(n, count)
    starts = [k * short + min(k, longer) for k in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


@dataclass(frozen=True)
class Geometry:
    """What a run's settings mean on a number of processes. Made by `Geometry.of`, which refuses what does not fit."""

    run: Run
    world_size: int
    """Number of processes."""

    @classmethod
    def of(cls, run: Run, world_size: int) -> Geometry:
        """The geometry of a run. Raises ConfigError with every problem and the nearest legal values."""
        geometry = cls(run, world_size)
        problems = [*_splits(geometry), *_window(geometry), *_dynamics(geometry)]
        if not problems:
            problems = [*_groups(geometry)]
        if problems:
            raise ConfigError("\n".join(problems))
        return geometry

    @property
    def images(self) -> int:
        """Images of an iteration, over all processes."""
        return self.run.rollout.prompts * self.run.rollout.group_size

    @property
    def images_per_process(self) -> int:
        """Images that one process samples in an iteration."""
        return self.images // self.world_size

    @property
    def whole_groups(self) -> bool:
        """Whether every group lies on one process."""
        return self.images_per_process % self.run.rollout.group_size == 0

    @property
    def rollout_batches(self) -> int:
        """Batches in which one process samples its images."""
        return len(even_chunks(self.images_per_process, self.run.rollout.batch_size))

    @property
    def largest_rollout_batch(self) -> int:
        """Images of the largest of these batches."""
        return -(-self.images_per_process // self.rollout_batches)

    @property
    def denoiser_calls_rollout(self) -> int:
        """Denoiser calls of one process in a rollout. With guidance a call holds twice the images, or there are twice as many."""
        twice = self.run.rollout.guidance_scale != 1 and not self.run.speed.guidance_in_one_call
        return self.run.rollout.steps * self.rollout_batches * (1 + twice)

    @property
    def images_per_update(self) -> int:
        """Images of one update, over all processes."""
        return self.images // self.run.update.per_iteration

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one process in one update, when no image is skipped."""
        return -(-self.images_per_update // (self.world_size * self.run.update.batch_size))

    @property
    def largest_micro_batch(self) -> int:
        """Images of the largest micro-batch."""
        return -(-self.images_per_update // (self.world_size * self.micro_batches))

    @property
    def updates_per_iteration(self) -> int:
        """Optimiser steps in an iteration."""
        return self.run.update.per_iteration

    @property
    def total_updates(self) -> int:
        """Optimiser steps in the run."""
        return self.run.iterations * self.updates_per_iteration

    @property
    def trainable_timesteps(self) -> int:
        """End of the timesteps that a window may hold: all, or all but the last."""
        return self.run.rollout.steps - (0 if self.run.rollout.last_step_stochastic else 1)

    @property
    def recorded(self) -> bool:
        """Whether the rollout's own transitions are trained on."""
        return registry.find("dynamics", self.run.rollout.dynamics.type).recorded

    @property
    def window_size(self) -> int:
        """Trained timesteps of an iteration, or noise levels where transitions are not recorded."""
        if not self.recorded:
            return self.run.rollout.dynamics.noise_levels
        window = self.run.rollout.window
        if isinstance(window, FixedWindow) and window.size is None:
            return self.trainable_timesteps - window.start
        assert window.size is not None
        return window.size

    @property
    def window_starts(self) -> range | tuple[int, ...]:
        """Every timestep at which the window may begin, in the order that a sliding window takes them."""
        window, size = self.run.rollout.window, self.window_size
        if isinstance(window, FixedWindow):
            return (window.start,)
        if isinstance(window, RandomWindow):
            first, end = window.range or (0, self.trainable_timesteps)
            return range(first, end - size + 1)
        last = self.trainable_timesteps - size
        # The last place is taken even if the stride does not meet it: otherwise timesteps would never be trained.
        return (*range(0, last, window.stride), last)

    def trained_timesteps(self, iteration: int, seed: int) -> range:
        """The window of an iteration, equal on all processes."""
        if not self.recorded:
            return range(self.window_size)
        starts, window = self.window_starts, self.run.rollout.window
        if isinstance(window, RandomWindow):
            place = int(np.random.default_rng([seed, WINDOW_STREAM, iteration]).integers(len(starts)))
        elif isinstance(window, SlidingWindow):
            place = iteration // window.dwell % len(starts)
        else:
            place = 0
        return range(starts[place], starts[place] + self.window_size)

    @property
    def legal_prompts(self) -> tuple[int, ...]:
        """Values of `rollout.prompts` next to the present one that fit, all else being equal."""
        split = math.lcm(self.world_size, self.updates_per_iteration)
        return nearest_multiples(self.run.rollout.prompts, split // math.gcd(split, self.run.rollout.group_size), 1)

    @property
    def legal_group_sizes(self) -> tuple[int, ...]:
        """Values of `rollout.group_size` next to the present one that fit, all else being equal."""
        split = math.lcm(self.world_size, self.updates_per_iteration)
        return nearest_multiples(self.run.rollout.group_size, split // math.gcd(split, self.run.rollout.prompts), 2)

    @property
    def legal_processes(self) -> tuple[int, ...]:
        """Numbers of processes near the present one that fit, all else being equal."""
        return nearest_divisors(self.images, self.world_size)

    @property
    def legal_updates(self) -> tuple[int, ...]:
        """Values of `update.per_iteration` near the present one that fit, all else being equal."""
        return nearest_divisors(self.images, self.updates_per_iteration)


def nearest_multiples(value: int, unit: int, lowest: int) -> tuple[int, ...]:
    """The multiples of `unit` below and above `value`, not itself, from `lowest` on."""
    below, above = (value - 1) // unit * unit, (value // unit + 1) * unit
    if above < lowest:
        above = -(-lowest // unit) * unit
    return (below, above) if below >= lowest else (above,)


def nearest_divisors(number: int, value: int, count: int = 6) -> tuple[int, ...]:
    """The divisors of `number` that are nearest to `value` in ratio, not itself, at most `count`, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = {d for s in small for d in (s, number // s)} - {value}
    return tuple(sorted(sorted(divisors, key=lambda d: (abs(math.log(d / value)), d))[:count]))


def either(values: Sequence[int]) -> str:
    """`1, 2 or 4`."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def _splits(g: Geometry) -> Iterator[str]:
    rollout = g.run.rollout
    made = f"rollout.prompts = {rollout.prompts} x rollout.group_size = {rollout.group_size}"
    if g.world_size < 1:
        yield f"{g.world_size} processes: must be 1 or more"
    elif g.images % g.world_size:
        rest = f"{g.images} / {g.world_size} = {g.images // g.world_size} rest {g.images % g.world_size}"
        yield (
            f"{made} over {g.world_size} processes: {g.images} images cannot be split evenly ({rest}). Use "
            f"{either(g.legal_prompts)} prompts, or a group size of {either(g.legal_group_sizes)}, or launch with "
            f"{either(g.legal_processes)} processes"
        )
    updates = g.updates_per_iteration
    if g.images % updates and g.world_size >= 1:
        rest = f"{g.images} / {updates} = {g.images // updates} rest {g.images % updates}"
        yield (
            f"update.per_iteration = {updates}: {g.images} images ({made}) cannot be split evenly into {updates} updates "
            f"({rest}). Use {either(g.legal_updates)} updates, or {either(g.legal_prompts)} prompts, or a group size of "
            f"{either(g.legal_group_sizes)}"
        )


def _groups(g: Geometry) -> Iterator[str]:
    rollout = g.run.rollout
    for name, config in g.run.rewards.items():
        if not g.whole_groups and registry.find("rewards", config.type).whole_groups:
            updates = g.updates_per_iteration // math.gcd(g.updates_per_iteration, rollout.group_size)
            prompts = nearest_multiples(rollout.prompts, math.lcm(g.world_size, updates), 1)
            yield (
                f"rewards.{name}: type {config.type} compares the images of a group, but rollout.prompts = {rollout.prompts} over "
                f"{g.world_size} processes leaves groups on several of them. Use {either(prompts)} prompts, or launch with "
                f"{either(nearest_divisors(rollout.prompts, g.world_size))} processes"
            )


def _window(g: Geometry) -> Iterator[str]:
    window, steps, end = g.run.rollout.window, g.run.rollout.steps, g.trainable_timesteps
    if not g.recorded:
        if window != FixedWindow():
            kind = g.run.rollout.dynamics.type
            yield f"rollout.window has no meaning with rollout.dynamics.type = {kind}: use rollout.dynamics.noise_levels and range, and leave the window out"
        return
    which = f"rollout.steps = {steps} ({'all' if end == steps else 'the last one is deterministic, so'} {end} can be trained)"
    more = "" if end == steps else ", or set rollout.last_step_stochastic: true"
    if isinstance(window, FixedWindow):
        if window.start >= end:
            yield f"rollout.window.start = {window.start} with {which}: use at most {end - 1}, or {window.start + 1 + steps - end} steps"
        elif window.size is not None and window.start + window.size > end:
            room, needed = end - window.start, window.start + window.size + steps - end
            yield (
                f"rollout.window.size = {window.size} from rollout.window.start = {window.start} with {which}: "
                f"use a size of at most {room}, or at least {needed} steps{more if window.size - room == 1 else ''}"
            )
    elif window.size > end:
        yield f"rollout.window.size = {window.size} with {which}: use a size of at most {end}, or at least {window.size + steps - end} steps"
    elif isinstance(window, RandomWindow) and window.range is not None:
        first, stop = window.range
        if stop > end:
            yield f"rollout.window.range = [{first}, {stop}] with {which}: its end must be at most {end}"
        elif stop - first < window.size:
            yield (
                f"rollout.window.range = [{first}, {stop}] holds {max(stop - first, 0)} timesteps, but rollout.window.size = "
                f"{window.size}: the range must hold at least as many as the window"
            )


def _dynamics(g: Geometry) -> Iterator[str]:
    dynamics = g.run.rollout.dynamics
    if not registry.find("dynamics", dynamics.type).stochastic:
        others = [n for n in registry.names("dynamics") if registry.find("dynamics", n).stochastic]
        yield (
            f"rollout.dynamics.type = {dynamics.type}: deterministic transitions have no density to train with; "
            f"use {', '.join(others[:-1])} or {others[-1]}"
        )
    elif dynamics.model_dump().get("noise_level") == 0:
        yield "rollout.dynamics.noise_level = 0: transitions without noise have no density to train with; use more than 0"
    elif g.run.rollout.same_noise and not g.recorded:
        yield (
            f"rollout.same_noise = true with rollout.dynamics.type = {dynamics.type}: its rollouts follow the ODE, so equal first "
            "noise gives a group of equal images; set it to false"
        )
    elif g.run.rollout.last_step_stochastic and not registry.find("dynamics", dynamics.type).last_step_has_density:
        yield (
            f"rollout.last_step_stochastic = true with rollout.dynamics.type = {dynamics.type}: its last step is deterministic by "
            "itself and has no density; set it to false, or use flow_sde or dance_sde"
        )
