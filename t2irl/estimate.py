"""What memory a run will need, part by part, from a model folder's JSON files and headers of weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2irl import registry
from t2irl.algebra.rules import needs_pooled
from t2irl.check import Folder, Shapes, trained_size
from t2irl.config import Lora, Run
from t2irl.geometry import Geometry

Rows = tuple[tuple[str, "int | None"], ...]
"""What it is, and bytes, None for unknown."""

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ACTIVATION_BYTES = {("lora", 4): 56, ("lora", 2): 41, ("full", 4): 99, ("full", 2): 66}
"""(tuning, bytes of the precision) -> bytes kept for the backward pass per token, channel and layer of any transformer.
`scripts/activation_bytes.py` finds 60, 43, 106 and 66 for SD3.5, 58, 37, 90 and 53 for FLUX.1, 56, 40, 100 and 62 for Qwen-Image;
families whose layers keep more, or are no transformer's, say so in their `sizes`."""
DRAWING_BYTES = {4: 60, 2: 40}
"""Bytes of the precision -> bytes alive at once without gradient, per token and channel of the widest layer: FLUX.1's, SD3's are fewer."""
DECODER_TENSORS = 3
"""Tensors of full size and the channels of the last but one resolution that an image decoder holds at once."""
BLOCK = re.compile(r"(.*(?:blocks|layers|refiner|resnets)\.\d+)\.")
"""The block of a weight, by its name: what `sharding.shard` has gathered in one go."""


@dataclass(frozen=True)
class Estimate:
    """Of one process. Rewards are not in it."""

    device: Rows
    """What the device holds all the time."""
    host: Rows
    """What rests in host memory."""
    phases: Rows
    """What comes on top, one at a time."""

    @property
    def peak(self) -> int:
        """Bytes on the device at most, of what is known."""
        return sum(size or 0 for _, size in self.device) + max((size or 0 for _, size in self.phases), default=0)

    @property
    def in_one_memory(self) -> int:
        """The same where device and host are one, as on a CPU."""
        return self.peak + sum(size or 0 for _, size in self.host)

    @property
    def complete(self) -> bool:
        """Whether every part on the device is known."""
        return all(size is not None for _, size in (*self.device, *self.phases))


def sizes(run: Run, folder: Folder) -> Any:
    """The family's `Sizes` of one image, None for a folder that is laid out otherwise."""
    family = registry.find("models", run.model.type)
    try:
        return family.sizes(run.model, {name: network.config for name, network in folder.networks.items()})
    except (KeyError, TypeError):
        return None


def estimate(run: Run, g: Geometry, folder: Folder, prompts: int, spread: bool = False) -> Estimate:
    """Of a run on as many processes as `g` says; `prompts`: how many different ones it will meet.

    `spread`: the denoiser, and what is there once more for each of its trained weights, is spread over the processes.
    """
    parts = g.world_size if spread else 1
    full = not isinstance(run.policy.tune, Lora)
    precision, resting = BYTES[run.model.precision], getattr(run.model, "offload", "none")
    image, trained = sizes(run, folder), trained_size(run, folder)
    denoiser = folder.networks[folder.denoiser].size
    texts = [n.size for name, n in folder.networks.items() if name.startswith("text_encoder")]
    decoder = folder.networks["vae"].size if "vae" in folder.networks else 0
    copies = 4 + (run.policy.ema is not None)  # weights, gradient, two moments, average
    text = ("text encoders", None if None in texts else sum(n or 0 for n in texts) * precision)
    vae = ("image decoder", _times(decoder, BYTES[run.model.vae_precision]))
    learning = f"{'trained weights' if full else 'adapters'}, gradient, optimiser{', average' if copies == 5 else ''}"
    idle = [part for part, rests in ((text, resting != "none"), (vae, resting == "all")) if rests]
    device = [
        ("reference copy of the denoiser" if full else "denoiser", _times(denoiser, 4 if full else precision, parts)),
        *(part for part in (text, vae) if part not in idle),
        (learning, _times(trained, 4 * copies, parts)),
    ]
    host = [(f"{name}, host memory while idle", size) for name, size in idle]
    at_work = [(f"{name} at work", size) for name, size in idle]
    if image is None:
        unknown = (("activations", None),)
        return Estimate((*device, ("stored trajectory", None)), (*host, ("text cache, host memory", None)), unknown)
    states = 4 * image.latent * (g.window_size + 2) + 4 * g.window_size + image.pixels
    cached = min(prompts + 1, run.model.text_cache)
    device.append(("stored trajectory", g.images_per_process * states))
    host.append((f"text cache, host memory ({cached} prompts)", cached * image.text * precision))
    learning = [
        n for n in needs_pooled(run) if registry.find("rewards", run.rewards[n].type).would_learn(run.rewards[n])
    ]
    if run.combine and learning:
        host.append(("base model's pictures, host memory", run.combine.base_images * image.pixels))
    phases = (*_phases(run, g, folder, image, precision, parts), *at_work)
    later = sum(size or 0 for name, size in device if name not in (text[0], vae[0]))
    if parts > 1 and (whole := (denoiser or 0) * precision) > later:  # moments and trajectory are not there yet
        phases += (("loading the whole denoiser, beyond what is held later", whole - later),)
    return Estimate(tuple(device), tuple(host), phases)


