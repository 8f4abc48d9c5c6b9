"""What the user watches: nested bars on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

HEARTBEAT_S = 30.0
"""Without a terminal, a stage that runs longer than this says so, again and again."""
_REMEMBERED = 41
"""Iterations whose ends are kept for the time left; enough to average over evaluations and checkpoints."""


class Progress:
    """Shows how a run gets on; silent when not `enabled` (every process but the first).

    `iterations` is the length of the run, `start` the number of iterations already finished. `console` is where to
    write, by default standard output: bars if it is a terminal, plain lines if not.
    """

    def __init__(self, enabled: bool, iterations: int, start: int = 0, console: Console | None = None):
        self.console = console or Console()
        self._enabled, self._iterations, self._images = enabled, iterations, None if start else 0.0
        self._ends: deque[float] = deque(maxlen=_REMEMBERED)
        self._status = Text(overflow="ellipsis", no_wrap=True)
        self._outer = Bars(
            TextColumn("iteration"), MofNCompleteColumn(), BarColumn(bar_width=30), TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"), console=self.console,
        )  # fmt: skip
        self._inner = Bars(
            TextColumn("{task.description:<9}"), MofNCompleteColumn(), BarColumn(bar_width=30), console=self.console
        )
        self._run = self._outer.add_task("", total=iterations, completed=start, speed="")
        self._live: Live | None = None
        if enabled and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(Group(self._outer, self._status, self._inner), console=self.console, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """An inner bar of `total` steps; yields `advance(n=1)`, to be called as steps are done."""
        if not self._enabled:
            yield lambda n=1: None
            return
        task = self._inner.add_task(name, total=total)
        done, began = 0, time.monotonic()
        said = began

        def advance(n: int = 1) -> None:
            nonlocal done, said
            done += n
            self._inner.advance(task, n)
            now = time.monotonic()
            if self._live is None and now - said >= HEARTBEAT_S:
                self.print(f"  {name} {done}/{total}  {duration(now - began)}")
                said = now

        try:
            yield advance
        finally:
            self._inner.remove_task(task)

    def iteration(self, finished: int, metrics: Mapping[str, float]) -> None:
        """Report the end of an iteration: `finished` of the run's iterations are done, `metrics` are its own.

        0 stands for the base model before training.
        """
        if not self._enabled:
            return
        self._ends.append(time.monotonic())
        seconds = self._seconds_per_iteration(metrics)
        left = f"left {duration(seconds * (self._iterations - finished))}" if seconds else ""
        heldout = {
            name.removeprefix("heldout/"): value for name, value in metrics.items() if name.startswith("heldout/")
        }
        scores = _scores(metrics)
        if self._live:
            speed = [f"{metrics['time/iteration_s']:.1f} s/iteration"] if "time/iteration_s" in metrics else []
            self._outer.update(
                self._run, completed=finished, speed="  ".join([*speed, *self._images_per_s(metrics), left])
            )
            self._status.plain = scores
            self._live.refresh()
        elif finished:
            parts = [f"iteration {finished}/{self._iterations}", scores, _stages(metrics), left]
            self.print("  ".join(p for p in parts if p))
        if heldout:
            took = f"  ({metrics['time/evaluate_s']:.1f} s)" if "time/evaluate_s" in metrics else ""
            when = f"after iteration {finished}" if finished else "before training"
            self.print(f"held out {when}: " + "  ".join(f"{k} {v:.3f}" for k, v in heldout.items()) + took)

    def print(self, text: str) -> None:
        """Print a line, above the bars if there are any."""
        if self._enabled:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _seconds_per_iteration(self, metrics: Mapping[str, float]) -> float:
        """Wall time from one iteration's end to the next, everything in between included, over the last iterations."""
        if len(self._ends) > 1:
            return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return metrics.get("time/iteration_s", 0.0)

    def _images_per_s(self, metrics: Mapping[str, float]) -> list[str]:
        """Images sampled since the last report, per second of this iteration; nothing while that is unknown."""
        if "data/images_total" not in metrics:
            return []
        before, self._images = self._images, metrics["data/images_total"]
        seconds = metrics.get("time/iteration_s")
        return [f"{(self._images - before) / seconds:.0f} images/s"] if before is not None and seconds else []


def _scores(metrics: Mapping[str, float]) -> str:
    """Mean rewards and the share of prompts without signal."""
    means = {n.removesuffix("/mean"): v for n, v in metrics.items() if n.startswith("reward/") and n.endswith("/mean")}
    if len(means) == 2:  # one reward and the total, which then says the same
        means.pop("reward/total", None)
    parts = [f"{name} {value:.3f}" for name, value in means.items()]
    if "advantage/zero_variance_groups" in metrics:
        parts.append(f"zero-variance {metrics['advantage/zero_variance_groups']:.2f}")
    return "  ".join(parts)


def _stages(metrics: Mapping[str, float]) -> str:
    """Seconds of the iteration, and of its stages."""
    if "time/iteration_s" not in metrics:
        return ""
    named = ((stage, metrics.get(f"time/{stage}_s")) for stage in ("rollout", "score", "adversary", "update"))
    inner = " ".join(f"{stage} {seconds:.1f}" for stage, seconds in named if seconds is not None)
    return f"{metrics['time/iteration_s']:.1f} s" + (f" ({inner})" if inner else "")


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
