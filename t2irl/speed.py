"""Switches of a run's speed and memory, applied once where the model is built. What each changes: docs/speed.md.

Imports no torch by itself: the config class stands here, and configs are read without torch.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from t2irl.errors import ConfigError
from t2irl.strict import Strict

if TYPE_CHECKING:
    import torch

    from t2irl.models.base import ModelFamily

PACKAGES = {
    "flash": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "xformers": ("xformers", "pip install xformers"),
}
"""Attention backend -> the module that it needs, and how to get it."""
GRAPHS = 256
"""Shapes for which a block may be compiled; beyond these torch would go on uncompiled, and without a word."""


class Speed(Strict):
    """What makes a run faster or smaller and changes results by rounding at most. Defaults change nothing."""

    attention: Literal["sdpa", "flash", "xformers"] = "sdpa"
    """Attention of the denoiser: PyTorch's own, or that of the package flash-attn or xformers, on an NVIDIA GPU."""
    compile: bool = False
    """Compile the denoiser's repeated blocks with torch.compile, anew for every shape; the first iteration is slow."""
    guidance_in_one_call: bool = True
    """With guidance, both branches in one denoiser call of twice the images; false: one after the other, which needs less memory
    in the rollout."""
    fuse_lora: bool | Literal["everywhere"] = True
    """Add adapters into float32 layers where pictures are drawn without densities (evaluation, grids, the base's pictures);
    everywhere: into layers of any precision, and in rollouts outside the trained window too, at the cost of a copy of these layers."""
    tf32: bool | None = None
    """TF32 products of float32 numbers on NVIDIA GPUs, 10 bits of mantissa: everywhere or nowhere; null: PyTorch's default,
    convolutions alone."""


def apply(speed: Speed, family: ModelFamily) -> None:
    """Set a family up as the switches say. After adapters were added. Raises ConfigError for what cannot be had here."""
    family.guidance_in_one_call = speed.guidance_in_one_call
    if speed.attention != "sdpa":
        use_attention(speed.attention, family)
    if speed.compile:
        compile_blocks(family)


def use_attention(backend: str, family: ModelFamily) -> None:
    """Another attention than PyTorch's in every layer. Raises ConfigError where package, device or model do not fit."""
    where, sdpa = f"speed.attention = {backend}", "use sdpa, which takes PyTorch's own fused attention"
    module, install = PACKAGES[backend]
    if family.device.type != "cuda":
        raise ConfigError(f"{where}: needs an NVIDIA GPU, and this run is on {family.device.type}; {sdpa}")
    if family.config.precision == "fp32" and backend == "flash":
        raise ConfigError(f"{where}: works in bf16 and fp16 only; set model.precision to bf16, or {sdpa}")
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{where}: the package {module} is not installed. Install it: {install}; or {sdpa}")
    if problem := attention_problem(backend, family.denoiser):
        raise ConfigError(f"{where}: {problem}; {sdpa}")
    try:
        if dispatches(family.denoiser):
            family.denoiser.set_attention_backend(backend)
        else:
            family.denoiser.enable_xformers_memory_efficient_attention()
    except (RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(f"{where}: {error}. Newest version: {install} --upgrade; or {sdpa}") from error
    norms_keep_dtype(family.denoiser)


def norms_keep_dtype(denoiser: torch.nn.Module) -> None:
    """Norms of queries and keys give the dtype that they get, which is that of the values.

    Some give float32: those of FLUX by autocast since PyTorch 2.12, and all whose own weights are trained. PyTorch's attention is
    cast by autocast, a package's kernels refuse the mix (huggingface/diffusers #14104).
    """
    for name, module in denoiser.named_modules():
        if name.rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            module.register_forward_hook(lambda module, inputs, output: output.to(inputs[0].dtype))


def attention_problem(backend: str, denoiser: Any) -> str | None:
    """Why a denoiser cannot have an attention backend, None if it can."""
    name = type(denoiser).__name__.removeprefix("FSDP")  # put there where weights are spread over processes
    if name in ("QwenImageTransformer2DModel", "ZImageTransformer2DModel"):
        return f"{name} masks the padding of texts, which the package's kernels cannot be trusted with here"
    if dispatches(denoiser):
        return None
    if backend == "flash":
        return f"diffusers cannot put it into {name}"
    # Of the others Sana's attention is linear, and has no such kernel.
    known = name in ("SD3Transformer2DModel", "UNet2DConditionModel")
    return None if known else f"diffusers cannot put it into {name}"


def dispatches(denoiser: Any) -> bool:
    """Whether diffusers lets a denoiser's attention be chosen by name."""
    processors = [getattr(m, "processor", None) for m in denoiser.modules()]
    return any(hasattr(p, "_attention_backend") for p in processors)


def compile_blocks(family: ModelFamily, **options: Any) -> None:
    """Compile the repeated blocks in place; `options` go to torch.compile.

    For every shape anew, never for shapes in general: what a shape was computed by must not depend on what came before it,
    or rollout and update would round differently. Rollouts of recorded transitions keep to the update's graph as well.
    """
    import torch

    denoiser = family.denoiser
    blocks = repeated_blocks(denoiser)
    if not blocks or not hasattr(denoiser, "compile_repeated_blocks"):
        raise ConfigError(f"speed.compile: {type(denoiser).__name__} has no repeated blocks; set it to false")
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, GRAPHS)
    denoiser._repeated_blocks = blocks
    denoiser.compile_repeated_blocks(**{"dynamic": False} | options)
    family.compiled = True


def repeated_blocks(denoiser: torch.nn.Module) -> list[str]:
    """Names of the classes of blocks that there are several of: diffusers' list, or what it never splits over devices."""
    known = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or []
    counts = Counter(type(m).__name__ for m in denoiser.modules())
    return [name for name in known if counts[name] > 1]


def use_tf32(allowed: bool | None) -> Callable[[], None]:
    """Allow or forbid TF32 for this process; returns what undoes it. None leaves it as it is."""
    import torch

    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]

    def put(values: list[bool]) -> None:
        for place, value in zip(places, values, strict=True):
            place.allow_tf32 = value

    if allowed is None:
        return lambda: None
    put([allowed] * 2)
    return lambda: put(before)
