"""A reward that learns to tell the policy's images from reference images: what all such rewards share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from t2irl.adversary.augment import Augment
from t2irl.adversary.exported import load_exported, save_exported
from t2irl.adversary.learning import Batch, Critic, Learner, Penalty, decision
from t2irl.adversary.losses import LossKind, accuracy, auc
from t2irl.adversary.memory import Recent, Tensors
from t2irl.adversary.pairs import Drawn, Pairs
from t2irl.adversary.replay import Old, Replay, ReplayBuffer
from t2irl.data import noise_seed
from t2irl.geometry import even_chunks
from t2irl.likeness import ReferenceReward
from t2irl.references import FeatureCache, ReferenceImages
from t2irl.turns import AnyTurns, FixedTurns, Observation, Turns
from t2irl.types import PromptGroups
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily

NAN = float("nan")
Judge = Callable[[Tensors, PromptGroups], Tensor]


@dataclass(frozen=True)
class Seen:
    """What the adversary says of this rollout and of reference images before it learns; values of all processes."""

    policy: Tensor
    """Scores of the rollout's images that have a reference image."""
    reference: Tensor
    """Scores of those reference images."""
    kept_real: Tensor
    """Decisions about reference images that it never learns from, relative to the zero of the loss."""
    kept_fake: Tensor
    """The same about the rollout images paired with them."""
    centre: float
    """The zero of the loss."""


