"""Scoring while pictures are drawn: the same scores, calls and errors as afterwards."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from t2irl.errors import RunError
from t2irl.rewards.base import Reward
from t2irl.rewards.combine import RewardSet
from t2irl.scoring import Scorer
from t2irl.types import PromptGroups, Trajectory
from tests.invariants.toy import PROMPTS, toy_run

IMAGES, SIZE = 14, 4
"""Batches of 4, 4, 3 and 3."""


class Watched(Reward):
    """Brightness and a random number of its own: a score depends on how many calls there were before."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.generator = torch.Generator().manual_seed(0)
        self.calls: list[tuple[str, int, bool]] = []
        self.inside = threading.Lock()
        self.meanwhile: Callable[[int], None] = lambda call: None

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """See the class; another call under way at the same time would fail."""
        assert self.inside.acquire(blocking=False)
        try:
            self.calls.append((threading.current_thread().name, groups.members[0], torch.is_grad_enabled()))
            self.meanwhile(len(self.calls))
            return images.mean((1, 2, 3)) + torch.randn(len(images), generator=self.generator)
        finally:
            self.inside.release()


@pytest.fixture
def make() -> Iterator[Callable[[bool | None], tuple[Scorer, Watched]]]:
    """A scorer of several rewards, and the one that can be watched."""
    made: list[Scorer] = []

    def scorer(overlap: bool | None) -> tuple[Scorer, Watched]:
        entries = {
            "watched": {"type": f"{__name__}:Watched"},
            "vivid": {"type": "vividness"},
            "jpeg": {"type": "jpeg_size"},
        }
        run = toy_run({"rewards": entries})
        rewards = RewardSet({n: run.rewards[n] for n in entries}, torch.device("cpu"), SIZE, Counter())
        made.append(Scorer(rewards, overlap))
        watched = rewards.rewards["watched"]
        assert isinstance(watched, Watched)
        return made[-1], watched

    yield scorer
    for one in made:
        one.close()


