"""Where a vision-language model that judges pictures runs: in here, or behind an OpenAI-compatible server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from reward_models.judges import Judge, LocalJudge, ServerJudge
from t2irl.errors import ConfigError, DataError
from t2irl.models.base import DTYPES
from t2irl.rewards.base import Reward


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
