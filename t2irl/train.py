"""The loop: prompts -> rollout -> score -> learn -> advantages -> policy update -> show and keep -> again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t2irl import registry, sharding, speed
from t2irl.algebra.pipeline import Pipeline
from t2irl.algorithms.base import Algorithm
from t2irl.batches import micro_batches, updates
from t2irl.check import describe
from t2irl.config import Run
from t2irl.data import images_of, load_both, overlap, prompt_ids
from t2irl.engines.base import Request, RolloutEngine, draw
from t2irl.evaluation.features import looker
from t2irl.finish import finish, show
from t2irl.geometry import Geometry
from t2irl.launch import Context, launch
from t2irl.models.base import ModelFamily
from t2irl.monitor import UpdateLog, iteration_metrics
from t2irl.optimizer import Optimizer
from t2irl.policy import Policy
from t2irl.preflight import check_files
from t2irl.regularizers.base import Regularizer
from t2irl.rewards.combine import RewardSet
from t2irl.rollout import Noise
from t2irl.scoring import Scorer
from t2irl.types import Clock, PromptGroups, Rollout, TrainingImages
from t2irl.utils import distributed


@dataclass
class Parts:
    """Everything that a run is built from; what has state is in the checkpoint."""

    family: ModelFamily
    policy: Policy
    algorithm: Algorithm
    rewards: RewardSet
    heldout: RewardSet
    regularizers: dict[str, Regularizer]
    optimizer: Optimizer
    prompts: Sequence[str]
    heldout_prompts: Sequence[str]
    geometry: Geometry
    clock: Clock

    def __post_init__(self) -> None:
        run = self.geometry.run
        self.pipeline = Pipeline(run, self.rewards)
        self.look = looker(run.monitors.features, self.family.device)
        self.engine: RolloutEngine = registry.build("engines", run.rollout.engine, run, self.policy)
        self.scorer = Scorer(self.rewards, run.rollout.overlap_scoring)
        for name, regularizer in self.regularizers.items():
            regularizer.prepare(name, self)

    def state_dict(self) -> dict[str, Any]:
        """State besides the policy's weights and the clock."""
        found = {name: state for name, r in self.regularizers.items() if (state := r.state_dict())}
        combined = {"combine": state} if (state := self.pipeline.state_dict()) else {}
        combined |= {"heldout": state} if (state := self.heldout.state_dict()) else {}
        return {
            "optimizer": self.optimizer.state_dict(), "rewards": self.rewards.state_dict(), "regularizers": found, **combined
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.rewards.load_state_dict(state["rewards"])
        self.heldout.load_state_dict(state.get("heldout", {}))
        self.pipeline.load_state_dict(state.get("combine", {}))
        for name, saved in state["regularizers"].items():
            self.regularizers[name].load_state_dict(saved)


def build(run: Run, ctx: Context) -> Parts:
    """Load and construct everything; cheap checks come before heavy loading."""
    geometry = Geometry.of(run, distributed.world_size())
    sharding.check(run, ctx.sharded)
    prompts, heldout_prompts = load_both(run.data)
    if ctx.is_main:
        ctx.say(describe(run, distributed.world_size(), ctx.sharded, (prompts, heldout_prompts)))
    prompt_ids(0, len(prompts), run.rollout.prompts, run.seed)  # refuses a file that is too short
    if both := overlap(prompts, heldout_prompts):
        ctx.warn(
            f"{len(both)} prompts are in data.prompts and in data.heldout, so they are not held out, for example {both[0]!r}"
        )
    dynamics = registry.build("dynamics", run.rollout.dynamics)
    algorithm = registry.build("algorithms", run.algorithm)
    regularizers = {name: registry.build("regularizers", config) for name, config in run.regularizers.items()}
    check_files(run, prompts.texts, heldout_prompts.texts)
    ctx.footprint.mark("start")
    family = registry.build("models", run.model, ctx.device)
    policy = Policy(run, family, dynamics, algorithm.reduction, ctx.sharded)
    speed.apply(run.speed, family)
    ctx.closing.callback(speed.use_tf32(run.speed.tf32))
    ctx.footprint.mark("model")
    rewards, heldout = (
        RewardSet(configs, ctx.device, run.rollout.batch_size, family.work, run.seed)
        for configs in (run.rewards, run.heldout_rewards)
    )
    for reward_set in (rewards, heldout):
        reward_set.prepare(prompts.texts, heldout_prompts.texts, family, trained=reward_set is rewards)
    ctx.footprint.mark("rewards")
    optimizer = Optimizer(run, list(policy.trained.values()), geometry.total_updates, ctx.device, policy.company)
    parts = Parts(
        family, policy, algorithm, rewards, heldout, regularizers, optimizer, prompts.texts, heldout_prompts.texts, geometry, Clock()
    )  # fmt: skip
    ctx.closing.callback(parts.scorer.close)
    ctx.closing.callback(parts.engine.close)
    return parts


def train(run: Run, *, resume: str = "auto") -> Path:
    """Train, and return the folder of the run. `resume`: auto, never, or the path of a run or checkpoint."""
    with launch(run, resume) as ctx:
        run = ctx.run  # its folder may be another one than asked for
        parts = build(run, ctx)
        ctx.restore(parts)
        if ctx.complete(parts.clock):
            ctx.say(
                f"{ctx.folder} is complete ({parts.clock.iteration} iterations). Give more --iterations, or --resume never for a new run"
            )
            return ctx.folder
        ctx.begin(parts.clock)
        policy, geometry, clock = parts.policy, parts.geometry, parts.clock
        levels = parts.family.levels(run.rollout.steps)
        skip = run.update.skip_zero_advantage and not any(r.needs_all_images for r in parts.regularizers.values())
        if clock.iteration == 0:
            show(ctx, parts, {})

        while clock.iteration < run.iterations and ctx.stopped is None:
            # 1. Roll out: G images for each prompt; keep states and log-densities of the trained window.
            iteration = clock.iteration
            groups = own_groups(run, parts)
            parts.pipeline.meet(ctx, parts)
            request = request_of(run, parts, groups, levels)
            with ctx.timed("rollout", len(groups)) as advance:
                trajectory, drawn = draw(parts.engine, policy, request, parts.scorer.watch(groups, advance))
            # 2. Score: {name: (B,)}; NaN means "does not apply". With overlap most of it is done by now.
            with ctx.timed("score", 1), distributed.together(ctx.device):
                scores, hidden = parts.scorer.scores(trajectory)
            if ctx.stop_requested():  # nothing has changed since the iteration began
                raise ctx.interrupted(ctx.save(parts))
            # 3. Trainable rewards take their turn; a fixed reward makes this a no-op.
            with ctx.timed("adversary", 1) if parts.rewards.learns else nullcontext():
                learned, policy_turn = parts.rewards.update(trajectory.images, groups)
            # 4. Credit: group-relative, over all processes, then shaped.
            table = {name: distributed.gather_rows(values, ctx.device) for name, values in scores.items()}
            ids = distributed.gather_rows(torch.tensor(groups.ids), ctx.device)
            credit = parts.pipeline.credit(table, ids)
            scored = Rollout(trajectory, table, ids, distributed.rank() * len(groups), iteration)
            advantages = shaped(credit.advantages[scored.own].float(), scored, parts)
            advantages = credit.filtered(advantages, scored.own)
            # 5. Update the policy, unless a trainable reward keeps the rollout for itself.
            log = UpdateLog(ctx.device)
            with ctx.timed("update", geometry.updates_per_iteration) as advance:
                chosen = updates(trajectory, advantages, geometry, run.seed, iteration, skip)
                for images in chosen if policy_turn else ():
                    update_policy(run, parts, images, trajectory.levels, log)
                    advance()
            clock.iteration += 1  # before saving: a resumed run starts at the next one
            clock.images += geometry.images
            # 6. Show and keep.
            metrics = iteration_metrics(ctx, parts, table, ids, credit.advantages, log) | credit.metrics | learned
            metrics |= drawn | hidden
            show(ctx, parts, metrics)
            if clock.iteration % run.checkpoints.every == 0 or clock.iteration == run.iterations or ctx.stopped:
                ctx.save(parts)
            if ctx.stop_requested():
                raise ctx.interrupted(ctx.save(parts))
        finish(ctx, parts)
        return ctx.folder


def own_groups(run: Run, parts: Parts) -> PromptGroups:
    """This process's images of the iteration: consecutive ones, so that groups are whole wherever they fit."""
    ids = prompt_ids(parts.clock.iteration, len(parts.prompts), run.rollout.prompts, run.seed)
    lines, members = images_of(ids, run.rollout.group_size, distributed.world_size(), distributed.rank())
    return PromptGroups.of(parts.prompts, lines, members)


def request_of(run: Run, parts: Parts, groups: PromptGroups, levels: torch.Tensor) -> Request:
    """What an engine is asked to draw in the present iteration."""
    iteration = parts.clock.iteration
    window = parts.geometry.trained_timesteps(iteration, run.seed)
    noise = Noise(run.seed, iteration, run.rollout.same_noise)
    return Request(parts.clock.update, groups, levels, window, noise, run.rollout.batch_size)


def shaped(advantages: torch.Tensor, scored: Rollout, parts: Parts) -> torch.Tensor:
    """This process's advantages (B,) after all regularisers, those that replace them first."""
    for regularizer in sorted(parts.regularizers.values(), key=lambda r: not r.comes_first):
        advantages = regularizer.shape(advantages, scored)
    return advantages


def update_policy(run: Run, parts: Parts, images: TrainingImages, levels: torch.Tensor, log: UpdateLog) -> None:
    """One optimiser step from the images that this process holds; gradients are summed over processes."""
    policy, clock = parts.policy, parts.clock
    share = 1 / (parts.geometry.images_per_update * (len(levels) - 1))
    for batch in micro_batches(images, levels, policy, parts.prompts, run.update.batch_size, share):
        prediction = policy.predict(batch)
        loss = parts.algorithm.loss(prediction, batch)
        terms = dict(loss.terms)
        for name, regularizer in parts.regularizers.items():
            term = regularizer.loss(policy, prediction, batch)
            if term is not None:
                terms[f"regularizer/{name}"] = term
        parts.optimizer.backward(torch.stack(list(terms.values())).sum())
        log.add(terms, loss.metrics)
    grad_norm, lr = parts.optimizer.step(clock)
    log.end_update(grad_norm, lr)
    policy.after_update(clock.update)
    clock.update += 1
    for regularizer in parts.regularizers.values():
        regularizer.after_update(policy, clock)
