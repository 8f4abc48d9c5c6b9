"""The boundary between the trainer and whatever draws its rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from t2irl.config import Run, Strict
from t2irl.errors import RunError
from t2irl.policy import Policy
from t2irl.rollout import Finished, Noise, log_densities, noised
from t2irl.types import PromptGroups, Trajectory
from t2irl.utils import distributed


@dataclass(frozen=True)
class Request:
    """The rollout that one process wants: its own images of an iteration. Can be pickled."""

    version: int
    """Number of optimiser steps behind the weights to draw with."""
    groups: PromptGroups
    """Prompts and images. A picture is known by its prompt's line and its number within the group."""
    levels: Tensor
    """(N + 1,) float32: noise levels to step through, whatever schedule the engine has of its own."""
    window: range
    """Timesteps that follow the policy's dynamics and are recorded; all others follow the ODE. Empty: plain pictures."""
    noise: Noise
    """All noise of these images: `draw(groups, 1 + len(window), latent_shape)`, the first one the initial latent, the others of
    the window's transitions in order."""
    batch_size: int
    """Most images in one call of the denoiser."""


class RolloutEngine:
    """Draws rollouts. Built once in every process of a run as `RolloutEngine(config, run, policy)`.

    The trainer calls `sync` whenever the weights have changed and then `generate`. `policy` is the trainer's own; an engine
    that is not `here` takes from it the family (`save_lora`, `latent_shape`), dynamics, guidance scale and negative prompt, and no
    weights. Pictures of evaluations, grids and the base model are always drawn by the trainer.

    No engine that runs elsewhere computes what the trainer computes to the last bit: other kernels, batches, precision. So
    the log-densities that updates divide by are those of the trainer, of the states that came back, and the engine's own ones
    only measure how far the two are apart.
    """

    class Config(Strict):
        """Settings that every engine has."""

        type: str
        """File name in `t2irl/engines/`, or `package.module:Class`."""

    version: int | None = None
    """That of the last `sync`; the trainer sets it."""
    here = False
    """Whether it draws by the trainer's code with the trainer's weights: nothing is handed over then, nor computed again."""

    def __init__(self, config: Any, run: Run, policy: Policy):
        self.config, self.run, self.policy = config, run, policy

    def sync(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Take over the trained weights, whole and float32, by their names in the denoiser: adapters, or all with full
        fine-tuning. `t2irl.export.lora_weights` gives adapters by diffusers' names. Afterwards these tensors change.
        """
        raise NotImplementedError

    def generate(self, request: Request, finished: Finished) -> Trajectory:
        """Draw, with the weights of the last `sync`; see `Trajectory` for what comes back, on any device.

        `log_probs` may be NaN. `finished` may be told of batches as they come, as `even_chunks(images, batch_size)` cuts
        them, so that they are scored meanwhile. What an engine raises on one process ends the run on all of them: RunError
        for a server that is gone, within the time that it promises. Neither method may wait for another process of the run.
        """
        raise NotImplementedError

    def close(self) -> None:
        """The run is over, maybe because of an error."""


def draw(
    engine: RolloutEngine, policy: Policy, request: Request, finished: Finished
) -> tuple[Trajectory, dict[str, float]]:
    """What an engine draws, as updates need it, and metrics.

    Weights are handed over if they have changed. Raises RunError, on all processes, when an engine that is not `here` fails on
    one of them or gives something else than it was asked for.
    """
    recorded, metrics = policy.dynamics.recorded, {}
    plain = request if recorded else replace(request, window=range(0))
    if engine.here:
        trajectory = engine.generate(plain, finished)
    else:
        with distributed.together(policy.family.device):
            if engine.version != request.version:
                engine.sync(request.version, {name: p.detach() for name, p in policy.trained.items()})
                engine.version = request.version
            trajectory = _checked(engine, policy, plain, engine.generate(plain, finished))
        if recorded:
            log_probs = log_densities(policy, trajectory, request.batch_size)
            metrics = _gap(trajectory.log_probs, log_probs)
            trajectory = replace(trajectory, log_probs=log_probs)
    return trajectory if recorded else noised(policy, trajectory, request.window, request.noise), metrics


def _checked(engine: RolloutEngine, policy: Policy, request: Request, found: Trajectory) -> Trajectory:
    """The trajectory on the policy's device, if it is one of the request."""
    where, device = f"rollout.engine {engine.config.type}", policy.family.device
    count, window, latent = len(request.groups), request.window, policy.family.latent_shape
    expected = {
        "latents": (torch.float32, (count, len(window) + 1, *latent) if window else (count, 0)),
        "log_probs": (torch.float32, (count, len(window))),
        "final": (torch.float32, (count, *latent)),
        "images": (torch.uint8, (count, 3, *found.images.shape[-2:])),
    }
    for name, (dtype, shape) in expected.items():
        tensor: Tensor = getattr(found, name)
        if tensor.dtype != dtype or tensor.shape != shape:
            raise RunError(f"{where} gave {name} of {tuple(tensor.shape)}, {tensor.dtype}; expected {shape}, {dtype}")
        if name != "log_probs" and not tensor.isfinite().all():
            raise RunError(f"{where} gave {name} that are not all finite")
    levels = request.levels[window.start : window.stop + 1]
    if found.groups != request.groups or not torch.equal(found.levels.to(device), levels):
        raise RunError(f"{where} drew other images, or other noise levels, than it was asked for")
    moved = {name: getattr(found, name).to(device) for name in expected}
    return replace(found, levels=levels, **moved)


def _gap(theirs: Tensor, own: Tensor) -> dict[str, float]:
    """The largest difference of log-densities, over all processes, if the engine gave any."""
    known = theirs.isfinite()
    worst = float((theirs - own)[known].abs().max()) if known.any() else None
    found = [value for value in distributed.gather_objects(worst) if value is not None]
    return {"policy/engine_gap": max(found)} if found else {}
