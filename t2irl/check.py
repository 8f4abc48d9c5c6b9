"""What a run will be, before anything heavy is loaded: geometry, calls, memory, legal alternatives.

Reads prompt files, the model folder's JSON files and the headers of its weight files, no weights.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2irl import registry
from t2irl.config import FixedWindow, Lora, RandomWindow, Run, SlidingWindow
from t2irl.data import Prompts, load_both, overlap, prompt_ids
from t2irl.errors import ConfigError, DataError
from t2irl.geometry import Geometry, either

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape, of a network's weights."""

HEADER_LIMIT = 100 << 20
"""safetensors allows no longer header."""


@dataclass(frozen=True)
class Network:
    """One network of a pipeline folder."""

    config: Mapping[str, Any]
    """Its config.json."""
    shapes: Shapes | None
    """Its weights, None where there are none in safetensors format."""

    @property
    def size(self) -> int | None:
        """Number of weights."""
        return None if self.shapes is None else sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Folder:
    """A diffusers pipeline folder, without its weights."""

    pipeline: str
    """Class name."""
    networks: Mapping[str, Network]
    """By the name of their folder: transformer or unet, vae, text_encoder ..."""

    @property
    def denoiser(self) -> str:
        """Name of the denoiser's folder."""
        return "transformer" if "transformer" in self.networks else "unet"


def read_folder(path: Path) -> Folder:
    """What a pipeline folder holds. Raises DataError with everything that is missing."""
    where = f"model.path = {path}"
    if not path.is_dir():
        raise DataError(f"{where}: no such folder (relative to {Path.cwd()}). Expected a diffusers pipeline folder")
    if not (path / "model_index.json").is_file():
        raise DataError(f"{where}: not a diffusers pipeline folder: model_index.json is missing")
    index = _read_json(path / "model_index.json", where)
    parts = [n for n, entry in index.items() if isinstance(entry, list) and entry[:1] not in ([None], [])]
    missing = [f"{name}/" for name in parts if not (path / name).is_dir()]
    networks = [n for n in parts if n in ("transformer", "unet", "vae") or n.startswith("text_encoder")]
    missing += [
        f"{n}/config.json" for n in networks if (path / n).is_dir() and not (path / n / "config.json").is_file()
    ]
    if not {"transformer", "unet"} & set(parts):
        missing.append("a transformer or unet in model_index.json")
    if missing:
        raise DataError(f"{where}: the pipeline folder is not complete; missing: {', '.join(missing)}")
    return Folder(
        str(index.get("_class_name", "pipeline of unknown class")),
        {n: Network(_read_json(path / n / "config.json", where), _read_shapes(path / n, where)) for n in networks},
    )


