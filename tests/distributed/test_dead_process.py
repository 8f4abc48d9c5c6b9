"""One of two processes dies, or is told to stop: the other ends soon, and the checkpoint is good."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from t2irl import checkpoint
from tests.end_to_end.runs import base_config, spawn

pytestmark = pytest.mark.slow
LIMIT = 60
"""Seconds that the other process may take."""


def start(config: Path, *options: str, spread: bool = False) -> list[subprocess.Popen[str]]:
    """Two processes of a long run, without a launcher: that would end the second one itself. `spread`: each has half the weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if spread else {}
    words = (sys.executable, "-m", "t2irl", "train", str(config), "--iterations=5000", "--evaluation.every=0", *options)
    return [spawn(*words, **variables, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


@pytest.mark.parametrize(
    "number, code, spread",
    [(signal.SIGKILL, 4, False), (signal.SIGTERM, 128 + signal.SIGTERM, False), (signal.SIGKILL, 4, True)],
    ids=str,
)
def test_the_other_process_ends(
    tmp_path: Path, sd3_folder: Callable[..., Path], number: signal.Signals, code: int, spread: bool
) -> None:
    """Killed: with a message and exit code 4. Asked to stop, on one process: both save together and say so."""
    processes = start(base_config(tmp_path, sd3_folder()), spread=spread)
    saved = tmp_path / "run" / "checkpoints"
    try:
        deadline = time.monotonic() + 200
        while not checkpoint.available(saved):
            assert time.monotonic() < deadline and all(p.poll() is None for p in processes), "no checkpoint"
            time.sleep(0.1)
        processes[1].send_signal(number)
        asked = time.monotonic()
        _, err = processes[0].communicate(timeout=LIMIT)
        assert time.monotonic() - asked < LIMIT
        assert processes[0].returncode == code, err
        assert "Traceback" not in err
        assert ("lost another one" if number == signal.SIGKILL else "the run is saved in") in err
        assert processes[1].wait(LIMIT) == (-signal.SIGKILL if number == signal.SIGKILL else code)
    finally:
        for process in processes:
            process.kill()
    warned: list[str] = []
    found = checkpoint.load_newest(saved, torch.device("cpu"), warned.append)
    assert found is not None and not warned
    assert found[0].iteration >= 1
