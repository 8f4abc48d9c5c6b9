"""Weights spread over processes by FSDP2: what the launcher asks for, the denoiser cut up, calls made in step.

Each process holds a part of every weight. What a denoiser call needs is gathered block by block, so all processes must make
the same calls in the same order; `Company` sees to that.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from t2irl.errors import ConfigError
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.config import Run
    from t2irl.policy import Policy

TRAINED = "trained"
"""The name of the weights that are trained, among those that the denoiser can have."""
PROMPT = "a picture"
"""What stand-in calls draw."""
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "FSDP_VERSION": (("2",), "only FSDP2 is there; set fsdp_version: 2"),
    "FSDP_RESHARD_AFTER_FORWARD": (
        ("true",), "the reference policy runs between a forward pass and its backward pass; set fsdp_reshard_after_forward: true"
    ),
    "FSDP_OFFLOAD_PARAMS": (("false",), "weights rest on the GPUs; set fsdp_offload_params: false, and use more processes"),
    "FSDP_AUTO_WRAP_POLICY": (
        ("TRANSFORMER_BASED_WRAP",), "the model's own blocks are gathered one by one; set TRANSFORMER_BASED_WRAP or leave it out"
    ),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "the model family knows its blocks; leave fsdp_transformer_layer_cls_to_wrap out"),
    "FSDP_IGNORED_MODULES": ((), "all of the denoiser is spread, and nothing else; leave fsdp_ignored_modules out"),
    "FSDP_STATE_DICT_TYPE": (
        ("FULL_STATE_DICT",), "checkpoints hold whole weights, for any number of processes; set FULL_STATE_DICT or leave it out"
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        ("false",), "text encoders and rewards would be loaded on the first process alone; set fsdp_cpu_ram_efficient_loading: false"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        ("false",), "the run's config decides: model.gradient_checkpointing; set fsdp_activation_checkpointing: false"
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("false",), "weights are spread over all processes alike; leave parallelism_config out"),
}  # fmt: skip
"""Variable by which `accelerate launch` hands an option on -> its values that are what happens, and why no other is."""


class Act(IntEnum):
    """What a process is about to do that takes all of them."""

    MEET = 0
    """Exchange something else: it has made its calls."""
    BACKWARD = 1
    CALL = 2
    """A forward pass without gradient."""
    CALL_WITH_GRADIENT = 3
    GATHER = 4
    """Put the trained weights together."""


def asked() -> bool:
    """Whether the launcher asks for weights spread over processes. Raises ConfigError for a way that is not there."""
    from accelerate.utils import parse_flag_from_env  # heavy, and `t2irl check` needs none of it

    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "the launcher asks for DeepSpeed (ACCELERATE_USE_DEEPSPEED), whose engine would take over optimiser, gradients and loss scale. "
            "Use configs/accelerate/fsdp2_8.yaml, which spreads weights, gradients and moments as ZeRO-3 does, or ddp_8.yaml"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    refused = []
    for variable, (values, why) in OPTIONS.items():
        found = os.environ.get(variable, "1" if variable == "FSDP_VERSION" else "")  # accelerate's default
        if found and found.lower() not in [value.lower() for value in values]:
            refused.append(f"{variable} = {found}: {why}")
    if refused:
        raise ConfigError("\n".join(["the launcher asks for FSDP (see configs/accelerate/fsdp2_8.yaml):", *refused]))
    return True


def check(run: Run, sharded: bool) -> None:
    """Raise ConfigError for settings that spread weights cannot be had with."""
    if sharded and run.speed.compile:
        raise ConfigError(
            "speed.compile = true: blocks whose weights are spread over processes (ACCELERATE_USE_FSDP) are not compiled, since rollouts would "
            "need gradients that no backward pass takes up; set it to false"
        )
    if sharded and run.speed.fuse_lora == "everywhere":
        raise ConfigError(
            "speed.fuse_lora = everywhere: adapters stay apart where weights are spread over processes (ACCELERATE_USE_FSDP); leave it out"
        )
    if sharded and run.rollout.engine.type != "local":
        raise ConfigError(
            f"rollout.engine.type = {run.rollout.engine.type}: an engine elsewhere is handed whole weights, and these are spread over "
            "processes (ACCELERATE_USE_FSDP). Use local, or configs/accelerate/ddp_8.yaml"
        )


def refuse(command: str) -> None:
    """Raise ConfigError where the launcher asks for it and `command` does not spread weights."""
    if asked():
        raise ConfigError(
            f"{command} does not spread weights over processes, but the launcher asks for FSDP (ACCELERATE_USE_FSDP). Use "
            "configs/accelerate/ddp_8.yaml"
        )


def shard(denoiser: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Spread all weights of a denoiser over all processes, in place, one block after the other; trained ones in float32.

    They are gathered in `dtype`, in which the products are anyway. Gradients are summed in float32, as
    `distributed.sum_gradients` does, not averaged.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    names = set(getattr(denoiser, "_no_split_modules", None) or ())
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names and module is not denoiser]
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*reversed(blocks), denoiser):  # inner blocks first
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        # Said for the root as well, whose weights would otherwise stay gathered, and swapped ones not be seen.
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    # Several denoisers return views, and none changes them in place afterwards.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in denoiser.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; all of one that is not spread."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tree: Any) -> Any:
    """Nested mappings and lists with spread tensors put together: in host memory of the main process, empty on the others.

    Called by all processes, or not at all. What is not spread stays as it is.
    """
    return _each(tree, _whole)


def _whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        full = tensor.full_tensor()
    return full.cpu() if distributed.rank() == 0 else full.new_empty(0)


def moved(tree: Any, device: torch.device) -> Any:
    """Nested mappings and lists with their tensors on a device."""
    return _each(tree, lambda tensor: tensor.to(device))


def _each(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _each(value, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_each(value, function) for value in tree]
    return function(tree) if isinstance(tree, Tensor) else tree


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """`full` spread as `like` is, without asking another process; itself where `like` is not spread, or of another shape."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    mine = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return mine.to(like.device, copy=True)


