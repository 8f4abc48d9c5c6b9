"""One arm of a benchmark: a run's settings, built with random weights, warmed up, timed, measured."""

from __future__ import annotations

import gc
import statistics
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from full_size.families import FAMILIES
from full_size.flops import backward_factor, forward_flops
from full_size.stages import Stages, Tracked
from t2irl import registry, speed
from t2irl.batches import updates
from t2irl.check import read_folder
from t2irl.config import Run
from t2irl.errors import ConfigError, RunError
from t2irl.estimate import Estimate, estimate
from t2irl.geometry import Geometry
from t2irl.monitor import UpdateLog
from t2irl.optimizer import Optimizer
from t2irl.policy import Policy
from t2irl.rewards.combine import RewardSet
from t2irl.rollout import Noise, rollout
from t2irl.train import Parts, own_groups, update_policy
from t2irl.types import Clock

PROMPTS = tuple(f"a picture of thing {k}" for k in range(256))
PROBED = 2
"""Images whose velocity and gradient are compared between arms."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")
"""How an allocator says so where it has no exception of its own."""


def build(run: Run, device: torch.device) -> Parts:
    """What `t2irl.train.build` makes, with random weights and without a run folder."""
    family = FAMILIES[run.model.type](run.model, device)
    algorithm = registry.build("algorithms", run.algorithm)
    policy = Policy(run, family, registry.build("dynamics", run.rollout.dynamics), algorithm.reduction)
    speed.apply(run.speed, family)
    rewards, heldout = (
        RewardSet(configs, device, run.rollout.batch_size, family.work) for configs in (run.rewards, {})
    )
    geometry = Geometry.of(run, 1)
    optimizer = Optimizer(run, list(policy.trained.values()), geometry.total_updates, device)
    return Parts(family, policy, algorithm, rewards, heldout, {}, optimizer, PROMPTS, PROMPTS, geometry, Clock())


def time_parts(parts: Parts, stages: Stages) -> None:
    """Let what happens inside rollout and update count for stages of its own."""
    stages.around(parts.family, "text", "text")
    stages.around(parts.family, "pictures", "decode")
    stages.around(parts.optimizer, "backward", "backward")
    stages.around(parts.optimizer, "step", "optimizer")
    stages.around(parts.policy, "after_update", "optimizer")


def iteration(run: Run, parts: Parts, stages: Stages, number: int) -> dict[str, float]:
    """One iteration by the trainer's own functions; metrics of its updates. No image is skipped."""
    parts.clock.iteration = number
    groups, window = own_groups(run, parts), parts.geometry.trained_timesteps(number, run.seed)
    levels = parts.family.levels(run.rollout.steps)
    with stages.stage("denoise"):
        trajectory = rollout(parts.policy, groups, levels, window, Noise(run.seed, number), run.rollout.batch_size)
    with stages.stage("score"):
        parts.rewards.score(trajectory.images, groups, whole=True)
    advantages = torch.randn(len(groups), generator=torch.Generator().manual_seed(number))
    log = UpdateLog(parts.family.device)
    for images in updates(trajectory, advantages, parts.geometry, run.seed, number, skip=False):
        with stages.stage("forward"):
            update_policy(run, parts, images, trajectory.levels, log)
    return log.metrics()


def probe(run: Run, parts: Parts) -> tuple[Tensor, Tensor]:
    """Velocity of fixed inputs under the initial weights, and the gradient of its square: float32, on the CPU."""
    family = parts.family
    latents = torch.randn(PROBED, *family.latent_shape, generator=torch.Generator().manual_seed(run.seed))
    t = torch.linspace(0.9, 0.3, PROBED, device=family.device)
    velocity = parts.policy.velocity(latents.to(family.device), t, parts.policy.text(PROMPTS[:PROBED]))
    (velocity.square().mean() * 1024).backward()  # small gradients would vanish in 16 bits
    gradient = torch.cat([p.grad.flatten().cpu() for p in parts.policy.trained.values() if p.grad is not None])
    parts.optimizer.adamw.zero_grad(set_to_none=True)
    return velocity.detach().cpu(), gradient


def evaluation(run: Run, parts: Parts) -> None:
    """A batch of pictures without densities, as evaluations draw them; adapters are fused there if the run says so."""
    groups = own_groups(run, parts)[: run.rollout.batch_size]
    levels = parts.family.levels(run.rollout.steps)
    rollout(parts.policy, groups, levels, range(0), Noise(run.seed, "evaluation"), run.rollout.batch_size)


def branches(run: Run) -> int:
    """Denoiser rows of an image: with guidance two."""
    return 1 if run.rollout.guidance_scale == 1 else 2


