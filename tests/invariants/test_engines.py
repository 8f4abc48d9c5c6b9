"""The boundary of rollouts: what stands behind it changes no number, and what it gives is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from t2irl.engines.base import RolloutEngine, draw
from t2irl.engines.local import Local
from t2irl.errors import RunError
from t2irl.rollout import Finished, log_densities
from t2irl.train import Parts, own_groups, request_of
from t2irl.types import Trajectory
from tests.engines import Copy, Deaf, Silent
from tests.invariants.toy import toy_parts, toy_rollout, toy_run

WINDOWS: dict[str, dict[str, Any]] = {
    "cps": {"batch_size": 6, "window": {"type": "fixed", "start": 1, "size": 3}, "guidance_scale": 2.5},
    "flow_sde": {"dynamics": {"type": "flow_sde", "noise_level": 0.7}, "window": {"type": "fixed"}, "batch_size": 5},
    "matching": {"dynamics": {"type": "matching"}, "window": {"type": "fixed"}},
}


def parts_of(engine: str, **rollout: Any) -> Parts:
    """A toy run with an engine of `tests.engines`, or `local`."""
    name = engine if engine == "local" else f"tests.engines:{engine}"
    return toy_parts(toy_run({"rollout": {"engine": {"type": name}, **rollout}}))


def draw_of(parts: Parts, finished: Finished = lambda rows, images: None) -> tuple[Trajectory, dict[str, float]]:
    """What the loop gets."""
    run = parts.geometry.run
    request = request_of(run, parts, own_groups(run, parts), parts.family.levels(run.rollout.steps))
    return draw(parts.engine, parts.policy, request, finished)


def move(parts: Parts) -> None:
    """As an update would."""
    with torch.no_grad():
        for parameter in parts.policy.trained.values():
            parameter += 0.05
    parts.clock.update += 1


def assert_equal(a: Trajectory, b: Trajectory) -> None:
    """To the last bit, NaN included."""
    assert a.groups == b.groups
    for name in ("latents", "log_probs", "levels", "final", "images"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["cps", "flow_sde"])
def test_log_densities_can_be_computed_again_to_the_bit(name: str) -> None:
    """From the recorded states alone, with the calls of the rollout, whatever its batches, window and guidance."""
    parts = parts_of("local", **WINDOWS[name])
    trajectory = toy_rollout(parts.geometry.run, parts)
    again = log_densities(parts.policy, trajectory, parts.geometry.run.rollout.batch_size)
    assert again.shape == trajectory.log_probs.shape and torch.equal(again, trajectory.log_probs)
    move(parts)
    assert not torch.equal(log_densities(parts.policy, trajectory, 6), trajectory.log_probs)


@pytest.mark.parametrize("engine", ["Copy", "Silent"])
@pytest.mark.parametrize("name", WINDOWS)
def test_another_engine_gives_the_same_trajectory(name: str, engine: str) -> None:
    """Before and after the weights have moved; each version is handed over once."""
    ours, theirs = parts_of("local", **WINDOWS[name]), parts_of(engine, **WINDOWS[name])
    assert isinstance(ours.engine, Local) and isinstance(theirs.engine, Copy)
    for _ in range(2):
        expected, nothing = draw_of(ours)
        assert_equal(expected, toy_rollout(ours.geometry.run, ours))
        for _ in range(2):
            found, metrics = draw_of(theirs)
            assert_equal(found, expected)
        assert nothing == {}
        assert metrics == ({} if engine == "Silent" or name == "matching" else {"policy/engine_gap": 0.0})
        for parts in (ours, theirs):
            move(parts)
    assert theirs.engine.synced == [0, 1]


def test_batches_are_told_of_as_they_come() -> None:
    """Rows and pictures of each, once, whatever the engine."""
    for engine in ("local", "Copy"):
        parts, told = parts_of(engine, batch_size=5), []
        trajectory, _ = draw_of(parts, lambda rows, images, told=told: told.append((rows, images)))
        assert [(rows.start, rows.stop) for rows, _ in told] == [(0, 4), (4, 8), (8, 12), (12, 16)]
        assert torch.equal(torch.cat([images for _, images in told]), trajectory.images)


def test_an_engine_with_other_weights_is_seen() -> None:
    """The gap tells. Updates divide by the trainer's own log-densities all the same, so that the first ratio is 1."""
    parts = parts_of("Deaf")
    assert isinstance(parts.engine, Deaf)
    assert draw_of(parts)[1] == {"policy/engine_gap": 0.0}
    move(parts)
    trajectory, metrics = draw_of(parts)
    assert metrics["policy/engine_gap"] > 1e-3
    assert torch.equal(trajectory.log_probs, log_densities(parts.policy, trajectory, 16))


def cut(t: Trajectory) -> Trajectory:
    return replace(t, latents=t.latents[:, 1:])


def half(t: Trajectory) -> Trajectory:
    return replace(t, latents=t.latents.half())


def floats(t: Trajectory) -> Trajectory:
    return replace(t, images=t.images / 255)


def nan(t: Trajectory) -> Trajectory:
    return replace(t, final=t.final.masked_fill(t.final > 0, torch.nan))


def swapped(t: Trajectory) -> Trajectory:
    return replace(t, groups=t.groups[list(range(len(t.groups)))[::-1]])


def shifted(t: Trajectory) -> Trajectory:
    return replace(t, levels=t.levels * 0.9)


@pytest.mark.parametrize(
    "change, words",
    [
        (cut, r"gave latents of \(16, 1, 2, 4, 4\), torch.float32; expected \(16, 2, 2, 4, 4\)"),
        (half, "torch.float16; expected"),
        (floats, "gave images of .* torch.float32; expected .* torch.uint8"),
        (nan, "gave final that are not all finite"),
        (swapped, "drew other images, or other noise levels"),
        (shifted, "drew other images, or other noise levels"),
    ],
)
def test_what_an_engine_gives_is_checked(
    change: Callable[[Trajectory], Trajectory], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes, dtypes, finite numbers, whose images, and at which levels: a server's own schedule would be another one."""
    parts = parts_of("Copy")
    good = parts.engine.generate
    monkeypatch.setattr(parts.engine, "generate", lambda request, finished: change(good(request, finished)))
    with pytest.raises(RunError, match=f"rollout.engine tests.engines:Copy .*{words}"):
        draw_of(parts)


def test_an_engine_must_be_one() -> None:
    """Any other class is refused where the config is read."""
    with pytest.raises(ValueError, match=r"is not a subclass of t2irl\.engines\.base\.RolloutEngine"):
        toy_run({"rollout": {"engine": {"type": "tests.invariants.toy:Brightness"}}})
    assert issubclass(Silent, RolloutEngine)