class Company:
    """Keeps the calls of a spread denoiser the same on all processes, whatever each of them has to do.

    Before each call, each backward pass and each exchange of anything else, processes tell each other what comes next. The largest
    number wins: a process that wants something else makes a call of one picture without effect in its stead, and asks again.
    So a process may have fewer micro-batches, no picture of an evaluation, or nothing to draw. A message in host
    memory is all that it costs when all want the same.
    """

    def __init__(self, policy: Policy):
        self.policy, self.family = policy, policy.family
        # Numbers on the host, so that no GPU waits for them. Every process is in the group.
        self.group = distributed.host_group()
        self.pending: list[Tensor] = []
        self.text = self.family.text([PROMPT])
        noise = torch.randn(1, *self.family.latent_shape, generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(self.family.device)
        self.level = torch.full((1,), self.family.highest_level, device=self.family.device)

    def before(self, act: Act) -> None:
        """Return when it is this process's turn to do it, as it is of all that want the same."""
        names = self._names()
        mine = 0 if act is Act.MEET else names.index(self.policy.now) * len(Act) + act
        while (chosen := self._largest(mine)) != mine:
            place, other = divmod(chosen, len(Act))
            self._stand_in(names[place], Act(other))

    def call(self, function: Callable[[], Tensor]) -> Tensor:
        """A denoiser call."""
        self.before(Act.CALL_WITH_GRADIENT if torch.is_grad_enabled() else Act.CALL)
        return function()

    def meet(self) -> None:
        """Keep the others company until every process is here."""
        self.before(Act.MEET)

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a loss."""
        self.before(Act.BACKWARD)
        self._backward([loss])

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained weights that the denoiser has now, whole, in host memory. For the main process by itself."""
        self.before(Act.GATHER)
        return whole(tensors)

    def _names(self) -> list[str]:
        """Weights that the denoiser may have: the trained ones first, so that nobody must put these back to stand in."""
        return [TRAINED, "reference", "average", *sorted(self.policy.snapshots)]

    def _largest(self, number: int) -> int:
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, self.group)
        return int(value)

    def _stand_in(self, weights: str, act: Act) -> None:
        """Take part in what another process does, under the same weights."""
        here = self.policy.now
        assert weights in (here, *self._names()[1:]), f"the trained weights were put away for {here}"
        with nullcontext() if weights == here else self.policy.at(weights):
            if act is Act.BACKWARD:
                self._backward([])
            elif act is Act.GATHER:
                whole(self.policy.trained)
            else:
                with torch.set_grad_enabled(act is Act.CALL_WITH_GRADIENT):
                    found = self.family.compute(self.noise, self.level, self.text)
                if act is Act.CALL_WITH_GRADIENT:
                    self.pending.append(found)

    def _backward(self, losses: list[Tensor]) -> None:
        """With calls of this update that were made in others' stead, which change no gradient."""
        terms = [*losses, *(0 * found.sum() for found in self.pending)]
        self.pending = []
        torch.stack(terms).sum().backward()


def moments(
    state: Mapping[int, Mapping[str, Tensor]], parameters: list[torch.nn.Parameter]
) -> Iterator[tuple[int, Any]]:
    """The state that an optimiser saved, each parameter's spread as it is."""
    for number, values in state.items():
        yield number, {name: part_of(value, parameters[number]) for name, value in values.items()}
