"""Arms in processes of their own: whatever becomes of one is a result, and the next one starts on a clean device."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from full_size import gpu

SCRIPTS = Path(__file__).resolve().parents[1]
MEASURES = "full_size.one_arm"
"""The module that does. On a CPU a server imports it once, with torch and all, and forks for each arm; what a library looks up of
CUDA when it is imported must not be inherited, so with a GPU every arm is a fresh interpreter."""
READ_EVERY_S = 5.0
"""Between two readings of the GPU's clocks."""
LAST_LINES = 20
"""Of what a process said that ended badly."""


def run_arm(spec: Mapping[str, Any], timeout: float | None) -> dict[str, Any]:
    """Measure an arm as `one_arm` does. `status` is ok, refused, out of memory, failed or timed out; `reason` has the words."""
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["__main__", MEASURES])
    if str(SCRIPTS) not in (there := os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        # Where the server looks for what it imports beforehand.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), *there])
    with tempfile.TemporaryDirectory() as place:
        out, said = Path(place) / "out.jsonl", Path(place) / "said.txt"
        out.touch()
        said.touch()
        child = context.Process(target=_measure, args=(dict(spec), out, said))
        child.start()
        started, readings = time.monotonic(), []
        try:
            while child.exitcode is None:
                left = READ_EVERY_S if timeout is None else timeout - (time.monotonic() - started)
                if left <= 0:
                    break
                child.join(min(READ_EVERY_S, left))
                if child.exitcode is None:
                    readings += filter(None, [gpu.read()])
            code = child.exitcode
        finally:
            _end(child)
        found: dict[str, Any] = {}
        *lines, _ = out.read_text(encoding="utf-8").split("\n")  # the last one is empty, or was cut off
        for line in lines:
            found |= json.loads(line)
        last = [line for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    found |= {"wall_s": time.monotonic() - started, "gpu": gpu.summary(readings)}
    if "status" not in found:
        if code is None:
            found |= {"status": "timed out", "reason": f"not done after {timeout:g} s (--arm-timeout)"}
        else:
            found |= {"status": "failed", "reason": _ending(code, last)}
    if found["status"] not in ("ok", "refused"):
        found["said"] = last[-LAST_LINES:]
    return {name: value for name, value in found.items() if value is not None}


def _measure(spec: dict[str, Any], out: Path, said: Path) -> None:
    """In the arm's own process: with what it starts it is ended together, and it does not outlive the benchmark."""
    os.setsid()
    with said.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)

    def watch(server: int) -> None:
        while os.getppid() == server:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
    importlib.import_module(MEASURES).measure(spec, out)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # after a fault of the GPU the interpreter's own teardown may crash or hang


def _end(child: BaseProcess) -> None:
    if child.exitcode is None:
        child.kill()
    assert child.pid is not None
    with suppress(ProcessLookupError):  # unless it has left compilers behind
        os.killpg(child.pid, signal.SIGKILL)
    child.join()


def _ending(code: int, last: list[str]) -> str:
    """How a process ended, in words."""
    if code < 0:
        name = signal.Signals(-code).name
        why = ", as where the host's memory is short" if name == "SIGKILL" else ""
        return f"ended by {name}{why}" + (f": {last[-1]}" if last else "")
    return last[-1] if last else f"ended with exit code {code} and without a result"
