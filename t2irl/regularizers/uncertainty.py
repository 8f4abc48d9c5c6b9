"""Rewards that are known with an uncertainty count as far as they are known: Ctrl-U (arXiv 2410.11236) carried over to GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from t2irl.advantages import normalise, trained
from t2irl.config import TOTAL, Run, Strict
from t2irl.errors import ConfigError
from t2irl.guards import credit, estimators
from t2irl.guards.auxiliary import trained_problem
from t2irl.guards.evaluations import Perturbation, drawn, drawn_again, perturbed
from t2irl.guards.uncertainty_rules import combined_problem, doubt_problem, members_problem
from t2irl.policy import Policy
from t2irl.regularizers.base import Regularizer
from t2irl.regularizers.kl import Kl
from t2irl.rewards.combine import RewardSet
from t2irl.types import MicroBatch, Prediction, Rollout
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts

SETTINGS = {
    "evaluations": estimators.AGAIN,
    "perturbations": ("augment",),
    "noise_level": ("steps", "tails"),
    "tail_steps": ("tails",),
    "members": ("ensemble", "cross_reward"),
}
"""Field -> the estimators that it has a meaning for."""
MEMORY = 0.99
"""Share of the old scale of a reward's uncertainty that is kept in each iteration."""
SHUFFLE_STREAM = 0x5F
ARTIFACT = ("artifact", "artifact_adaptive", "artifact_judge")
"""Types of rewards that say how clean a picture is."""


class Trust(Kl.Config):
    """KL divergence that holds uncertain images closer (V5): coefficient x (1 + slope x min(u, 3))."""

    slope: PositiveFloat = 0.5
    """How much more an image of the median uncertainty, u = 1, weighs than one without any."""


class Doubt(Strict):
    """More uncertainty for pictures that another reward calls broken: u + factor x (1 - R)."""

    reward: str
    """Name of that reward R, in [0, 1] with 1 for a clean picture, such as an artifact reward; of any weight."""
    factor: PositiveFloat = 0.5
    """What is added for a picture that is broken beyond doubt, in units of the median uncertainty."""