class AdversarialReward(ReferenceReward):
    """Scores what an adversary takes for a reference image; learns from every rollout as `turns` says.

    The scores that the policy learns from are those of before the adversary's step. Trained parameters and moments are
    float32, gradients are summed over processes, and all of it is in the checkpoint.
    """

    class Config(ReferenceReward.Config):
        """Settings that all adversarial rewards have."""

        references: ReferenceImages.Config | None = None
        """Reference images of the prompts trained on; needed unless `frozen`."""
        frozen: Path | None = None
        """A folder that an earlier run exported (`export/rewards/<name>`): score with it and do not learn. Every setting that
        the score depends on must be as it was."""
        turns: AnyTurns = FixedTurns()
        """When the adversary learns, and whether the policy then does."""
        loss: LossKind = "hinge"
        """hinge, bce (cross-entropy of reference or rollout), or bt (Bradley-Terry within each pair)."""
        label_smoothing: float = Field(0.0, ge=0, lt=0.5)
        """bce and bt: share of the opposite label."""
        lr: PositiveFloat = 1e-4
        """Learning rate."""
        betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.999)
        """Decay rates of the two moments."""
        weight_decay: NonNegativeFloat = 0.0
        """Decoupled weight decay."""
        max_grad_norm: PositiveFloat | None = None
        """Gradients are scaled down to this norm; null: never."""
        batch_size: PositiveInt = 64
        """Pairs in one forward and backward pass, per process; an optimiser step takes all pairs of the rollout."""
        penalty: Penalty | None = None
        """R1 gradient penalty; null: none."""
        augment: Augment = Augment()
        """Changes of the pictures that it learns from."""
        replay: Replay | None = None
        """Older rollout images that it learns from as well; null: none."""
        reencode: bool = True
        """Put reference images through the policy's image encoder and decoder first, so that the decoder's traces tell
        nothing. They take the same 8-bit path as rollouts in any case. Published: false, which a model that encodes no
        images needs."""
        heldout: float = Field(0.125, ge=0, lt=1)
        """Share of the reference images that it never learns from: heldout_accuracy and heldout_auc are measured on them."""
        memory_gib: PositiveFloat = 1.0
        """Memory for features of reference images and for re-encoded ones on the host, and for features of the last rollout
        on the device, each, per process."""
        feature_cache: Path | None = None
        """Folder where features of reference images are kept from run to run, by content; null: in memory only. With the
        patches of a large backbone that is some MiB an image."""

        @model_validator(mode="after")
        def _settings_fit(self) -> AdversarialReward.Config:
            if self.label_smoothing and self.loss == "hinge":
                raise PydanticCustomError(
                    "adversary", "label_smoothing = {value} has no meaning for loss: hinge; use bce or bt, or 0",
                    {"value": self.label_smoothing},
                )  # fmt: skip
            if self.frozen is not None and self.references is not None:
                raise PydanticCustomError(
                    "adversary", "a frozen adversary does not learn, so it takes no references; remove one of the two"
                )
            return self

    needs_heldout = False
    references_advice = (
        "an adversary learns from reference images: give references: {index: FILE} or references: {folder: FOLDER}, or frozen: "
        "FOLDER for an exported one"
    )
    critic: Critic
    """What `make_critic` gave."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self._limit = round(config.memory_gib * 2**30)
        self._recent = Recent(self._limit)
        self._features: FeatureCache | None = None
        self._side = 0
        self.turns = Turns(config.turns)
        self.replay = None if config.replay is None else ReplayBuffer(config.replay)
        self.critic = self.make_critic(self.seed)
        if config.frozen is not None:
            load_exported(config.frozen, config.type, self.critic, device)

    def make_critic(self, seed: int) -> Critic:
        """Load the networks; new weights are drawn from `seed`. Raises DataError for a bad folder."""
        raise NotImplementedError

    def reset(self, seed: int) -> None:
        """Draw new weights from `seed`, where there are any."""

    @classmethod
    def compares(cls, config: Any) -> bool:
        """Unless it is frozen."""
        return config.frozen is None

    @classmethod
    def would_learn(cls, config: Any) -> bool:
        """Unless it is frozen."""
        return config.frozen is None

    @property
    def version(self) -> int:
        """Optimiser steps so far."""
        return self.learner.steps if self.learns else 0

    def prepare(self, prompts: Sequence[str], family: ModelFamily) -> None:
        """Look up the reference images of the prompts trained on."""
        if not self.learns:
            return
        self.family = family
        self.reset(self.seed)
        images = self.look_up(self.config, prompts)
        self.references = self.redrawn(images, family, self._limit)
        paired = self.config.references.folder is None
        self.pairs = Pairs(images, self.config.heldout, paired, self.seed)
        self.learner = Learner(self.critic, self.config, self.seed, self.reference_pictures, self.reference_features)

    # ------------------------------------------------------------------------------------------------------- scoring
    @torch.no_grad()
    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """The adversary's present opinion, (B,) float32."""
        features = self.critic.embed(images)
        if self.learns:
            self._recent.add(images, features)
        return self._score(features, groups)

    def _score(self, features: Tensors, groups: PromptGroups) -> Tensor:
        return self.critic.score(features, groups.texts, self._seeds("score", groups))

    # ---------------------------------------------------------------------------------------------- reference images
    def reference_pictures(self, files: Sequence[Path]) -> Tensor:
        """Reference images as the policy's pictures are: (n, 3, S, S) uint8."""
        return torch.stack(self.references.pictures(files, self._side))

    def reference_features(self, files: Sequence[Path]) -> Tensors:
        """Frozen features of reference images, each computed once if memory or the disk allows."""
        if self._features is None:
            self._features = self._feature_cache()
        return tuple(x.to(self.device) for x in self._features.of(files))

    def _feature_cache(self) -> FeatureCache:
        folder, name = self.config.feature_cache, ""
        if folder is not None:
            way = f"{self.family.config.path} {self.family.config.vae_precision}" if self.config.reencode else ""
            name = f"{self.critic.fingerprint()} {self._side} {way}"
        return self.references.features(
            lambda images: self.critic.embed(images.to(self.device)), lambda: self._side, name, folder
        )

    # ------------------------------------------------------------------------------------------------------ learning
    def update(self, images: Tensor, groups: PromptGroups) -> dict[str, float]:
        """Look at a rollout, decide whose turn it is, learn; see `metrics.md` for what is returned."""
        iteration, self._side = self.turns.iteration, images.shape[-1]
        features = self._recent.take(images)
        if features is None:
            with torch.no_grad():
                parts = [self.critic.embed(images[c]) for c in even_chunks(len(images), self.config.batch_size)]
            features = tuple(torch.cat(x) for x in zip(*parts, strict=True))
        drawn = self.pairs.draw(groups, iteration)
        seen = self._look(features, groups, drawn)
        share_right = accuracy(self.config.loss, seen.kept_real, seen.kept_fake) if len(seen.kept_real) else NAN
        means = float(seen.policy.mean()), float(seen.reference.mean())
        turn = self.turns.next(Observation(*means, share_right))
        self.policy_turn = turn.policy
        metrics = {"reference_mean": means[1], "gap": means[1] - means[0], "learned": 0.0}
        if len(seen.kept_real):
            metrics |= {"heldout_accuracy": share_right, "heldout_auc": auc(seen.kept_real, seen.kept_fake)}
        if turn.adversary:
            batch, total = self._batch(images, features, groups, drawn, iteration)
            self.learner.centre = seen.centre
            for number in range(self.config.turns.updates if total else 0):
                metrics |= self.learner.step(batch, total, iteration, number) | {"learned": number + 1.0}
        if self.replay is not None:
            self._store(self.replay, images, groups, drawn, iteration)
        return metrics

    @torch.no_grad()
    def _look(self, features: Tensors, groups: PromptGroups, drawn: Drawn) -> Seen:
        """Opinions about the rollout and about reference images, before any step."""
        files = [a or b for a, b in zip(drawn.learned, drawn.kept, strict=True)]
        kept = [k for k, file in enumerate(drawn.kept) if file is not None]
        known = [k for k, file in enumerate(files) if file is not None]

        def own(rows: list[int], judge: Judge) -> Tensor:
            return judge(tuple(x[rows] for x in features), groups[rows]) if rows else torch.empty(0)

        policy, reference, real, fake = map(
            _everyone,
            (
                own(known, self._score),
                self._about(files, groups, self._score),
                self._about(drawn.kept, groups, self._decide),
                own(kept, self._decide),
            ),
        )
        centre = 0.0
        if not self.critic.has_zero and len(reference):
            both = own(known, self._decide), self._about(files, groups, self._decide)
            centre = sum(float(_everyone(x).mean()) for x in both) / 2
        return Seen(policy, reference, real - centre, fake - centre, centre)

    def _about(self, files: Sequence[Path | None], groups: PromptGroups, judge: Judge) -> Tensor:
        """What `judge` says of reference images; places without one are left out."""
        known = {k: file for k, file in enumerate(files) if file is not None}
        return judge(self.reference_features(list(known.values())), groups[list(known)]) if known else torch.empty(0)

    def _decide(self, features: Tensors, groups: PromptGroups) -> Tensor:
        seeds = self._seeds("look", groups)
        return decision(self.critic, self.critic.judge(features, groups.texts, seeds))

    def _batch(
        self, images: Tensor, features: Tensors, groups: PromptGroups, drawn: Drawn, iteration: int
    ) -> tuple[Batch, int]:
        """Pairs that this process learns from, older images last, and the number of pairs of all processes."""
        rows = [k for k, file in enumerate(drawn.learned) if file is not None]
        texts, keys = groups[rows].texts, list(zip(groups[rows].ids, groups[rows].members, strict=True))
        real = [file for file in drawn.learned if file is not None]
        images, features = images[rows], tuple(x[rows] for x in features)
        total = sum(distributed.gather_objects(len(rows)))
        old = [] if self.replay is None else self.replay.draw(total, self.seed, iteration)
        if old:
            pictures = torch.stack([x.picture for x in old]).to(self.device).float().div(255)
            with torch.no_grad():
                parts = [self.critic.embed(pictures[c]) for c in even_chunks(len(old), self.config.batch_size)]
            images = torch.cat([images, pictures])
            features = tuple(torch.cat(x) for x in zip(features, *parts, strict=True))
            files = [self.pairs.choose(self.pairs.parts(x.text)[0], x.prompt, x.member, iteration) for x in old]
            real += [file for file in files if file is not None]  # only prompts that have some are stored
            texts, keys = [*texts, *(x.text for x in old)], [*keys, *((x.prompt, x.member) for x in old)]
        total = sum(distributed.gather_objects(len(real)))
        return Batch(real, images, features, texts, keys), total

    def _store(self, replay: ReplayBuffer, images: Tensor, groups: PromptGroups, drawn: Drawn, iteration: int) -> None:
        """Keep some of the rollout's images for later iterations."""
        rows = [k for k, file in enumerate(drawn.learned) if file is not None]
        pictures = images[rows].mul(255).round().to("cpu", torch.uint8)
        part = groups[rows]
        own = [Old(*x) for x in zip(pictures, part.texts, part.ids, part.members, strict=True)]
        replay.add(own, self.seed, iteration)

    def _seeds(self, stream: str, groups: PromptGroups) -> list[int]:
        stream = f"adversary {stream} {self.turns.iteration}"
        return [noise_seed(self.seed, stream, *key) for key in zip(groups.ids, groups.members, strict=True)]

    # --------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Parameters, moments, whose turn it is, and the stored images; nothing for a frozen adversary."""
        if not self.learns:
            return {}
        state = {"learner": self.learner.state_dict(), "turns": self.turns.state_dict()}
        return state if self.replay is None else state | {"replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises ValueError when it does not fit."""
        if not self.learns:
            raise ValueError(f"it holds an adversary that learns, but this {self.config.type} is frozen")
        self.learner.load_state_dict(state["learner"])
        self.turns.load_state_dict(state["turns"])
        if self.replay is not None:
            self.replay.load_state_dict(state.get("replay", {}))

    def export(self, folder: Path) -> None:
        """`adversary.safetensors` and `adversary.json`, which `frozen` reads."""
        save_exported(folder, self.config.type, self.critic)


def _everyone(values: Tensor) -> Tensor:
    """Values of all processes in float64 on the CPU; each process may have any number of them."""
    found = chain.from_iterable(distributed.gather_objects(values.double().tolist()))
    return torch.tensor(list(found), dtype=torch.float64)
