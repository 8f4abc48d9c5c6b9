"""A frozen vision-language model that is asked whether a picture has artifacts (ArtifactReward, arXiv 2601.03468)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from reward_models.judges import LEAST_MASS, SEED_INSTRUCTION, Judge, LocalJudge, ServerJudge, cleanliness, to_pictures
from t2irl.errors import ConfigError, DataError, RunError
from t2irl.models.base import DTYPES
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups
from t2irl.utils import distributed


class ArtifactJudge(Reward):
    """P(no) / (P(no) + P(yes)) for the question whether a picture has artifacts: in [0, 1], 1 is clean.

    The prompt is not shown. Only the instruction was tuned (`reward_models/recipes/tune_instruction.py`), nothing learns
    during RL. Hacked by pictures with little in them: empty, blurred or simple ones have nothing to find fault with.
    """

    class Config(Reward.Config):
        """Settings. One of `path` and `server` is needed."""

        type: Literal["artifact_judge"] = "artifact_judge"
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
        instruction: Path | None = None
        """What the judge is asked: a text file, or a .json beam of `tune_instruction.py`, over which scores are averaged; null:
        the untuned instruction that comes with this package."""
        answer_mass: float = Field(LEAST_MASS, ge=0, le=1)
        """P(yes) + P(no) below which the judge has not answered: such a picture scores 0 (published: 1, which invites it)."""
        max_pixels: PositiveInt = 501_760
        """With `path`: larger pictures are shrunk to so many pixels before the judge sees them."""
        jpeg: bool = False
        """Send pictures through JPEG of quality 95 first, as published; false: exact."""
        precision: Literal["fp32", "bf16"] = "bf16"
        """With `path`: dtype of the judge."""

        @model_validator(mode="after")
        def _one_place(self) -> ArtifactJudge.Config:
            if self.path is not None and self.server is not None:
                raise PydanticCustomError(
                    "judge", "path and server are both there; the judge runs in one place, drop one"
                )
            for name in ("model", "api_key_env"):
                if self.server is None and getattr(self, name) is not None:
                    raise PydanticCustomError(
                        "judge", "{name} = {value} belongs to `server`, which is missing; give server: http://HOST:PORT/v1, "
                        "or drop it", {"name": name, "value": getattr(self, name)},
                    )  # fmt: skip
            return self

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.instructions = read_instructions(config.instruction or SEED_INSTRUCTION)
        self.judge = make_judge(config, device)
        self.asked = self.silent = 0

    @property
    def elsewhere(self) -> bool:
        """Behind a server."""
        return self.config.server is not None

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Probability that each picture is clean, (B,) float32: mean over the instructions."""
        return self.each(images).mean(0).float().to(images.device)

    def each(self, images: Tensor) -> Tensor:
        """The same for every instruction by itself, (K, B) float64 on the CPU. Raises RunError when the judge is gone."""
        pictures, found = to_pictures(images, self.config.jpeg), []
        for instruction in self.instructions:
            try:
                answers = self.judge.log_answers(pictures, instruction)
            except OSError as error:
                raise RunError(
                    f"reward artifact_judge: {error}. The last checkpoint is good; start the run again"
                ) from error
            clean, answered = cleanliness(answers[:, 0], answers[:, 1], self.config.answer_mass)
            self.asked, self.silent = self.asked + len(answered), self.silent + int((~answered).sum())
            found.append(clean)
        return torch.stack(found)

    def report(self) -> dict[str, float]:
        """Share of the questions that were not answered by yes or no."""
        counts = torch.tensor(distributed.gather_objects([self.asked, self.silent])).sum(0).tolist()
        self.asked = self.silent = 0
        return {"unanswered": counts[1] / counts[0]} if counts[0] else {}

    def state_dict(self) -> dict[str, Any]:
        """What `report` has not told yet."""
        return {"asked": self.asked, "silent": self.silent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.asked, self.silent = state["asked"], state["silent"]


def make_judge(config: Any, device: torch.device) -> Judge:
    """The judge of a config. Raises ConfigError or DataError saying what is missing or wrong."""
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


def read_instructions(file: Path) -> tuple[str, ...]:
    """One instruction from a text file, or several from a beam. Raises DataError."""
    where = f"reward artifact_judge: instruction = {file}"
    try:
        text = file.read_text(encoding="utf-8")
        found = [entry["text"] for entry in json.loads(text)["beam"]] if file.suffix == ".json" else [text]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: cannot be read: {error!r}; expected a text file, or a .json that tune_instruction.py wrote"
        ) from error
    stripped = tuple(t.strip() for t in found)
    if not stripped or not all(stripped):
        raise DataError(f"{where}: is empty; expected what the judge is asked, to be answered by yes or no")
    return stripped