def trajectory() -> Trajectory:
    """Random pictures, one for each prompt."""
    images = torch.randint(0, 256, (IMAGES, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    groups = PromptGroups.of(PROMPTS, list(range(IMAGES)), list(range(IMAGES)))
    empty = torch.empty(0)
    return Trajectory(groups, empty, empty, empty, empty, images)


def rows_of(*ends: int) -> list[slice]:
    """Consecutive batches."""
    return [slice(a, b) for a, b in itertools.pairwise((0, *ends))]


WHOLE = rows_of(4, 8, 11, 14)


def scores_of(scorer: Scorer, told: list[slice]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Draw, telling of these batches, and score."""
    drawn = trajectory()
    finished = scorer.watch(drawn.groups, lambda images: None)
    for rows in told:
        finished(rows, drawn.images[rows])
    return scorer.scores(drawn)


@pytest.mark.parametrize(
    "told, early",
    [
        (WHOLE, 4), (WHOLE[:2], 2), ([], 0), (rows_of(7, 14), 0), ([WHOLE[0], *WHOLE[2:]], 1),
        ([WHOLE[1], WHOLE[0], *WHOLE[2:]], 1), (rows_of(4, 14), 1),
    ],
    ids=["all", "some", "none", "other batches", "one missing", "another order", "others later"],
)  # fmt: skip
def test_scores_are_the_same_to_the_bit(
    make: Callable[..., tuple[Scorer, Watched]], told: list[slice], early: int
) -> None:
    """Whatever the engine tells of, in two rollouts: every image once, in the same calls and the same order."""
    (overlapped, watched), (after, other) = make(True), make(False)
    for _ in range(2):
        found, expected = scores_of(overlapped, told)[0], scores_of(after, told)[0]
        assert list(found) == ["watched", "vivid", "jpeg"]
        for name, values in expected.items():
            assert values.shape == (IMAGES,) and torch.equal(found[name], values), name
    assert [call[1:] for call in watched.calls] == [call[1:] for call in other.calls]
    assert [first for _, first, _ in watched.calls] == [0, 4, 8, 11] * 2
    assert not any(graded for _, _, graded in watched.calls)
    assert overlapped.rewards.work == after.rewards.work == {"reward_calls": 2 * 4 * 3, "scored_images": 2 * 3 * IMAGES}
    threads = [name.startswith("scoring") for name, _, _ in watched.calls]
    assert threads == ([True] * early + [False] * (4 - early)) * 2
    assert not any(name.startswith("scoring") for name, _, _ in other.calls)


def test_a_batch_is_scored_while_the_next_one_is_drawn(make: Callable[..., tuple[Scorer, Watched]]) -> None:
    """Each waits for the other, which can only end well if both go on at once; hidden is what was done before the end."""
    scorer, watched = make(True)
    scoring, drawing = threading.Event(), threading.Event()

    def meanwhile(call: int) -> None:
        scoring.set()
        assert drawing.wait(20) or call > 1
        time.sleep(0.05)

    watched.meanwhile, drawn, counted = meanwhile, trajectory(), []
    finished = scorer.watch(drawn.groups, counted.append)
    finished(WHOLE[0], drawn.images[WHOLE[0]])
    assert scoring.wait(20)
    drawing.set()
    for rows in WHOLE[1:]:
        finished(rows, drawn.images[rows])
    while len(watched.calls) < 3:
        time.sleep(0.01)
    began = time.perf_counter()
    _, metrics = scorer.scores(drawn)
    waited = time.perf_counter() - began
    assert waited >= 0.05  # the last batch cannot be hidden
    assert metrics["time/score_hidden_s"] >= 0.1
    assert counted == [4, 4, 3, 3]
    assert set(metrics) == {"time/score_hidden_s"} and make(False)[0].scores(drawn)[1] == {}


def test_the_first_error_is_raised_and_nothing_is_scored_after_it(make: Callable[..., tuple[Scorer, Watched]]) -> None:
    """As without overlap, where scoring stops there."""

    def fail(call: int) -> None:
        if call >= 2:
            raise RunError(f"no score in call {call}")

    for overlap in (True, False):
        scorer, watched = make(overlap)
        watched.meanwhile = fail
        with pytest.raises(RunError, match="no score in call 2"):
            scores_of(scorer, WHOLE)
        assert len(watched.calls) == 2


def test_by_default_only_what_is_computed_elsewhere_is_overlapped(make: Callable[..., tuple[Scorer, Watched]]) -> None:
    """A reward beside the policy would only share its processor."""
    scorer, _ = make(None)
    assert not scorer.overlap
    run = toy_run({"rewards": {"there": {"type": "remote", "url": "http://localhost:1"}}})
    rewards = RewardSet(run.rewards, torch.device("cpu"), SIZE, scorer.rewards.work)
    assert Scorer(rewards, None).overlap and not Scorer(rewards, False).overlap


class Place(Reward):
    """How many images of the call, which must be a whole group, are darker."""

    whole_groups = True

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.calls: list[tuple[set[int], list[int]]] = []

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """See the class."""
        self.calls.append((set(groups.ids), list(groups.members)))
        light = images.mean((1, 2, 3))
        return (light[:, None] > light).sum(1).float()


@pytest.mark.parametrize("overlap", [True, False])
def test_rewards_that_need_whole_groups_get_them(overlap: bool) -> None:
    """Batches of 4, 4, 3 and 3 images cut two groups of 7; others are still scored in those batches."""
    run = toy_run({"rewards": {"place": {"type": f"{__name__}:Place"}, "watched": {"type": f"{__name__}:Watched"}}})
    rewards = RewardSet({n: run.rewards[n] for n in ("place", "watched")}, torch.device("cpu"), SIZE, Counter())
    scorer, drawn = Scorer(rewards, overlap), trajectory()
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(2)).tolist()
    groups = PromptGroups.of(PROMPTS, [k % 2 for k in order], [k // 2 for k in order])
    drawn = replace(drawn, groups=groups)
    finished = scorer.watch(groups, lambda images: None)
    for rows in WHOLE:
        finished(rows, drawn.images[rows])
    found, _ = scorer.scores(drawn)
    scorer.close()
    place, watched = (rewards.rewards[name] for name in found)
    assert isinstance(place, Place) and isinstance(watched, Watched)
    assert sorted(sorted(ids) for ids, _ in place.calls) == [[0], [1]] and len(watched.calls) == 4
    assert all(sorted(members) == list(range(7)) for _, members in place.calls)
    light = drawn.images.float().mean((1, 2, 3))
    for line in (0, 1):
        rows = [k for k, other in enumerate(groups.ids) if other == line]
        assert found["place"][rows].tolist() == light[rows].argsort().argsort().tolist()
    assert rewards.work == {"reward_calls": 2 + 4, "scored_images": 2 * IMAGES}
    assert torch.equal(rewards.score(drawn.images, groups, whole=True)["place"], found["place"])
