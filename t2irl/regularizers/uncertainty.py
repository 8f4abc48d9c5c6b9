"""Rewards that are known with an uncertainty count as far as they are known: Ctrl-U (arXiv 2410.11236) carried over to GRPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from t2irl.advantages import normalise, trained
from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.guards import credit
from t2irl.guards.auxiliary import auxiliary_problem, trained_problem
from t2irl.guards.evaluations import Perturbation, drawn, drawn_again, perturbed
from t2irl.guards.gardo import uncertainty
from t2irl.policy import Policy
from t2irl.regularizers.base import Regularizer
from t2irl.regularizers.kl import Kl
from t2irl.types import MicroBatch, Prediction, Rollout
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts

SETTINGS = {
    "evaluations": ("augment", "steps", "tails"),
    "perturbations": ("augment",),
    "noise_level": ("steps", "tails"),
    "tail_steps": ("tails",),
    "members": ("ensemble", "cross_reward"),
}
"""Field -> the estimators that it has a meaning for."""
MEMORY = 0.99
"""Share of the old scale of a reward's uncertainty that is kept in each iteration."""
TINY = 1e-8
"""Keeps the uncertainty finite where a reward has none."""
SHUFFLE_STREAM = 0x5F


class Trust(Kl.Config):
    """KL divergence that holds uncertain images closer (V5): coefficient x (1 + slope x min(u, 3))."""

    slope: PositiveFloat = 0.5
    """How much more an image of the median uncertainty, u = 1, weighs than one without any."""


