"""Runs of a grid as subprocesses: several at a time, each on cores of its own, skipped when done, resumed when not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from t2irl.errors import ConfigError, Interrupted
from t2irl.hacklab.grid import Cell, changed
from t2irl.loading import dump_run
from t2irl.utils.progress import duration

POLL_S = 0.2


@dataclass(frozen=True)
class Failure:
    """A run that ended without a result."""

    name: str
    code: int
    """Exit code of `t2irl train`; negative: the signal that killed it."""
    log: Path
    """What it printed."""

    @property
    def words(self) -> str:
        """The last lines that it printed."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(lines[-3:]) or "it printed nothing"


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    cores: list[int]
    started: float = field(default_factory=time.monotonic)


def finished(cell: Cell) -> bool:
    """Whether a run has reached its end, early stops included."""
    summary = cell.run.run_dir / "summary.json"
    if not summary.is_file():
        return False
    found: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return found["iterations"] >= cell.run.iterations or bool(found.get("stopped"))


def refuse_changed(cells: Sequence[Cell]) -> None:
    """Raise ConfigError if a run that was started before is not the one that the grid describes now."""
    lines = [f"{cell.run.run_dir}: {'; '.join(found)}" for cell in cells if (found := changed(cell))]
    if lines:
        head = f"{len(lines)} runs were started with other settings. Remove their folders, or give another --out"
        raise ConfigError("\n".join([head, *lines]))


class Pool:
    """Runs what is left of a grid, `jobs` at a time. `say` prints a line."""

    def __init__(self, cells: Sequence[Cell], jobs: int, say: Callable[[str], None]):
        cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        self.say, self.threads = say, max(1, len(cores) // jobs)
        pinned = hasattr(os, "sched_setaffinity") and len(cores) >= jobs
        # Cores of a job; empty where the system cannot pin, or has to share.
        self.free = [cores[k * self.threads : (k + 1) * self.threads] if pinned else [] for k in range(jobs)]
        self.waiting = [cell for cell in cells if not finished(cell)]
        self.total, self.done, self.skipped = len(cells), 0, len(cells) - len(self.waiting)
        self.running: list[_Running] = []
        self.failures: list[Failure] = []
        self.took: list[float] = []
        self._signal: int | None = None

    def run(self) -> list[Failure]:
        """Run them all; returns those that failed. Raises Interrupted after a signal, once every run has saved itself."""
        if self.skipped:
            self.say(f"{self.skipped} of {self.total} runs are there already")
        with self._signals():
            while self.running or (self.waiting and self._signal is None):
                while self.waiting and self.free and self._signal is None:
                    self._start(self.waiting.pop(0), self.free.pop(0))
                for job in [job for job in self.running if job.process.poll() is not None]:
                    self._end(job)
                time.sleep(POLL_S)
        if self._signal is not None:
            raise Interrupted("the runs are saved; give the same command again to continue", self._signal)
        return self.failures

    def _start(self, cell: Cell, cores: list[int]) -> None:
        """Start a run in a session of its own: an interrupt at the keyboard reaches it through us alone, and once."""
        folder = cell.run.run_dir
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not any((folder / "checkpoints").glob("iteration_*")):
            shutil.rmtree(folder)  # stopped before its first checkpoint: train would leave it and take another name
        config = folder.with_name(f"{folder.name}.yaml")
        config.write_text(dump_run(cell.run), encoding="utf-8")
        log = folder.with_name(f"{folder.name}.log").open("ab")
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TERM": "dumb", "NO_COLOR": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "t2irl", "train", str(config)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        if cores:
            os.sched_setaffinity(process.pid, cores)
        self.running.append(_Running(cell, process, log, cores))

    def _end(self, job: _Running) -> None:
        """Book a run that has ended."""
        job.log.close()
        self.running.remove(job)
        self.free.append(job.cores)
        if self._signal is not None:
            return
        self.done += 1
        seconds = time.monotonic() - job.started
        self.took.append(seconds)
        count = f"{self.done + self.skipped} of {self.total}"
        if job.process.returncode == 0:
            rounds = -(-(len(self.waiting) + len(self.running)) // (len(self.free) + len(self.running)))
            left = duration(rounds * sum(self.took) / len(self.took))
            self.say(f"{count}  {job.cell.name}  {duration(seconds)}, about {left} left")
            return
        failure = Failure(job.cell.name, job.process.returncode, Path(job.log.name))
        self.failures.append(failure)
        self.say(f"{count}  {job.cell.name}  FAILED with exit code {failure.code}, see {failure.log}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass signals on to the runs, which save themselves; start no more of them."""
        handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for job in self.running:  # only after an error of our own
                job.process.terminate()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self.say(
                f"{signal.Signals(number).name}: {len(self.running)} runs save themselves; once more to stop at once"
            )
        self._signal = number
        for job in self.running:
            job.process.send_signal(number)
