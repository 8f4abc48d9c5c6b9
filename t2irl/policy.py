"""The policy: which weights are trained, and the named snapshots of them (reference policy, running average)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from t2irl.config import Lora, Run
from t2irl.dynamics.base import Dynamics, Reduction
from t2irl.errors import ConfigError
from t2irl.models.base import DTYPES, ModelFamily
from t2irl.registry import did_you_mean
from t2irl.sharding import TRAINED, Company, local, part_of, shard, whole
from t2irl.types import MicroBatch, Prediction, TextEmbeds
from t2irl.utils import distributed


class Policy:
    """A model family's denoiser with trainable weights, guidance and dynamics.

    `trained` maps names to float32 parameters; everything else is frozen. With LoRA the reference policy is the denoiser
    without its adapters, with full fine-tuning a copy of the initial weights. `snapshots` holds further copies of the trained
    weights by name; they are saved with the run. With `sharded` each process holds a part of every weight and every copy; all
    processes must then build the policy.
    """

    def __init__(self, run: Run, family: ModelFamily, dynamics: Dynamics, reduction: Reduction, sharded: bool = False):
        self.family, self.dynamics = family, dynamics
        self.reduction: Reduction = reduction
        if not dynamics.recorded:
            check_levels(run.rollout.dynamics.type, dynamics, family)
        self.guidance_scale = run.rollout.guidance_scale
        self.negative_prompt = run.rollout.negative_prompt
        self.tune, self.ema, self.fuse = run.policy.tune, run.policy.ema, run.speed.fuse_lora
        self._joined: list[tuple[Tensor, Tensor, Tensor]] = []
        """Inside `fused`: each adapted weight, what it is alone and with its adapter."""
        if isinstance(self.tune, Lora):
            self._add_adapters(self.tune, run.seed)
        else:
            family.denoiser.requires_grad_(True)
        if sharded:
            shard(family.denoiser, family.device, DTYPES[run.model.precision])
        self.trained: dict[str, torch.nn.Parameter] = {}
        for name, parameter in family.denoiser.named_parameters():
            if parameter.requires_grad:
                if not sharded:
                    parameter.data = parameter.data.float()
                self.trained[name] = parameter
        self._initial = self._copy() if self.tune.type == "full" else None
        self.average = self._copy() if self.ema is not None else None
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        self.now = TRAINED
        """Which weights the denoiser has: `trained`, or another policy that `at` knows."""
        self.company = family.company = Company(self) if sharded else None
        distributed.keep(self.company)

    def _add_adapters(self, tune: Lora, seed: int) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        targets = list(self.family.lora_targets if tune.targets is None else tune.targets)
        check_targets(self.family.denoiser, targets)
        torch.manual_seed(seed)  # peft draws the adapters from the global generator
        self.family.denoiser.add_adapter(
            LoraConfig(r=tune.rank, lora_alpha=tune.alpha, target_modules=targets, init_lora_weights="gaussian")
        )
        for layer in self.family.denoiser.modules():
            if isinstance(
                layer, Linear
            ):  # autocast casts what comes in, which peft would first make float32, for each adapter
                layer.cast_input_dtype_enabled = False

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trained.items()}

    def take_snapshot(self, name: str) -> None:
        """Keep a copy of the trained weights as they are now, in place of an earlier one of that name."""
        self.snapshots[name] = self._copy()

    def text(self, prompts: Sequence[str]) -> TextEmbeds:
        """Encoded prompts, each encoded once per run."""
        return self.family.text(prompts)

    def velocity(self, latents: Tensor, t: Tensor, text: TextEmbeds, guidance: float | None = None) -> Tensor:
        """Guided velocity, float32. Guidance defaults to the rollout's, so that rollout and update cannot differ."""
        scale = self.guidance_scale if guidance is None else guidance
        null = self.family.null(self.negative_prompt) if scale != 1 else None
        return self.family.velocity(latents, t, text, null, scale)

    def predict(self, batch: MicroBatch) -> Prediction:
        """Velocity, transition and log-density of a micro-batch, by the functions that the rollout used."""
        velocity = self.velocity(batch.x, batch.t, batch.text, None if self.dynamics.guided else 1.0)
        mean, std = self.dynamics.mean_std(batch.x, velocity, batch.t, batch.t_next)
        return Prediction(velocity, mean, std, self.dynamics.log_prob(batch.x_next, mean, std, self.reduction))

    def after_update(self, update: int) -> None:
        """Move the running average; `update` is the number of optimiser steps taken before this one.

        decay = min((1 + n) / (10 + n), ema.decay) with warm-up.
        """
        if self.average is None or self.ema is None:
            return
        decay = min((1 + update) / (10 + update), self.ema.decay) if self.ema.warmup else self.ema.decay
        shadows = [self.average[name] for name in self.trained]
        torch._foreach_lerp_(shadows, [p.detach() for p in self.trained.values()], 1 - decay)

    @contextmanager
    def _as(self, name: str) -> Iterator[None]:
        before, self.now = self.now, name
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def _swapped(self, name: str, weights: dict[str, Tensor]) -> Iterator[None]:
        kept = {n: p.data if self.company is None else local(p).clone() for n, p in self.trained.items()}
        self._put(weights)
        try:
            with self._as(name):
                yield
        finally:
            self._put(kept)

    def _put(self, weights: dict[str, Tensor]) -> None:
        """Give the denoiser these weights; FSDP gathers what is in memory of its own, so that spread ones are copied there."""
        for name, p in self.trained.items():
            if self.company is None:
                p.data = weights[name]
            else:
                local(p).copy_(local(weights[name]))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the denoiser has the running average's weights (its own without one)."""
        if self.average is None:
            yield
        else:
            with self._swapped("average", self.average):
                yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the denoiser is the reference policy."""
        if self._initial is not None:
            with self._swapped("reference", self._initial):
                yield
            return
        self.family.denoiser.disable_adapters()
        if self.company is not None:
            for parameter in self.trained.values():  # FSDP asks at the first call what is trained
                parameter.requires_grad_(True)
        try:
            with self._as("reference"):
                yield
        finally:
            self.family.denoiser.enable_adapters()

    def at(self, anchor: str) -> AbstractContextManager[None]:
        """Inside, the denoiser is another policy: `reference`, `average`, or the snapshot of that name."""
        if anchor == "reference":
            return self.reference()
        return self.averaged() if anchor == "average" else self._swapped(anchor, self.snapshots[anchor])

    @contextmanager
    def fused(self, recorded: bool = False) -> Iterator[None]:
        """Inside, adapters are added into the layers that they adapt: the same function up to rounding, without two more
        products a layer. For sampling without gradient. With `recorded` some calls, which `apart` must be around, are for densities
        that are those of the update to the bit.

        Leaves the layers as they were, to the bit. Does nothing without `speed.fuse_lora`, for full fine-tuning, for the reference policy, whose adapters
        are off, nor for weights spread over processes; nor, unless that is `everywhere`, for layers below float32 and with `recorded`.
        """
        from peft.tuners.lora import Linear

        layers = [m for m in self.family.denoiser.modules() if isinstance(m, Linear) and self.fuse]
        plain = [cast(Tensor, layer.get_base_layer().weight) for layer in layers]
        off = any(layer.disable_adapters for layer in layers)
        bold = recorded or any(weight.dtype != torch.float32 for weight in plain)
        if not layers or off or self.company is not None or (bold and self.fuse != "everywhere"):
            yield
            return
        for layer, weight in zip(layers, plain, strict=True):
            joined = weight.data + layer.get_delta_weight(layer.active_adapters[0])
            self._joined.append((weight, weight.data, joined.to(weight.dtype)))
        self._join(True)
        try:
            yield
        finally:
            self._join(False)
            self._joined.clear()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside `fused`, adapters are apart all the same; elsewhere this does nothing."""
        if not self._joined:
            yield
            return
        self._join(False)
        try:
            yield
        finally:
            self._join(True)

    def _join(self, joined: bool) -> None:
        for weight, alone, both in self._joined:
            weight.data = both if joined else alone
        if joined:
            self.family.denoiser.disable_adapters()
        else:
            self.family.denoiser.enable_adapters()

    def weights(self) -> dict[str, Tensor]:
        """The trained weights that the denoiser has now, whole. Spread ones for the main process alone, on the host."""
        found: dict[str, Tensor] = {name: p.detach() for name, p in self.trained.items()}
        return found if self.company is None else self.company.gather(found)

    def state_dict(self) -> dict[str, Tensor]:
        """Trained weights, their average and snapshots, by `trained.<name>`, `average.<name>`, `snapshot.<snapshot>.<name>`.

        Spread ones are put together on the main process: all processes call it.
        """
        return whole({f"{kind}.{n}": t.detach() for kind, copy in self._saved().items() for n, t in copy.items()})

    def _saved(self) -> dict[str, dict[str, Tensor]]:
        """The trained weights and every copy of them that is saved, by the prefix of its tensors."""
        average = {} if self.average is None else {"average": self.average}
        snapshots = {f"snapshot.{name}": weights for name, weights in self.snapshots.items()}
        return {TRAINED: dict(self.trained), **average, **snapshots}

    @contextmanager
    def restored(self, state: dict[str, Any]) -> Iterator[None]:
        """Inside, the policy is what `state_dict` gave; afterwards what it was."""
        kept = {kind: {n: local(t).clone() for n, t in copy.items()} for kind, copy in self._saved().items()}
        self.load_state_dict(state)
        try:
            yield
        finally:
            for kind, copy in self._saved().items():
                for name, tensor in copy.items():
                    local(tensor).copy_(kept[kind][name])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises KeyError for a missing tensor, ValueError for another shape."""
        with torch.no_grad():
            for prefix, target in self._saved().items():
                for name, tensor in target.items():
                    saved = state[f"{prefix}.{name}"]
                    if saved.shape != tensor.shape:
                        raise ValueError(
                            f"{prefix}.{name} has shape {tuple(saved.shape)}, expected {tuple(tensor.shape)}"
                        )
                    local(tensor).copy_(local(part_of(saved, tensor)))


def check_levels(kind: str, dynamics: Dynamics, family: ModelFamily) -> None:
    """Raise ConfigError for dynamics that would train at noise levels which the denoiser does not know."""
    asked = float(dynamics.levels(torch.ones(1)).max())
    if asked > family.highest_level:
        known = int(family.highest_level * 1000) / 1000
        raise ConfigError(
            f"rollout.dynamics.range ends at noise level {asked:g}, but the noise of {family.config.path} ends at "
            f"{family.highest_level:.4f}: with rollout.dynamics.type = {kind} use a range up to {known:g} at most"
        )


def check_targets(denoiser: torch.nn.Module, targets: Sequence[str]) -> None:
    """Raise ConfigError for LoRA targets that do not match linear layers alone.

    peft itself notices only when no target matches any layer, or prints a whole block.
    """
    layers = dict(denoiser.named_modules())
    linear = [name for name, module in layers.items() if isinstance(module, torch.nn.Linear)]
    # Blocks have equal layers, so their number is left out: blocks.3.attn.to_q -> attn.to_q.
    known = sorted({re.sub(r"^[^.]*\.\d+\.", "", name) for name in linear})
    choices = f"Layers: {', '.join(known)}; null takes the usual ones"
    if not targets:
        raise ConfigError(f"policy.tune.targets is empty. {choices}")
    for target in targets:
        matches = [name for name in layers if f".{name}".endswith(f".{target}")]  # peft's rule
        if not set(matches) & set(linear):
            hint = did_you_mean(target, known)
            raise ConfigError(f"policy.tune.targets: no linear layer is called {target!r}.{hint} {choices}")
        others = [name for name in matches if name not in linear]
        if others:
            raise ConfigError(
                f"policy.tune.targets: {target!r} also matches {others[0]}, which is no linear layer; write more of the name. {choices}"
            )
