"""A vision-language model that compares the images of a group two by two (DNO, arXiv 2404.03715; Pref-GRPO, arXiv 2508.20751)."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor

from reward_models.judges import LEAST_MASS, to_pictures
from reward_models.vlm_scores import PAIR, first_better
from t2irl.data import noise_seed
from t2irl.geometry import even_chunks
from t2irl.judging import JudgeConfig, JudgeReward, make_judge, read_question
from t2irl.types import PromptGroups

Pair = tuple[int, int]


class PairwiseJudge(JudgeReward):
    """Win rate of an image in its group: mean over its opponents of the probability that it is the better of the two, in [0, 1].

    Both orders of a pair are asked and averaged, so that a liking for the first picture cancels; P(i beats j) + P(j beats i) = 1
    and all images have equally many opponents, so that a group's mean is 1/2. It says nothing between groups: it has no held-out
    value, and NaN for an image alone. Hacked by what the model takes for quality: gloss, detail, written words.
    """

    whole_groups = True
    may_skip = True

    class Config(JudgeConfig):
        """Settings. One of `path` and `server` is needed."""

        type: Literal["pairwise_judge"] = "pairwise_judge"
        question: Path | None = None
        """Text file with the question, to be answered by first or second; {prompt} stands for the prompt. null: one of our own."""
        opponents: PositiveInt | None = None
        """Images that each image is compared with, drawn anew in each iteration; null, or a number that a group has not: all
        others. An odd number becomes the next even one in groups of odd size, where not all images can have it."""
        answer_mass: float = Field(LEAST_MASS, ge=0, le=1)
        """P(first) + P(second) below which the judge has not answered: that question counts as a draw."""
        batch_size: PositiveInt = 8
        """With `path`: questions, of two pictures each, in one forward pass."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.question = PAIR if config.question is None else read_question(config)
        self.judge = make_judge(config, device)
        self.iteration = 0

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """Win rates, (B,) float32; NaN for an image whose group has no other. Raises RunError when the judge is gone."""
        pictures = to_pictures(images)
        scores = torch.full((len(images),), torch.nan, dtype=torch.float64)
        for line in dict.fromkeys(groups.ids):
            rows = [k for k, other in enumerate(groups.ids) if other == line]
            rows.sort(key=lambda k: groups.members[k])  # so that who meets whom does not depend on their order here
            if len(rows) > 1:
                prompt = groups.prompts[groups.index[rows[0]]]
                scores[rows] = self._win_rates([pictures[k] for k in rows], prompt, line)
        return scores.float().to(images.device)

    def _win_rates(self, pictures: list[Image.Image], prompt: str, line: int) -> Tensor:
        """Of the images of one group, (n,) float64."""
        seed = noise_seed(self.seed, f"opponents {self.name} {self.iteration}", line, 0)
        pairs = matches(len(pictures), self.config.opponents, seed)
        asked = [(pictures[a], pictures[b]) for a, b in (*pairs, *((b, a) for a, b in pairs))]
        question = self.question.replace("{prompt}", prompt)
        size = len(asked) if self.config.server else self.config.batch_size
        found = []
        with self.asking():
            for chunk in even_chunks(len(asked), size):
                first, answered = first_better(self.judge, asked[chunk], question, self.config.answer_mass)
                self.count(answered)
                found.append(first)
        there, back = torch.cat(found).chunk(2)
        wins, (left, right) = (there + 1 - back) / 2, torch.tensor(pairs).T
        total = torch.zeros(len(pictures), dtype=torch.float64)
        total.index_add_(0, left, wins).index_add_(0, right, 1 - wins)
        return total / torch.bincount(torch.cat([left, right]))

    def report(self) -> dict[str, float]:
        """Share of the questions that were not answered by first or second. Opponents are then drawn anew."""
        self.iteration += 1
        return super().report()

    def state_dict(self) -> dict[str, Any]:
        """Which draw of opponents it is at, and what `report` has not told yet."""
        return super().state_dict() | {"iteration": self.iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state)
        self.iteration = state["iteration"]


def matches(count: int, opponents: int | None, seed: int) -> list[Pair]:
    """Pairs of `count` >= 2 images so that each meets equally many others: all of them, or `opponents` neighbours in a random ring.

    Where count and opponents are both odd there is no such plan, and each meets one more.
    """
    if opponents is None or opponents >= count - 1:
        return list(combinations(range(count), 2))
    ring = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    near, opposite = divmod(opponents + opponents * count % 2, 2)
    pairs = [(ring[k], ring[(k + step) % count]) for step in range(1, near + 1) for k in range(count)]
    pairs += [(ring[k], ring[k + count // 2]) for k in range(count // 2 if opposite else 0)]
    return [(min(pair), max(pair)) for pair in pairs]
