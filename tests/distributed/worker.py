"""What every process of a distributed test does: `python -m tests.distributed.worker RANK PROCESSES STORE OUT SCENARIO`.

The scenarios are functions of this process's place alone, so that a test can call them with one process as well.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2irl import registry
from t2irl.advantages import group_advantages
from t2irl.algorithms.grpo import Grpo
from t2irl.batches import micro_batches, updates
from t2irl.config import Run
from t2irl.geometry import Geometry
from t2irl.monitor import UpdateLog
from t2irl.train import Parts, own_groups, shaped, update_policy
from t2irl.types import MicroBatch, Prediction, PromptGroups, Rollout, TrainingImages, Trajectory
from t2irl.utils import distributed
from tests.distributed.adversaries import adversary, beside, lacking
from tests.invariants.test_gardo import GATE, RECORDED, REWARDS, SLOW, gardo_run, iterate
from tests.invariants.toy import PROMPTS, toy_parts, toy_rollout, toy_run

CPU = torch.device("cpu")
COUNTS = ([5, 0], [0, 5], [3, 4], [7, 1], [0, 0], [1, 0], [6, 6])
"""Images per process before balancing."""


def transfers() -> dict[str, Any]:
    """What crosses processes: balanced images, gathered rows, flags, summed gradients."""
    me, found = distributed.rank(), {}
    for counts in COUNTS:
        mine = counts[me] if distributed.world_size() > 1 else sum(counts)
        start = sum(counts[:me])
        numbers = torch.arange(start, start + mine)
        images = TrainingImages(
            numbers.float().view(-1, 1, 1, 1, 1).expand(-1, 4, 2, 2, 2),
            numbers[:, None] + torch.zeros(3),
            -numbers.float(),
            numbers + 2**40,
            numbers,
        )
        found["balance", tuple(counts)] = distributed.balance(images, CPU).tensors()
    found["rows"] = distributed.gather_rows(torch.tensor([[2**62 + me, me], [2**53 + 1, -me]]), CPU)
    found["nan"] = distributed.gather_rows(torch.tensor([float("nan") if me else 1.5], dtype=torch.float64), CPU)
    found["flags"] = [
        distributed.any_process(flag, CPU) for flag in (False, me == 0, me == distributed.world_size() - 1, True)
    ]
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    if me == 0:
        parameters[0].grad = torch.full((2, 3), 1.0)
    parameters[1].grad = torch.arange(4.0) * (me + 1)
    distributed.sum_gradients(parameters)
    found["gradients"] = [p.grad for p in parameters]
    return found


def gradients() -> dict[str, Any]:
    """Float64 gradients of a toy policy for every update: the real assignment, balancing, micro-batches, loss and sum.

    v = w_0 + w_1 x + w_2 t; recorded states are the same for any number of processes.
    """
    found = {}
    for skip in (True, False):
        run = toy_run(
            {
                "rollout": {"prompts": 6, "group_size": 4, "window": {"type": "fixed", "start": 0, "size": 3}},
                "update": {"per_iteration": 2, "batch_size": 5},
            }
        )
        geometry = Geometry.of(run, distributed.world_size())
        policy = toy_parts(run).policy
        trajectory, advantages = recorded(geometry)
        weights = nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))
        for number, images in enumerate(updates(trajectory, advantages, geometry, 5, 3, skip)):
            share = 1 / (geometry.images_per_update * geometry.window_size)
            for batch in micro_batches(images, trajectory.levels, policy, PROMPTS, run.update.batch_size, share):
                loss(weights, batch).backward()
            distributed.sum_gradients([weights])
            assert weights.grad is not None
            found[skip, number] = weights.grad.clone(), len(images)
            weights.grad = None
    return found


def recorded(geometry: Geometry) -> tuple[Trajectory, Tensor]:
    """This process's part of one and the same float64 trajectory of 24 images, two of three with a zero advantage."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(24, 4, 2, 2, 2, generator=generator, dtype=torch.float64)
    log_probs = -torch.rand(24, 3, generator=generator, dtype=torch.float64)
    advantages = torch.randn(24, generator=generator, dtype=torch.float64)
    advantages[torch.arange(24) % 3 != 0] = 0
    n = geometry.images_per_process
    mine = slice(distributed.rank() * n, (distributed.rank() + 1) * n)
    groups = PromptGroups.of(PROMPTS, [i // 4 for i in range(24)], [i % 4 for i in range(24)])[mine]
    levels = torch.tensor([1.0, 0.8, 0.6, 0.4])
    pictures = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
    return Trajectory(groups, latents[mine], log_probs[mine], levels, latents[mine, -1], pictures), advantages[mine]


def loss(weights: Tensor, batch: MicroBatch) -> Tensor:
    """GRPO's loss of the toy velocity under Flow-SDE, with a clip range that stops some transitions and not others."""
    dynamics = registry.build("dynamics", registry.find("dynamics", "flow_sde").Config(type="flow_sde"))
    t, t_next = batch.t.double(), batch.t_next.double()
    velocity = weights[0] + weights[1] * batch.x + weights[2] * t.view(-1, 1, 1, 1)
    mean, std = dynamics.mean_std(batch.x, velocity, t, t_next)
    prediction = Prediction(velocity, mean, std, dynamics.log_prob(batch.x_next, mean, std))
    return Grpo(Grpo.Config(clip_range=0.9)).loss(prediction, batch).terms["policy"]


def matching() -> dict[str, Any]:
    """`training` on finished pictures."""
    return training({"dynamics": {"type": "matching"}, "window": {"type": "fixed"}})


def training(rollout: dict[str, Any] | None = None) -> dict[str, Any]:
    """Three iterations of two updates of a real policy: images, scores, weights after every update, metrics."""
    run = toy_run(
        {
            "rollout": rollout or {"window": {"type": "fixed", "start": 0, "size": 3}},
            "update": {"per_iteration": 2, "batch_size": 4},
            "regularizers": {"kl": {"type": "kl", "kind": "v_mse", "coefficient": 0.1}},
            "optimizer": {"lr": 0.05, "eps": 0.01},
        }
    )
    parts = toy_parts(run)
    found: dict[str, Any] = {"groups": [], "final": [], "weights": [], "metrics": []}
    for iteration in range(3):
        parts.clock.iteration = iteration
        trajectory, log = toy_rollout(run, parts), UpdateLog(CPU)
        scores = parts.rewards.score(trajectory.images, trajectory.groups)
        table = {name: distributed.gather_rows(values, CPU) for name, values in scores.items()}
        ids = distributed.gather_rows(torch.tensor(trajectory.groups.ids), CPU)
        everyone = group_advantages(table, parts.rewards.weights, ids, run.advantage)
        n = len(trajectory.groups)
        advantages = everyone[distributed.rank() * n : (distributed.rank() + 1) * n].float()
        for images in updates(trajectory, advantages, parts.geometry, run.seed, iteration, False):
            update_policy(run, parts, images, trajectory.levels, log)
            found["weights"].append(torch.cat([p.detach().flatten() for p in parts.policy.trained.values()]))
        found["groups"].append((trajectory.groups.ids, trajectory.groups.members))
        found["final"].append(trajectory.final)
        found["metrics"].append(log.metrics())
    return found


def combined() -> dict[str, Any]:
    """Three iterations of a pipeline with base-model scores, of a reward that learns too, constraints and a filter, and of
    regularisers that need all images."""
    bright, dark = ({"type": "tests.invariants.toy:Brightness", "weight": 1} for _ in range(2))
    run = toy_run(
        {
            "rollout": {"prompts": 6, "window": {"type": "fixed", "start": 0, "size": 3}},
            "rewards": {"dark": dark, "growing": {"type": "tests.end_to_end.plugins:Growing"}},
            "heldout_rewards": {"gold": bright},
            "combine": {
                "aggregate": {"type": "constraints", "average": 0, "rate": 3},
                "rewards": {
                    "brightness": {"bound": {"type": "clip", "quantile": 0.8}},
                    "dark": {"constraint": {"quantile": 0.9}},
                    "growing": {
                        "transform": {"type": "standardise"}, "bound": {"type": "clip", "quantile": 0.7, "per_prompt": 3}
                    },
                },
                "filter": {"type": "best_worst"}, "base_images": 13,
            },
            "regularizers": {
                "chi": {"type": "chi_square", "coefficient": 0.1}, "seen": {"type": "chi_square_image", "path": None},
                "wide": {"type": "diversity_logdet", "path": None, "allow_on_failures": True, "base_prompts": 3},
                "own": {"type": "sft", "passed": {"reward": "dark", "at": -9}, "images": 3},
            },
            "update": {"per_iteration": 2, "batch_size": 5}, "optimizer": {"lr": 0.05, "eps": 0.01},
        }
    )  # fmt: skip
    parts, context = toy_parts(run), SimpleNamespace(timed=lambda stage, total: nullcontext())
    found: dict[str, Any] = {"weights": [], "metrics": [], "advantages": []}
    for iteration in range(3):
        parts.clock.iteration = iteration
        parts.pipeline.meet(cast(Any, context), parts)
        trajectory, log = toy_rollout(run, parts), UpdateLog(CPU)
        scores = parts.rewards.score(trajectory.images, trajectory.groups)
        parts.rewards.update(trajectory.images, trajectory.groups)
        table = {name: distributed.gather_rows(values, CPU) for name, values in scores.items()}
        ids = distributed.gather_rows(torch.tensor(trajectory.groups.ids), CPU)
        credit = parts.pipeline.credit(table, ids)
        scored = Rollout(trajectory, table, ids, distributed.rank() * len(trajectory.groups), iteration)
        advantages = credit.filtered(shaped(credit.advantages[scored.own].float(), scored, parts), scored.own)
        for images in updates(trajectory, advantages, parts.geometry, run.seed, iteration, False):
            update_policy(run, parts, images, trajectory.levels, log)
            found["weights"].append(torch.cat([p.detach().flatten() for p in parts.policy.trained.values()]))
        found["advantages"].append(distributed.gather_rows(advantages, CPU))
        own = {f"{name}/{k}": v for name, r in parts.regularizers.items() for k, v in r.metrics().items()}
        found["metrics"].append(credit.metrics | own)
    found["base"] = parts.pipeline.base.pooled
    found["own"] = {f"{line} {n}": x for line, t in parts.pipeline.base.by_prompt.items() for n, x in t.items()}
    return found


def prompts() -> dict[str, Any]:
    """Prompt ids, member numbers and windows of forty iterations."""
    run = toy_run(
        {
            "rollout": {"prompts": 5, "group_size": 8, "steps": 9, "window": {"type": "random", "size": 2}},
            "seed": 11,
            "iterations": 40,
        }
    )
    parts = toy_parts(run)
    found: dict[str, Any] = {"groups": [], "windows": []}
    for iteration in range(40):
        parts.clock.iteration = iteration
        groups = own_groups(run, parts)
        found["groups"].append(
            [(i, m, text) for i, m, text in zip(groups.ids, groups.members, groups.texts, strict=True)]
        )
        window = parts.geometry.trained_timesteps(iteration, run.seed)
        found["windows"].append((window.start, window.stop))
    return found


def one_image(run: Run, parts: Parts) -> dict[str, Any]:
    """Updates of an iteration in which one image carries signal, so all processes but one have nothing to do: images held, metrics."""
    trajectory, log = toy_rollout(run, parts), UpdateLog(CPU)
    advantages = torch.zeros(len(trajectory.groups))
    if distributed.rank() == 0:
        advantages[3] = 1.0
    held = []
    for images in updates(trajectory, advantages, parts.geometry, run.seed, 0, True):
        held.append(len(images))
        update_policy(run, parts, images, trajectory.levels, log)
    return {"held": held, "metrics": log.metrics()}


def lonely() -> dict[str, Any]:
    """One image of the whole iteration carries signal, so all processes but one have nothing to do in an update."""
    run = toy_run({"update": {"per_iteration": 2}})
    parts = toy_parts(run)
    return {
        **one_image(run, parts),
        "weights": torch.cat([p.detach().flatten() for p in parts.policy.trained.values()]),
    }


def guards() -> dict[str, Any]:
    """Three iterations with every guard; the third of five groups lies on both of two processes."""
    run = gardo_run(
        {
            "unsure": {
                "type": "uncertainty",
                "rewards": ["brightness"],
                "trust": {"kind": "v_mse"},
                "control": "shuffled",
            },
            "several": {"type": "uncertainty", "rewards": ["panel"], "estimator": "ensemble"},
            "gate": {**GATE, "proxy": "brightness", "normaliser": "gated", "adapt": {"window": 1, "warmup": 1}},
            "slow": {**SLOW, "threshold": 1e-3},
            "wide": {"type": "diversity", "path": None},
        },
        rollout={"prompts": 5, **RECORDED},
        rewards={**REWARDS, "panel": {"type": "tests.invariants.test_uncertainty_shared:Panel", "weight": 0.5}},
    )
    parts = toy_parts(run)
    found: dict[str, Any] = {"advantages": [], "chosen": [], "metrics": [], "weights": []}
    for _ in range(3):
        found["advantages"] += iterate(run, parts, 1)
        found["chosen"].append(parts.regularizers["gate"].chosen)
        found["metrics"].append({name: r.metrics() for name, r in parts.regularizers.items()})
        found["weights"].append(torch.cat([p.detach().flatten() for p in parts.policy.trained.values()]))
    found["state"] = parts.state_dict()["regularizers"]
    return found


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        transfers,
        gradients,
        training,
        matching,
        combined,
        prompts,
        lonely,
        adversary,
        beside,
        guards,
        lacking,
    )
}


def main(known: dict[str, Callable[[], dict[str, Any]]] = SCENARIOS) -> None:
    """Join the other processes, run the scenarios (joined by commas), save what they give."""
    rank, processes, store, out, scenarios = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(processes),
        timeout=datetime.timedelta(seconds=60),
    )
    torch.save({name: known[name]() for name in scenarios.split(",")}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
