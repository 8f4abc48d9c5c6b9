"""All rewards of a run: built, called in batches, checked, saved together."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2irl import registry
from t2irl.errors import ConfigError, RunError
from t2irl.geometry import even_chunks
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily


class RewardSet:
    """Rewards by the names they have in the config. `work` counts calls and scored images."""

    def __init__(
        self, configs: Mapping[str, Any], device: torch.device, batch_size: int, work: Counter[str], seed: int = 0
    ):
        self.rewards: dict[str, Reward] = {n: registry.build("rewards", c, device) for n, c in configs.items()}
        self.weights = {name: reward.config.weight for name, reward in self.rewards.items()}
        self.device, self.batch_size, self.work = device, batch_size, work
        self.each: dict[str, Tensor] = {}
        """What every judge of a reward said of the pictures scored last: name -> (judges, B) float64."""
        for name, reward in self.rewards.items():
            reward.seed, reward.name = seed, name

    @property
    def learns(self) -> bool:
        """Whether any reward is trainable."""
        return any(reward.learns for reward in self.rewards.values())

    @property
    def elsewhere(self) -> bool:
        """Whether any reward that can be given pictures as they are drawn is computed by another program."""
        return any(reward.elsewhere and not reward.whole_groups for reward in self.rewards.values())

    def prepare(self, prompts: Sequence[str], heldout: Sequence[str], family: ModelFamily, trained: bool) -> None:
        """Give every reward the run's prompts. Raises ConfigError for one that cannot serve as it should: `trained` on, or
        only measured on held-out prompts.
        """
        for name, reward in self.rewards.items():
            if trained and not reward.per_image:
                raise ConfigError(
                    f"rewards.{name}: {reward.config.type} measures whole sets of pictures, so it cannot be trained on; "
                    "move it to heldout_rewards"
                )
            if not trained and reward.learns:
                raise ConfigError(
                    f"heldout_rewards.{name}: this {reward.config.type} learns, but held-out rewards are only measured; "
                    "move it to rewards, or set its `frozen` to an exported one"
                )
            if not trained and reward.whole_groups:
                raise ConfigError(
                    f"heldout_rewards.{name}: {reward.config.type} compares the images of a group with each other, so it says "
                    "nothing of held-out pictures as a whole; move it to rewards"
                )
            reward.prepare(reward.prompts_of(reward.config, prompts, heldout, trained), family)

    def score(self, images: Tensor, groups: PromptGroups, whole: bool = False) -> dict[str, Tensor]:
        """Score (B, 3, H, W) uint8 pictures: name -> (B,) float32 on the CPU.

        `whole`: all images of their groups are here, as in a rollout; otherwise rewards that need that give NaN. Raises
        RunError, with the prompt, for an infinite score, and for NaN from a reward that may not skip images.
        """
        batches = [self.each_batch(images[rows], groups[rows]) for rows in self.batches(len(groups))]
        return self.joined(batches, images, groups, whole)

    def batches(self, images: int) -> list[slice]:
        """The batches in which so many images are scored, in order."""
        return even_chunks(images, self.batch_size)

    def each_batch(self, images: Tensor, groups: PromptGroups) -> dict[str, Tensor]:
        """Of one batch, by all rewards in turn but for those that need whole groups: name -> (judges, n) float64, of which scores are
        the means. Raises as `score`.
        """
        rewards = {name: reward for name, reward in self._per_image().items() if not reward.whole_groups}
        return self._each(rewards, images, groups)

    def joined(
        self, batches: Sequence[Mapping[str, Tensor]], images: Tensor, groups: PromptGroups, whole: bool = True
    ) -> dict[str, Tensor]:
        """The scores of a whole rollout, as `score`, from its batches' `each_batch`, and from rewards that need whole groups, a group
        a call. `update` will know them. `images`, `groups`, `whole`: see `score`.
        """
        self.each, none = {}, torch.empty(1, 0, dtype=torch.float64)
        for name, reward in self._per_image().items():
            if not reward.whole_groups:
                self.each[name] = torch.cat([batch[name] for batch in batches], 1) if batches else none
                continue
            self.each[name] = torch.full((reward.judges, len(groups)), torch.nan, dtype=torch.float64)
            for line in dict.fromkeys(groups.ids) if whole else ():
                rows = [k for k, other in enumerate(groups.ids) if other == line]
                self.each[name][:, rows] = self._each({name: reward}, images[rows], groups[rows])[name]
        return self._scores()

    def _each(self, rewards: Mapping[str, Reward], images: Tensor, groups: PromptGroups) -> dict[str, Tensor]:
        """What the judges of some of the rewards say of uint8 pictures, checked."""
        pictures, each = images.to(self.device).float().div(255), {}
        for name, reward in rewards.items():
            self.work["reward_calls"] += 1
            self.work["scored_images"] += len(groups)
            with torch.no_grad():
                each[name] = reward.each(pictures, groups).cpu().double()
            self._check(name, reward, each[name].mean(0), groups)
        return each

    def _scores(self) -> dict[str, Tensor]:
        return {name: values.mean(0).float() for name, values in self.each.items()}

    def only(self, names: Collection[str]) -> RewardSet:
        """Some of these rewards: the same objects in a set of their own."""
        chosen = copy.copy(self)
        chosen.rewards = {name: reward for name, reward in self.rewards.items() if name in names}
        chosen.weights = {name: self.weights[name] for name in chosen.rewards}
        return chosen

    def measure(self, images: Tensor, groups: PromptGroups) -> dict[str, float]:
        """Measures of whole sets, by name. Every process calls it with its part of the (B, 3, H, W) uint8 pictures."""
        return {name: reward.measure(images, groups) for name, reward in self.rewards.items() if not reward.per_image}

    def _per_image(self) -> dict[str, Reward]:
        return {name: reward for name, reward in self.rewards.items() if reward.per_image}

    def _check(self, name: str, reward: Reward, values: Tensor, groups: PromptGroups) -> None:
        if values.shape != (len(groups),):
            raise RunError(
                f"reward {name!r} gave shape {tuple(values.shape)} for {len(groups)} images; expected ({len(groups)},)"
            )
        bad = values.isinf() | (values.isnan() if not reward.may_skip else torch.zeros_like(values, dtype=torch.bool))
        if bad.any():
            first = int(bad.nonzero()[0])
            raise RunError(
                f"reward {name!r} gave {float(values[first])} for the prompt {groups.texts[first]!r}. Scores must be finite; "
                "a reward for which NaN means 'does not apply' declares may_skip = True"
            )

    def update(self, images: Tensor, groups: PromptGroups) -> tuple[dict[str, float], bool]:
        """Let trainable rewards learn from a rollout, (B, 3, H, W) uint8.

        Returns metrics by `reward/<name>/<metric>`, and whether the policy learns from this rollout as well.
        """
        metrics, policy_turn = {}, True
        for name, reward in self.rewards.items():
            metrics |= {f"reward/{name}/{key}": value for key, value in reward.report().items()}
            if reward.learns:
                reward.rollout_scores = {n: (self.weights[n], values) for n, values in self._scores().items()}
                found = reward.update(images.to(self.device).float().div(255), groups)
                metrics |= {f"reward/{name}/{key}": value for key, value in found.items()}
                policy_turn = policy_turn and reward.policy_turn
        return metrics, policy_turn

    def export(self, folder: Path) -> None:
        """Write every reward that has learned into a folder of its name. Main process only."""
        for name, reward in self.rewards.items():
            if reward.learns:
                reward.export(folder / name)

    def state_dict(self) -> dict[str, Any]:
        """State of every reward that has one."""
        return {name: state for name, reward in self.rewards.items() if (state := reward.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Raises ValueError when a reward that learns would start afresh."""
        for name, reward in self.rewards.items():
            if reward.learns and name not in state and reward.state_dict():
                raise ValueError(f"it has no state of the reward {name!r}, which learns")
        for name, saved in state.items():
            self.rewards[name].load_state_dict(saved)
