"""Around the loop: processes, run folder, signals, clocks, curves. Nothing here knows about learning."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from t2irl import checkpoint, sharding
from t2irl.config import Processes, Run
from t2irl.errors import CheckpointError, ConfigError, Interrupted, RunError, UserError
from t2irl.footprint import Footprint
from t2irl.types import Clock
from t2irl.utils import distributed
from t2irl.utils.memory import keep_heap, peak_gib
from t2irl.utils.progress import Progress
from t2irl.utils.tracking import Tracker, accelerator_arguments, flatten, write_run_files

if TYPE_CHECKING:
    from t2irl.train import Parts

FIXED = ("model", "policy.tune", "rollout.guidance_scale", "seed")
"""Settings that a continued run cannot change: the saved weights or their log-densities depend on them."""
FREE = ("model.offload",)
"""Exceptions of these."""


class Context:
    """Everything about a run that is not learning: folder, device, progress, tracker, stop requests, timers."""

    def __init__(self, run: Run, accelerator: Accelerator, start: Path | None, again: str):
        self.run, self.accelerator, self.folder, self.start = run, accelerator, run.run_dir, start
        self.again = again
        """How to go on after an interruption."""
        # With several processes on the CPU accelerate numbers it, and cpu:1 is a device that nothing can be loaded to.
        self.device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
        self.footprint = Footprint(self.device)
        self.is_main = accelerator.is_main_process
        self.sharded = sharding.asked() and distributed.world_size() > 1
        """Whether the denoiser's weights are spread over the processes."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.warnings: list[str] = []
        self.stopped: str | None = None
        """The rule of the monitors that ended the run early."""
        self._signal: int | None = None
        self._source: Path | None = None  # run folder of the checkpoint that was loaded
        self.progress: Progress
        self.tracker: Tracker
        self.closing = ExitStack()
        """What is undone at the end."""

    def say(self, text: str) -> None:
        """Print on the main process."""
        self.progress.print(text)

    def warn(self, text: str) -> None:
        """Print a warning once, and keep it for the summary."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.say(f"warning: {text}")

    @contextmanager
    def timed(self, stage: str, total: int) -> Iterator[Any]:
        """A stage with its progress bar; its seconds go into the iteration's `time/<stage>_s`."""
        started = time.perf_counter()
        with self.progress.stage(stage, total) as advance:
            yield advance
        if self.device.type == "cuda":
            # At phase borders only, so that the next stage is not billed for this one, nor this one for scoring beside it.
            torch.cuda.current_stream(self.device).synchronize()
        self.seconds[stage] += time.perf_counter() - started

    def take_seconds(self) -> dict[str, float]:
        """Metrics of the timers since the last call."""
        found = {f"time/{stage}_s": seconds for stage, seconds in self.seconds.items()}
        self.seconds.clear()
        return found

    def memory(self) -> dict[str, float]:
        """Peak memory so far: the device's, or the process's on the CPU."""
        return {"memory/peak_gib": peak_gib(self.device)}

    def stop_requested(self) -> bool:
        """Whether a signal asked any process to stop. Called at the same places on all of them."""
        return distributed.any_process(self._signal is not None, self.device)

    def interrupted(self, saved: Path) -> Interrupted:
        """The exception that ends a run after a signal."""
        number = self._signal or signal.SIGTERM
        name = signal.Signals(number).name
        return Interrupted(f"{name}: the run is saved in {saved}; {self.again} to continue", number)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """First signal: finish safely. Second: stop at once."""
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        self.say(f"{signal.Signals(number).name}: saving at the next safe place; once more to stop at once")

    def save(self, parts: Parts) -> Path:
        """Write a checkpoint of the run as it stands; returns where."""
        return self.keep(parts, self.folder / "checkpoints", self.run.checkpoints.keep)

    def keep(self, parts: Parts, folder: Path, number: int) -> Path:
        """Write a checkpoint to a folder where the newest `number` are kept; on all processes, whose parts the main one writes."""
        weights, state = parts.policy.state_dict(), parts.state_dict()
        if self.is_main:
            checkpoint.save(folder, parts.clock, weights, state, number)
        distributed.barrier()
        return checkpoint.path_of(folder, parts.clock.iteration)

    def restore(self, parts: Parts) -> None:
        """Load the checkpoint that was chosen at the start, if any. Writes nothing."""
        if self.start is None:
            return
        if (self.start / "manifest.json").is_file():
            source, found = self.start.parent.parent, checkpoint.load(self.start, self.device, self.sharded)
        else:
            source, found = self.start.parent, checkpoint.load_newest(self.start, self.device, self.warn, self.sharded)
        assert found is not None  # open_folder saw a checkpoint
        clock, weights, state = found
        if self.sharded:  # what is spread stays in the file until each process takes its part
            others = {name: value for name, value in state.items() if name != "optimizer"}
            state |= sharding.moved(others, self.device)
        try:
            parts.policy.load_state_dict(weights)
            parts.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint in {source} does not fit this config: {error}") from error
        for field in fields(clock):
            setattr(parts.clock, field.name, getattr(clock, field.name))
        self._source = source
        self.say(f"continuing from iteration {clock.iteration} of {source}")

    def complete(self, clock: Clock) -> bool:
        """Whether the run that was loaded has nothing left to do."""
        iterations, stopped = _summarised(self.folder)
        early = stopped is not None and stopped in self.run.monitors.stop
        return (early or clock.iteration >= self.run.iterations) and iterations == clock.iteration

    def begin(self, clock: Clock) -> None:
        """From here on the run folder is written to: what the run is made of, and curves, rewound to where it stands."""
        if self.is_main:
            for path in write_run_files(self.folder, self.run):
                self.warn(f"{path} is not what it was when this run began; what comes of it was made with both")
            if self._source not in (None, self.folder) and (self._source / "metrics.jsonl").exists():
                shutil.copyfile(self._source / "metrics.jsonl", self.folder / "metrics.jsonl")
                if (self._source / "best").exists():
                    shutil.copytree(self._source / "best", self.folder / "best", dirs_exist_ok=True)
        self.tracker = Tracker(self.folder, self.accelerator, self.run)
        self.closing.callback(self.tracker.close)
        if self._source is not None:
            # The line of iteration 0, before training, is written again by a run that starts there.
            self.tracker.rewind(clock.iteration + 1 if clock.iteration else 0)


