"""What two processes of `test_waiting` do: `python -m tests.distributed.waiting SCENARIO`, started as torchrun starts them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch

from t2irl.config import Processes
from t2irl.launch import start_processes
from t2irl.utils import distributed

CPU = torch.device("cpu")
LATE = 4.0
"""Seconds that the first process is busy by itself: twice what an exchange may take."""


def alone() -> None:
    """The main process writes, the others wait for it before each kind of exchange."""
    for exchange in (
        distributed.barrier,
        lambda: distributed.gather_objects(1),
        lambda: distributed.any_process(True, CPU),
    ):
        if distributed.rank() == 0:
            time.sleep(LATE)
        exchange()


def never() -> None:
    """The first process does not come."""
    if distributed.rank() == 0:
        time.sleep(3 * LATE)
    distributed.gather_objects(1)


def gone() -> None:
    """The first process ends without a word."""
    if distributed.rank() == 0:
        os._exit(9)
    distributed.sum_gradients([torch.nn.Parameter(torch.ones(1))])


SCENARIOS: dict[str, tuple[Callable[[], None], Processes]] = {
    "alone": (alone, Processes(timeout=LATE / 2, patience=100)),
    "never": (never, Processes(timeout=LATE / 2, patience=LATE / 2)),
    "gone": (gone, Processes(timeout=100, patience=100)),
}


def main() -> None:
    """Exit code 4 and the error where another process was lost."""
    scenario, settings = SCENARIOS[sys.argv[1]]
    start_processes(settings)
    started = time.monotonic()
    try:
        scenario()
    except RuntimeError as error:
        print(f"{time.monotonic() - started:.1f} s: {error}", flush=True)
        os._exit(4 if distributed.lost_a_process(error) else 1)
    os._exit(0)


if __name__ == "__main__":
    main()
