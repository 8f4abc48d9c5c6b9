"""A classifier of artifacts that is refreshed during RL from pictures on which the other rewards and it disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from reward_models.artifact import scores
from reward_models.recipes.labelled import load_labelled, pixels
from reward_models.recipes.train_artifact import Settings, fit
from reward_models.recipes.tune_instruction import log_likelihood
from t2irl import registry
from t2irl.data import noise_seed
from t2irl.errors import ConfigError, DataError
from t2irl.registry import Plugin
from t2irl.rewards.artifact import Artifact
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily


@dataclass(frozen=True)
class Mined:
    """A picture of a rollout that is worth a label."""

    picture: Tensor
    """(3, H, W) uint8 on the CPU."""
    text: str
    prompt: int
    """Line of its prompt."""
    member: int
    iteration: int


class ArtifactAdaptive(Artifact):
    """As `artifact`, and every `every` iterations it learns from pictures mined since the last time.

    Mined are pictures that the other rewards rank high and it ranks low, and those that it is least sure of. A `labeller` looks
    at `labels` of them. Three quarters are learned from, together with all earlier ones and `examples`; the refreshed classifier
    is accepted if it explains the last quarter better, otherwise everything stays as it was. Hacked between refreshes, and
    in whatever the labeller does not see.
    """

    class Config(Artifact.Config):
        """Settings."""

        type: Literal["artifact_adaptive"] = "artifact_adaptive"
        labeller: Plugin("rewards") | None = None  # type: ignore[valid-type]
        """A reward that rates mined pictures, such as an `artifact_judge` or a rule; needed. It stands for a human rater."""
        clean_above: float = 0.8
        """Pictures that the labeller scores at least this are clean."""
        broken_below: float = 0.6
        """Pictures that it scores below this are broken; those in between are left out."""
        examples: Path | None = None
        """Labelled pictures (JSON Lines, see `reward_models/recipes/labelled.py`) that are always learned from as well, so that
        the classifier does not forget; null: only mined ones."""
        every: PositiveInt = 20
        """Iterations between refreshes (published idea: 300 to 500 updates)."""
        disagree: NonNegativeInt = 4
        """Pictures mined in an iteration, over all processes, that the other rewards like and it does not."""
        unsure: NonNegativeInt = 4
        """Pictures mined in an iteration, over all processes, whose probability is nearest to 0.5."""
        labels: PositiveInt = 60
        """Most pictures that the labeller looks at in a refresh, drawn at random from those mined."""
        remember: PositiveInt = 2048
        """Most labelled pictures kept, in the checkpoint as 8-bit pictures; the oldest leave."""
        steps: PositiveInt = 100
        """Optimiser steps of a refresh."""
        batch_size: PositiveInt = Field(64, multiple_of=2)
        """Pictures of a step, half of them clean."""
        lr: PositiveFloat = 3e-4
        """Learning rate of a refresh."""

        @model_validator(mode="after")
        def _settings_fit(self) -> ArtifactAdaptive.Config:
            if self.broken_below > self.clean_above:
                raise PydanticCustomError(
                    "artifact", "broken_below = {low} is above clean_above = {high}: a picture would be both; lower it",
                    {"low": self.broken_below, "high": self.clean_above},
                )  # fmt: skip
            if self.disagree + self.unsure == 0:
                raise PydanticCustomError(
                    "artifact", "disagree and unsure are both 0, so nothing is mined; raise one, or use type: artifact"
                )
            return self

    @classmethod
    def needs_heldout(cls, config: Any) -> bool:
        """It knows pictures, not prompts."""
        return False

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        if config.labeller is None:
            raise ConfigError(
                "reward artifact_adaptive: labeller is missing; give a reward that rates pictures, such as labeller: "
                "{type: artifact_judge, server: http://HOST:PORT/v1}, or use type: artifact"
            )
        self.labeller: Reward = registry.build("rewards", config.labeller, device)
        if self.labeller.learns or self.labeller.whole_groups or not self.labeller.per_image:
            raise ConfigError(
                f"reward artifact_adaptive: labeller.type = {config.labeller.type}: expected a fixed reward of single pictures"
            )
        self.iteration = self.accepted = 0
        self.mined: list[Mined] = []
        self.pictures, self.labels, self.kept = torch.empty(0), torch.empty(0), torch.empty(0)
        self.old = self._examples(config.examples)

    def _examples(self, file: Path | None) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures uint8, labels, and which are held out by their prompt."""
        if file is None:
            return torch.empty(0), torch.empty(0), torch.empty(0)
        try:
            items = load_labelled(file)
            return (
                pixels(items),
                torch.tensor([x.label for x in items]),
                torch.tensor([self._is_kept(x.prompt) for x in items]),
            )
        except (OSError, ValueError) as error:
            raise DataError(f"reward artifact_adaptive: examples = {file}: {error}") from error

    def _is_kept(self, text: str) -> bool:
        """Whether pictures of a prompt belong to the quarter that is never learned from; the same in every run."""
        return noise_seed(0, f"artifact heldout {text}", 0, 0) % 4 == 0

    def prepare(self, prompts: Sequence[str], family: ModelFamily) -> None:
        """Give the labeller the prompts."""
        self.labeller.seed = self.seed
        self.labeller.prepare(prompts, family)

    @property
    def version(self) -> int:
        """Accepted refreshes so far."""
        return self.accepted

    # -------------------------------------------------------------------------------------------------------- mining
    def update(self, images: Tensor, groups: PromptGroups) -> dict[str, float]:
        """Mine a rollout; refresh when it is time. See `metrics.md` for what is returned."""
        self._mine(images, groups)
        self.iteration += 1
        metrics = {"mined": float(len(self.mined)), "refreshed": 0.0}
        if self.iteration % self.config.every == 0:
            metrics |= self._refresh()
            self.mined = []
        return metrics

    def _mine(self, images: Tensor, groups: PromptGroups) -> None:
        """Keep the pictures of all processes that a label would teach most, the same ones on each."""
        with torch.no_grad():
            own = torch.cat([self.classifier.clean(part) for part in images.split(64)]).double().cpu()
        rows = torch.stack([own, self._liked(len(own))], 1)
        everyone = distributed.gather_rows(rows, self.device)
        chosen = choose(everyone[:, 1], everyone[:, 0], self.config.disagree, self.config.unsure)
        first = distributed.rank() * len(own)
        mine = [k - first for k in chosen if first <= k < first + len(own)]
        pictures = images[mine].mul(255).round().to("cpu", torch.uint8)
        part = groups[mine]
        found = [
            Mined(picture, text, prompt, member, self.iteration)
            for picture, text, prompt, member in zip(pictures, part.texts, part.ids, part.members, strict=True)
        ]
        for members in distributed.gather_objects(found):
            self.mined += members

    def _liked(self, count: int) -> Tensor:
        """What the other rewards say, this process's rows: sum of their standardised scores in their weights, (count,)."""
        total = torch.zeros(count, dtype=torch.float64)
        for name, (weight, values) in self.rollout_scores.items():
            if name != self.name and weight:
                total += weight * standardised(values.double(), distributed.gather_rows(values.double(), self.device))
        return total

    # ---------------------------------------------------------------------------------------------------- refreshing
    def _refresh(self) -> dict[str, float]:
        """Label, learn, and keep what was learned if it is better on the pictures held out."""
        count = self._label()
        data = [torch.cat(parts) if len(parts[0]) and len(parts[1]) else max(parts, key=len)
                for parts in zip(self.old, (self.pictures, self.labels, self.kept), strict=True)]  # fmt: skip
        metrics = {"labelled": float(count), "refreshed": 0.0, "accepted": float(self.accepted)}
        if not len(data[0]):
            return metrics
        kept = data[2].bool()
        sides = [set(data[1][part].tolist()) for part in (~kept, kept)]
        if any(side != {0, 1} for side in sides):
            return metrics  # a refresh on one label only would teach it to say that label
        model = self.classifier
        before, old = explained(model, data[0][kept], data[1][kept]), _copied(model.trained())
        settings = Settings(steps=self.config.steps, batch=self.config.batch_size, lr=self.config.lr)
        seed = noise_seed(self.seed, "artifact refresh", self.iteration, 0)
        fit(model, data[0][~kept], data[1][~kept], settings, seed)
        after = explained(model, data[0][kept], data[1][kept])
        # Processes learn alike but for rounding; the first one's result counts.
        before, after, new = distributed.gather_objects((before, after, _copied(model.trained())))[0]
        accepted = accept(before, after)
        model.set_trained({name: x.to(self.device) for name, x in (new if accepted else old).items()})
        self.accepted += int(accepted)
        return metrics | {
            "refreshed": 1.0,
            "accepted": float(self.accepted),
            "heldout_before": before,
            "heldout_after": after,
        }

    def _label(self) -> int:
        """Have mined pictures rated, and remember them; the number that became clean or broken. The same on all processes."""
        rng = np.random.default_rng(noise_seed(self.seed, "artifact labels", self.iteration, 0))
        chosen = [self.mined[k] for k in sorted(rng.permutation(len(self.mined))[: self.config.labels].tolist())]
        if not chosen:
            return 0
        pictures = torch.stack([x.picture for x in chosen])
        texts = list(dict.fromkeys(x.text for x in chosen))
        groups = PromptGroups.of(texts, [texts.index(x.text) for x in chosen], [x.member for x in chosen])
        with torch.no_grad(), distributed.together(self.device):
            rated = self.labeller.score(pictures.to(self.device).float().div(255), groups).double().cpu()
        rated = distributed.gather_objects(rated)[0]  # a judge may differ in rounding
        clear = (rated >= self.config.clean_above) | (rated < self.config.broken_below)
        new = (pictures[clear], (rated[clear] < self.config.broken_below).long(),
               torch.tensor([self._is_kept(x.text) for x in chosen])[clear])  # fmt: skip
        if len(self.pictures):
            new = tuple(torch.cat(pair) for pair in zip((self.pictures, self.labels, self.kept), new, strict=True))
        self.pictures, self.labels, self.kept = (x[-self.config.remember :] for x in new)
        return int(clear.sum())

    # --------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The classifier, what was mined and labelled, and where it stands."""
        state: dict[str, Any] = {
            "parameters": {n: p.detach() for n, p in self.classifier.trained().items()}, "iteration": self.iteration,
            "accepted": self.accepted, "rows": [[x.text, x.prompt, x.member, x.iteration] for x in self.mined],
            "labelled": [self.pictures, self.labels, self.kept],
        }  # fmt: skip
        return state | ({"mined": torch.stack([x.picture for x in self.mined])} if self.mined else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises ValueError when the weights do not fit."""
        self.classifier.set_trained(state["parameters"])
        self.iteration, self.accepted = state["iteration"], state["accepted"]
        self.mined = [Mined(state["mined"][k].cpu(), *row) for k, row in enumerate(state["rows"])]
        self.pictures, self.labels, self.kept = (x.cpu() for x in state["labelled"])

    def export(self, folder: Path) -> None:
        """A folder that `type: artifact` reads."""
        self.classifier.save(folder)


def _copied(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


def choose(liked: Tensor, clean: Tensor, disagree: int, unsure: int) -> list[int]:
    """Rows to mine, ascending: the largest rank(liked) - rank(clean), then the `clean` (n,) in [0, 1] nearest to 0.5."""
    gap = liked.argsort(stable=True).argsort() - clean.argsort(stable=True).argsort()
    first = gap.argsort(descending=True, stable=True)[:disagree].tolist()
    rest = [k for k in (clean - 0.5).abs().argsort(stable=True).tolist() if k not in first]
    return sorted(first + rest[:unsure])


def standardised(values: Tensor, everyone: Tensor) -> Tensor:
    """Rows of one process relative to all processes' mean and deviation; NaN, which means no opinion, becomes 0."""
    known = everyone[~everyone.isnan()]
    if len(known) < 2:
        return torch.zeros_like(values)
    return ((values - known.mean()) / (known.std(correction=0) + 1e-8)).nan_to_num(0.0)


def explained(model: Any, pictures: Tensor, labels: Tensor) -> float:
    """Mean log-likelihood of labels, calibrated as the model says; both labels weigh the same. Higher is better."""
    p = torch.sigmoid(scores(model, pictures) / model.design.temperature)
    return sum(log_likelihood(p[labels == y], labels[labels == y]) for y in (0, 1)) / 2


def accept(before: float, after: float) -> bool:
    """Whether a refreshed classifier replaces the old one: it explains the held-out quarter better.

    Equal is not enough: all scores would change and nothing be gained.
    """
    return after > before
