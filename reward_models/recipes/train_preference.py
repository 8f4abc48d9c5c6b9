"""Train a preference model on judged pairs, calibrate it, and say on a card how good it is.

Half of the prompts are learned from, a quarter decides when to stop and calibrates, a quarter is reported on. `t2irl prefs train`
is the command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor

from reward_models.preference import PreferenceModel
from reward_models.recipes.labelled import PARTS, Part, part_of
from reward_models.recipes.train_artifact import best_temperature, calibration_error

BATCH = 64
"""Pictures whose features are computed at a time."""
LEAST = 5
"""Decided pairs that each part must have."""


@dataclass(frozen=True)
class Pair:
    """Two pictures of a prompt, and how likely it is that the first is preferred."""

    first: Path
    second: Path
    prompt: str
    target: float
    """From 0 to 1; 0.5 for a tie."""


@dataclass(frozen=True)
class Settings:
    """Of the training."""

    steps: int = 400
    """Most optimiser steps; the ones after the best on the prompts for selection are undone."""
    batch: int = 256
    """Pairs in a step."""
    lr: float = 2e-3
    """Highest learning rate; it rises over the first steps and falls to 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    look: int = 10
    """Steps between two looks at the prompts for selection."""


@dataclass(frozen=True)
class Report:
    """How good a model is on prompts that it neither learned from nor was calibrated on."""

    pairs: int
    """Decided pairs."""
    prompts: int
    """Their prompts."""
    accuracy: float
    """Share in which the preferred picture scores higher; equal scores count half."""
    interval: tuple[float, float]
    """Wilson interval at 95 % of the accuracy."""
    loss: float
    """Mean negative log-likelihood of all pairs, ties included; ln 2 = 0.693 for a coin."""
    calibration: float
    """Expected calibration error of the predicted shares."""

    @property
    def table(self) -> str:
        """As Markdown."""
        low, high = self.interval
        return (
            "| pairs | prompts | accuracy | 95 % | log loss (coin 0.693) | calibration error |\n|---|---|---|---|---|---|\n"
            f"| {self.pairs} | {self.prompts} | {self.accuracy:.3f} | {low:.3f} to {high:.3f} | {self.loss:.3f} | {self.calibration:.3f} |"
        )


def split(pairs: Sequence[Pair], seed: int) -> dict[Part, list[Pair]]:
    """Pairs by part, all of a prompt in one. Raises ValueError when a part has too few decided ones."""
    parts: dict[Part, list[Pair]] = {name: [p for p in pairs if part_of(p.prompt, seed) == name] for name in PARTS}
    for name, members in parts.items():
        decided = sum(p.target != 0.5 for p in members)
        if decided < LEAST:
            raise ValueError(
                f"the part {name!r} has {decided} decided pairs, {LEAST} are needed; {len(pairs)} judgements on "
                f"{len({p.prompt for p in pairs})} prompts are too few, or use another seed (now {seed})"
            )
    return parts


Rows = tuple[Tensor, Tensor, Tensor]
"""Features of first and second pictures (n, D), and targets (n,)."""


def rows_of(model: PreferenceModel, pairs: Sequence[Pair], known: dict[tuple[Path, str], Tensor]) -> Rows:
    """Features of pairs; those of a picture with a prompt are computed once and kept in `known`. Raises OSError."""
    wanted = dict.fromkeys((path, pair.prompt) for pair in pairs for path in (pair.first, pair.second))
    new = [key for key in wanted if key not in known]
    for start in range(0, len(new), BATCH):
        part = new[start : start + BATCH]
        pictures = [_pixels(path) for path, _ in part]
        alike = len({picture.shape for picture in pictures}) == 1
        for keys, stack in (
            [(part, torch.stack(pictures))] if alike else [([k], p[None]) for k, p in zip(part, pictures, strict=True)]
        ):
            found = model.features(stack.to(model.device).float() / 255, [prompt for _, prompt in keys])
            known.update(zip(keys, found, strict=True))
    first = torch.stack([known[p.first, p.prompt] for p in pairs])
    second = torch.stack([known[p.second, p.prompt] for p in pairs])
    return first, second, torch.tensor([p.target for p in pairs], device=model.device)


def _pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def margins(model: PreferenceModel, rows: Rows) -> Tensor:
    """Log-odds (n,) of the first picture, before calibration."""
    return model.judge(rows[0]) - model.judge(rows[1])


