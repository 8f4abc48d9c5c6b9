"""Scores asked of a vision-language model: VQAScore, the levels of Q-Align and DeQA, the marks of UnifiedReward, and which of two
pictures is better.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from reward_models.judges import LEAST_MASS, Judge, cleanliness

VQA = 'Does this figure show "{prompt}"? Please answer yes or no.'
"""Published question of VQAScore (arXiv 2404.01291)."""
LEVELS = ("excellent", "good", "fair", "poor", "bad")
"""From 5 down to 1."""
RATE = "How would you rate the quality of this image? Answer with one word: excellent, good, fair, poor or bad."
PAIR = (
    'Two pictures were made for the prompt "{prompt}". Which of them is better: which shows more of what the prompt asks for, with '
    "fewer defects? Answer with one word: first or second."
)
MARK = re.compile(r"final\s+score\s*:\s*\**\s*([0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)
REPLY_TOKENS = 512


def vqa(judge: Judge, pictures: Sequence[Image.Image], question: str) -> Tensor:
    """P(yes) as the first word of the answer: (B,) float64."""
    return judge.log_answers(pictures, question)[:, 0].exp()


def levels(judge: Judge, pictures: Sequence[Image.Image], question: str) -> Tensor:
    """Expected level, 1 to 5, under the probabilities of the five words alone: (B,) float64; NaN where none is likely."""
    log_words = judge.log_words(pictures, question, LEVELS)
    values = torch.arange(len(LEVELS), 0, -1, dtype=torch.float64)
    return log_words.softmax(-1) @ values  # all impossible: NaN


def marks(judge: Judge, pictures: Sequence[Image.Image], question: str) -> Tensor:
    """The mark after 'Final Score:' in a reply without chance, (B,) float64; NaN where there is none from 1 to 5."""
    return torch.tensor([mark(judge.reply(question, [x], 0, 0.0, REPLY_TOKENS)) for x in pictures], dtype=torch.float64)


def mark(reply: str) -> float:
    """The last mark of a reply; NaN for none."""
    found = MARK.findall(reply)
    value = float(found[-1]) if found else float("nan")
    return value if 1 <= value <= 5 else float("nan")


def first_better(
    judge: Judge, pairs: Sequence[tuple[Image.Image, Image.Image]], question: str, least: float = LEAST_MASS
) -> tuple[Tensor, Tensor]:
    """P(first) / (P(first) + P(second)) as the first word about two pictures shown in this order: (B,) float64 in [0, 1].

    1/2 where P(first) + P(second) is below `least`. The second result, (B,) bool, says which pairs were answered.
    """
    first, second = judge.log_choices(pairs, question, ("first", "second")).T
    share, answered = cleanliness(second, first, least)
    return share.where(answered, 0.5), answered
