"""What a run leaves behind in numbers: its config, its command, its machine, and one line of metrics an iteration."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from PIL import Image

from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.utils.files import write_atomic as write_atomic
from t2irl.utils.files import writing as _writing
from t2irl.utils.inputs import input_digests, recorded_inputs

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = (
    "t2irl", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow", "pydantic",
    "tyro", "scipy",
)  # fmt: skip
"""Packages whose versions are recorded."""
_PIP_NAMES = {"comet_ml": "comet-ml"}
_SHOW_IMAGE: dict[str, Callable[[Any, str, Image.Image, int], None]] = {
    "tensorboard": lambda t, name, image, step: t.log_images(
        {name: np.asarray(image)[None]}, step=step, dataformats="NHWC"
    ),
    "wandb": lambda t, name, image, step: t.log_images({name: [image]}, step=step),
    "swanlab": lambda t, name, image, step: t.log_images({name: [image]}, step=step),
    "aim": lambda t, name, image, step: t.log_images({name: image}, step=step),
}
"""How each tracker that can show images takes them."""
_log = logging.getLogger(__name__)


def accelerator_arguments(run: Run, folder: Path) -> dict[str, Any]:
    """Arguments for `Accelerator(...)` that start the run's trackers, with their files in `folder`/trackers.

    Raises ConfigError for a tracker that is not installed, which accelerate would silently leave out.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import ProjectConfiguration

    installed = {str(name) for name in get_available_trackers()}
    for name in run.tracking.trackers:
        if name not in installed:
            known = ", ".join(sorted(installed)) or "none"
            raise ConfigError(
                f"tracking.trackers: {name!r} is not installed. Run `pip install {_PIP_NAMES.get(name, name)}`, "
                f"or leave it out; metrics.jsonl is written in any case. Installed: {known}"
            )
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers"))
    return {"log_with": list(run.tracking.trackers) or None, "project_config": project}


class Tracker:
    """Appends metrics to `folder`/metrics.jsonl and passes them to the trackers of `accelerator`.

    `accelerator` was built with `accelerator_arguments`. Acts on the main process only; elsewhere all calls are no-ops.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, run: Run):
        self.path = folder / "metrics.jsonl"
        self._accelerator, self._main = accelerator, accelerator.is_main_process
        self._no_images_said: set[str] = set()
        if not self._main:
            return
        init: dict[str, Any] = {}
        if "wandb" in run.tracking.trackers:
            init["wandb"] = {"dir": str(folder), "name": folder.name, "id": _run_id(folder), "resume": "allow"}
        accelerator.init_trackers(run.tracking.project, config=flatten(run.model_dump(mode="json")), init_kwargs=init)

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        """Append one line, {"iteration", "time", **metrics}, and pass it on. `time` is in seconds since 1970.

        Numbers that are not finite become null in the file, which stays plain JSON. Raises RunError if it cannot be
        written.
        """
        if not self._main:
            return
        values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        line = {"iteration": iteration, "time": round(time.time(), 3)}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with _writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._accelerator.log(values, step=iteration)

    def rewind(self, iteration: int) -> None:
        """Drop every line of `iteration` and later, and lines cut off by a crash: the run goes on from there."""
        if not self._main:
            return
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
            kept = [line for line in lines if _iteration_of(line) < iteration]
            write_atomic(self.path, "".join(f"{line}\n" for line in kept).encode())
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                _rewind_tensorboard(tracker, iteration)

    def image(self, name: str, path: Path, iteration: int) -> None:
        """Show a picture file in every tracker that can; the others are named once in the log."""
        if not self._main:
            return
        for tracker in self._accelerator.trackers:
            if tracker.name in _SHOW_IMAGE:
                with Image.open(path) as image:
                    _SHOW_IMAGE[tracker.name](tracker, name, image.convert("RGB"), iteration)
            elif tracker.name not in self._no_images_said:
                self._no_images_said.add(tracker.name)
                _log.warning("tracker %s gets no pictures from t2irl; they are in %s", tracker.name, path.parent)

    def close(self) -> None:
        """Finish the trackers. `accelerator.end_training()`, which does so too, must not be called as well."""
        if self._main:
            for tracker in self._accelerator.trackers:
                tracker.finish()


def _iteration_of(line: str) -> float:
    """The iteration of a line of metrics.jsonl; infinite for what is no such line."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _rewind_tensorboard(tracker: Any, iteration: int) -> None:
    """Tell TensorBoard to forget what earlier files say of `iteration` and later (what `purge_step` writes)."""
    from tensorboard.compat.proto import event_pb2

    messages: Any = event_pb2  # made by protobuf at run time
    writer = tracker.writer.file_writer
    writer.add_event(messages.Event(step=iteration, file_version="brain.Event:2"))
    writer.add_event(messages.Event(step=iteration, session_log=messages.SessionLog(status=messages.SessionLog.START)))


def _run_id(folder: Path) -> str:
    """A name for this run folder, kept in it, so that a resumed run goes on in the same curves of a hosted tracker."""
    path = folder / "tracking.json"
    if not path.exists():
        write_atomic(path, json.dumps({"id": uuid.uuid4().hex[:12]}).encode())
    return json.loads(path.read_text())["id"]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested mappings as one, keys joined by slashes. What trackers cannot keep (null, lists) becomes text."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, int, float)) else json.dumps(value)
    return flat


def write_run_files(folder: Path, run: Run) -> list[str]:
    """Write config.yaml (resolved), environment.json, and this command at the end of command.txt.

    Returns the files of the settings whose content is another one than when the run in this folder began.
    """
    inputs, different = _inputs(folder, run)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomic(folder / "config.yaml", text.encode())
    write_atomic(
        folder / "environment.json",
        json.dumps(environment() | {"inputs": inputs}, indent=2, ensure_ascii=False).encode(),
    )
    with _writing(folder / "command.txt"), (folder / "command.txt").open("a", encoding="utf-8") as file:
        file.write(command() + "\n")
    return different


def _inputs(folder: Path, run: Run) -> tuple[dict[str, str], list[str]]:
    """Digests of what a run reads, by path, and the paths that an earlier start in this folder read with another content.

    Those keep both digests: what comes of such a run was made with neither alone.
    """
    before, inputs, different = recorded_inputs(folder), input_digests(run), []
    for path, digest in inputs.items():
        known = before.get(path, digest)
        if known.rpartition(" ")[2] != digest:
            different.append(path)
            known = f"{known}, then {digest}"
        inputs[path] = known
    return inputs, different


def command() -> str:
    """The command line of this process, quoted for a shell."""
    name = Path(sys.argv[0]).name
    return shlex.join(["t2irl" if name == "__main__.py" else name, *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Versions, hardware, git state and command line, all JSON-able."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "git": _git_state(),
        "command": command(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in PACKAGES}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # the only place on Linux that has the model's name
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> dict[str, Any] | None:
    """Revision of the checkout that this package runs from, and whether files differ from it; None if it is none."""
    here = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here:  # installed somewhere inside another checkout
            return None
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
