"""A reward that learns to tell the policy's images from reference images: what all such rewards share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2irl.adversary.companions import Companions, Judge
from t2irl.adversary.exported import load_exported, save_exported
from t2irl.adversary.learning import Batch, Critic, Learner, decision
from t2irl.adversary.losses import accuracy, auc
from t2irl.adversary.memory import Recent, Tensors
from t2irl.adversary.negatives import spoil
from t2irl.adversary.pairs import Drawn, Pairs
from t2irl.adversary.replay import Old, ReplayBuffer
from t2irl.adversary.settings import AdversarialConfig
from t2irl.data import noise_seed
from t2irl.geometry import even_chunks
from t2irl.likeness import ReferenceReward
from t2irl.references import FeatureCache, ReferenceImages
from t2irl.turns import Observation, Turns
from t2irl.types import PromptGroups
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily

NAN = float("nan")


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

    Config = AdversarialConfig

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
        self.companions: Companions | None = None
        self.may_skip = self.may_lack(config)
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
        """Unless it is frozen and judges a picture by itself."""
        return config.frozen is None or config.condition is not None

    @classmethod
    def may_lack(cls, config: Any) -> bool:
        """With a condition, whose `missing` is skip."""
        return config.condition is not None and config.condition.missing == "skip"

    @classmethod
    def needs_heldout(cls, config: Any) -> bool:
        """With a condition, to compare with their reference images."""
        return config.condition is not None

    @classmethod
    def look_up(cls, config: Any, prompts: Sequence[str]) -> ReferenceImages:
        """With a condition, two of each prompt: a reference image is judged beside another one."""
        if config.condition is not None:
            least = max(2, config.references.at_least)
            config = config.model_copy(update={"references": config.references.model_copy(update={"at_least": least})})
        return super().look_up(config, prompts)

    @property
    def uses_policy(self) -> bool:
        """Its image encoder, for reference images that a picture is judged beside."""
        return self.config.condition is not None and self.config.reencode

    @classmethod
    def would_learn(cls, config: Any) -> bool:
        """Unless it is frozen."""
        return config.frozen is None

    @property
    def version(self) -> int:
        """Optimiser steps so far."""
        return self.learner.steps if self.learns else 0

    def prepare(self, prompts: Sequence[str], family: ModelFamily) -> None:
        """Look up the reference images."""
        c = self.config
        if not self.compares(c):
            return
        self.family = family
        images = self.look_up(c, prompts)
        self.references = self.redrawn(images, family, self._limit)
        conditioned, share = c.condition is not None, c.heldout if self.learns else 0
        self.pairs = Pairs(images, share, c.references.folder is None, self.seed, least=2 if conditioned else 0)
        if conditioned:
            self.companions = Companions(c.condition, self.pairs, self.reference_features, self.seed)
        if not self.learns:
            return
        self.reset(self.seed)
        self.learner = Learner(self.critic, self.config, self.seed, self.reference_pictures, self.reference_features)

    # ------------------------------------------------------------------------------------------------------- scoring
    @torch.no_grad()
    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """The adversary's present opinion, (B,) float32."""
        features, self._side = self.critic.embed(images), images.shape[-1]
        if self.learns:
            self._recent.add(images, features)
        return self._opinion(self._score, features, groups)

    def _score(self, features: Tensors, groups: PromptGroups) -> Tensor:
        return self.critic.score(features, groups.texts, self._seeds("score", groups))

    def _opinion(
        self, judge: Judge, features: Tensors, groups: PromptGroups, shown: Sequence[Path | None] | None = None
    ) -> Tensor:
        """What `judge` says of pictures, beside their companions if there is a condition; `shown`: the files they are from."""
        if self.companions is None:
            return judge(features, groups)
        return self.companions.mean(judge, features, groups, [None] * len(groups) if shown is None else shown)

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
            features = self._embed(images)
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
            mine = tuple(x[rows] for x in features)
            return self._opinion(judge, mine, groups[rows]) if rows else torch.empty(0)

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
        if not known:
            return torch.empty(0)
        shown = list(known.values())
        return self._opinion(judge, self.reference_features(shown), groups[list(known)], shown)

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
            images = torch.cat([images, pictures])
            features = tuple(torch.cat(x) for x in zip(features, self._embed(pictures), strict=True))
            files = [self.pairs.choose(self.pairs.parts(x.text)[0], x.prompt, x.member, iteration) for x in old]
            real += [file for file in files if file is not None]  # only prompts that have some are stored
            texts, keys = [*texts, *(x.text for x in old)], [*keys, *((x.prompt, x.member) for x in old)]
        total = sum(distributed.gather_objects(len(real)))
        companions, strangers = [], []
        if self.companions is not None:
            present = list(chain.from_iterable(distributed.gather_objects(texts)))
            companions = self.companions.draw(texts, keys, real, iteration)
            strangers = self.companions.strangers(texts, keys, present, iteration)
        spoilt = self._spoilt(real, keys, iteration)
        return Batch(real, images, features, texts, keys, companions, strangers, spoilt), total

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensors:
        """Frozen features of pictures (B, 3, H, W) in [0, 1], B above 0."""
        parts = [self.critic.embed(images[c]) for c in even_chunks(len(images), self.config.batch_size)]
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))

    def _spoilt(self, files: Sequence[Path], keys: Sequence[tuple[int, int]], iteration: int) -> Tensors:
        """Features of reference images spoilt on purpose, one for each pair; none without that loss."""
        if self.config.negatives is None or not files:
            return ()
        seeds = [noise_seed(self.seed, f"adversary spoilt {iteration}", *key) for key in keys]
        pictures = spoil(self.reference_pictures(files), self.config.negatives, seeds)
        return self._embed(pictures.to(self.device).float().div(255))

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