class Uncertainty(Regularizer):
    """Replaces the advantages by w (r - weighted mean of the group) / std, of each reward by itself, then weighted and added.

    r is the mean of K evaluations of an image, w falls with their spread. With `advantage`: eps, floor and clip stay, std and combine
    are replaced. Several of them share the rewards: each judges those that it names, in its own way, and all parts are
    added. With `combine` r is the one score that it makes of all rewards, evaluated K times. It sees variance, not bias: what a reward is wrong about and sure of stays, and that is what an artifact reward
    or a gate is for. Before using it, check that uncertainty foretells error, and compare with the controls: `weighting: none`
    has as many evaluations, `control: shuffled` the same weights on other images.
    """

    class Config(Regularizer.Config):
        """Settings."""

        type: Literal["uncertainty"] = "uncertainty"
        rewards: tuple[str, ...] | None = None
        """Names of the trained rewards that this is for; null: all. Those that none is for enter without weights, with the `std` of
        the first."""
        estimator: Literal["augment", "steps", "tails", "ensemble", "cross_reward"] = "augment"
        """Where the spread comes from. augment: the picture changed imperceptibly. steps: the picture as expected at neighbouring
        noise levels. tails: the picture drawn again from a low noise level. ensemble: several judges of the same, in the same unit,
        be they a reward's own or other rewards. cross_reward: none; how much higher a reward ranks the image than the members do."""
        evaluations: int = Field(default=2, ge=2)
        """K: evaluations of each image, that of the rollout included (augment, steps, tails)."""
        perturbations: tuple[Perturbation, ...] = Field(("jpeg", "crop", "shift", "gain"), min_length=1)
        """What augment draws from: JPEG of quality 85 to 95, up to 2 % cut off, moved by up to 2 pixels, brightness by up to 2 %. Leave
        out what changes the task."""
        noise_level: float = Field(default=0.2, gt=0, le=0.5)
        """Noise level of steps (the highest) and tails; above 0.25 the policy's diversity begins to count as uncertainty."""
        tail_steps: PositiveInt = 2
        """Steps of the ODE from there to the picture (tails)."""
        members: tuple[str, ...] = ()
        """Names of rewards of weight 0: the other judges of ensemble, the witnesses of cross_reward. Empty with ensemble: the
        reward's own judges, such as the instructions of an artifact_judge, whose mean it is."""
        weighting: Literal["wiener", "exponential", "none"] = "wiener"
        """V2, w = signal / (signal + spread^2 / K); V1, w = exp(-u / temperature); or V0, w = 1, the mean of K evaluations."""
        temperature: PositiveFloat = 4.0
        """Of exponential, for an uncertainty u whose median is 1; 1 is Ctrl-U as written."""
        lowest: float = Field(default=0.1, ge=0, le=1)
        """Smallest weight of exponential."""
        control: credit.Control = "none"
        """Controls: weights permuted within groups, or inverted."""
        std: credit.Std = "global"
        """Divide by the standard deviation of all images, of the group, or not at all; replaces advantage.std."""
        group_reliability: bool = False
        """V3: multiply the advantages of a group by signal / (signal + noise); only with std: group."""
        pessimism: float = Field(default=0, ge=0, le=0.5)
        """V4: subtract so many standard deviations of the evaluations from the score."""
        drop: float = Field(default=0, ge=0, lt=1)
        """V6: the most uncertain share of images is left out."""
        doubt: Doubt | None = None
        """More uncertainty where another reward sees a fault (exponential); null: none."""
        trust: Trust | None = None
        """V5: a KL divergence that is larger for uncertain images; null: none."""

        @property
        def needs_average(self) -> bool:
            """Whether the trust region is around the average."""
            return self.trust is not None and self.trust.needs_average

        @model_validator(mode="after")
        def _settings_fit(self) -> Uncertainty.Config:
            if problem := _misfit(self):
                raise PydanticCustomError("uncertainty", "{problem}", {"problem": problem})
            return self

        def problem(self, run: Run) -> str | None:
            """Rewards that are not what they should be, or that another one is for as well."""
            found = combined_problem(self, run) or trained_problem(run, self.judged(run), "rewards")
            found = found or members_problem(self, run)
            found = found or doubt_problem(self, run) or _shared_problem(self, run)
            return found or (self.trust and self.trust.problem(run)) or super().problem(run)

        def judged(self, run: Run) -> tuple[str, ...]:
            """Names of the rewards that this is for."""
            if self.rewards is not None:
                return self.rewards
            return tuple(name for name, config in run.rewards.items() if config.weight)

    comes_first = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.needs_all_images = config.trust is not None
        self.trust = Kl(config.trust) if config.trust is not None else None
        self.scales: dict[str, float] = {}
        self.found: dict[str, float] = {}

    def prepare(self, name: str, parts: Parts) -> None:
        """Get hold of the rewards and the policy. Raises ConfigError for a reward that cannot be judged as it should."""
        self.run, self.policy, self.weights = parts.geometry.run, parts.policy, parts.rewards.weights
        chosen = self.config.judged(self.run)
        self.names = [n for n in self.weights if n in chosen]
        self.every, self.rewards = parts.rewards, parts.rewards.only(self.names)
        refuse_unfit(name, self.config, self.rewards)
        self.pipeline = parts.pipeline
        if self.run.combine is not None:
            self.names = [TOTAL]
        self.artifact = next((n for n, c in self.run.rewards.items() if c.type in ARTIFACT), None)
        self.all = [r for r in parts.regularizers.values() if isinstance(r, Uncertainty)]
        if self.trust is not None:
            self.trust.prepare(name, parts)

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """This process's part of the new advantages, (B,) float32. The first regulariser of this type does it for all."""
        if self.all[0] is not self:
            return advantages
        own = {name: part for one in self.all for name, part in one.own(rollout).items()}
        total = own[TOTAL] if TOTAL in own else self._sum(own, rollout)
        clip = self.run.advantage.clip
        return total.clamp(-clip, clip)[rollout.own].to(advantages)

    def _sum(self, own: Mapping[str, Tensor], rollout: Rollout) -> Tensor:
        """Weighted sum of the advantages by each trained reward, (N,) float64; those that nobody is for enter without weights."""
        plain = self.run.advantage.model_copy(update={"std": self.config.std})
        total = torch.zeros(len(rollout.ids), dtype=torch.float64)
        for name, values in trained(rollout.scores, self.weights).items():
            part = own[name] if name in own else normalise(values.double(), rollout.ids, plain)
            total += self.weights[name] * part
        return total

    def own(self, rollout: Rollout) -> dict[str, Tensor]:
        """Advantages by each of its own rewards, before weights: name -> (N,) float64 over all processes."""
        self.found, self.uncertain = {}, torch.zeros(len(rollout.ids), dtype=torch.float64)
        device, each = self.policy.family.device, {}
        if self.config.estimator == "ensemble" and not self.config.members:
            each = {name: distributed.gather_rows(self.every.each[name].T, device).T for name in self.names}

        def judged(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return dict(scores) if TOTAL not in self.names else {TOTAL: self.pipeline.total(scores, rollout.ids, {})}

        def again(number: int) -> dict[str, Tensor]:
            images = self._version(rollout, number)
            with distributed.together(device):
                found = self.rewards.score(images, rollout.trajectory.groups, whole=True)
            return judged({name: distributed.gather_rows(scores, device) for name, scores in found.items()})

        scores = {**rollout.scores, **judged(rollout.scores)}
        table = estimators.evaluations(self.config, self.names, scores, each, again)
        return {name: self._advantages(name, values, rollout) for name, values in table.items()}

    def _version(self, rollout: Rollout, number: int) -> Tensor:
        """Another version of this process's pictures, (B, 3, H, W) uint8."""
        c, trajectory, seed = self.config, rollout.trajectory, self.run.seed
        if c.estimator == "augment":
            return perturbed(trajectory.images, trajectory.groups, c.perturbations, seed, rollout.iteration, number)
        # Neighbouring levels share their noise, as in Ctrl-U; tails differ by it.
        own = number if c.estimator == "tails" else 0
        shape = self.policy.family.latent_shape
        noise = drawn(trajectory.groups, shape, seed, f"drawn again {own} {rollout.iteration}")
        level, steps = c.noise_level, c.tail_steps
        if c.estimator == "steps":
            level, steps = level * number / (c.evaluations - 1), 1
        return drawn_again(self.policy, trajectory, noise, level, steps, self.run.rollout.batch_size)

    def _advantages(self, name: str, evaluations: Tensor, rollout: Rollout) -> Tensor:
        """Of one reward, over all processes, (N,) float64."""
        c, count, sign = self.config, evaluations.shape[1], -1 if self.weights.get(name, 1) < 0 else 1
        mean, deviation, size = estimators.sizes(c, evaluations, rollout.scores, sign)
        uncertain = estimators.relative(c, size, self._scale(name, size), rollout.scores)
        groups = credit.Groups.of(rollout.ids, ~mean.isnan() & ~credit.most_uncertain(uncertain, c.drop))
        noise, signal = credit.noise_and_signal(mean, deviation, count, groups)
        weights = torch.ones_like(mean)
        if c.weighting == "exponential":
            weights = credit.exponential_weights(uncertain, c.temperature, c.lowest)
        elif c.weighting == "wiener":
            weights = credit.wiener_weights(deviation, count, signal)
        stream = SHUFFLE_STREAM + self.all.index(self)
        seed = [self.run.seed, stream, rollout.iteration, self.names.index(name)]
        weights = credit.normalised(credit.controlled(weights, groups, c.control, seed), groups)
        values = mean - c.pessimism * sign * deviation
        advantage = self.run.advantage
        found = credit.weighted_advantages(values, weights, groups, c.std, advantage.eps, advantage.floor)
        if c.group_reliability:
            found = found * credit.reliability(noise, signal)
        self.uncertain = torch.maximum(self.uncertain, uncertain.nan_to_num(0))
        numbers = {"scale": self.scales[name], **credit.report(uncertain, weights, mean, noise, signal, groups)}
        if self.artifact is not None:  # of the spread itself, whatever doubt adds
            rows = groups.applies
            numbers["artifact_correlation"] = credit.correlation(size[rows], rollout.scores[self.artifact][rows])
        self.found |= {f"{name}/{key}": value for key, value in numbers.items()} if groups.applies.any() else {}
        return found

    def _scale(self, name: str, size: Tensor) -> float:
        """Running average of the median size of a reward's uncertainty."""
        median = estimators.median_size(self.config, size)
        old = self.scales.get(name, median)
        self.scales[name] = MEMORY * old + (1 - MEMORY) * median
        return self.scales[name]

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """The trust region's term, if there is one."""
        if self.trust is None:
            return None
        c = self.trust.config
        factor = 1 + c.slope * self.uncertain.clamp_max(3)
        divergence = self.trust.divergence(policy, prediction, batch)
        return c.coefficient * (factor.to(divergence)[batch.image] * divergence).sum() * batch.share

    def metrics(self) -> dict[str, float]:
        """For each reward: how uncertain it was, what weights that gave."""
        return self.found

    def state_dict(self) -> dict[str, Any]:
        """The scales of the rewards' uncertainties."""
        return {"scales": dict(self.scales)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.scales = dict(state["scales"])


def _misfit(c: Uncertainty.Config) -> str | None:
    """What in the settings contradicts itself, None if nothing does."""
    values = dict(c)
    for name, known in SETTINGS.items():
        if c.estimator not in known and values[name] != type(c).model_fields[name].default:
            return f"{name} has no meaning with estimator {c.estimator}, only with {' and '.join(known)}: leave it out"
    if c.estimator == "cross_reward":
        spread = [("weighting: wiener", c.weighting == "wiener"), ("pessimism", c.pessimism > 0)]
        spread.append(("group_reliability", c.group_reliability))
        for setting, used in spread:
            if used:
                return f"{setting} needs a spread in units of the reward, which estimator cross_reward has not; use weighting: exponential"
    if c.doubt is not None and c.weighting != "exponential":
        return f"doubt acts on weighting: exponential, but weighting is {c.weighting}; leave it out, or change that"
    if c.control != "none" and c.weighting == "none":
        return f"control: {c.control} needs weights, but weighting is none"
    if c.group_reliability and c.std != "group":
        return f"group_reliability mends std: group, but std is {c.std}; leave it out, or set std: group"
    if c.rewards == ():
        return "rewards is empty: name some, or null for all"
    return None


def _shared_problem(c: Uncertainty.Config, run: Run) -> str | None:
    """Which other regulariser of this type is for the same reward."""
    for name, other in run.regularizers.items():
        if other is c or not isinstance(other, Uncertainty.Config):
            continue
        if None in (c.rewards, other.rewards):
            return f"shares the type uncertainty with {name}: each must say in rewards which ones it is for"
        if both := [reward for reward in c.judged(run) if reward in other.judged(run)]:
            return f"and {name} both have rewards: {both[0]!r}, but a reward has one estimator: drop it in one of them"
    return None


def refuse_unfit(name: str, c: Uncertainty.Config, rewards: RewardSet) -> None:
    """Raise ConfigError, for the regulariser `name`, unless all `rewards` that it is for can be judged as its settings want."""
    for key, reward in rewards.rewards.items():
        if c.estimator in estimators.AGAIN and reward.learns:
            raise ConfigError(
                f"regularizers.{name}: the reward {key!r} learns between two evaluations of a picture; leave it out of "
                "rewards, or use estimator: cross_reward"
            )
        if c.estimator == "ensemble" and not c.members and reward.judges == 1:
            raise ConfigError(
                f"regularizers.{name}: estimator ensemble: the reward {key!r} is one judge alone; give it several, such as "
                "instruction: beam.json of tune_instruction.py for an artifact_judge, or name members"
            )
