"""A reward that runs elsewhere: behind `t2irl serve-reward`, on another machine or in another environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from t2irl.errors import ConfigError, DataError, RunError
from t2irl.rewards.base import Reward
from t2irl.serving.client import Address, ServerError, find_reward, score
from t2irl.types import PromptGroups
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily


class Remote(Reward):
    """What the served reward gives, and hacked as that is. Pictures travel without loss, as 8 bits a channel.

    Scores are those of the model that the server had at the start, or the run stops: on every process, within `retry_for`
    and `timeout` seconds of a server's end, with its last checkpoint good.
    """

    class Config(Reward.Config):
        """Settings."""

        type: Literal["remote"] = "remote"
        url: str | None = None
        """Address of the server, such as http://localhost:8400; needed."""
        reward: str | None = None
        """Name of the reward there; null: the only one that it serves."""
        token_env: str | None = None
        """Environment variable that holds the server's token; null: it wants none."""
        timeout: PositiveFloat = 120
        """Seconds until a request without an answer counts as failed."""
        retry_for: NonNegativeFloat = 60
        """Seconds for which a failing request is tried again, with pauses of 0.25, 0.5, 1, ... 8, before the run stops."""
        batch_size: PositiveInt = 16
        """Pictures in a request; fewer where the server takes no more. The server puts requests together as it sees fit."""
        parallel: PositiveInt = 4
        """Requests under way at once, per process."""
        encoding: Literal["raw", "png"] = "raw"
        """How pictures travel: as they are, or as PNG, a third to a half of the bytes for some milliseconds of work each."""
        nan: Literal["error", "skip"] = "error"
        """When the served reward says that it does not apply to a picture: the run stops, or the picture goes without this
        score."""
        model_hash: str | None = None
        """Hash that the served reward must have, as the server prints it; null: whatever it has at the start."""
        accept_other_model: bool = False
        """Go on from a checkpoint although the server has had another model until then; false: refuse."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.may_skip = config.nan == "skip"
        if config.url is None:
            raise ConfigError("reward remote: url is missing; give url: http://HOST:PORT of a `t2irl serve-reward`")
        token = None
        if config.token_env is not None:
            token = os.environ.get(config.token_env)
            if not token:
                raise ConfigError(
                    f"reward remote: token_env = {config.token_env}: no such environment variable, or it is empty; set it "
                    "before the run"
                )
        try:
            self.address = Address(config.url.rstrip("/"), token, config.timeout, config.retry_for)
        except ValueError as error:
            raise ConfigError(f"reward remote: url = {config.url}: {error}") from error

    @property
    def elsewhere(self) -> bool:
        """Always."""
        return True

    def prepare(self, prompts: Sequence[str], family: ModelFamily) -> None:
        """Ask the server what it serves: the same for all processes, or none of them begins."""
        with distributed.together(self.device):
            try:
                self.served = find_reward(self.address, self.config.reward)
            except ServerError as error:
                raise DataError(f"reward {self.name or 'remote'}: {error}") from error
        hashes = list(dict.fromkeys(distributed.gather_objects(self.served.hash)))
        if len(hashes) > 1:
            raise DataError(
                f"reward {self.name}: {self.config.url} gives processes different models: {', '.join(hashes)}"
            )
        if self.config.model_hash not in (None, self.served.hash):
            raise DataError(
                f"reward {self.name}: model_hash = {self.config.model_hash}, but {self.config.url} serves {self.served.hash}"
            )

    @torch.no_grad()
    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """What the server gives, (B,) float32. Raises RunError when it is gone or has another model."""
        pixels = images.float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
        c = self.config
        try:
            values = score(
                self.address, self.served, pixels.numpy(), groups.texts, c.batch_size, c.parallel, c.encoding
            )
        except ServerError as error:
            raise RunError(
                f"reward {self.name or 'remote'}: {error}. The last checkpoint is good; give the same command again"
            ) from error
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def state_dict(self) -> dict[str, Any]:
        """Which model gave the scores so far."""
        return {"model": self.served.hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with that. Raises ValueError for another one."""
        if state["model"] != self.served.hash and not self.config.accept_other_model:
            raise ValueError(
                f"reward {self.name!r} was {state['model']}, but {self.config.url} now serves {self.served.hash}; start that "
                "model again, or set accept_other_model: true"
            )