def flops(run: Run, parts: Parts) -> dict[str, float]:
    """Of an iteration: what the model needs for rollout and update, and what recomputation adds."""
    family, g, c = parts.family, parts.geometry, branches(run)
    denoiser: Any = family.denoiser.config
    tokens = (family.latent_shape[1] // 2) ** 2  # all these families see 2 x 2 latents as a token
    forward = forward_flops(run.model.type, denoiser, tokens, parts.policy.text(PROMPTS[:1]).tokens.shape[1])
    factor = backward_factor(run.model.type, run.policy.tune.type)
    update = g.images * c * g.window_size * forward * factor
    again = g.images * c * g.window_size * forward if run.model.gradient_checkpointing else 0.0
    return {"forward": forward, "rollout": g.images * c * run.rollout.steps * forward, "update": update, "again": again}


def expected_work(run: Run, g: Geometry) -> dict[str, int]:
    """Work counters of an iteration in which nothing is skipped."""
    c = branches(run)
    update = g.images * c * g.window_size
    return {
        "denoiser_forward_images": g.images * c * run.rollout.steps + update, "denoiser_backward_images": update,
        "decoded_images": g.images, "scored_images": g.images,
    }  # fmt: skip


def check_work(run: Run, parts: Parts, work: Counter[str]) -> None:
    """Refuse to report the time of other work than was meant."""
    for name, count in expected_work(run, parts.geometry).items():
        if work[name] != count:
            raise RunError(f"an iteration counted {work[name]} {name}, its settings say {count}")


class Arm:
    """A built arm and what has been measured of it. `result` is filled step by step, so that it holds what there was before an
    error."""

    def __init__(self, run: Run, device: torch.device):
        self.run, self.device = run, device
        self.result: dict[str, Any] = {}
        # Nothing can be compiled while tensors are tracked; a GPU counts by itself.
        self.tracked = None if device.type == "cuda" or run.speed.compile else Tracked()
        self.stages = Stages(device, self.tracked)
        self.kept: tuple[Tensor, Tensor] | None = None

    def measure(self, warmup: int, iterations: int) -> None:
        """Build, warm up, time. Tensors are tracked until the warm-up is over, and what is timed is not."""
        if self.tracked is None:
            parts = self._ready(warmup)
        else:
            with self.tracked:
                parts = self._ready(warmup)
            self.stages.take()
            self.stages.tracked = None
        timings, ratios = [], []
        for number in range(warmup, warmup + iterations):
            parts.family.work.clear()
            metrics = iteration(self.run, parts, self.stages, number)
            timings.append(self.stages.take())
            check_work(self.run, parts, parts.family.work)
            ratios.append(metrics["policy/log_ratio_first"])
        with self.stages.stage("evaluation"):
            evaluation(self.run, parts)
        self._report(parts, timings, ratios, self.stages.take()["evaluation"])

    def _ready(self, warmup: int) -> Parts:
        with self.stages.stage("build"):
            parts = build(self.run, self.device)
        folder = read_folder(self.run.model.path)
        networks = {n: network for n, network in folder.networks.items() if not n.startswith("text_encoder")}
        self.result["estimate"] = as_dict(estimate(self.run, parts.geometry, replace(folder, networks=networks), 0))
        time_parts(parts, self.stages)
        with self.stages.stage("probe"):
            self.kept = probe(self.run, parts)
        self.stages.take()
        for number in range(warmup):
            iteration(self.run, parts, self.stages, number)
            seconds = sum(self.stages.take().values())
            self.result.setdefault("cold_start_s", seconds)
        return parts

    def _report(self, parts: Parts, timings: list[dict[str, float]], ratios: list[float], evaluated: float) -> None:
        totals = [sum(t.values()) for t in timings]
        names = dict.fromkeys(name for t in timings for name in t)
        quarter = statistics.quantiles(totals, n=4) if len(totals) > 1 else [totals[0]] * 3
        median = statistics.median(totals)
        peak = {name: size for name, size in self.stages.peak.items() if name not in ("build", "probe")}
        self.result |= {
            "status": "ok",
            "iterations_s": totals,
            "iteration_s": median,
            "iqr_s": quarter[2] - quarter[0],
            "stages_s": {name: statistics.median(t.get(name, 0.0) for t in timings) for name in names},
            "evaluation_s": evaluated,
            "images_per_s": parts.geometry.images / median,
            "trained_rows_per_s": parts.geometry.images * parts.geometry.window_size / median,
            "work": {name: parts.family.work[name] for name in expected_work(self.run, parts.geometry)},
            "flops": flops(self.run, parts),
            "log_ratio_first": max(ratios),
            "peak_bytes": peak,
        }
        if self.device.type == "cuda":
            self.result["reserved_bytes"] = torch.cuda.memory_reserved()
        if self.run.speed.compile:
            self.result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]


def as_dict(found: Estimate) -> dict[str, Any]:
    """JSON-able."""
    return {"peak_bytes": found.peak, "held": dict(found.device), "phases": dict(found.phases)}


def attempt(run: Run, device: torch.device, warmup: int, iterations: int) -> tuple[dict[str, Any], Any]:
    """An arm's result and what it is compared by. What cannot be had, or does not fit, is a result as well."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arm, undo = Arm(run, device), speed.use_tf32(run.speed.tf32)
    try:
        arm.measure(warmup, iterations)
    except ConfigError as error:
        arm.result |= {"status": "refused", "reason": str(error)}
    except (RuntimeError, MemoryError) as error:
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in OUT_OF_MEMORY)
        kind = "out of memory" if memory else "failed"
        arm.result |= {"status": kind, "stage": arm.stages.current, "reason": (str(error) or kind).splitlines()[0]}
    finally:
        undo()
    result, kept = arm.result, arm.kept
    del arm
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result, kept


def compared(mine: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How far velocity and gradient are from the base's, which had the same weights and inputs."""
    (v, g), (v0, g0) = mine, base
    return {
        "velocity_max": float((v - v0).abs().max()),
        "velocity_relative": float((v - v0).norm() / v0.norm()),
        "gradient_cosine": float(torch.nn.functional.cosine_similarity(g.double(), g0.double(), dim=0)),
        "gradient_relative": float((g - g0).norm() / g0.norm()),
    }
