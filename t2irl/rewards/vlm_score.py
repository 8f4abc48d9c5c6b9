"""A vision-language model as a reward: VQAScore, UnifiedReward, or a level of quality."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from reward_models.judges import to_pictures
from reward_models.vlm_scores import RATE, VQA, levels, marks, vqa
from t2irl.judging import JudgeConfig, JudgeReward, make_judge, read_question
from t2irl.types import PromptGroups

ASK = {"vqa": (vqa, VQA), "unified": (marks, None), "levels": (levels, RATE)}


class VlmScore(JudgeReward):
    """What a frozen model says of picture and prompt, in here or behind an OpenAI-compatible server.

    Hacked by written words ("yes", the prompt itself), and by whatever the model takes for granted; `levels` does not read
    the prompt.
    """

    class Config(JudgeConfig):
        """Settings. One of `path` and `server` is needed."""

        type: Literal["vlm_score"] = "vlm_score"
        ask: Literal["vqa", "unified", "levels"] = "vqa"
        """vqa: VQAScore, P(yes) that the picture shows the prompt, in [0, 1]. unified: the mark of UnifiedReward, 1 to 5, for
        its own models. levels: expected quality, 1 to 5, from the words excellent to bad, as Q-Align; DeQA itself is the reward `deqa`."""
        question: Path | None = None
        """Text file with the question; {prompt} stands for the prompt. null: the published one of vqa, one of our own for levels;
        unified needs it: the text of the UnifiedReward release whose weights are asked, since other words are another model."""
        missing: Literal["error", "skip"] = "error"
        """An answer without a score stops the run, or the picture is not scored by this reward."""
        server: str | None = None
        """Address of an OpenAI-compatible server, such as http://localhost:8000/v1; top_logprobs for all but `unified`."""

        @model_validator(mode="after")
        def _has_a_question(self) -> VlmScore.Config:
            if self.ask == "unified" and self.question is None:
                raise PydanticCustomError(
                    "question",
                    "ask: unified needs `question`, a text file with what this release of UnifiedReward was trained to be asked, and "
                    "the word prompt in braces where the prompt goes",
                )
            return self

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.may_skip = config.missing == "skip"
        self.ask, published = ASK[config.ask]
        self.question = (published or "") if config.question is None else read_question(config)
        self.judge = make_judge(config, device)

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """What the model says, (B,) float32; NaN where it gives no score. Raises RunError when the server is gone."""
        pictures = to_pictures(images)
        scores = torch.full((len(images),), float("nan"), dtype=torch.float64)

        def one(place: int) -> tuple[list[int], Tensor]:
            rows = [k for k, other in enumerate(groups.index) if other == place]
            question = self.question.replace("{prompt}", groups.prompts[place])
            return rows, self.ask(self.judge, [pictures[k] for k in rows], question)

        # A model in here has one device to work on; a server takes several prompts at once.
        workers = self.config.parallel if self.config.server else 1
        with self.asking(), ThreadPoolExecutor(workers) as pool:
            for rows, values in pool.map(one, dict.fromkeys(groups.index)):
                scores[rows] = values
        return scores.float().to(images.device)