@contextmanager
def launch(run: Run, resume: str) -> Iterator[Context]:
    """Processes, folder, trackers and signal handlers of a run; undone at the end whatever happens."""
    sharding.asked()  # refuses a way that is not there before anything is done
    if not torch.cuda.is_available():
        keep_heap()
    state = start_processes(run.processes)
    folder, start = _agree(run, resume, state.is_main_process)
    accelerator = Accelerator(cpu=on_cpu(), **accelerator_arguments(run, folder))
    same = resume == "auto" and folder == run.run_dir
    again = "give the same command again" if same else f"use --resume auto --run_dir {folder}"
    context = Context(run.model_copy(update={"run_dir": folder}), accelerator, start, again)
    with Progress(context.is_main, run.iterations, _iterations_done(start)) as progress:
        context.progress = progress
        handlers = {n: signal.signal(n, context.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield context
        except RuntimeError as error:
            if not distributed.lost_a_process(error):
                raise
            raise RunError(
                f"process {distributed.rank()} lost another one of the run ({str(error).splitlines()[0]}). The newest checkpoint "
                f"in {folder / 'checkpoints'} is good; {again} to continue"
            ) from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            context.closing.close()
            distributed.leave()


def start_processes(settings: Processes) -> PartialState:
    """Find the other processes of this run, as accelerate does, and agree on how long they are waited for."""
    # PyTorch's own default, said here because it is relied on: without it an exchange over NCCL waits for ever for a lost process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    state = PartialState(cpu=on_cpu(), timeout=timedelta(seconds=settings.timeout))
    distributed.join(settings.patience)
    return state


def on_cpu() -> bool:
    """Whether accelerate must be told to use the CPU: otherwise it takes each of several processes on it for the only one."""
    asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    return asked or (int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available())


def _iterations_done(start: Path | None) -> int:
    """Iterations that the newest checkpoint stands for, for the progress bar."""
    if start is None:
        return 0
    newest = start if (start / "manifest.json").is_file() else checkpoint.available(start)[-1]
    return checkpoint.iteration_of(newest)


def _agree(run: Run, resume: str, is_main: bool) -> tuple[Path, Path | None]:
    """The main process's choice of folder, or its refusal, on all processes."""
    box: list[Any] = [None]
    if is_main:
        try:
            box = [open_folder(run, resume)]
        except UserError as error:
            box = [error]
    if distributed.world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def open_folder(run: Run, resume: str) -> tuple[Path, Path | None]:
    """Choose the run folder and the checkpoint (or folder of checkpoints) to start from. Never overwrites a run.

    auto: continue `run_dir` if it holds checkpoints. never: start in the next free folder (`demo-2`). A path: start in the
    next free folder from that checkpoint or run folder. Raises ConfigError when settings changed that must not.
    """
    folder = run.run_dir
    if resume == "auto":
        checkpoints = folder / "checkpoints"
        if checkpoint.available(checkpoints):
            check_same(folder, run)
            return folder, checkpoints
        return (free_folder(folder), None)
    if resume == "never":
        return free_folder(folder), None
    source = Path(resume)
    if checkpoint.available(source / "checkpoints"):
        check_same(source, run)
        return free_folder(folder), source / "checkpoints"
    if (source / "manifest.json").is_file():
        check_same(source.parent.parent, run)
        return free_folder(folder), source
    raise CheckpointError(
        f"--resume {resume}: no checkpoint and no run folder; use auto, never, a run folder or one of its checkpoints"
    )


def free_folder(folder: Path) -> Path:
    """`folder`, or `folder`-2, -3 ... if a run lies there."""
    number, candidate = 1, folder
    while (candidate / "metrics.jsonl").exists() or (candidate / "config.yaml").exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def check_same(folder: Path, run: Run) -> None:
    """Compare with the config that a run was started with. Prints harmless changes, refuses others with ConfigError."""
    saved = folder / "config.yaml"
    if not saved.exists():
        return
    trees = yaml.safe_load(saved.read_text(encoding="utf-8")), run.model_dump(mode="json")
    old, new = ({key.replace("/", "."): value for key, value in flatten(tree).items()} for tree in trees)
    changes = {
        k: (old.get(k), new.get(k))
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k) and k != "run_dir"
    }
    bad = [k for k in changes if any(f"{k}.".startswith(f"{fixed}.") for fixed in FIXED) and k not in FREE]
    if bad:
        listed = "; ".join(f"{k}: {changes[k][0]} -> {changes[k][1]}" for k in bad)
        raise ConfigError(
            f"{folder} was trained with other settings ({listed}). Use --resume never or another --run_dir"
        )
    for key, (before, after) in changes.items():
        print(f"changed since {saved}: {key}: {before} -> {after}", flush=True)


def _summarised(folder: Path) -> tuple[int | None, str | None]:
    """The iterations that a run's summary speaks of, and the rule that ended it early, if one did."""
    file = folder / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    return summary.get("iterations"), summary.get("stopped")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All lines of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(file)
