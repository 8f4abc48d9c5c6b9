"""Where a vision-language model that judges pictures runs: in here, or behind an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from reward_models.judges import Judge, LocalJudge, ServerJudge
from t2irl.errors import ConfigError, DataError, RunError
from t2irl.models.base import DTYPES
from t2irl.rewards.base import Reward
from t2irl.utils import distributed


class JudgeConfig(Reward.Config):
    """Settings of every reward that asks such a model. One of `path` and `server` is needed."""

    path: Path | None = None
    """Folder of a vision-language model of the Qwen2.5-VL class in transformers format, run beside the policy."""
    server: str | None = None
    """Address of an OpenAI-compatible server, such as http://localhost:8000/v1 of vLLM, that gives top_logprobs."""
    model: str | None = None
    """With `server`: name of the model there; null: the only one that it offers."""
    api_key_env: str | None = None
    """With `server`: environment variable that holds the key; null: no key."""
    timeout: PositiveFloat = 60
    """With `server`: seconds until a request counts as failed."""
    tries: PositiveInt = 5
    """With `server`: tries of a request, with pauses of 1, 2, 4, ... seconds, before the run stops."""
    parallel: PositiveInt = 8
    """With `server`: requests under way at once, per process."""
    max_pixels: PositiveInt = 501_760
    """With `path`: larger pictures are shrunk to so many pixels before the model sees them."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """With `path`: dtype of the model."""

    @model_validator(mode="after")
    def _one_place(self) -> JudgeConfig:
        if self.path is not None and self.server is not None:
            raise PydanticCustomError("judge", "path and server are both there; the model runs in one place, drop one")
        for name in ("model", "api_key_env"):
            if self.server is None and getattr(self, name) is not None:
                raise PydanticCustomError(
                    "judge", "{name} = {value} belongs to `server`, which is missing; give server: http://HOST:PORT/v1, "
                    "or drop it", {"name": name, "value": getattr(self, name)},
                )  # fmt: skip
        return self


class JudgeReward(Reward):
    """A reward that asks such a model, and counts the questions that it did not answer."""

    judge: Judge
    """The model; made by the subclass, once its cheaper checks are passed."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.asked = self.silent = 0

    @property
    def elsewhere(self) -> bool:
        """Behind a server."""
        return self.config.server is not None

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Inside, a server that is gone raises RunError."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"reward {self.config.type}: {error}. The last checkpoint is good; start the run again"
            ) from error

    def count(self, answered: Tensor) -> None:
        """Note for `report` which questions, (n,) bool, were answered."""
        self.asked, self.silent = self.asked + len(answered), self.silent + int((~answered).sum())

    def report(self) -> dict[str, float]:
        """Share of the counted questions that were not answered; nothing without any."""
        counts = torch.tensor(distributed.gather_objects([self.asked, self.silent])).sum(0).tolist()
        self.asked = self.silent = 0
        return {"unanswered": counts[1] / counts[0]} if counts[0] else {}

    def state_dict(self) -> dict[str, Any]:
        """What `report` has not told yet."""
        return {"asked": self.asked, "silent": self.silent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.asked, self.silent = state["asked"], state["silent"]


def read_question(config: Any) -> str:
    """The text of the file `config.question`. Raises DataError."""
    try:
        return config.question.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"reward {config.type}: question = {config.question}: cannot be read: {error}") from error


def make_judge(config: Any, device: torch.device) -> Judge:
    """The judge of a `JudgeConfig`. Raises ConfigError or DataError saying what is missing or wrong."""
    if config.path is not None:
        try:
            return LocalJudge.load(config.path, device, DTYPES[config.precision], config.max_pixels)
        except (OSError, ValueError) as error:
            raise DataError(f"reward {config.type}: path = {config.path}: {error}") from error
    if config.server is None:
        raise ConfigError(
            f"reward {config.type}: path and server are both missing; give path: FOLDER of a vision-language model, or "
            "server: http://HOST:PORT/v1 of an OpenAI-compatible server"
        )
    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise ConfigError(
                f"reward {config.type}: api_key_env = {config.api_key_env}: no such environment variable, or it is empty; "
                "set it before the run"
            )
    try:
        return ServerJudge(config.server, config.model, key, config.timeout, config.tries, config.parallel)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"reward {config.type}: server = {config.server}: {error}") from error
