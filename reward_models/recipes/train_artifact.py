"""Train a light classifier of artifacts on labelled pictures, calibrate it, and say on a card how good it is.

    python -m reward_models.recipes.train_artifact --images labelled.jsonl --backbone DINOV2 --out classifier

Labels 0: clean pictures, of the base model above all. Labels 1: broken ones, corrupted and over-optimised. Where a line names the `original` of a
broken picture, the two are compared, and the places where they differ are learned as well. Half of the prompts are learned from, a quarter calibrates, a quarter is reported on.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from reward_models.artifact import ArtifactClassifier, Design, scores
from reward_models.pixels import fit_square
from reward_models.recipes.command import command
from reward_models.recipes.labelled import load_labelled, originals, pixels, split
from reward_models.vision import VisionBackbone


@dataclass(frozen=True)
class Settings:
    """Of the training."""

    steps: int = 600
    """Optimiser steps."""
    batch: int = 64
    """Pictures in a step, half of them clean."""
    lr: float = 3e-3
    """Highest learning rate; it rises over the first steps and falls to 0."""
    weight_decay: float = 0.02
    """Decoupled weight decay."""
    shift: int = 6
    """Pictures are moved by up to so many pixels."""
    mirror: bool = True
    """Half of the batches are mirrored: an artifact is one from either side."""
    bf16: bool = False
    """Convolutions in bfloat16."""
    changed: float = 0.06
    """A place whose colours differ by more than this (of 1) from those of the original shows an artifact; by less than a quarter
    of it, none; in between it is not learned from. Nor is a broken picture that differs so much in no place."""


def fit(
    model: ArtifactClassifier, pictures: Tensor, labels: Tensor, settings: Settings, seed: int,
    say: Callable[[str], None] = lambda text: None, originals: Tensor | None = None,
) -> None:  # fmt: skip
    """Train on pictures (n, 3, H, W) uint8 with labels (n,) in {0, 1}; both labels weigh the same in every batch.

    `originals`: for each broken picture the row of the clean one that it was made from, or -1. The two then stand in one batch:
    the clean one has to score higher, and where they differ is where the artifact is.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = [(labels == y).nonzero()[:, 0] for y in (0, 1)]
    parameters = list(model.trained().values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    chance = torch.ones(len(sides[1]))  # broken pictures that are not told yet come more often
    adamw = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    for step in range(settings.steps):
        for group in adamw.param_groups:
            group["lr"] = settings.lr * min(1, (step + 1) / 30) * (1 - step / settings.steps)
        clean = sides[0][torch.randint(len(sides[0]), (settings.batch // 2,), generator=generator)]
        drawn = torch.multinomial(chance, settings.batch // 2, replacement=True, generator=generator)
        broken = sides[1][drawn]
        paired = torch.zeros(len(broken), dtype=torch.bool)
        if originals is not None:
            paired = originals[broken] >= 0
            clean = torch.where(paired, originals[broken], clean)
        images = _moved(pictures[torch.cat([clean, broken])].to(model.device).float().div(255), settings, generator)
        images = fit_square(images, model.design.size)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.bf16):
            logits, maps = model.judge(images)
        chance[drawn] = 0.1 + F.softplus(-logits.detach()[len(clean) :].float()).clamp(max=2).cpu()
        loss = _loss(logits.float(), maps, images, paired.to(model.device), settings.changed)
        loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if step % 100 == 99:
            say(f"step {step + 1} of {settings.steps}: loss {float(loss.detach()):.3f}")
    for parameter in parameters:
        parameter.requires_grad_(False)


def _loss(logits: Tensor, maps: list[Tensor], images: Tensor, paired: Tensor, changed: float) -> Tensor:
    """Of a batch whose first half is clean; `paired`: which rows of the other half have their original in the first."""
    (clean, broken), half = logits.chunk(2), len(logits) // 2
    change = (images[half:] - images[:half]).abs().amax(1, keepdim=True)
    plain = ~paired | (F.avg_pool2d(change, 4).amax((1, 2, 3)) > changed)
    loss = F.softplus(clean).mean() + (F.softplus(-broken) * plain).mean()
    if not paired.any():
        return loss
    loss = loss + (F.softplus(clean - broken) * (paired & plain)).mean()
    for places in maps:
        there = F.adaptive_avg_pool2d(change, (places.shape[-2], places.shape[-1]))[:, 0]
        wrong, right = (x & paired[:, None, None] for x in (there > changed, there < changed / 4))
        before, after = F.softplus(places[:half]), places[half:]
        loss = loss + before.mean() + (F.softplus(after) * right).sum() / right.sum().clamp(min=1)
        loss = loss + (F.softplus(-after) * wrong).sum() / wrong.sum().clamp(min=1)
    return loss


def _moved(images: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """A batch moved by one random offset, and mirrored or not."""
    if settings.mirror and torch.rand((), generator=generator) < 0.5:
        images = images.flip(-1)
    reach = settings.shift
    top, left = torch.randint(2 * reach + 1, (2,), generator=generator).tolist()
    height, width = images.shape[-2:]
    return F.pad(images, (reach,) * 4, mode="replicate")[..., top : top + height, left : left + width]


# ----------------------------------------------------------------------------------------------------------- figures
def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T at which sigmoid(logit / T) explains labels (n,) in [0, 1] best (Guo et al. 2017), between 0.05 and 20."""
    z, y = logits.double(), labels.double()

    def loss(log_t: float) -> float:
        return float(F.binary_cross_entropy_with_logits(z / math.exp(log_t), y))

    found: Any = minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    return math.exp(found.x)


def calibrate(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Temperature T and offset b at which sigmoid((logit - b) / T) explains labels (n,) best; T between 0.05 and 20.

    Both labels weigh the same, however many there are of each (Platt 1999, Guo et al. 2017).
    """
    z, y = logits.double(), labels.double()
    weight = 1 / torch.where(y == 1, y.sum(), (1 - y).sum())

    def loss(values: Any) -> float:
        said = (z - values[1]) / math.exp(min(max(values[0], -3), 3))
        return float((F.binary_cross_entropy_with_logits(said, y, reduction="none") * weight).sum())

    found: Any = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-8})
    return math.exp(min(max(found.x[0], -3), 3)), float(found.x[1])


def calibration_error(p: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error of P(artifact) (n,): mean distance of what is said and what is true, in equal bins."""
    place = (p.double() * bins).long().clamp(0, bins - 1)
    gaps = [
        (p[place == k].double().mean() - labels[place == k].double().mean()).abs() * (place == k).sum()
        for k in range(bins)
        if (place == k).any()
    ]
    return float(torch.stack(gaps).sum() / len(p))


def pair_accuracy(clean: Tensor, labels: Tensor, prompts: Sequence[str]) -> tuple[float, int]:
    """Share of pairs of a clean and a broken picture of one prompt in which the clean one scores higher, and their number.

    `clean`: scores (n,), higher is cleaner. Ties count half (arXiv 2601.03468, table 2). NaN when there are no pairs.
    """
    right, count = 0.0, 0
    for prompt in dict.fromkeys(prompts):
        rows = torch.tensor([k for k, other in enumerate(prompts) if other == prompt])
        good, bad = (clean[rows][labels[rows] == y] for y in (0, 1))
        right += float((good[:, None] > bad).sum() + 0.5 * (good[:, None] == bad).sum())
        count += len(good) * len(bad)
    return (right / count if count else float("nan")), count


@dataclass(frozen=True)
class Report:
    """How good a classifier is on pictures that it neither learned from nor was calibrated on."""

    pairs: float
    """Accuracy on same-prompt pairs."""
    count: int
    """Number of such pairs."""
    accuracy: float
    """Balanced accuracy at probability 0.5."""
    calibration: float
    """Expected calibration error."""

    @property
    def table(self) -> str:
        """As Markdown."""
        return (
            "| same-prompt pairs | accuracy on them | balanced accuracy | calibration error |\n|---|---|---|---|\n"
            f"| {self.count} | {self.pairs:.3f} | {self.accuracy:.3f} | {self.calibration:.3f} |"
        )


def report(model: ArtifactClassifier, pictures: Tensor, labels: Tensor, prompts: Sequence[str]) -> Report:
    """Measure it."""
    p = torch.sigmoid(scores(model, pictures) / model.design.temperature)
    pairs, count = pair_accuracy(1 - p, labels, prompts)
    right = (p >= 0.5) == (labels == 1)
    accuracy = float(sum(right[labels == y].double().mean() for y in (0, 1)) / 2)
    return Report(pairs, count, accuracy, calibration_error(p, labels))


def with_temperature(model: ArtifactClassifier, pictures: Tensor, labels: Tensor) -> None:
    """Calibrate a classifier on pictures that it did not learn from."""
    temperature, offset = calibrate(scores(model, pictures), labels)
    model.move(-offset)
    model.design = replace(model.design, temperature=temperature)


# ------------------------------------------------------------------------------------------------------ command line
CARD = """# Artifact classifier

P(no artifact) of a picture, whatever its prompt. Trained on {counts} pictures of `{images}` (half of the prompts to learn from, a
quarter to calibrate, a quarter measured here), temperature {temperature:.3f}:

{table}

The pairs hold kinds of artifacts that were learned; unknown kinds are told worse. {base}
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument(
        "--images", type=Path, required=True, help="labelled pictures, see reward_models/recipes/labelled.py"
    )
    cli.add_argument("--out", type=Path, required=True, help="folder of the classifier")
    cli.add_argument("--backbone", type=Path, help="folder of a vision backbone, which stays frozen")
    cli.add_argument("--layers", type=int, nargs="+", default=[-1], help="its blocks to look at (default: the last)")
    cli.add_argument(
        "--detail", type=int, default=0, help="width of a convolutional network beside it, or alone; 0: none"
    )
    cli.add_argument("--size", type=int, help="side in pixels; the backbone's own, or 64")
    cli.add_argument(
        "--base-kind", help="the `kind` of the base model's own pictures, whose median is what a gate needs"
    )
    cli.add_argument("--steps", type=int, default=Settings.steps)
    cli.add_argument("--lr", type=float, default=Settings.lr)
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and write the folder. Returns the exit code."""
    return command(parser(), run, argv)


def run(args: argparse.Namespace) -> None:
    """What `main` does, with errors raised."""
    items = load_labelled(args.images)
    parts, device = split(items, args.seed), torch.device(args.device)
    backbone, where = None, None
    if args.backbone is not None:
        backbone = VisionBackbone.load(args.backbone, device, args.layers, size=args.size)
        where = os.path.relpath(args.backbone, args.out)
    size = backbone.size if backbone is not None else args.size or 64
    torch.manual_seed(args.seed)
    model = ArtifactClassifier(Design(size, args.detail, where, tuple(args.layers)), backbone, device)
    data = {name: (pixels(members), torch.tensor([x.label for x in members])) for name, members in parts.items()}
    fit(model, *data["train"], Settings(steps=args.steps, lr=args.lr), args.seed, print, originals(parts["train"]))
    with_temperature(model, *data["select"])
    measured = report(model, *data["report"], [x.prompt for x in parts["report"]])
    base, said = [x for x in items if args.base_kind and x.kind == args.base_kind], ""
    if args.base_kind and not base:
        raise ValueError(
            f"--base-kind = {args.base_kind}: no picture is of this kind; there are {', '.join(sorted({x.kind for x in items}))}"
        )
    if base:
        median = float(torch.sigmoid(-scores(model, pixels(base)) / model.design.temperature).median())
        model.design = replace(model.design, base={"median": median})
        said = f"Median of {len(base)} pictures of the base model: {median:.3f}."
    words = dict(
        counts=len(items), images=args.images, temperature=model.design.temperature, table=measured.table, base=said
    )
    model.save(args.out, CARD.format(**words))
    print(f"{args.out}: accuracy {measured.pairs:.3f} on {measured.count} same-prompt pairs")


if __name__ == "__main__":
    sys.exit(main())
