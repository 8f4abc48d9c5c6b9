"""Supervised fine-tuning on reference images, or on approved ones of the rollout, as a regulariser (RPO, arXiv 2405.16436, for flow models)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from t2irl.adversary.memory import Memory
from t2irl.batches import assigned
from t2irl.config import Run
from t2irl.data import noise_seed
from t2irl.dynamics.base import per_sample
from t2irl.errors import ConfigError
from t2irl.geometry import even_chunks
from t2irl.guards.auxiliary import Passed, unknown_problem
from t2irl.policy import Policy
from t2irl.references import ReferenceImages
from t2irl.regularizers.base import Regularizer
from t2irl.types import Clock, MicroBatch, Prediction, Rollout, TextEmbeds
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts

LATENT_MEMORY = 256 * 2**20
"""Bytes of encoded reference images kept."""
CHOICE, METER = "sft choice", "sft meter"
"""Streams of the draws: which images of an update, and the fixed batch."""


class Sft(Regularizer):
    """coefficient x E ||v(x_t, t, prompt) - (noise - x_0)||^2, x_t = (1 - t) x_0 + t noise: the loss of pre-training, mean over elements,
    on reference images x_0 of the prompts that are trained on.

    It holds the policy near pictures that are known to be good, whatever the reward says of its own. Reference images drawn by
    the base model itself (`scripts/make_references.py --model`) make it a pure anchor. With `passed`, x_0 are instead the rollout's
    own images that a reward approves of, which had better be one that is not trained on: it is hacked by what that reward likes.
    """

    class Config(Regularizer.Config):
        """Settings."""

        type: Literal["sft"] = "sft"
        coefficient: PositiveFloat = 0.01
        """Weight. The published one, 0.005 x beta 0.01 of a language model's loss, has another scale."""
        references: ReferenceImages.Config | None = None
        """Reference images of the prompts trained on; these or `passed` are needed."""
        passed: Passed | None = None
        """Learn from the iteration's own images of which this reward, of any weight, approves, instead of reference images."""
        missing: Literal["error", "skip"] = "error"
        """With `references`: a prompt without reference images is refused at the start, or left out of the loss."""
        images: PositiveInt = 8
        """Images x_0 in an update, over all processes, each with one noise level; at most one for each of its images."""
        density: Literal["logit_normal", "uniform"] = "logit_normal"
        """How noise levels are drawn: sigmoid of a standard normal number, as SD3 was trained, or evenly over [0, 1]."""
        meter: int = Field(default=16, ge=0)
        """With `references`: images, noise and levels of a fixed batch whose loss is logged in each iteration, without gradient; 0: none."""

        @model_validator(mode="after")
        def _one_source(self) -> Sft.Config:
            if (self.references is None) == (self.passed is None):
                given = "neither" if self.passed is None else "both"
                raise PydanticCustomError(
                    "sft",
                    "give either `references` or `passed` (with reward and at); {given} given",
                    {"given": given},
                )
            return self

        def problem(self, run: Run) -> str | None:
            """More images than there are to put them beside, or a reward that is not there."""
            if self.passed is not None and (found := unknown_problem(run, self.passed.reward, "passed.reward")):
                return found
            most = run.rollout.prompts * run.rollout.group_size // run.update.per_iteration
            if self.images > most:
                return f"has images = {self.images}, but an update has {most} images; use at most {most}"
            return super().problem(run)

    needs_all_images = True

    @classmethod
    def check(cls, name: str, config: Any, prompts: Sequence[str]) -> None:
        """The reference images."""
        if config.references is not None:
            _look_up(name, config, prompts)

    def prepare(self, name: str, parts: Parts) -> None:
        """Look up the reference images. Raises ConfigError for a model that cannot encode pictures."""
        self.parts, self.seed = parts, parts.geometry.run.seed
        if self.config.references is not None:
            if not parts.family.encodes_images:
                kind = parts.geometry.run.model.type
                raise ConfigError(
                    f"regularizers.{name}: models of type {kind} do not encode pictures, so there is nothing to train on"
                )
            self.pictures = _look_up(name, self.config, parts.prompts)
        self.latents = Memory(LATENT_MEMORY)
        self.good, self.own = torch.empty(0, dtype=torch.bool), dict[int, Tensor]()
        self.ids, self.side, self.iteration, self.part = torch.empty(0), 0, 0, 0
        self.chosen: dict[int, int] = {}

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Note whose prompts the images of the iteration have; advantages stay."""
        self.ids, self.iteration, self.part = rollout.ids, rollout.iteration, 0
        self.side = rollout.trajectory.images.shape[-1]
        if self.config.passed is not None:
            self.good = rollout.scores[self.config.passed.reward].double() > self.config.passed.at  # NaN does not pass
            final = rollout.trajectory.final
            wanted = {n for part in range(self.parts.geometry.updates_per_iteration) for n in self._choice(part)}
            mine = {n: final[n - rollout.first].cpu() for n in wanted if rollout.own.start <= n < rollout.own.stop}
            self.own = {n: x for process in distributed.gather_objects(mine) for n, x in process.items()}
        self.chosen = self._choice(0)
        return advantages

    def _choice(self, part: int) -> dict[int, int]:
        """Which images of an update get an x_0 beside them: {number within the iteration: noise seed}."""
        everyone = assigned(self.parts.geometry, self.seed, self.iteration, part)
        order = torch.randperm(len(everyone), generator=_generator(noise_seed(self.seed, CHOICE, self.iteration, part)))
        usable = [n for n in everyone[order.numpy()].tolist() if self._usable(n)][: self.config.images]
        return {n: noise_seed(self.seed, f"sft {self.iteration}", n, part) for n in usable}

    def _usable(self, number: int) -> bool:
        return bool(self.good[number] if self.config.passed else self.pictures.of(self._prompt(number)))

    def _prompt(self, number: int) -> str:
        return self.parts.prompts[int(self.ids[number])]

    def loss(self, policy: Policy, prediction: Prediction, batch: MicroBatch) -> Tensor | None:
        """The weighted loss of this micro-batch's share of the update's images x_0; one more pass."""
        first: dict[int, int] = {}
        for row, number in enumerate(batch.image.tolist()):
            first.setdefault(number, row)
        mine = [number for number in first if number in self.chosen]
        if not mine:
            return None
        draws = [self._draw(self._prompt(number), self.chosen[number], self.own.get(number)) for number in mine]
        text = batch.text[torch.tensor([first[number] for number in mine])]
        return self.config.coefficient * self._errors(policy, draws, text).sum() / len(self.chosen)

    def _draw(self, prompt: str, seed: int, clean: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents (C, h, w), noise, level () of one x_0; a reference image of the prompt if none is given."""
        generator = _generator(seed)
        if clean is None:
            files = self.pictures.of(prompt)
            file = files[int(torch.randint(len(files), (), generator=generator))]
            clean = self._encoded(str(file), self.pictures.picture(file, self.side))
        noise = torch.randn(clean.shape, generator=generator)
        if self.config.density == "uniform":
            level = torch.rand((), generator=generator)
        else:
            level = torch.randn((), generator=generator).sigmoid()
        return clean, noise, level * self.parts.family.highest_level

    def _encoded(self, key: str, picture: Tensor) -> Tensor:
        found = self.latents.get(key)
        if found is None:
            with torch.no_grad():
                image = picture[None].to(self.parts.family.device).float().div(255)
                found = (self.parts.family.encode_images(image)[0].cpu(),)
            self.latents.put(key, found)
        return found[0]

    def _errors(self, policy: Policy, draws: list[tuple[Tensor, Tensor, Tensor]], text: TextEmbeds) -> Tensor:
        """||v - (noise - x_0)||^2 of each, mean over elements, unguided: (n,)."""
        device = self.parts.family.device
        clean, noise, t = (torch.stack(x).to(device) for x in zip(*draws, strict=True))
        x = (1 - per_sample(t)) * clean + per_sample(t) * noise
        velocity = policy.velocity(x, t, text, 1.0)
        return (velocity - (noise - clean)).square().flatten(1).mean(1)

    def after_update(self, policy: Policy, clock: Clock) -> None:
        """On to the next update of the iteration."""
        self.part += 1
        if self.part < self.parts.geometry.updates_per_iteration:
            self.chosen = self._choice(self.part)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Loss on the fixed batch: how far the policy has drifted from where pre-training left it; or the share that passed."""
        if self.config.passed is not None:
            return {"passed": float(self.good.double().mean())} if len(self.good) else {}
        known = [text for text in dict.fromkeys(self.parts.prompts) if self.pictures.of(text)]
        if not self.config.meter or not known:
            return {}
        mine = range(self.config.meter)[distributed.rank() :: distributed.world_size()]
        policy, found = self.parts.policy, []
        for chunk in even_chunks(len(mine), self.parts.geometry.run.update.batch_size):
            texts = [known[k % len(known)] for k in mine[chunk]]
            seeds = [noise_seed(self.seed, METER, k, 0) for k in mine[chunk]]
            draws = [self._draw(text, seed) for text, seed in zip(texts, seeds, strict=True)]
            found += self._errors(policy, draws, policy.text(texts)).tolist()
        errors = [x for part in distributed.gather_objects(found) for x in part]
        return {"meter": sum(errors) / len(errors)}


def _look_up(name: str, config: Any, prompts: Sequence[str]) -> ReferenceImages:
    return ReferenceImages.load(config.references, prompts, f"regularizers.{name}.references", config.missing == "skip")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
