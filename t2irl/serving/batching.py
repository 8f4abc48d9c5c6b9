"""Pictures of many requests, scored together: one thread that scores, and a queue before it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

Names = tuple[str, ...]
Scores = Mapping[str, Sequence[float]]
Scorer = Callable[[Sequence[np.ndarray], Sequence[str], Names], Scores]
"""Pictures of one size (H, W, 3) uint8, a prompt each, names of rewards -> scores by name."""


@dataclass(eq=False)
class Job:
    """A request on its way."""

    pictures: Sequence[np.ndarray]
    prompts: Sequence[str]
    names: Names
    done: asyncio.Future[dict[str, list[float]]]
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    """What is known, by the number of the picture."""


Item = tuple[Job, int]


class Batcher:
    """Scores pictures in batches of equal size, over requests. An error of one request is not an error of its neighbours."""

    def __init__(self, scorer: Scorer, batch_size: int, wait: float):
        """`wait`: seconds that a batch which is not full waits for more."""
        self.scorer, self.batch_size, self.wait = scorer, batch_size, wait
        self.waiting: deque[Item] = deque()
        self.batches: list[int] = []
        """Sizes of the latest batches."""
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "score")

    async def score(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], names: Names) -> Scores:
        """Scores of some pictures, by name, in order. Cancelled, it leaves the queue."""
        job = Job(pictures, prompts, names, asyncio.get_running_loop().create_future())
        self.waiting.extend((job, number) for number in range(len(pictures)))
        self._arrived.set()
        return await job.done

    async def run(self) -> None:
        """Work on the queue until cancelled."""
        while True:
            await self._arrived.wait()
            if len(self.waiting) < self.batch_size:
                await asyncio.sleep(self.wait)
            batch = self._take()
            if batch:
                self.batches = [*self.batches[-99:], len(batch)]
                await self._work(batch)

    def close(self) -> None:
        """End the thread after what it is doing."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> list[Item]:
        """The oldest picture and others that can be scored with it."""
        alive = [item for item in self.waiting if not item[0].done.done()]
        kinds = [(job.pictures[number].shape, job.names) for job, number in alive]
        batch = [item for item, kind in zip(alive, kinds, strict=True) if kind == kinds[0]][: self.batch_size]
        taken = {(id(job), number) for job, number in batch}
        self.waiting = deque(item for item in alive if (id(item[0]), item[1]) not in taken)
        if not self.waiting:
            self._arrived.clear()
        return batch

    async def _work(self, batch: Sequence[Item]) -> None:
        """Score a batch; when that fails, every request of it by itself."""
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._scored, batch)
        await asyncio.wait([work])
        error = work.exception()
        jobs = list(dict.fromkeys(job for job, _ in batch))
        if error is not None and len(jobs) > 1:
            for job in jobs:
                await self._work([item for item in batch if item[0] is job])
        elif error is not None:
            if not jobs[0].done.done():
                jobs[0].done.set_exception(error)
        else:
            for (job, number), row in zip(batch, work.result(), strict=True):
                job.scores[number] = row
            for job in jobs:
                if len(job.scores) == len(job.pictures) and not job.done.done():
                    job.done.set_result({n: [job.scores[k][n] for k in sorted(job.scores)] for n in job.names})

    def _scored(self, batch: Sequence[Item]) -> list[dict[str, float]]:
        names = batch[0][0].names
        found = self.scorer([job.pictures[k] for job, k in batch], [job.prompts[k] for job, k in batch], names)
        return [{name: float(found[name][row]) for name in names} for row in range(len(batch))]