def _phases(run: Run, g: Geometry, folder: Folder, image: Any, precision: int, parts: int) -> Rows:
    full = not isinstance(run.policy.tune, Lora)
    guided = run.rollout.guidance_scale != 1 and getattr(run.rollout.dynamics, "guided", True)
    kept = _kept(run, image, full, precision)
    rows = g.largest_micro_batch * g.window_size * (2 if guided else 1)
    updating, drawing = _whole(run, folder, precision, parts)
    if run.speed.fuse_lora == "everywhere":
        drawing += (trained_size(run, folder, adapters=False) or 0) * precision
    drawn = g.largest_rollout_batch * (2 if guided and run.speed.guidance_in_one_call else 1)
    # Compiled, recorded transitions are computed with gradient.
    each = max(kept if run.speed.compile else 0, DRAWING_BYTES[precision] * image.layer)
    return (
        (f"update, activations of {g.largest_micro_batch} images, rough", rows * kept + updating),
        (f"drawing {g.largest_rollout_batch} images, rough", drawn * each + drawing),
        (f"decoding {g.largest_rollout_batch} images, rough", _decoding(run, g, folder, image)),
    )


def _whole(run: Run, folder: Folder, precision: int, parts: int) -> tuple[int, int]:
    """Bytes of weights beside those held: while a micro-batch is learned from, and while pictures are drawn."""
    full = not isinstance(run.policy.tune, Lora)
    trained = trained_size(run, folder) or 0
    if parts == 1:
        # Under autocast every trained weight has a copy of the lower precision while it is used.
        casts = trained * precision if full and precision < 4 else 0
        return casts, casts
    largest, others = blocks(folder.networks[folder.denoiser].shapes or {})
    gathered = (2 * largest + others) * precision  # the next block comes while one works
    summed = largest * (precision + 4) if full else 0  # gradients of a block, and in float32 for their sum
    aside = -(-trained // parts) * 4  # where other weights take the place of the trained ones, these are put aside
    swaps = full and bool(run.regularizers)
    # The divergence of the averaged weights from the reference policy is measured under both.
    shown = (run.policy.ema is not None) + (full and run.monitors.prompts > 0)
    return gathered + summed + swaps * aside, gathered + shown * aside


def blocks(shapes: Shapes) -> tuple[int, int]:
    """Number of weights in the largest block of a denoiser, and of those that are in none; both 0 without weights."""
    sizes: dict[str, int] = {"": 0}
    for name, shape in shapes.items():
        found = BLOCK.match(name)
        block = found[1] if found else ""
        sizes[block] = sizes.get(block, 0) + math.prod(shape)
    others = sizes.pop("")
    return max(sizes.values(), default=0), others


def _kept(run: Run, image: Any, full: bool, precision: int) -> int:
    """Bytes kept for the backward pass of one row."""
    factor = ACTIVATION_BYTES["full" if full else "lora", precision]
    if run.model.gradient_checkpointing:
        return factor * image.layer + precision * image.kept
    return factor * image.kept


def _decoding(run: Run, g: Geometry, folder: Folder, image: Any) -> int | None:
    """The image decoder at its last resolution, which as many pixels reach at once as a call takes, and the pictures."""
    from t2irl.pipelines.family import PIXELS_AT_ONCE

    vae: Mapping[str, Any] = folder.networks["vae"].config if "vae" in folder.networks else {}
    if "base_dim" in vae:
        widths = [vae["base_dim"] * m for m in vae["dim_mult"]]
    else:
        widths = vae.get("decoder_block_out_channels") or vae.get("block_out_channels") or []
    if not widths:
        return None
    pixels, images = image.pixels // 3, g.largest_rollout_batch
    at_once = pixels * min(max(PIXELS_AT_ONCE // pixels, 1), images)
    tensors = at_once * DECODER_TENSORS * widths[min(1, len(widths) - 1)] * BYTES[run.model.vae_precision]
    return tensors + 2 * 4 * images * image.pixels


def _times(count: int | None, size: int, parts: int = 1) -> int | None:
    """Bytes of one of equal parts of so many elements."""
    return None if count is None else -(-count // parts) * size
