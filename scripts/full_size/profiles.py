"""What `bench_gpu.py` measures: profiles (a model and its work) and variants of them, as overrides of a run's settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tiny_models.flux import make_flux
from tiny_models.qwen_image import make_qwen_image
from tiny_models.sd3 import make_sd3

from full_size.networks import write_folder


@dataclass(frozen=True)
class Profile:
    """A workload: which model, which settings of a run."""

    title: str
    """For people."""
    folder: Callable[[Path], Path]
    """Writes the folder that the model's configs are read from."""
    model: dict[str, Any]
    """`model` of the run, without its path."""
    rollout: dict[str, Any]
    """`rollout` of the run."""
    rank: int
    """Of the adapters, on the family's usual layers."""
    batch_size: int
    """Images in one forward and backward pass."""
    update: dict[str, Any] = field(default_factory=dict)

    def tree(self, folder: Path) -> dict[str, Any]:
        """A run's settings."""
        return {
            "seed": 0,
            "iterations": 1000,
            "model": {"resolution": 512, "precision": "bf16", "vae_precision": "fp32"} | self.model | {"path": str(folder)},
            "policy": {"tune": {"type": "lora", "rank": self.rank, "alpha": 2 * self.rank}},
            "data": {"prompts": "prompts.txt", "heldout": "prompts.txt"},  # not read: prompts are made up
            "rollout": {
                "group_size": 16, "steps": 10, "dynamics": {"type": "cps", "noise_level": 0.8},
                "window": {"type": "random", "size": 2, "range": [0, 5]},
            } | self.rollout,
            "algorithm": {"type": "grpo", "clip_range": 1e-3},
            "rewards": {"vividness": {"type": "vividness"}},  # costs next to nothing
            "update": {"per_iteration": 2, "batch_size": self.batch_size},
            "tracking": {"trackers": []},
        }  # fmt: skip


TINY_ROLLOUT = {
    "prompts": 2, "group_size": 4, "steps": 4, "batch_size": 4,
    "window": {"type": "random", "size": 2, "range": [0, 3]},
}  # fmt: skip
GUIDED = {"guidance_scale": 4.0, "negative_prompt": " "}
TINY = {"precision": "fp32", "max_sequence_length": 12}
PROFILES = {
    "b": Profile(
        "B': SD3.5 Medium, 512 px, 128 images, no guidance, 2 of 10 timesteps trained",
        partial(write_folder, name="sd35_medium"),
        {"type": "sd3", "max_sequence_length": 128},
        {"prompts": 8, "batch_size": 32},
        rank=32,
        batch_size=8,
    ),
    "c": Profile(
        "C'': FLUX.1-dev, 512 px, 32 images, 512 text tokens, 2 of 10 timesteps trained",
        partial(write_folder, name="flux1_dev"),
        {"type": "flux", "max_sequence_length": 512},
        {"prompts": 2, "batch_size": 16},
        rank=64,
        batch_size=1,
    ),
    "d": Profile(
        "D'': Qwen-Image, 512 px, 32 images, 64 text tokens, guided, 2 of 10 timesteps trained, checkpointing",
        partial(write_folder, name="qwen_image"),
        {"type": "qwen_image", "gradient_checkpointing": True, "vae_precision": "bf16"},
        {"prompts": 2, "batch_size": 8, **GUIDED},
        rank=64,
        batch_size=1,
    ),
    "tiny-b": Profile(
        "an SD3.5 of two layers, 16 px",
        partial(make_sd3, qk_norm="rms_norm", dual_attention=(0,), shift=3.0),
        {"type": "sd3", "resolution": 16, **TINY},
        TINY_ROLLOUT,
        rank=4,
        batch_size=4,
    ),
    "tiny-c": Profile(
        "a FLUX.1-dev of four layers, 16 px",
        make_flux,
        {"type": "flux", "resolution": 16, **TINY},
        TINY_ROLLOUT,
        rank=4,
        batch_size=4,
    ),
    "tiny-d": Profile(
        "a Qwen-Image of two layers, 16 px, guided, checkpointing",
        make_qwen_image,
        {"type": "qwen_image", "resolution": 16, "gradient_checkpointing": True, **TINY},
        TINY_ROLLOUT | GUIDED,
        rank=4,
        batch_size=4,
    ),
}
"""b, c, d: profiles B', C'' and D'' at full size, for a GPU of 80 GB. tiny-*: the same code in seconds on a CPU."""

BASE, AGAIN, DIFFUSERS = "base", "base again", "diffusers"
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    DIFFUSERS: (),
    "compile": ("--speed.compile=true",),
    "flash": ("--speed.attention=flash",),
    "xformers": ("--speed.attention=xformers",),
    "checkpointing": ("--model.gradient_checkpointing=true",),
    "no checkpointing": ("--model.gradient_checkpointing=false",),
    "two calls": ("--speed.guidance_in_one_call=false",),
    "bf16 decoder": ("--model.vae_precision=bf16",),
    "tf32": ("--speed.tf32=true",),
    "fp16": ("--model.precision=fp16",),
    "bf16": ("--model.precision=bf16",),
    "fp32": ("--model.precision=fp32",),
    "fp32 tf32": ("--model.precision=fp32", "--speed.tf32=true"),
    "fp32 unfused": ("--model.precision=fp32", "--speed.fuse_lora=false"),
    AGAIN: (),
}
"""Name -> overrides. The second one is the base's rollout as plain denoiser calls and decoding in a loop, without a trainer. The
last one is the first once more: how far equal arms differ."""
GPU_ONLY = ("compile", "fp16", "tf32", "fp32 tf32")
"""Left out on the CPU unless asked for: compiling takes minutes there, fp16 is emulated, TF32 does not exist."""
