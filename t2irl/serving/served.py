"""The rewards of a config as a server holds them: built, told what they must know, named by hashes, scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from t2irl import __version__, loading
from t2irl.data import load_prompts
from t2irl.errors import ConfigError
from t2irl.registry import Plugin
from t2irl.rewards.base import Reward
from t2irl.rewards.combine import RewardSet
from t2irl.serving.identity import reward_hash
from t2irl.strict import Strict
from t2irl.types import PromptGroups


class RewardsOnly(Strict):
    """The part of a config that a server reads."""

    rewards: dict[str, Plugin("rewards")] = Field(min_length=1)  # type: ignore[valid-type]
    """Rewards by name."""


def load_rewards(files: Sequence[Path], overrides: Sequence[str], only: Sequence[str] | None) -> dict[str, Any]:
    """The `rewards` of config files, merged left to right, whatever else they hold; `only` some of them.

    Raises ConfigError with every problem at once.
    """
    layer = reduce(loading.merge, map(loading.read_file, files), loading.Layer({}, {}))
    values = {key: value for key, value in layer.values.items() if key == "rewards"}
    if not values:
        raise ConfigError(f"rewards is missing in {', '.join(map(str, files))}")
    origins = {place: at for place, at in layer.origins.items() if place[0] == "rewards"}
    found = loading.load(
        RewardsOnly, [loading.Layer(values, origins)], overrides, "t2irl serve-reward configs/tiny/demo.yaml"
    )
    if unknown := [name for name in only or () if name not in found.rewards]:
        raise ConfigError(f"--only {unknown[0]}: no such entry; rewards has {', '.join(found.rewards)}")
    return found.rewards if only is None else {name: found.rewards[name] for name in only}


class Served:
    """Rewards that answer requests."""

    def __init__(self, configs: Mapping[str, Any], device: torch.device, batch_size: int, prompts: Path | None):
        """`prompts`: a prompt file, for rewards that must know the run's prompts. Raises ConfigError for others."""
        self.rewards = RewardSet(configs, device, batch_size, Counter())
        for name, reward in self.rewards.rewards.items():
            _refuse(name, reward, prompts)
        texts = load_prompts(prompts, "--prompts").texts if prompts else ()
        for reward in self.rewards.rewards.values():
            reward.prepare(texts, None)  # type: ignore[arg-type]  # a model is asked for only with `reencode`
        self.hashes = {name: reward_hash(config) for name, config in configs.items()}

    def manifest(self) -> dict[str, Any]:
        """What a client must know of each reward."""
        return {
            "t2irl": __version__,
            "rewards": {
                name: {"type": reward.config.type, "hash": self.hashes[name], "may_skip": reward.may_skip}
                for name, reward in self.rewards.rewards.items()
            },
        }

    def score(
        self, pictures: Sequence[np.ndarray], prompts: Sequence[str], names: Sequence[str]
    ) -> dict[str, list[float]]:
        """Scores by name of (H, W, 3) uint8 pictures of one size. NaN where a reward does not apply."""
        # Laid out as in a run: sums then round as they do there.
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        texts = list(dict.fromkeys(prompts))
        places = [texts.index(prompt) for prompt in prompts]
        groups = PromptGroups(tuple(texts), tuple(places), tuple(places), tuple(range(len(places))))
        return {name: values.tolist() for name, values in self.rewards.only(names).score(images, groups).items()}


def _refuse(name: str, reward: Reward, prompts: Path | None) -> None:
    """Raise ConfigError for a reward that cannot be served."""
    where = f"rewards.{name}: {reward.config.type}"
    if reward.learns:
        raise ConfigError(f"{where} learns from the policy's pictures, so it cannot be served; keep it in the run")
    if not reward.per_image:
        raise ConfigError(f"{where} measures whole sets of pictures, so it cannot be served; keep it in the run")
    if reward.whole_groups:
        raise ConfigError(f"{where} compares the images of a group, so it cannot be served; keep it in the run")
    settings = reward.config.model_dump()
    if settings.get("reencode") and settings.get("references") is not None:
        raise ConfigError(f"{where}: reencode: true needs the run's model, which a server has not; set it to false")
    if settings.get("references") is not None and prompts is None:
        raise ConfigError(
            f"{where} compares with reference images of the run's prompts; give those with --prompts FILE"
        )
