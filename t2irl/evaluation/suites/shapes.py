"""The shapes world: captions of its grammar, by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from t2irl.data import load_prompts
from t2irl.errors import DataError
from t2irl.evaluation.suites.base import Prompt, Suite
from t2irl.shapes.captions import parse_caption


class ShapesWorld(Suite):
    """Captions that no shipped model was trained on. Its verifier is the reward `shapes`."""

    class Config(Suite.Config):
        """Settings."""

        type: Literal["shapes"] = "shapes"
        path: Path = Path("assets/prompts/shapes_heldout.txt")
        """Captions of the grammar, one a line."""

    def prompts(self) -> list[Prompt]:
        """Every different caption, in the order of the file; its tag is its kind: single, count, pair or relation."""
        texts = dict.fromkeys(load_prompts(self.config.path, "suite.path").texts)
        try:
            return [Prompt(text, parse_caption(text).kind) for text in texts]
        except ValueError as error:
            raise DataError(f"{self.where}: {error}") from error
