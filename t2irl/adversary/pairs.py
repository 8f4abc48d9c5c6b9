"""Which reference image stands against which rollout image: drawn by seed, the same for any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2irl.data import noise_seed
from t2irl.references import ReferenceImages
from t2irl.types import PromptGroups


@dataclass(frozen=True)
class Drawn:
    """Reference images for the images of a rollout, one each; None where there is none."""

    learned: list[Path | None]
    """That the adversary may learn from."""
    kept: list[Path | None]
    """That it never learns from, for the diagnostics."""


class Pairs:
    """Reference images of prompts, a fixed share of them kept out of the adversary's sight."""

    def __init__(self, references: ReferenceImages, share: float, paired: bool, seed: int, least: int = 0):
        """`share` is kept out of sight, but of no prompt so many that fewer than `least` are left to learn from."""
        self.references, self.share, self.paired, self.seed, self.least = references, share, paired, seed, least
        self._parts: dict[str, tuple[list[Path], list[Path]]] = {}

    def parts(self, prompt: str) -> tuple[list[Path], list[Path]]:
        """A prompt's reference images to learn from, and those kept back."""
        key = prompt if self.paired else ""
        if key not in self._parts:
            files = list(self.references.of(prompt))
            kept = [file for file in files if self._is_kept(key, file)][: max(0, len(files) - self.least)]
            if len(kept) == len(files) and not self.paired:
                kept = []  # a style folder is all that there is to learn from
            self._parts[key] = [file for file in files if file not in kept], kept
        return self._parts[key]

    def _is_kept(self, prompt: str, file: Path) -> bool:
        digest = hashlib.blake2b(f"{self.seed}/{prompt}/{file.name}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") < self.share * 2**32

    def draw(self, groups: PromptGroups, iteration: int) -> Drawn:
        """One reference image of each kind for each image of a rollout."""
        rows = list(zip(groups.texts, groups.ids, groups.members, strict=True))
        learned, kept = (
            [self.choose(self.parts(text)[kind], prompt, member, iteration) for text, prompt, member in rows]
            for kind in (0, 1)
        )
        return Drawn(learned, kept)

    def choose(self, files: Sequence[Path], prompt: int, member: int, iteration: int) -> Path | None:
        """The file for one image: within a group each file comes once before any comes twice."""
        if not files:
            return None
        turn, place = divmod(member, len(files))
        rng = np.random.default_rng(noise_seed(self.seed, f"reference images {turn}", prompt, iteration))
        return files[int(rng.permutation(len(files))[place])]
