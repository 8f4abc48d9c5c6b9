"""Counts, windows, and refusals whose suggestions are themselves legal."""

from __future__ import annotations

import re
from typing import Any

import pytest

from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.geometry import Geometry, even_chunks, nearest_divisors, nearest_multiples


def run_of(updates: int = 2, micro: int = 32, iterations: int = 100, **rollout: Any) -> Run:
    return Run.model_validate(
        {
            "model": {"type": "sd3", "path": "x"},
            "data": {"prompts": "a", "heldout": "b"},
            "rewards": {"gold": {"type": "shapes"}},
            "rollout": rollout,
            "iterations": iterations,
            "update": {"per_iteration": updates, "batch_size": micro},
        }
    )


def refusal(run: Run, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        Geometry.of(run, world_size)
    return str(caught.value)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 7, 12, 64, 65, 127, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 32, 64, 200])
def test_even_chunks(n: int, size: int) -> None:
    chunks = even_chunks(n, size)
    assert [i for c in chunks for i in range(n)[c]] == list(range(n))
    lengths = [c.stop - c.start for c in chunks]
    assert len(chunks) == -(-n // size)
    assert not lengths or (max(lengths) <= size and max(lengths) - min(lengths) <= 1 and min(lengths) > 0)


def test_counts_on_one_process() -> None:
    g = Geometry.of(run_of(prompts=16, group_size=8, steps=10, batch_size=50, iterations=7, updates=2, micro=30), 1)
    assert (g.images, g.images_per_process, g.whole_groups) == (128, 128, True)
    assert (g.rollout_batches, g.largest_rollout_batch, g.denoiser_calls_rollout) == (3, 43, 30)
    assert (g.images_per_update, g.micro_batches, g.largest_micro_batch) == (64, 3, 22)
    assert (g.updates_per_iteration, g.total_updates) == (2, 14)


def test_counts_on_several_processes() -> None:
    g = Geometry.of(run_of(prompts=3, group_size=8, steps=5, batch_size=4, updates=6, micro=2), 4)
    assert (g.images, g.images_per_process, g.whole_groups) == (24, 6, False)
    assert (g.rollout_batches, g.largest_rollout_batch, g.denoiser_calls_rollout) == (2, 3, 10)
    # 4 images an update on 4 processes: one each.
    assert (g.images_per_update, g.micro_batches, g.largest_micro_batch) == (4, 1, 1)
    # 5 images an update on 4 processes: one of them has two.
    g = Geometry.of(run_of(prompts=5, group_size=4, updates=4, micro=1), 4)
    assert (g.images_per_update, g.micro_batches, g.largest_micro_batch) == (5, 2, 1)


def test_micro_batches_agree_with_even_chunks() -> None:
    for world_size, updates, micro in ((1, 1, 5), (2, 3, 7), (4, 2, 3), (3, 4, 100)):
        g = Geometry.of(run_of(prompts=12, group_size=4, updates=updates, micro=micro), world_size)
        most = -(-g.images_per_update // world_size)
        chunks = even_chunks(most, micro)
        assert (g.micro_batches, g.largest_micro_batch) == (len(chunks), chunks[0].stop)


@pytest.mark.parametrize(
    "prompts, group_size, world_size, updates",
    [(50, 8, 3, 1), (50, 16, 8, 3), (1, 2, 4, 1), (16, 8, 1, 3), (7, 9, 2, 4), (5, 3, 64, 1), (2, 2, 3, 5)],
)
def test_what_a_refusal_suggests_is_legal(prompts: int, group_size: int, world_size: int, updates: int) -> None:
    run = run_of(prompts=prompts, group_size=group_size, updates=updates)
    message = refusal(run, world_size)
    assert f"rollout.prompts = {prompts} x rollout.group_size = {group_size}" in message
    g = Geometry(run, world_size)
    suggested = re.search(r"([\d ,or]+) prompts, or a group size of ([\d ,or]+)", message)
    assert suggested is not None
    assert [int(n) for n in re.findall(r"\d+", suggested[1])] == list(g.legal_prompts)
    assert [int(n) for n in re.findall(r"\d+", suggested[2])] == list(g.legal_group_sizes)
    for value in g.legal_prompts:
        Geometry.of(run_of(prompts=value, group_size=group_size, updates=updates), world_size)
    for value in g.legal_group_sizes:
        Geometry.of(run_of(prompts=prompts, group_size=value, updates=updates), world_size)
    for value in g.legal_processes:
        assert (prompts * group_size) % value == 0
    # Nearest: no legal value lies in between.
    for value in range(g.legal_prompts[0] + 1, g.legal_prompts[-1]):
        with pytest.raises(ConfigError):
            Geometry.of(run_of(prompts=value, group_size=group_size, updates=updates), world_size)


def test_the_words_of_a_refusal() -> None:
    message = refusal(run_of(prompts=50, group_size=8, updates=1), 3)
    assert message == (
        "rollout.prompts = 50 x rollout.group_size = 8 over 3 processes: 400 images cannot be split evenly "
        "(400 / 3 = 133 rest 1). Use 48 or 51 prompts, or a group size of 6 or 9, or launch with 1, 2, 4, 5, 8 or 10 processes"
    )
    message = refusal(run_of(prompts=16, group_size=8, updates=3))
    assert message.startswith("update.per_iteration = 3: 128 images")
    assert "Use 1, 2, 4, 8, 16 or 32 updates" in message


def test_all_problems_come_together() -> None:
    run = run_of(
        prompts=5, group_size=5, updates=4, steps=4, window={"type": "fixed", "start": 3}, dynamics={"type": "ode"}
    )
    lines = refusal(run, 2).splitlines()
    keys = ["rollout.prompts", "update.per_iteration", "rollout.window.start", "rollout.dynamics.type"]
    assert [line.split(" ")[0] for line in lines] == keys


def test_nearest_values() -> None:
    assert nearest_multiples(50, 3, 1) == (48, 51)
    assert nearest_multiples(48, 3, 1) == (45, 51)
    assert nearest_multiples(2, 3, 1) == (3,)
    assert nearest_multiples(2, 1, 2) == (3,)
    assert nearest_multiples(0, 1, 2) == (2,)
    assert nearest_divisors(400, 3) == (1, 2, 4, 5, 8, 10)
    assert nearest_divisors(7, 1) == (7,)


@pytest.mark.parametrize(
    "window, last, expected",
    [
        ({"type": "fixed"}, False, range(9)),
        ({"type": "fixed"}, True, range(10)),
        ({"type": "fixed", "start": 3}, False, range(3, 9)),
        ({"type": "fixed", "start": 2, "size": 3}, False, range(2, 5)),
        ({"type": "fixed", "start": 9, "size": 1}, True, range(9, 10)),
    ],
)
def test_fixed_windows(window: dict[str, Any], last: bool, expected: range) -> None:
    dynamics = {"type": "flow_sde"}
    g = Geometry.of(run_of(window=window, steps=10, last_step_stochastic=last, dynamics=dynamics), 1)
    assert g.window_size == len(expected)
    assert all(g.trained_timesteps(i, seed=0) == expected for i in range(5))


@pytest.mark.parametrize("bounds, allowed", [(None, range(9)), ([2, 7], range(2, 7)), ([0, 3], range(3))])
def test_random_windows_stay_inside_and_reach_every_place(bounds: list[int] | None, allowed: range) -> None:
    run = run_of(window={"type": "random", "size": 3, "range": bounds}, steps=10)
    one, two = Geometry.of(run, 1), Geometry.of(run, 2)
    windows = [one.trained_timesteps(i, seed=5) for i in range(300)]
    assert windows == [two.trained_timesteps(i, seed=5) for i in range(300)]
    assert {w.start for w in windows} == set(range(allowed.start, allowed.stop - 2))
    assert all(len(w) == one.window_size == 3 for w in windows)
    if len(allowed) > 3:
        assert windows != [one.trained_timesteps(i, seed=6) for i in range(300)]


def test_random_windows_are_evenly_spread() -> None:
    g = Geometry.of(run_of(window={"type": "random", "size": 3}, steps=10), 1)
    starts = [g.trained_timesteps(i, seed=1).start for i in range(3500)]
    counts = [starts.count(s) for s in range(7)]
    assert sum(counts) == 3500 and all(abs(c - 500) < 100 for c in counts)  # 100 is 4.8 standard deviations


def test_sliding_windows() -> None:
    g = Geometry.of(run_of(window={"type": "sliding", "size": 4, "dwell": 2, "stride": 2}, steps=10), 1)
    starts = [g.trained_timesteps(i, seed=0).start for i in range(10)]
    assert starts == [0, 0, 2, 2, 4, 4, 5, 5, 0, 0]  # the last move stops at the end, so that timestep 8 is trained too
    assert all(len(g.trained_timesteps(i, 0)) == 4 for i in range(10))
    whole = Geometry.of(run_of(window={"type": "sliding", "size": 9}, steps=10), 1)
    assert whole.trained_timesteps(1000, 0) == range(9)


@pytest.mark.parametrize(
    "rollout, said",
    [
        ({"window": {"type": "fixed", "start": 9}}, ["rollout.window.start = 9", "at most 8", "11 steps"]),
        (
            {"window": {"type": "fixed", "start": 5, "size": 5}},
            ["size of at most 4", "at least 11 steps", "last_step_stochastic"],
        ),
        ({"window": {"type": "fixed", "size": 11}}, ["size of at most 9", "at least 12 steps"]),
        ({"window": {"type": "random", "size": 10}}, ["rollout.window.size = 10", "at most 9", "at least 11 steps"]),
        ({"window": {"type": "sliding", "size": 12}}, ["rollout.window.size = 12", "at most 9", "at least 13 steps"]),
        ({"window": {"type": "random", "range": [4, 10]}}, ["rollout.window.range = [4, 10]", "at most 9"]),
        ({"window": {"type": "random", "range": [4, 6]}}, ["holds 2 timesteps", "rollout.window.size = 3"]),
        ({"window": {"type": "random", "range": [6, 4]}}, ["holds 0 timesteps"]),
        ({"dynamics": {"type": "ode"}}, ["no density", "cps, dance_sde, ddim, flow_sde or matching"]),
        ({"dynamics": {"type": "cps", "noise_level": 0}}, ["rollout.dynamics.noise_level = 0", "more than 0"]),
        ({"last_step_stochastic": True}, ["cps", "flow_sde or dance_sde"]),
        ({"dynamics": {"type": "matching"}, "same_noise": True}, ["rollout.same_noise = true", "equal images"]),
    ],
)
def test_windows_and_dynamics_that_cannot_be(rollout: dict[str, Any], said: list[str]) -> None:
    message = refusal(run_of(steps=10, **rollout))
    assert all(words in message for words in said), message


def test_a_suggested_number_of_steps_is_enough() -> None:
    for window, steps in (({"type": "fixed", "start": 5, "size": 5}, 11), ({"type": "random", "size": 10}, 11)):
        Geometry.of(run_of(steps=steps, window=window), 1)
    late = {"type": "fixed", "start": 9, "size": 1}
    assert "11 steps" in refusal(run_of(steps=9, window=late))
    Geometry.of(run_of(steps=11, window=late), 1)
    free = {"last_step_stochastic": True, "dynamics": {"type": "flow_sde"}, "window": late}
    assert "10 steps" in refusal(run_of(steps=9, **free))
    Geometry.of(run_of(steps=10, **free), 1)


def test_no_processes() -> None:
    assert "0 processes" in refusal(run_of(), 0)