def fit(
    model: PreferenceModel, train: Rows, select: Rows, settings: Settings, seed: int,
    say: Callable[[str], None] = lambda text: None,
) -> None:  # fmt: skip
    """Train the head: -[t log sigmoid(d) + (1 - t) log sigmoid(-d)]; keep the weights that were best on `select`."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.cat(train[:2])
    model.mean.copy_(pictures.mean(0))
    # A feature that hardly changes must not be blown up when it does.
    spread = pictures.std(0)
    model.std.copy_(spread.clamp_min(float(spread.mean()) / 10 + 1e-6))
    model.head.reset(seed)
    model.head.requires_grad_(True)
    adamw = torch.optim.AdamW(model.head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    best, kept, place = math.inf, {n: p.detach().clone() for n, p in model.head.state_dict().items()}, 0
    count = len(train[2])
    for step in range(settings.steps):
        for group in adamw.param_groups:
            group["lr"] = settings.lr * min(1, (step + 1) / 20) * (1 - step / settings.steps)
        chosen = torch.randperm(count, generator=generator)[: settings.batch].to(model.device)
        batch = (train[0][chosen], train[1][chosen], train[2][chosen])
        F.binary_cross_entropy_with_logits(margins(model, batch), batch[2]).backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if step % settings.look == settings.look - 1:
            with torch.no_grad():
                loss = float(F.binary_cross_entropy_with_logits(margins(model, select), select[2]))
            if loss < best:
                best, place = loss, step + 1
                kept = {n: p.detach().clone() for n, p in model.head.state_dict().items()}
    model.head.load_state_dict(kept)
    model.head.requires_grad_(False)
    say(f"best after {place} of {settings.steps} steps: log loss {best:.3f} on the prompts for selection")


def with_calibration(model: PreferenceModel, train: Rows, select: Rows) -> None:
    """Set the temperature on pairs that were not learned from, and the offset by the pictures that were."""
    with torch.no_grad():
        temperature = best_temperature(margins(model, select).cpu(), select[2].cpu())
        offset = float(model.judge(torch.cat(train[:2])).mean())
    model.design = replace(model.design, temperature=temperature, offset=offset)


@torch.no_grad()
def report(model: PreferenceModel, rows: Rows, pairs: Sequence[Pair]) -> Report:
    """Measure it on the pairs of `rows`."""
    d, t = (margins(model, rows) / model.design.temperature).double().cpu(), rows[2].double().cpu()
    decided = t != 0.5
    right = float(((d * (t - 0.5) > 0)[decided].double() + 0.5 * (d == 0)[decided].double()).sum())
    count = int(decided.sum())
    interval = binomtest(round(right), count).proportion_ci(method="wilson")
    # Either picture may be called the first: both ways together tell nothing but what was said.
    p, y = torch.sigmoid(torch.cat([d, -d])), torch.cat([t, 1 - t])
    prompts = {pair.prompt for pair, known in zip(pairs, decided.tolist(), strict=True) if known}
    loss = float(F.binary_cross_entropy_with_logits(d, t))
    return Report(count, len(prompts), right / count, (interval.low, interval.high), loss, calibration_error(p, y))


CARD = """# Preference model

A Bradley-Terry head on frozen features: between two pictures of a prompt, the sigmoid of the difference of their scores is the share
of raters that prefers the first. {reads} Learned from {source}: {pairs} judgements on {prompts} prompts, axis {axis}; half of the
prompts to learn from, a quarter to stop and calibrate (temperature {temperature:.3f}), a quarter measured here:

{table}

Pictures unlike those that were judged are scored all the same, and a policy finds them: hold other rewards beside it, and judge
pictures of the trained policy before believing its score.
"""


def train(
    model: PreferenceModel, pairs: Sequence[Pair], settings: Settings, seed: int, say: Callable[[str], None]
) -> Report:
    """Fit, calibrate and measure. Raises ValueError for too few pairs, OSError for a picture that cannot be read."""
    parts, known = split(pairs, seed), dict[tuple[Path, str], Tensor]()
    rows = {name: rows_of(model, members, known) for name, members in parts.items()}
    fit(model, rows["train"], rows["select"], settings, seed, say)
    with_calibration(model, rows["train"], rows["select"])
    return report(model, rows["report"], parts["report"])
