"""A frozen vision-language model that is asked whether a picture has artifacts (ArtifactReward, arXiv 2601.03468)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from reward_models.judges import LEAST_MASS, SEED_INSTRUCTION, cleanliness, to_pictures
from t2irl.errors import DataError
from t2irl.judging import JudgeConfig, JudgeReward, make_judge
from t2irl.types import PromptGroups


class ArtifactJudge(JudgeReward):
    """P(no) / (P(no) + P(yes)) for the question whether a picture has artifacts: in [0, 1], 1 is clean.

    The prompt is not shown. Only the instruction was tuned (`reward_models/recipes/tune_instruction.py`), nothing learns
    during RL. Hacked by pictures with little in them: empty, blurred or simple ones have nothing to find fault with.
    """

    class Config(JudgeConfig):
        """Settings. One of `path` and `server` is needed."""

        type: Literal["artifact_judge"] = "artifact_judge"
        instruction: Path | None = None
        """What the judge is asked: a text file, or a .json beam of `tune_instruction.py`, over which scores are averaged; null:
        the untuned instruction that comes with this package."""
        answer_mass: float = Field(LEAST_MASS, ge=0, le=1)
        """P(yes) + P(no) below which the judge has not answered: such a picture scores 0 (published: 1, which invites it)."""
        jpeg: bool = False
        """Send pictures through JPEG of quality 95 first, as published; false: exact."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.instructions = read_instructions(config.instruction or SEED_INSTRUCTION)
        self.judge = make_judge(config, device)

    @property
    def judges(self) -> int:
        """One judge, but as many opinions as instructions."""
        return len(self.instructions)

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Probability that each picture is clean, (B,) float32: mean over the instructions."""
        return self.each(images, groups).mean(0).float().to(images.device)

    def each(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """The same for every instruction by itself, (K, B) float64 on the CPU. Raises RunError when the judge is gone."""
        pictures, found = to_pictures(images, self.config.jpeg), []
        for instruction in self.instructions:
            with self.asking():
                answers = self.judge.log_answers(pictures, instruction)
            clean, answered = cleanliness(answers[:, 0], answers[:, 1], self.config.answer_mass)
            self.count(answered)
            found.append(clean)
        return torch.stack(found)


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
