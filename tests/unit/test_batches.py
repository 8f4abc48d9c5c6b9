"""Which image serves which update, what is skipped, and how the rows of a micro-batch lie."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2irl.batches import micro_batches, updates
from t2irl.config import Run
from t2irl.geometry import Geometry
from t2irl.types import PromptGroups, TrainingImages, Trajectory
from tests.invariants.toy import PROMPTS, toy_parts, toy_run

properties = settings(deadline=None, derandomize=True, max_examples=60)
STEPS = 3


def make_run(prompts: int, group_size: int, per_iteration: int) -> Run:
    """A run of the toy family with this geometry and three trained timesteps."""
    window = {"type": "fixed", "start": 0, "size": STEPS}
    rollout = {"prompts": prompts, "group_size": group_size, "window": window}
    return toy_run({"rollout": rollout, "update": {"per_iteration": per_iteration}})


def trajectory_of(count: int, group_size: int, first: int = 0) -> Trajectory:
    """Images `first` to `first + count`, each with its own number in its latents, log-densities and prompt."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    states = numbers.view(-1, 1, 1, 1, 1) + torch.arange(STEPS + 1).view(1, -1, 1, 1, 1) / 10
    groups = PromptGroups.of(
        PROMPTS, [(first + i) // group_size for i in range(count)], [(first + i) % group_size for i in range(count)]
    )
    levels = torch.linspace(1, 0.4, STEPS + 1)
    log_probs = numbers[:, None] * 100 + torch.arange(STEPS)
    return Trajectory(groups, states, log_probs, levels, states[:, -1], torch.zeros(count, 3, 2, 2, dtype=torch.uint8))


def numbers_of(images: TrainingImages) -> list[int]:
    """Which images these are."""
    return images.latents[:, 0, 0, 0, 0].round().int().tolist()


def assigned(
    advantages: Tensor,
    geometry: Geometry,
    seed: int = 0,
    iteration: int = 0,
    skip: bool = False,
    count: int | None = None,
) -> list[list[int]]:
    """Image numbers of every update."""
    trajectory = trajectory_of(count or geometry.images, geometry.run.rollout.group_size)
    return [numbers_of(images) for images in updates(trajectory, advantages, geometry, seed, iteration, skip)]


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Up to 8 prompts x 8 images in 1, 2 or 4 updates."""
    per_iteration = draw(st.sampled_from([1, 2, 4]))
    group_size = draw(st.sampled_from([2, 4, 8]) if per_iteration < 4 else st.sampled_from([4, 8]))
    return Geometry.of(make_run(draw(st.integers(1, 8)), group_size, per_iteration), 1)


@given(geometries(), st.integers(0, 2**31), st.integers(0, 1000))
@properties
def test_every_image_serves_exactly_one_update(geometry: Geometry, seed: int, iteration: int) -> None:
    """All of them, equally many in each update, within an update in the order of the rollout."""
    parts = assigned(torch.ones(geometry.images), geometry, seed, iteration)
    assert len(parts) == geometry.updates_per_iteration
    assert all(len(part) == geometry.images_per_update for part in parts)
    assert all(part == sorted(part) for part in parts)
    assert sorted(chain(*parts)) == list(range(geometry.images))


@given(geometries(), st.integers(0, 1000), st.data())
@properties
def test_skipping_leaves_out_zero_advantages_and_nothing_else(
    geometry: Geometry, iteration: int, data: st.DataObject
) -> None:
    """The survivors stay in the update that they were in; 0 and -0 are skipped, 1e-30 is not."""
    values = st.sampled_from([0.0, -0.0, 1e-30, -1.0, 2.5])
    advantages = torch.tensor(data.draw(st.lists(values, min_size=geometry.images, max_size=geometry.images)))
    everything = assigned(advantages, geometry, iteration=iteration)
    kept = assigned(advantages, geometry, iteration=iteration, skip=True)
    assert kept == [[i for i in part if advantages[i] != 0] for part in everything]


def test_the_assignment_is_drawn_from_seed_and_iteration() -> None:
    """The same for the same two, another for another; what the advantages are does not matter."""
    geometry = Geometry.of(make_run(8, 4, 2), 1)
    ones = torch.ones(geometry.images)
    first = assigned(ones, geometry)
    assert assigned(-ones, geometry) == first
    assert assigned(ones, geometry, iteration=1) != first
    assert assigned(ones, geometry, seed=1) != first
    assert first[0] != list(range(16))  # not simply the first half


def test_the_assignment_does_not_depend_on_the_number_of_processes() -> None:
    """What the first of W processes holds is what one process has among its first images."""
    one = Geometry.of(make_run(8, 4, 2), 1)
    whole = assigned(torch.ones(32), one, seed=3, iteration=5)
    for processes in (2, 4, 8):
        many = Geometry.of(make_run(8, 4, 2), processes)
        n = many.images_per_process
        mine = assigned(torch.ones(n), many, seed=3, iteration=5, count=n)
        assert mine == [[i for i in part if i < n] for part in whole]


def test_everything_about_an_image_travels_together() -> None:
    """States, log-densities, advantage and prompt of a row belong to one image; dtypes are those of the types."""
    geometry = Geometry.of(make_run(6, 4, 2), 1)
    trajectory = trajectory_of(24, 4)
    advantages = torch.arange(24, dtype=torch.float64) - 11.5
    for images in updates(trajectory, advantages, geometry, 0, 0, True):
        numbers = torch.tensor(numbers_of(images))
        assert torch.equal(images.latents, trajectory.latents[numbers])
        assert torch.equal(images.log_probs, trajectory.log_probs[numbers])
        assert torch.equal(images.advantages, advantages[numbers].float())
        assert images.prompt.tolist() == [int(n) // 4 for n in numbers]
        assert images.prompt.dtype == torch.int64
        assert torch.equal(images.image, numbers.long())


def test_no_survivor_is_an_empty_update() -> None:
    """The shapes stay, so that other processes can send images."""
    geometry = Geometry.of(make_run(2, 2, 2), 1)
    for images in updates(trajectory_of(4, 2), torch.zeros(4), geometry, 0, 0, True):
        assert len(images) == 0
        assert images.latents.shape == (0, STEPS + 1, 1, 1, 1)


# Micro-batches.


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(8, 8, [8]), (8, 3, [3, 3, 2]), (10, 4, [4, 3, 3]), (3, 100, [3]), (0, 4, [])]
)
def test_sizes_are_even(count: int, size: int, expected: list[int]) -> None:
    """The fewest passes of at most `size` images, within one of each other."""
    batches = micro_batches_of(count, size)
    assert [len(batch.x) // STEPS for batch in batches] == expected


def micro_batches_of(count: int, size: int, changes: Mapping[str, Any] | None = None) -> list[Any]:
    """Micro-batches of images 0 to `count`, with groups of 2."""
    policy = toy_parts(toy_run(changes)).policy
    trajectory = trajectory_of(count, 2)
    images = TrainingImages(
        trajectory.latents,
        trajectory.log_probs,
        torch.arange(count) - 0.5,
        torch.tensor(trajectory.groups.ids, dtype=torch.int64),
        torch.arange(count) + 40,
    )
    return list(micro_batches(images, trajectory.levels, policy, PROMPTS, size, 0.125))


def test_rows_are_transitions_image_by_image() -> None:
    """Row (image, k): state k and k + 1, their levels, the k-th log-density, the image's advantage and text."""
    policy = toy_parts(toy_run()).policy
    levels = torch.linspace(1, 0.4, STEPS + 1)
    row = 0
    for batch in micro_batches_of(7, 3):
        assert batch.share == 0.125
        for k in range(len(batch.x)):
            image, step = divmod(row + k, STEPS)
            assert batch.x[k].item() == pytest.approx(image + step / 10)
            assert batch.x_next[k].item() == pytest.approx(image + (step + 1) / 10)
            assert (batch.t[k], batch.t_next[k]) == (levels[step], levels[step + 1])
            assert batch.log_prob[k].item() == 100 * image + step
            assert batch.advantage[k].item() == image - 0.5
            assert batch.image[k].item() == image + 40
            expected = policy.text([PROMPTS[image // 2]])
            assert torch.equal(batch.text.tokens[k], expected.tokens[0])
            assert torch.equal(batch.text.pooled[k], expected.pooled[0])
        row += len(batch.x)
    assert row == 7 * STEPS


def test_a_prompt_is_encoded_once_however_often_it_occurs() -> None:
    """Over images, timesteps, micro-batches and updates."""
    parts = toy_parts(toy_run())
    trajectory = trajectory_of(8, 4)
    images = TrainingImages(
        trajectory.latents, trajectory.log_probs, torch.ones(8), torch.tensor(trajectory.groups.ids), torch.arange(8)
    )
    for _ in range(2):
        list(micro_batches(images, trajectory.levels, parts.policy, PROMPTS, 3, 1.0))
    assert parts.family.work["encoded_prompts"] == 2