def _read_json(file: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {file.relative_to(file.parents[1])} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{where}: {file.relative_to(file.parents[1])} holds no JSON object")
    return content


def _read_shapes(folder: Path, where: str) -> Shapes | None:
    """Shapes of a network's weights, from the headers of its safetensors files. None if it has none."""
    files = sorted(folder.glob("*.safetensors"))
    # A folder may hold the same weights again in other precisions (`model.fp16.safetensors`): take the plain ones.
    plain = [f for f in files if f.stem in ("model", "diffusion_pytorch_model")]
    shards = [f for f in files if f.stem.split("-")[0] in ("model", "diffusion_pytorch_model")]
    first_variant = [f for f in files if files and f.stem.split(".")[1:] == files[0].stem.split(".")[1:]]
    shapes: dict[str, tuple[int, ...]] = {}
    for file in plain or shards or first_variant:
        try:
            with file.open("rb") as handle:
                (length,) = struct.unpack("<Q", handle.read(8))
                if length > HEADER_LIMIT:
                    raise ValueError("its header has an impossible length; is it a Git LFS pointer?")
                header = json.loads(handle.read(length))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
            raise DataError(f"{where}: {file.relative_to(folder.parent)} is no safetensors file: {error}") from error
    return shapes or None


def adapted(shapes: Shapes, tune: Lora, targets: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Shapes of the layers that `targets` name.

    Raises ConfigError for a target of the config that names no layer.
    """
    layers = {n.removesuffix(".weight"): s for n, s in shapes.items() if n.endswith(".weight") and len(s) > 1}
    for target in tune.targets or ():
        if not any(_is_target(layer, target) for layer in layers):
            known = sorted({layer.split(".", 2)[-1] for layer in layers if layer.startswith("transformer_blocks.")})
            raise ConfigError(
                f"policy.tune.targets: no layer of the denoiser is called {target!r}.{registry.did_you_mean(target, known)} "
                f"Layers: {', '.join(known or sorted(layers))}"
            )
    return [shape for layer, shape in layers.items() if any(_is_target(layer, t) for t in targets)]


def _is_target(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def trained_size(run: Run, folder: Folder, adapters: bool = True) -> int | None:
    """Number of trained weights, None when the folder holds no weights to count. LoRA's are rank x (inputs + outputs) a layer.

    Without `adapters`: of the layers that get them, themselves.
    """
    shapes, tune = folder.networks[folder.denoiser].shapes, run.policy.tune
    if shapes is None or not isinstance(tune, Lora):
        return folder.networks[folder.denoiser].size
    layers = adapted(shapes, tune, tuple(tune.targets or registry.find("models", run.model.type).lora_targets))
    return sum(tune.rank * (s[0] + math.prod(s[1:])) if adapters else math.prod(s) for s in layers)


def describe(run: Run, world_size: int, spread: bool = False, data: tuple[Prompts, Prompts] | None = None) -> str:
    """What a run will be on a number of processes, as text. Raises ConfigError and DataError as the run itself would.

    `spread`: the denoiser's weights are spread over the processes. `data`: the run's prompts, where they have been read.
    """
    from t2irl.estimate import estimate  # which reads folders by what is above

    g = Geometry.of(run, world_size)
    train, heldout = data or load_both(run.data)
    prompt_ids(0, len(train), run.rollout.prompts, run.seed)  # refuses a file that is too short
    folder = read_folder(run.model.path)
    rows = [*_plan(run, g, folder), ("data", f"{len(train)} prompts to train on, {len(heldout)} held out")]
    rows += [("", f"note: {note}") for note in (*train.notes, *heldout.notes)]
    if both := overlap(train, heldout):
        rows.append(("", f"warning: {len(both)} held-out prompts are trained on as well, for example {both[0]!r}"))
    if not run.heldout_rewards:
        what = "what pleases the rewards and nothing else stays unseen; name a reward that is never trained on"
        rows.append(("", f"warning: heldout_rewards is empty: {what}"))
    if spread:
        what = f"each holds 1/{world_size} of the denoiser, trained weights, copies and moments"
        rows.append(("spread", f"over {world_size} processes: {what}"))
    found = estimate(run, g, folder, len(train) + len(heldout), spread)
    parts = (*found.device, *found.host, *((f"  {name}", size) for name, size in found.phases))
    width = max(len(name) for name, _ in parts)
    total = f"{human(found.peak)}{'' if found.complete else ' and the unknown parts'}"
    rows.append(("memory", f"estimate per process: {total} at most, without rewards; the run reports its peak"))
    shown = [f"{name:{width}}  {human(size)}" for name, size in parts]
    shown.insert(len(shown) - len(found.phases), "and, one at a time, the largest of")
    rows += [("", f"  {line}") for line in shown]
    rows.append(("time", "unknown until the first iteration is done"))
    rows.append(("legal", f"also possible, one at a time: {either(g.legal_prompts)} prompts; {_alternatives(g)}"))
    return "\n".join(f"{label:<10} {text}".rstrip() for label, text in rows)


def _alternatives(g: Geometry) -> str:
    return "; ".join(
        f"{name} {either(values)}"
        for name, values in (
            ("group size", g.legal_group_sizes),
            ("processes", g.legal_processes),
            ("updates", g.legal_updates),
        )
        if values
    )


def _plan(run: Run, g: Geometry, folder: Folder) -> Iterator[tuple[str, str]]:
    rollout, many = run.rollout, f"{g.world_size} process{'es' * (g.world_size > 1)}"
    yield (
        "model",
        f"{run.model.path} ({folder.pipeline}), {_count(folder.networks[folder.denoiser].size)} denoiser weights",
    )
    yield (
        "policy",
        f"{_tuning(run)}: {_count(trained_size(run, folder))} weights trained in float32, the rest {run.model.precision}",
    )
    groups = g.images_per_process // rollout.group_size
    whole = f"{groups} whole group{'s' * (groups > 1)} each" if g.whole_groups else "groups lie across processes"
    each = f"{g.images_per_process} per process, {whole}"
    yield (
        "geometry",
        f"{rollout.prompts} prompts x {rollout.group_size} images = {g.images} images an iteration on {many} ({each})",
    )
    guidance = (
        "no guidance"
        if rollout.guidance_scale == 1
        else f"guidance {rollout.guidance_scale:g} ({'calls of twice the images' if run.speed.guidance_in_one_call else 'two calls'})"
    )
    yield "rollout", f"{rollout.steps} timesteps, trained {_window(g)}; {rollout.dynamics.type}, {guidance}"
    batches = f"{g.rollout_batches} batch{'es' * (g.rollout_batches > 1)} of at most {g.largest_rollout_batch} images"
    yield "", f"{batches} -> {g.denoiser_calls_rollout} denoiser calls per process"
    calls = g.updates_per_iteration * g.micro_batches * (1 if one_call(run) else 2)
    micro = f"{g.micro_batches} micro-batch{'es' * (g.micro_batches > 1)} of at most {g.largest_micro_batch} images"
    yield (
        "update",
        f"{g.updates_per_iteration} x {g.images_per_update} images; each {micro} x {g.window_size} timesteps",
    )
    yield "", f"-> at most {calls} denoiser calls forward and backward per process"
    yield (
        "run",
        f"{run.iterations} iterations = {g.total_updates} updates, {run.iterations * g.images} images, in {run.run_dir}",
    )
    rewards = ", ".join(f"{name} {config.weight:g} ({config.type})" for name, config in run.rewards.items())
    held = ", ".join(f"{name} ({config.type})" for name, config in run.heldout_rewards.items())
    yield "rewards", f"{rewards}    held out: {held or 'none'}"
    regularizers = ", ".join(f"{name} ({config.type})" for name, config in run.regularizers.items())
    yield "algorithm", f"{run.algorithm.type}    regularisers: {regularizers or 'none'}"


def one_call(run: Run) -> bool:
    """Whether the velocity of a batch takes one denoiser call in the update: both branches in it, or no guidance."""
    guided = run.rollout.guidance_scale != 1 and getattr(run.rollout.dynamics, "guided", True)
    return run.speed.guidance_in_one_call or not guided


def _tuning(run: Run) -> str:
    tune = run.policy.tune
    if not isinstance(tune, Lora):
        return "all weights"
    targets = tune.targets or registry.find("models", run.model.type).lora_targets
    return f"LoRA rank {tune.rank} on {len(targets)} kinds of layers"


def _window(g: Geometry) -> str:
    if not g.recorded:
        return f"{g.window_size} noise levels of the finished pictures"
    window, places, size = g.run.rollout.window, g.window_starts, g.window_size
    span = f"{places[0]} to {places[-1] + size - 1}"
    if isinstance(window, FixedWindow):
        return f"{size} ({span})"
    if isinstance(window, RandomWindow):
        return f"{size}, anywhere in {span}"
    assert isinstance(window, SlidingWindow)
    return f"{size}, sliding over {span} by {window.stride} every {window.dwell} iterations"


def _count(number: int | None) -> str:
    if number is None:
        return "unknown number of"
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M" if number >= 1e4 else str(number)


def human(size: int | None) -> str:
    """Bytes for people."""
    if size is None:
        return "unknown"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 2**10:.1f} KiB"
