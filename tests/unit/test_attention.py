"""What attention is handed: gradients of one layout, and queries, keys and values of one dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from t2irl import registry, speed
from t2irl.models.base import ModelFamily
from t2irl.models.flux import PackedGradient
from t2irl.sharding import shard
from tests.families import CASES

CPU = torch.device("cpu")
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
Folder = Callable[..., Path]
Layouts = dict[tuple[Any, ...], set[tuple[int, ...]]]
"""Shapes and strides of queries, keys and values -> strides of the gradients that came to attention of that layout."""


def load(folder: Path, name: str, **settings: Any) -> ModelFamily:
    """A tiny checkpoint in bfloat16."""
    config = registry.find("models", CASES[name].model["type"]).Config
    return registry.build("models", config(path=folder, **CASES[name].model | {"precision": "bf16"} | settings), CPU)


def note(layouts: Layouts, grad: Tensor, *inputs: Tensor) -> None:
    """One backward call of attention."""
    layouts[tuple((tuple(x.shape), x.stride()) for x in inputs)].add(grad.stride())


class Watch(TorchDispatchMode):
    """Looks at every backward call of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: Layouts = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs what it sees."""
        if func is BACKWARD:
            note(self.layouts, *args[:4])
        return func(*args, **(kwargs or {}))


def learn(family: ModelFamily) -> list[Tensor]:
    """Gradients of the denoiser's weights."""
    family.denoiser.requires_grad_(True)
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    text = family.text(["a red circle", "a large blue square"])
    family.velocity(x, torch.tensor([0.9, 0.5]), text, None, 1.0).square().mean().backward()
    return [p.grad for p in family.denoiser.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", sorted(set(CASES) - {"sd21", "flux_schnell"}))
def test_gradients_of_one_layout(tiny_folder: Folder, name: str) -> None:
    """In every family attention of one layout gets gradients of one layout, as cuDNN's cache of plans takes for granted."""
    with Watch() as watch:
        assert learn(load(tiny_folder(name), name))
    assert watch.layouts and all(len(strides) == 1 for strides in watch.layouts.values()), watch.layouts


def test_packed_gradients_are_the_same_numbers(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With layers computed again or not. Without it a layout of FLUX.1 has two of gradients."""
    found = {}
    for packed in (True, False):
        for again in (True, False):
            family = load(tiny_folder("flux_dev"), "flux_dev", gradient_checkpointing=again)
            if not packed:
                monkeypatch.setattr(PackedGradient, "backward", staticmethod(lambda ctx, grad: grad))
            with Watch() as watch:
                found[packed, again] = learn(family)
            assert [len(strides) for strides in watch.layouts.values()] == [1 if packed else 2]
    for gradients in found.values():
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[False, False], strict=True))


def test_compiled_gradients_of_one_layout(tiny_folder: Folder) -> None:
    """A block stays one graph, and what is compiled of its backward pass is watched."""
    layouts: Layouts = defaultdict(set)

    def backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is BACKWARD:
                note(layouts, *(argument.meta["val"] for argument in node.args[:4]))
        return make_boxed_func(graph)

    family = load(tiny_folder("flux_dev"), "flux_dev")
    torch._dynamo.utils.counters.clear()
    try:
        speed.compile_blocks(
            family, backend=aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=backward)
        )
        assert learn(family)
    finally:
        torch._dynamo.reset()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert [len(strides) for strides in layouts.values()] == [1]


def test_spread_weights_keep_it(tiny_folder: Folder) -> None:
    """FSDP gives blocks another class and hooks of its own; attention's stay."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        family = load(tiny_folder("flux_dev"), "flux_dev")
        family.denoiser.requires_grad_(True)
        shard(family.denoiser, CPU, torch.bfloat16)
        with Watch() as watch:
            learn(family)
        assert [len(strides) for strides in watch.layouts.values()] == [1]
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------------- dtypes
class Dtypes(TorchFunctionMode):
    """Looks at queries, keys and values before autocast does, and at what attention makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[torch.dtype, ...]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs what it sees."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            inputs = args[:3] or [kwargs[name] for name in ("query", "key", "value")]
            self.found.add((*(x.dtype for x in inputs), result.dtype))
        return result


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """As on an NVIDIA GPU, which `torch.autocast` would look for."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def dtypes_on_a_gpu(family: ModelFamily) -> set[tuple[torch.dtype, ...]]:
    """Of queries, keys and values in a call of the denoiser: on a GPU without numbers, by CUDA's own rules of autocast."""
    text = family.text(["a red circle", "a large blue square"])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), cuda_autocast(), Dtypes() as seen:

        def there(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor.detach()).to("cuda")

        for module in family.denoiser.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = None if p is None else torch.nn.Parameter(there(p), requires_grad=False)
            for name, b in module._buffers.items():
                module._buffers[name] = None if b is None else there(b)
        family.device = torch.device("cuda")
        x = torch.empty(2, *family.latent_shape, device="cuda")
        family.denoise(x, torch.empty(2, device="cuda"), text._each(there))
    return seen.found


@pytest.mark.parametrize(("name", "full"), [("flux_dev", False), ("flux2_klein", False), ("sd3", True)])
def test_one_dtype_for_the_packages_kernels(tiny_folder: Folder, name: str, full: bool) -> None:
    """Norms of queries and keys give float32 under CUDA's autocast, or where their own weights are float32.

    PyTorch's own attention, whose result is bfloat16, is cast by autocast.
    """
    folder, found = tiny_folder(name, **({"qk_norm": "rms_norm"} if name == "sd3" else {})), {}
    for cast in (False, True):
        family = load(folder, name)
        if full:
            family.denoiser.float()  # as trained weights are
        if cast:
            speed.norms_keep_dtype(family.denoiser)
        found[cast] = dtypes_on_a_gpu(family)
    assert found[False] == {(torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)}
    assert found[True] == {(torch.bfloat16,) * 4}
