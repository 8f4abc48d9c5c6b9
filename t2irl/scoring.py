"""Scoring a rollout, if wanted while it is still being drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from t2irl.errors import ConfigError
from t2irl.rewards.combine import RewardSet
from t2irl.types import PromptGroups, Trajectory


@dataclass(frozen=True)
class _Scored:
    """Scores of a batch, and when the thread began and ended with it."""

    scores: dict[str, Tensor]
    begun: float
    ended: float


class Scorer:
    """All rewards on all pictures of a rollout, as `RewardSet.score`: in its batches and in its order.

    With `overlap` a thread scores a batch as soon as it is drawn. It is one thread that takes batch after batch, so every
    reward sees the calls that it would see afterwards, and the scores are the same to the bit. Rewards that need whole groups
    are asked when all is drawn. None: where a reward is computed elsewhere. On a GPU the thread has a stream of its own.
    """

    def __init__(self, rewards: RewardSet, overlap: bool | None):
        self.rewards = rewards
        busy = [name for name, reward in rewards.rewards.items() if reward.uses_policy]
        if overlap and busy:
            raise ConfigError(
                f"rollout.overlap_scoring = true: the reward {busy[0]!r} puts reference images through the policy's image encoder "
                "when it scores, which is in use then; set it to false, or the reward's reencode"
            )
        self.overlap = rewards.elsewhere and not busy if overlap is None else overlap
        self._thread = ThreadPoolExecutor(1, "scoring")
        self._stream: torch.cuda.Stream | None = None
        self._batches: list[Future[_Scored]] = []
        self._failed = False

    def watch(self, groups: PromptGroups, advance: Callable[[int], None]) -> Callable[[slice, Tensor], None]:
        """What is to be told of every finished batch of a rollout, its rows and its (n, 3, H, W) uint8 pictures.

        `advance` is told of the number of images. A batch that is not the next one of the rewards' waits for `scores`.
        """
        waiting = self.rewards.batches(len(groups)) if self.overlap else []
        self._batches, self._failed = [], False

        def finished(rows: slice, images: Tensor) -> None:
            advance(len(images))
            if waiting and rows == waiting[0]:
                waiting.pop(0)
                self._batches.append(self._thread.submit(self._score, images, groups[rows], self._drawn()))

        return finished

    def scores(self, trajectory: Trajectory) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Scores of the whole rollout, name -> (B,) float32 on the CPU, and metrics. Waits for the thread, and scores what it
        was not given. Raises what a reward raises, the first of them in the order of batches.
        """
        asked, images, groups = time.perf_counter(), trajectory.images, trajectory.groups
        early = [batch.result() for batch in self._batches]
        late = self.rewards.batches(len(groups))[len(early) :]
        found = [batch.scores for batch in early] + [
            self.rewards.each_batch(images[rows], groups[rows]) for rows in late
        ]
        hidden = sum(max(min(batch.ended, asked) - batch.begun, 0.0) for batch in early)
        return self.rewards.joined(found, images, groups), {"time/score_hidden_s": hidden} if self.overlap else {}

    def close(self) -> None:
        """Score no more. A call that is under way ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _score(self, images: Tensor, groups: PromptGroups, drawn: torch.cuda.Event | None) -> _Scored:
        """One batch, in the thread."""
        begun = time.perf_counter()
        if self._failed:  # an earlier batch says why
            return _Scored({}, begun, begun)
        self._failed = True  # until it has gone well
        with self._beside(drawn):
            scores = self.rewards.each_batch(images, groups)
        self._failed = False
        return _Scored(scores, begun, time.perf_counter())

    def _drawn(self) -> torch.cuda.Event | None:
        """When the GPU, if there is one, will have done what it was told until now."""
        if self.rewards.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.rewards.device))
        return event

    @contextmanager
    def _beside(self, drawn: torch.cuda.Event | None) -> Iterator[None]:
        """Inside, the GPU works in the thread's own stream, after `drawn`; at the end that work is done."""
        if drawn is None:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.rewards.device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(drawn)
            yield
            self._stream.synchronize()  # what rewards remember is there before another stream reads it
