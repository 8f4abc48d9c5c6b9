"""GenEval as a reward: objects, numbers, colours, places, looked for by a detector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from reward_models.clip import ClipScorer
from reward_models.geneval import COUNTING_THRESHOLD, THRESHOLD, GenEvalScorer, check_entry, soft, strict
from reward_models.instances import SHORT, Detector
from t2irl.errors import ConfigError, DataError
from t2irl.models.base import DTYPES
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups

if TYPE_CHECKING:
    from t2irl.models.base import ModelFamily


class Geneval(Reward):
    """In [0, 1]: whether a picture shows what its prompt asks for (strict), or how much of it (soft).

    Hacked by objects cut out and set beside each other on nothing, the easier to find; hold a measure of looks beside it.
    """

    class Config(Reward.Config):
        """Settings."""

        type: Literal["geneval"] = "geneval"
        path: Path = Path("models/mask2former-swin-small-coco-instance")
        """Folder of the detector: a Mask2Former for instances of COCO in transformers format."""
        clip: Path = Path("models/clip-vit-large-patch14")
        """Folder of the CLIP that tells colours, in transformers format. Published: ViT-L/14 of OpenAI."""
        metadata: Path | None = None
        """JSON Lines with what each prompt asks for: `prompt`, `tag`, `include`, `exclude`, as GenEval's; needed."""
        score: Literal["soft", "strict"] = "soft"
        """soft: credit for a part of the way. strict: the benchmark's 1 or 0."""
        missing: Literal["error", "skip"] = "error"
        """A prompt without metadata is refused, or its images are not scored by this reward."""
        threshold: float = Field(THRESHOLD, ge=0, lt=1)
        """Least score of an object."""
        counting_threshold: float = Field(COUNTING_THRESHOLD, ge=0, lt=1)
        """The same for prompts with the tag `counting`."""
        short_side: PositiveInt = SHORT
        """Pixels of the short side that the detector sees."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Dtype of the detector; CLIP is float32."""

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.may_skip = config.missing == "skip"
        if config.metadata is None:
            raise ConfigError(
                "reward geneval: metadata is missing; give metadata: FILE.jsonl with `prompt` and `include`"
            )
        self.entries = _read(config.metadata)
        try:
            detector = Detector.load(config.path, device, DTYPES[config.precision], config.short_side)
            clip = ClipScorer.load(config.clip, device)
        except (OSError, ValueError) as error:
            raise DataError(f"reward geneval: path = {config.path}, clip = {config.clip}: {error}") from error
        self.scorer = GenEvalScorer(detector, clip, config.threshold, config.counting_threshold)

    def prepare(self, prompts: Sequence[str], family: ModelFamily) -> None:
        """Refuse prompts of which nothing is known."""
        self._refuse_unknown(prompts)

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """(B,) float32 in [0, 1]; NaN where nothing is known of a prompt."""
        texts = groups.texts
        self._refuse_unknown(texts)
        scores = torch.full((len(images),), float("nan"), device=images.device)
        rows = [k for k, text in enumerate(texts) if text in self.entries]
        if rows:
            rule = soft if self.config.score == "soft" else strict
            scores[rows] = self.scorer.score(images[rows], [self.entries[texts[k]] for k in rows], rule)
        return scores

    def _refuse_unknown(self, prompts: Sequence[str]) -> None:
        unknown = [] if self.may_skip else [text for text in prompts if text not in self.entries]
        if unknown:
            raise DataError(
                f"reward geneval: metadata = {self.config.metadata} says nothing of {len(unknown)} prompts, such as "
                f"{unknown[0]!r}; add them, or set missing: skip"
            )


def _read(file: Path) -> dict[str, Any]:
    """Entries by prompt."""
    where, found = f"reward geneval: metadata = {file}", {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = json.loads(line)
                check_entry(entry)
            except (ValueError, TypeError) as error:
                raise DataError(f"{where}, line {number}: {error}") from error
            found[entry["prompt"].strip()] = entry
    return found
