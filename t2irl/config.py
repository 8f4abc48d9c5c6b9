"""What a run is made of: frozen, strict pydantic classes. Imports no torch.

A field's docstring says its meaning, unit and scope. Derived numbers are in `geometry`, loading and overrides in
`loading`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from t2irl.algebra.config import Combine
from t2irl.algebra.rules import combine_problem
from t2irl.evaluation.rules import Monitors, primary_of
from t2irl.registry import Plugin
from t2irl.speed import Speed
from t2irl.strict import Strict

ENTRY_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What a reward or regulariser may be called: its name is part of log keys and of overrides."""
TOTAL = "total"
"""What stands for all rewards together where single ones have their names."""
RESERVED_NAMES = frozenset({TOTAL, "type"})
"""Names with a meaning of their own in log keys and in configs."""


class Lora(Strict):
    """Low-rank adapters on the denoiser (the reference policy is the denoiser without them)."""

    type: Literal["lora"] = "lora"
    rank: PositiveInt = 32
    """Rank of each adapter."""
    alpha: PositiveFloat = 64
    """Scale: the adapter's output is multiplied by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter, as peft matches them; null takes the model family's list."""


class Full(Strict):
    """All weights of the denoiser, kept in float32 (the reference policy is a frozen copy)."""

    type: Literal["full"] = "full"


class Ema(Strict):
    """Running average of the trained weights, used for evaluation, grids and export."""

    decay: float = Field(default=0.9, ge=0, lt=1)
    """Share of the old average kept at each update."""
    warmup: bool = True
    """Start lower: the decay of update n is min((1 + n) / (10 + n), decay)."""


class Policy(Strict):
    """Which weights are trained."""

    tune: Lora | Full = Field(default=Lora(), discriminator="type")
    """`lora` or `full`, with its settings."""
    ema: Ema | None = Ema()
    """Running average of the trained weights; null for none."""


class Data(Strict):
    """Prompt files: UTF-8 text with one prompt a line, or JSON Lines with a `prompt` key."""

    prompts: Path
    """Prompts that the policy is trained on."""
    heldout: Path
    """Prompts for evaluation and grids; a prompt that is in both files is reported."""


class FixedWindow(Strict):
    """The same timesteps are stochastic and trained in every iteration."""

    type: Literal["fixed"] = "fixed"
    start: NonNegativeInt = 0
    """First trained timestep (0 is pure noise)."""
    size: PositiveInt | None = None
    """Number of trained timesteps; null: all from `start`, without the last unless `last_step_stochastic`."""


class RandomWindow(Strict):
    """A window of `size` at a place drawn anew in each iteration, equal on all processes (Flow-GRPO-Fast)."""

    type: Literal["random"] = "random"
    size: PositiveInt = 3
    """Number of trained timesteps."""
    range: tuple[NonNegativeInt, PositiveInt] | None = None
    """The window lies within [first, end); null: anywhere, without the last timestep unless `last_step_stochastic`."""


class SlidingWindow(Strict):
    """A window that moves from noise to data as the run goes on (MixGRPO)."""

    type: Literal["sliding"] = "sliding"
    size: PositiveInt = 4
    """Number of trained timesteps."""
    dwell: PositiveInt = 25
    """Iterations that the window stays at one place."""
    stride: PositiveInt = 1
    """Timesteps that it moves on; the last move stops at the end, after that it starts again at the first place."""


class Rollout(Strict):
    """How images are sampled for training. Counts are global, over all processes."""

    prompts: PositiveInt = 16
    """Different prompts in an iteration."""
    group_size: int = Field(default=8, ge=2)
    """Images of one prompt; an image's baseline is its group's mean, so 1 carries no signal."""
    steps: int = Field(default=10, ge=2)
    """Denoising steps."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance in rollout and update alike; 1 skips the unconditional branch."""
    negative_prompt: str = ""
    """Text of the unconditional branch."""
    dynamics: Plugin("dynamics") = {"type": "cps"}  # type: ignore[valid-type]
    """How a stochastic transition is sampled."""
    window: FixedWindow | RandomWindow | SlidingWindow = Field(default=FixedWindow(), discriminator="type")
    """Which timesteps are stochastic and trained; all others follow the ODE."""
    last_step_stochastic: bool = False
    """Allow the last timestep into the window. Its noise stays in the picture and its density is very narrow."""
    same_noise: bool = False
    """One initial noise for all images of a group (DanceGRPO)."""
    batch_size: PositiveInt = 64
    """Images in one denoiser call, per process."""
    engine: Plugin("engines") = {"type": "local"}  # type: ignore[valid-type]
    """What draws the pictures: this process, or a class of your own that hands the work to a server. See docs/rollout_engines.md."""
    overlap_scoring: bool | None = None
    """Score the pictures of a batch while the next one is drawn; the scores are the same to the bit. null: where a reward is
    computed by another program (`remote`, a judge behind a server). See docs/speed.md."""


