"""What crosses processes: gathered tables, summed gradients, images dealt out evenly. No-ops with one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from t2irl.errors import RunError, UserError
from t2irl.types import TrainingImages

if TYPE_CHECKING:
    from t2irl.sharding import Company

LOST = (
    "gloo", "communicator was aborted", "collective operation timeout", "remote error", "remote process exited", "network error",
    "unhandled system error",
)  # fmt: skip
"""What gloo and NCCL say when another process is gone or does not answer."""
OWN = ("invalid usage", "invalid argument", "Duplicate GPU", "unhandled cuda error")
"""What NCCL says where this process is wrong itself."""

_company: list[Company] = []  # of the run's policy, where its weights are spread over processes
_host: list[dist.ProcessGroup] = []  # all processes, over gloo, which sees at once that one has ended


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def keep(company: Company | None) -> None:
    """From now on, whatever else crosses processes waits until all have made the denoiser calls that take all of them."""
    _company[:] = [] if company is None else [company]


def join(patience: float) -> None:
    """From now on processes wait for each other in host memory before anything else crosses them, at most `patience` seconds.
    Called on all of them.
    """
    if world_size() > 1:
        _host[:] = [_gloo(timedelta(seconds=patience))]


def host_group() -> dist.ProcessGroup:
    """All processes, over gloo whatever the GPUs use: that of `join`, else one of its own, made on all of them."""
    return _host[0] if _host else _gloo(None)


def _gloo(timeout: timedelta | None) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "every process is in the group"
    return group


def leave() -> None:
    """The run is over: nobody is waited for any more."""
    _company.clear()
    _host.clear()


def meet() -> None:
    """Make the denoiser calls of the others with them until all processes are here, where weights are spread over them."""
    for company in _company:
        company.meet()


def barrier() -> None:
    """Wait for all processes, as patiently as the run's settings say."""
    meet()
    if world_size() > 1:
        dist.barrier(_host[0] if _host else None)


def arrive() -> None:
    """Wait for all processes before something crosses them.

    So the time that one of them takes alone (loading, a slow reward, a checkpoint) never counts for NCCL, whose watchdog kills
    what waits; and a process that has ended is seen here, by gloo, and not after NCCL's timeout.
    """
    meet()
    for group in () if _company else _host:  # to meet a company is to arrive
        dist.barrier(group)


def lost_a_process(error: RuntimeError) -> bool:
    """Whether an error says that another process has ended, or answers no more."""
    said = str(error)
    if world_size() == 1 or any(words in said for words in OWN):
        return False
    return isinstance(error, dist.DistError) or any(words in said for words in LOST)


def gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of all processes, in process order, on the CPU. Every process has equally many; dtypes stay."""
    if world_size() == 1:
        return rows.cpu()
    arrive()
    mine = rows.to(device).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts).cpu()


def gather_objects(mine: Any) -> list[Any]:
    """Small Python objects of all processes, in process order."""
    if world_size() == 1:
        return [mine]
    arrive()
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    return found


def totals(parts: Sequence[Tensor], size: int, device: torch.device) -> list[float]:
    """Sum of vectors (size,) over all that every process holds, which may be none."""
    mine = torch.stack(list(parts)).sum(0) if parts else torch.zeros(size, dtype=torch.float64, device=device)
    return gather_rows(mine[None], device).sum(0).tolist()


def any_process(flag: bool, device: torch.device) -> bool:
    """True on all processes if it is true on one."""
    if world_size() == 1:
        return flag
    arrive()
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """What fails on one process fails on all, so that none waits for one that is gone.

    Every process enters it, and nothing inside crosses processes but denoiser calls, which may be some processes' alone. Where the trouble is, the error goes on as it is; the
    others raise RunError with its words.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others must hear of it; it is raised again below
        mine = error
    if any_process(mine is not None, device):
        words = None if mine is None else str(mine) if isinstance(mine, UserError) else repr(mine)
        everyone = gather_objects(words)
        if mine is not None:
            raise mine
        first = next(k for k, said in enumerate(everyone) if said is not None)
        raise RunError(f"process {first}: {everyone[first]}")


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over processes, in one transfer. A missing gradient counts as 0.

    Loss terms are already divided by the global count, so the sum is the gradient of the whole update, whatever each
    process held. Those of spread parameters were summed in the backward passes.
    """
    arrive()
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world_size() == 1 or isinstance(parameters[0], DTensor):
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    start = 0
    for p in parameters:
        assert p.grad is not None
        p.grad.copy_(flat[start : start + p.numel()].view_as(p))
        start += p.numel()


def transfers(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Moves (from, to, how many) after which all processes hold equally many images, within one."""
    total, n = sum(counts), len(counts)
    # The remainder stays where most is, so that no image moves without need.
    order = sorted(range(n), key=lambda r: -counts[r])
    target = [0] * n
    for place, process in enumerate(order):
        target[process] = total // n + (place < total % n)
    surplus = [[r, counts[r] - target[r]] for r in range(n) if counts[r] > target[r]]
    moves = []
    for r in range(n):
        missing = target[r] - counts[r]
        while missing > 0:
            giver = surplus[0]
            moved = min(missing, giver[1])
            moves.append((giver[0], r, moved))
            missing -= moved
            giver[1] -= moved
            if giver[1] == 0:
                surplus.pop(0)
    return moves


def balance(images: TrainingImages, device: torch.device) -> TrainingImages:
    """Deal the images of an update out evenly over processes. Surplus images leave from the end of their process."""
    if world_size() == 1:
        return images
    counts = gather_rows(torch.tensor([len(images)]), device).tolist()
    me, kept = rank(), len(images)
    received: list[list[Tensor]] = []
    operations = []
    for source, target, n in transfers(counts):
        if source == me:
            kept -= n
            parts = [x[kept : kept + n].contiguous() for x in images.tensors()]
            operations += [dist.P2POp(dist.isend, x, target) for x in parts]
        elif target == me:
            parts = [x.new_empty((n, *x.shape[1:])) for x in images.tensors()]
            operations += [dist.P2POp(dist.irecv, x, source) for x in parts]
            received.append(parts)
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    own = [x[:kept] for x in images.tensors()]
    return TrainingImages(*(torch.cat([x, *(parts[i] for parts in received)]) for i, x in enumerate(own)))
