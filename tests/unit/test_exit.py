"""How the process ends: alone as Python does, among several without the teardown that a process group's threads disturb."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import atexit, ctypes
from t2irl import cli

def main():
    print("said")
    {body}

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # runs where C++ destroys what is left: a thread that is still there ends the same
atexit.register(print, "finished")
cli.main = main
cli.entry()
"""


def ended(body: str, processes: int) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(processes)}
    words = [sys.executable, "-c", PROGRAM.format(body=body)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("return 4", 4, ""),
        ("raise SystemExit(0)", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise KeyError('a bug')", 1, "KeyError: 'a bug'"),
    ],
)
def test_one_of_several_ends_with_its_own_code(body: str, code: int, words: str) -> None:
    """Hooks run and output is written; what would abort the process later is not reached."""
    found, out, err = ended(body, processes=2)
    assert (found, out) == (code, "said\nfinished\n"), err
    assert words in err and bool(err) == bool(words)


def test_a_process_alone_ends_as_python_does() -> None:
    assert ended("return 4", processes=1) == (-signal.SIGABRT, "said\nfinished\n", "")
