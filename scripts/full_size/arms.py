"""One arm of a benchmark: a run's settings, built with random weights, warmed up, timed, measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from bench import bare_rollout
from torch import Tensor

from full_size.families import FAMILIES
from full_size.flops import backward_factor, forward_flops
from full_size.stages import Stages, Tracked
from t2irl import registry, speed
from t2irl.batches import updates
from t2irl.check import read_folder
from t2irl.config import Run
from t2irl.errors import RunError
from t2irl.estimate import Estimate, estimate
from t2irl.geometry import Geometry, even_chunks
from t2irl.monitor import UpdateLog
from t2irl.optimizer import Optimizer
from t2irl.policy import Policy
from t2irl.rewards.combine import RewardSet
from t2irl.rollout import Noise, rollout
from t2irl.train import Parts, own_groups, update_policy
from t2irl.types import Clock
from t2irl.utils.memory import peak_gib

PROMPTS = tuple(f"a picture of thing {k}" for k in range(256))
PROBED = 2
"""Images whose velocity and gradient are compared between arms."""


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


def bare_iteration(run: Run, parts: Parts, stages: Stages) -> dict[str, float]:
    """A rollout's denoiser calls and decoding in a plain loop, as a script with diffusers would do them: nothing of a trainer."""
    images, size = parts.geometry.images_per_process, run.rollout.batch_size
    with stages.stage("denoise"):
        bare_rollout(parts, run.rollout.steps, size, images)
    for chunk in even_chunks(images, size):
        parts.family.pictures(
            torch.randn(chunk.stop - chunk.start, *parts.family.latent_shape, device=parts.family.device)
        )
    return {}


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


def bare_work(run: Run, g: Geometry) -> dict[str, int]:
    """The same of a rollout without a trainer around it."""
    return {"denoiser_forward_images": g.images * branches(run) * run.rollout.steps, "decoded_images": g.images}


def check_work(expected: Mapping[str, int], work: Counter[str]) -> None:
    """Refuse to report the time of other work than was meant."""
    for name, count in expected.items():
        if work[name] != count:
            raise RunError(f"an iteration counted {work[name]} {name}, its settings say {count}")


class Arm:
    """An arm and what has been measured of it, told step by step, so that what there was before an error is known."""

    def __init__(self, run: Run, device: torch.device, tell: Callable[[dict[str, Any]], None], reference: bool):
        """`tell` takes parts of the result; `reference`: measure bare denoiser calls instead of the trainer."""
        self.run, self.device, self.tell, self.reference = run, device, tell, reference
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
        expected = (bare_work if self.reference else expected_work)(self.run, parts.geometry)
        timings, ratios = [], []
        for number in range(warmup, warmup + iterations):
            self.tell({"stage": f"iteration {number}"})
            parts.family.work.clear()
            metrics = self._iterate(parts, number)
            timings.append(self.stages.take())
            check_work(expected, parts.family.work)
            ratios.append(metrics.get("policy/log_ratio_first"))
        g = parts.geometry
        self.tell({"timings": timings, "work": expected, "flops": self._flops(parts)})
        self.tell({"images": g.images, "window": g.window_size})
        if not self.reference:
            with self.stages.stage("evaluation"):
                evaluation(self.run, parts)
            self.tell({"log_ratio_first": max(ratios), "evaluation_s": self.stages.take()["evaluation"]})
        self._report()

    def _iterate(self, parts: Parts, number: int) -> dict[str, float]:
        if self.reference:
            return bare_iteration(self.run, parts, self.stages)
        return iteration(self.run, parts, self.stages, number)

    def _ready(self, warmup: int) -> Parts:
        self.tell({"stage": "build"})
        with self.stages.stage("build"):
            parts = build(self.run, self.device)
        folder = read_folder(self.run.model.path)
        networks = {n: network for n, network in folder.networks.items() if not n.startswith("text_encoder")}
        time_parts(parts, self.stages)
        if not self.reference:
            found = estimate(self.run, parts.geometry, replace(folder, networks=networks), 0)
            self.tell({"estimate": as_dict(found), "stage": "probe"})
            with self.stages.stage("probe"):
                self.kept = probe(self.run, parts)
        self.stages.take()
        for number in range(warmup):
            self.tell({"stage": f"warm-up {number}"})
            self._iterate(parts, number)
            seconds = sum(self.stages.take().values())
            if number == 0:
                self.tell({"cold_start_s": seconds})
        return parts

    def _flops(self, parts: Parts) -> dict[str, float]:
        found = flops(self.run, parts)
        return found | {"update": 0.0, "again": 0.0} if self.reference else found

    def _report(self) -> None:
        def phases(sizes: dict[str, int]) -> dict[str, int]:
            return {name: size for name, size in sizes.items() if name not in ("build", "probe")}

        self.tell({"peak_bytes": phases(self.stages.peak), "reserved_bytes": phases(self.stages.reserved)})
        self.tell({"rss_bytes": int(peak_gib(torch.device("cpu")) * 2**30)})
        if self.run.speed.compile:
            self.tell({"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]})


def as_dict(found: Estimate) -> dict[str, Any]:
    """JSON-able."""
    return {"peak_bytes": found.peak, "held": dict(found.device), "phases": dict(found.phases)}
