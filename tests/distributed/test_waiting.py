"""How long processes wait for each other: patiently for one that is busy, not at all for one that has ended."""

from __future__ import annotations

import socket
import sys

import pytest
import torch.distributed as dist

from t2irl.utils import distributed
from tests.distributed.waiting import LATE
from tests.end_to_end.runs import spawn


def run(scenario: str) -> tuple[list[int], str]:
    """Exit codes of both processes, and what the second one said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    words = (sys.executable, "-m", "tests.distributed.waiting", scenario)
    both = [spawn(*words, **variables, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    try:
        out, err = both[1].communicate(timeout=120)
        return [process.wait(120) for process in both], out + err
    finally:
        for process in both:
            process.kill()


@pytest.mark.slow
def test_what_the_main_process_does_alone_ends_nothing() -> None:
    """Twice as long as an exchange may take, before a barrier, a gather and a reduction."""
    codes, said = run("alone")
    assert codes == [0, 0], said


@pytest.mark.slow
def test_patience_ends() -> None:
    """A process that is alive and does not come is given up; the late one then finds the other gone."""
    codes, said = run("never")
    assert codes == [4, 4], said
    assert LATE / 2 <= float(said.partition(" s:")[0].split()[-1]) < 2 * LATE


@pytest.mark.slow
def test_an_ended_process_is_not_waited_for() -> None:
    codes, said = run("gone")
    assert codes == [9, 4], said
    assert float(said.partition(" s:")[0].split()[-1]) < 20


@pytest.mark.parametrize(
    "lost, error",
    [
        (True, RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer")),
        (True, RuntimeError("NCCL communicator was aborted on rank 3.  Original reason for failure was: [Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600004 milliseconds before timing out.")),
        (True, dist.DistBackendError("NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error, NCCL version 2.19.3\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.")),
        (True, RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1691, unhandled system error (run with NCCL_DEBUG=INFO for details)")),
        (True, dist.DistNetworkError("failed to recv, got 0 bytes")),
        (True, dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0//cuda//0")),
        (False, dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94, invalid usage, NCCL version 2.21.5\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b0")),
        (False, dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1333, unhandled cuda error, NCCL version 2.19.3\nncclUnhandledCudaError: Call to CUDA function failed.")),
        (False, RuntimeError("CUDA error: an illegal memory access was encountered")),
        (False, RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0")),
    ],
    ids=range(10),
)  # fmt: skip
def test_words_of_a_lost_process(monkeypatch: pytest.MonkeyPatch, lost: bool, error: RuntimeError) -> None:
    """As gloo, NCCL and the store say it; an error of this process itself is none."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert distributed.lost_a_process(error) is lost
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    assert not distributed.lost_a_process(error)