class Uncertainty(Regularizer):
    """Replaces the advantages by w (r - weighted mean of the group) / std, of each reward by itself, then weighted and added.

    r is the mean of K evaluations of an image, w falls with their spread. With `advantage`: eps, floor and clip stay, std and combine
    are replaced. It sees variance, not bias: what a reward is wrong about and sure of stays, and that is what an artifact reward
    or a gate is for. Before using it, check that uncertainty foretells error, and compare with the controls: `weighting: none`
    has as many evaluations, `control: shuffled` the same weights on other images.
    """

    class Config(Regularizer.Config):
        """Settings."""

        type: Literal["uncertainty"] = "uncertainty"
        rewards: tuple[str, ...] | None = None
        """Names of the trained rewards that this is for; null: all. The others enter without weights."""
        estimator: Literal["augment", "steps", "tails", "ensemble", "cross_reward"] = "augment"
        """Where the spread comes from. augment: the picture changed imperceptibly. steps: the picture as expected at neighbouring
        noise levels. tails: the picture drawn again from a low noise level. ensemble: other judges of the same, in the same unit.
        cross_reward: none; how much higher a reward ranks the image than the members do."""
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
        """Names of rewards of weight 0: the other judges of ensemble, the witnesses of cross_reward."""
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
            """Rewards that are not what they should be, or a second regulariser of this type."""
            names = (
                [name for name, config in run.rewards.items() if config.weight]
                if self.rewards is None
                else self.rewards
            )
            found = trained_problem(run, names, "rewards")
            if self.estimator in SETTINGS["members"]:
                found = found or auxiliary_problem(run, self.members, "members")
            if self.estimator == "ensemble" and len(names) != 1:
                found = (
                    found
                    or f"has estimator ensemble for {len(names)} rewards: name the one that its members judge in rewards"
                )
            if sum(config.type == self.type for config in run.regularizers.values()) > 1:
                found = found or "is not the only one of type uncertainty; each would replace the other's advantages"
            return found or (self.trust and self.trust.problem(run)) or super().problem(run)

    comes_first = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.needs_all_images = config.trust is not None
        self.trust = Kl(config.trust) if config.trust is not None else None
        self.scales: dict[str, float] = {}
        self.found: dict[str, float] = {}

    def prepare(self, name: str, parts: Parts) -> None:
        """Get hold of the rewards and the policy. Raises ConfigError for a reward that changes between two evaluations."""
        self.run, self.policy, self.weights = parts.geometry.run, parts.policy, parts.rewards.weights
        chosen = self.config.rewards
        self.names = [n for n, weight in self.weights.items() if weight and (chosen is None or n in chosen)]
        self.rewards = parts.rewards.only(self.names)
        if self.config.estimator in SETTINGS["evaluations"] and self.rewards.learns:
            learning = next(n for n in self.names if self.rewards.rewards[n].learns)
            raise ConfigError(
                f"regularizers.{name}: the reward {learning!r} learns between two evaluations of a picture; leave it out of "
                "rewards, or use estimator: cross_reward"
            )
        if self.trust is not None:
            self.trust.prepare(name, parts)

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """This process's part of the new advantages, (B,) float32."""
        evaluations, config = self._evaluations(rollout), self.run.advantage
        total = torch.zeros(len(rollout.ids), dtype=torch.float64)
        self.found, self.uncertain = {}, torch.zeros_like(total)
        for name, values in trained(rollout.scores, self.weights).items():
            if name in evaluations:
                part = self._advantages(name, evaluations[name], rollout)
            else:
                part = normalise(values.double(), rollout.ids, config.model_copy(update={"std": self.config.std}))
            total += self.weights[name] * part
        total = total.clamp(-config.clip, config.clip)
        return total[rollout.own].to(advantages)

    def _evaluations(self, rollout: Rollout) -> dict[str, Tensor]:
        """Reward name -> (N, K) float64: the rollout's score, then those of the other versions."""
        c, trajectory, device = self.config, rollout.trajectory, self.policy.family.device
        columns = {name: [rollout.scores[name]] for name in self.names}
        if c.estimator == "ensemble":
            columns[self.names[0]] += [rollout.scores[name] for name in c.members]
        for number in range(1, c.evaluations if c.estimator in SETTINGS["evaluations"] else 1):
            images = self._version(rollout, number)
            with distributed.together(device):
                found = self.rewards.score(images, trajectory.groups, whole=True)
            for name, scores in found.items():
                columns[name].append(distributed.gather_rows(scores, device))
        return {name: torch.stack(values, 1).double() for name, values in columns.items()}

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
        c, count, sign = self.config, evaluations.shape[1], 1 if self.weights[name] > 0 else -1
        mean, deviation = credit.spread(evaluations)
        size = deviation
        if c.estimator == "cross_reward":
            witnesses = [sign * rollout.scores[member] for member in c.members]
            size = uncertainty(sign * mean, witnesses).clamp_min(0).nan_to_num(0).where(~mean.isnan(), torch.nan)
        uncertain = size / (self._scale(name, size) + TINY)
        groups = credit.Groups.of(rollout.ids, ~mean.isnan() & ~credit.most_uncertain(uncertain, c.drop))
        noise, signal = credit.noise_and_signal(mean, deviation, count, groups)
        weights = torch.ones_like(mean)
        if c.weighting == "exponential":
            weights = credit.exponential_weights(uncertain, c.temperature, c.lowest)
        elif c.weighting == "wiener":
            weights = credit.wiener_weights(deviation, count, signal)
        seed = [self.run.seed, SHUFFLE_STREAM, rollout.iteration, self.names.index(name)]
        weights = credit.normalised(credit.controlled(weights, groups, c.control, seed), groups)
        values = mean - c.pessimism * sign * deviation
        advantage = self.run.advantage
        found = credit.weighted_advantages(values, weights, groups, c.std, advantage.eps, advantage.floor)
        if c.group_reliability:
            found = found * credit.reliability(noise, signal)
        self.uncertain = torch.maximum(self.uncertain, uncertain.nan_to_num(0))
        self._report(name, uncertain, weights, mean, noise, signal, groups)
        return found

    def _scale(self, name: str, size: Tensor) -> float:
        """Running average of the median spread of a reward; of the median of positive excess ranks, since half of all are 0."""
        known = size[~size.isnan()]
        known = known[known > 0] if self.config.estimator == "cross_reward" else known
        median = float(known.median()) if len(known) else 0.0
        old = self.scales.get(name, median)
        self.scales[name] = MEMORY * old + (1 - MEMORY) * median
        return self.scales[name]

    def _report(
        self, name: str, uncertain: Tensor, weights: Tensor, mean: Tensor, noise: Tensor, signal: Tensor,
        groups: credit.Groups,
    ) -> None:  # fmt: skip
        rows = groups.applies
        if not rows.any():
            return
        share = (1 - credit.reliability(noise, signal))[rows].mean()
        pair = torch.stack([weights[rows], mean[rows]])
        correlation = torch.corrcoef(pair)[0, 1].nan_to_num(0) if len(pair[0]) > 1 else torch.tensor(0.0)
        numbers = {
            "scale": self.scales[name],
            "uncertainty_p90": float(uncertain[rows].quantile(0.9)),
            "weight_min": float(weights[rows].min()),
            "effective_share": credit.effective_share(weights, groups),
            "noise_share": float(share),
            "weight_score_correlation": float(correlation),
        }
        self.found |= {f"{name}/{key}": value for key, value in numbers.items()}

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
    for name, estimators in SETTINGS.items():
        if c.estimator not in estimators and values[name] != type(c).model_fields[name].default:
            return f"{name} has no meaning with estimator {c.estimator}, only with {' and '.join(estimators)}: leave it out"
    if c.estimator == "cross_reward":
        spread = [("weighting: wiener", c.weighting == "wiener"), ("pessimism", c.pessimism > 0)]
        spread.append(("group_reliability", c.group_reliability))
        for setting, used in spread:
            if used:
                return f"{setting} needs a spread in units of the reward, which estimator cross_reward has not; use weighting: exponential"
    if c.control != "none" and c.weighting == "none":
        return f"control: {c.control} needs weights, but weighting is none"
    if c.group_reliability and c.std != "group":
        return f"group_reliability mends std: group, but std is {c.std}; leave it out, or set std: group"
    if c.rewards == ():
        return "rewards is empty: name some, or null for all"
    return None
