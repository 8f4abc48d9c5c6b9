"""`t2irl prefs train`: from judgements to a reward."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from reward_models.preference import Design, build
from reward_models.recipes.train_preference import CARD, Pair, Report, Settings, train
from t2irl.errors import ConfigError, DataError
from t2irl.preferences.record import Axis, Preferences, new_folder


def train_reward(
    preferences: Preferences, source: Path, out: Path, axis: Axis, backbone: Path | None, clip: Path | None,
    steps: int, seed: int, device: torch.device, say: Callable[[str], None],
) -> Report:  # fmt: skip
    """Train on the judgements of one axis, checks of raters left out, and write the model's folder."""
    if backbone is None and clip is None:
        raise ConfigError("neither --backbone nor --clip is given; the head needs features of one of them, or of both")
    judged = [r for r in preferences.records if not r.is_check and r.axis == axis and r.preference is not None]
    pairs = [
        Pair(preferences.picture(r, "a"), preferences.picture(r, "b"), r.prompt, r.preference)
        for r in judged
        if r.preference is not None
    ]
    if not pairs:
        there = sorted({r.axis for r in preferences.records})
        raise DataError(f"{source}: no judgement on the axis {axis}; there are some on {', '.join(there) or 'none'}")

    def beside(folder: Path | None) -> str | None:
        # Relative, so that model and backbone can be moved together.
        return None if folder is None else os.path.relpath(folder.resolve(), out.resolve())

    with new_folder(out) as part:
        try:
            # `part` lies beside `out`, so that relative paths mean the same from either.
            model = build(Design(beside(backbone), beside(clip)), part, device)
        except (OSError, ValueError) as error:
            raise DataError(f"--backbone {backbone}, --clip {clip}: {error}") from error
        try:
            found = train(model, pairs, Settings(steps=steps), seed, say)
        except (OSError, ValueError) as error:
            raise DataError(f"{source}: {error}") from error
        card = CARD.format(
            reads="It reads the prompt." if model.reads_prompts else "It does not read the prompt.", source=source.name,
            pairs=len(pairs), prompts=len({p.prompt for p in pairs}), axis=axis, temperature=model.design.temperature,
            table=found.table,
        )  # fmt: skip
        model.save(part, card)
    return found


def device_of(name: str | None) -> torch.device:
    """A device by name, the GPU if there is one for None. Raises ConfigError."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device = {name}: expected cpu, cuda or cuda:N") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device = {name}: this machine has no usable GPU; use cpu")
    return found