class Advantage(Strict):
    """From scores to advantages."""

    std: Literal["group", "global", "none"] = "group"
    """Divide by the standard deviation of the group, of all images of the iteration, or not at all."""
    eps: NonNegativeFloat = 1e-4
    """Added to the standard deviation."""
    floor: NonNegativeFloat = 1e-6
    """A group whose scores span no more than this carries no signal: its advantages are exactly 0."""
    clip: PositiveFloat = 5.0
    """Advantages are clamped to +-clip."""
    combine: Literal["scores", "advantages"] = "scores"
    """Several rewards: weight the scores and normalise the sum, or normalise each reward in its group and weight those."""


class Update(Strict):
    """How a rollout becomes optimiser steps."""

    per_iteration: PositiveInt = 2
    """Optimiser steps in an iteration; each image serves one of them."""
    batch_size: PositiveInt = 32
    """Images in one forward and backward pass, per process, each with all its trained timesteps."""
    skip_zero_advantage: bool = True
    """Leave out images whose advantage is exactly 0. The loss still divides by the full count, so the gradient is the same
    unless a regulariser acts on these images too; then they are kept."""


class Optimizer(Strict):
    """AdamW on the trained weights, float32."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    warmup_updates: NonNegativeInt = 0
    """Updates of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or decay to 0 at the end of the run."""


class Evaluation(Strict):
    """Held-out measurement with fixed noise: before training, every `every` iterations, and at the end."""

    every: NonNegativeInt = 20
    """Iterations between evaluations; 0: only before and after training."""
    images: PositiveInt = 256
    """Pictures per evaluation; prompts repeat with new noise when the held-out file is shorter."""
    steps: PositiveInt | None = None
    """ODE steps; null: as in the rollout."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """Null: as in the rollout."""


class Grids(Strict):
    """Pictures of fixed prompts and fixed noise, with their scores, over the course of the run."""

    every: NonNegativeInt = 10
    """Iterations between grids; 0: only at the start and the end."""
    prompts: PositiveInt = 12
    """Held-out prompts shown."""
    images: PositiveInt = 2
    """Images per prompt."""


class Checkpoints(Strict):
    """When the state of the run is saved. It is saved at the end and on SIGINT or SIGTERM as well."""

    every: PositiveInt = 20
    """Iterations between checkpoints."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""


class Tracking(Strict):
    """Where curves go. `metrics.jsonl` is always written."""

    trackers: tuple[
        Literal["tensorboard", "wandb", "swanlab", "trackio", "aim", "mlflow", "comet_ml", "clearml", "dvclive"], ...
    ] = ("tensorboard",)
    """Trackers that accelerate starts; each must be installed and logged in."""
    project: str = "t2irl"
    """Project name for trackers that have one."""


class Processes(Strict):
    """How long processes wait for each other. One that has ended is noticed at once, by its closed connection."""

    timeout: PositiveFloat = 600
    """Seconds that an exchange of tensors may take once all processes have come to it; then the run ends."""
    patience: PositiveFloat = 7200
    """Seconds that a process which is alive may be waited for: loading, slow rewards, checkpoints and the export, which the main
    process writes alone."""


