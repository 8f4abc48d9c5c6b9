"""A prompt file of the user's own."""

from __future__ import annotations

from typing import Literal

from t2irl.data import load_prompts
from t2irl.evaluation.suites.base import Prompt, Suite, read_objects


class PromptFile(Suite):
    """UTF-8 text with one prompt a line, or JSON Lines with a `prompt` and, for means by category, a `tag`."""

    class Config(Suite.Config):
        """Settings."""

        type: Literal["prompts"] = "prompts"

    def prompts(self) -> list[Prompt]:
        """Every line."""
        texts = load_prompts(self.config.path, "suite.path").texts
        if self.config.path.suffix.lower() != ".jsonl":
            return [Prompt(text) for text in texts]
        entries = [entry for _, entry in read_objects(self.config.path, self.where, ["prompt"])]
        return [Prompt(text, str(entry.get("tag") or ""), entry) for text, entry in zip(texts, entries, strict=True)]