class Run(Strict):
    """One training run: everything but the number of processes."""

    run_dir: Path = Path("runs/run")
    """Folder of the results."""
    seed: NonNegativeInt = 0
    """Seed of every random draw: prompts, noise, windows, adapters."""
    iterations: PositiveInt = 100
    """Rollouts with their updates."""
    model: Plugin("models")  # type: ignore[valid-type]
    """The model to fine-tune: family, folder, precision."""
    policy: Policy = Policy()
    """Which weights are trained, and their average."""
    data: Data
    """Prompt files."""
    # A factory: an instance made here would import the dynamics, which import this module.
    rollout: Rollout = Field(default_factory=Rollout)
    """Sampling for training."""
    advantage: Advantage = Advantage()
    """From scores to advantages."""
    algorithm: Plugin("algorithms") = {"type": "grpo"}  # type: ignore[valid-type]
    """The objective."""
    rewards: dict[str, Plugin("rewards")] = Field(min_length=1)  # type: ignore[valid-type]
    """Rewards trained on, by a name of your choice."""
    heldout_rewards: dict[str, Plugin("rewards")] = {}  # type: ignore[valid-type]
    """Rewards that are only measured, never in the gradient."""
    regularizers: dict[str, Plugin("regularizers")] = {}  # type: ignore[valid-type]
    """Regularisers, by a name of your choice."""
    combine: Combine | None = None
    """How scores become one advantage; null: the weighted sum, normalised as `advantage` says. See docs/reward_algebra.md."""
    update: Update = Update()
    """Updates and micro-batches."""
    optimizer: Optimizer = Optimizer()
    """AdamW."""
    speed: Speed = Speed()
    """What makes a run faster or smaller, up to rounding. See docs/speed.md."""
    evaluation: Evaluation = Evaluation()
    """Held-out measurement."""
    grids: Grids = Grids()
    """Pictures along the way."""
    checkpoints: Checkpoints = Checkpoints()
    """Saving."""
    monitors: Monitors = Monitors()
    """What is watched for reward hacking, and what happens then."""
    tracking: Tracking = Tracking()
    """Curves."""
    processes: Processes = Processes()
    """How long processes wait for each other."""

    @field_validator("run_dir", mode="before")
    @classmethod
    def _folder_is_named(cls, value: Any) -> Any:
        if value == "":  # would be the current directory
            raise PydanticCustomError("run_dir", "Input should be the path of a folder, not empty")
        return value

    @field_validator("rewards", "heldout_rewards", "regularizers", mode="after")
    @classmethod
    def _names_are_log_keys(cls, entries: dict[str, Any]) -> dict[str, Any]:
        for name in entries:
            if not ENTRY_NAME.fullmatch(name) or name in RESERVED_NAMES:
                raise PydanticCustomError(
                    "entry_name",
                    "Name {name} should be of letters, digits, _ and -, and not total or type: it is part of log keys",
                    {"name": repr(name)},
                )
        return entries

    @model_validator(mode="after")
    def _parts_fit(self) -> Run:
        for name, config in self.regularizers.items():
            if problem := config.problem(self):
                found = {"name": name, "problem": problem}
                raise PydanticCustomError("regularizer", "regularizers.{name} {problem}", found)
        if not any(config.weight for config in self.rewards.values()):
            raise PydanticCustomError("weight", "all rewards have weight 0, so there is nothing to train on")
        if problem := combine_problem(self):
            raise PydanticCustomError("combine", "{problem}", {"problem": problem})
        return self

    @model_validator(mode="after")
    def _there_is_something_to_fuse(self) -> Run:
        if self.speed.fuse_lora == "everywhere" and not isinstance(self.policy.tune, Lora):
            said = "speed.fuse_lora = everywhere: there are no adapters with policy.tune.type = {type}; leave it out"
            raise PydanticCustomError("fuse_lora", said, {"type": self.policy.tune.type})
        return self

    @model_validator(mode="after")
    def _monitors_have_something_to_watch(self) -> Run:
        weighted = any(config.type == "uncertainty" for config in self.regularizers.values())
        problem = self.monitors.problem(self.heldout_rewards, primary_of(self.combine), weighted)
        if problem:
            raise PydanticCustomError("monitors", "{problem}", {"problem": problem})
        return self

    @model_validator(mode="after")
    def _names_are_unique(self) -> Run:
        both = sorted(set(self.rewards) & set(self.heldout_rewards))
        if both:
            raise PydanticCustomError(
                "entry_name",
                "rewards and heldout_rewards share the name {name}; names are log keys and should differ",
                {"name": repr(both[0])},
            )
        return self
