"""The artifact classifier of the shapes world, assets/tiny-artifact: its training, its card.

What it learns from is in `shapes_models.artifact_pictures`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reward_models.artifact import ArtifactClassifier, Design, scores
from reward_models.recipes.train_artifact import Settings, fit, pair_accuracy, report, with_temperature
from shapes_models.artifact_pictures import BAD, GOOD, PROMPTS, Pool, draw_pools, draw_sources, rated
from t2irl.corruptions import FAMILIES, KINDS
from t2irl.shapes.corruptions_extra import EXTRA, EXTRA_FAMILIES
from t2irl.shapes.render import SIZE
from t2irl.shapes.verify import verify

DETAIL = 16
"""Width of the network."""
TRAINING = Settings(steps=2000, lr=2e-3, bf16=True)
EXAMPLES, ACROSS = 192, 16
"""Labelled pictures that are written beside the classifier, and how many stand in a row."""
SEEDS = 3
"""Trainings without each family of kinds."""


def train(pool: Pool, seed: int, say: bool = True) -> ArtifactClassifier:
    """A classifier of a pool."""
    torch.manual_seed(seed)
    model = ArtifactClassifier(Design(SIZE, DETAIL), None, torch.device("cpu"))
    fit(
        model, pool.pictures, pool.labels, TRAINING, seed, lambda text: print(f"  {text}", flush=True) if say else None,
        pool.originals,
    )  # fmt: skip
    return model


def by_kind(model: ArtifactClassifier, pool: Pool, kinds: Sequence[str]) -> dict[str, float]:
    """Accuracy on same-prompt pairs, kind by kind; the clean side is what the policy can draw: redrawn or drawn."""
    return _pairs(-scores(model, pool.pictures), pool, kinds)


def _pairs(clean: Tensor, pool: Pool, kinds: Sequence[str]) -> dict[str, float]:
    found = {}
    for kind in kinds:
        rows = [k for k, own in enumerate(pool.kinds) if own in (kind, "redrawn", "drawn")]
        found[kind] = pair_accuracy(clean[rows], pool.labels[rows], [pool.prompts[k] for k in rows])[0]
    return found


def left_out(place: int) -> tuple[str, ...]:
    """The kinds of one family, those of `KINDS` first: nothing like them is learned from when it is tried."""
    return (*FAMILIES[place], *(("climbed",) if "grain" in FAMILIES[place] else ()), *EXTRA_FAMILIES[place])


def never_seen(work: Path, learn: Pool, tried: dict[str, Pool], seed: int) -> dict[str, dict[str, list[float]]]:
    """Accuracy on pairs of kinds left out, family by family, one value for each of `SEEDS` trainings; finished ones are kept.

    By the name in `tried`, then by kind.
    """
    file = work / "artifact_unseen.json"
    done = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for one in range(seed, seed + SEEDS):
        for place in range(len(FAMILIES)):
            if (key := f"{one}/{place}") not in done:
                model = train(learn.without(left_out(place)), one, say=False)
                kinds = [kind for kind in left_out(place) if kind not in EXTRA]
                done[key] = {name: by_kind(model, pool, kinds) for name, pool in tried.items()}
                file.write_text(json.dumps(done), encoding="utf-8")
                means = (f"{name} {np.mean(list(values.values())):.3f}" for name, values in done[key].items())
                print(f"seed {one}, never seen {', '.join(kinds)}: " + ", ".join(means), flush=True)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in tried}
    for one in range(seed, seed + SEEDS):
        for place in range(len(FAMILIES)):
            for name, values in done[f"{one}/{place}"].items():
                for kind, value in values.items():
                    found[name].setdefault(kind, []).append(value)
    return found


def make_artifact(work: Path, assets: Path, seed: int) -> None:
    """Train it, write its folder and its card."""
    started = time.process_time()
    sources, vae = draw_sources(work, assets / "tiny-sd3", seed)
    learn, select, every = draw_pools(work, assets, sources, vae, seed)
    tried = {"all": every, "rated": rated(every)}
    print(f"{len(learn.labels)} pictures to learn from, {time.process_time() - started:.0f} s", flush=True)
    unseen = never_seen(work, learn, tried, seed)
    model = train(learn, seed)
    calibration = rated(select)
    with_temperature(model, calibration.pictures, calibration.labels)
    values = torch.sigmoid(-scores(model, sources.drawn) / model.design.temperature)
    base = {
        name: round(float(values.quantile(q)), 4) for name, q in (("lower", 0.25), ("median", 0.5), ("upper", 0.75))
    }
    model.design = replace(model.design, base=base)
    measured = report(model, tried["rated"].pictures, tried["rated"].labels, tried["rated"].prompts)
    means = {name: np.array(list(kinds.values())).mean(0) for name, kinds in unseen.items()}
    worst = min(unseen["rated"], key=lambda kind: float(np.mean(unseen["rated"][kind])))
    words = dict(
        prompts=PROMPTS, learn=len(learn.labels), steps=TRAINING.steps, table=measured.table, examples=EXAMPLES, good=GOOD, bad=BAD,
        rows=_rows(model, tried, unseen), seeds=SEEDS, worst=worst, unseen=means["rated"].mean(), unrated=means["all"].mean(),
        spread="" if SEEDS < 2 else " (seeds: " + ", ".join(f"{x:.3f}" for x in means["rated"]) + ")",
        temperature=model.design.temperature, **base,
    )  # fmt: skip
    model.save(assets / "tiny-artifact", CARD.format(**words), torch.float16)
    write_examples(assets / "tiny-artifact", calibration, seed)
    print(f"mean over kinds never seen: {words['unseen']:.3f}; all kinds seen: {measured.pairs:.3f}", flush=True)


def _rows(model: ArtifactClassifier, tried: dict[str, Pool], unseen: dict[str, dict[str, list[float]]]) -> str:
    """Lines of the card: a kind, its pairs, and accuracy on them never seen, seen, and on all pairs never seen."""
    rows, pool = [], tried["rated"]
    seen = by_kind(model, pool, [*KINDS, "climbed", "drawn badly"])
    verifier = by_verifier(tried["all"], [*KINDS, "climbed", "drawn badly"])
    for kind, value in seen.items():
        others = [f"{np.mean(unseen[name][kind]):.3f}" if kind in unseen[name] else "" for name in ("rated", "all")]
        clean = [p for p, own in zip(pool.prompts, pool.kinds, strict=True) if own in ("redrawn", "drawn")]
        pairs = sum(clean.count(p) for p, own in zip(pool.prompts, pool.kinds, strict=True) if own == kind)
        rows.append(f"| {kind} | {others[0]} | {value:.3f} | {pairs} | {others[1]} | {verifier[kind]:.3f} |")
    return "\n".join(rows)


def by_verifier(pool: Pool, kinds: Sequence[str]) -> dict[str, float]:
    """As `by_kind`, of the verifier's own cleanliness: what no classifier of these labels can be expected to exceed by much."""
    return _pairs(verify(pool.pictures, pool.prompts)["cleanliness"].double(), pool, kinds)


def write_examples(folder: Path, pool: Pool, seed: int) -> None:
    """Some labelled pictures of a pool, half of them clean, in one file, for runs that refresh the classifier."""
    order = torch.randperm(len(pool.labels), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [k for y in (0, 1) for k in [k for k in order if pool.labels[k] == y][: EXAMPLES // 2]]
    lines, sheet = [], Image.new("RGB", (ACROSS * SIZE, -(-len(rows) // ACROSS) * SIZE))
    for place, k in enumerate(rows):
        left, top = place % ACROSS * SIZE, place // ACROSS * SIZE
        sheet.paste(Image.fromarray(pool.pictures[k].permute(1, 2, 0).contiguous().numpy()), (left, top))
        entry = {"path": "examples.png", "box": [left, top, left + SIZE, top + SIZE], "label": int(pool.labels[k])}
        lines.append(json.dumps(entry | {"prompt": pool.prompts[k], "kind": pool.kinds[k]}) + "\n")
    sheet.save(folder / "examples.png", optimize=True)
    (folder / "examples.jsonl").write_text("".join(lines), encoding="utf-8")


CARD = """# tiny-artifact

P(no artifact) of a 64 x 64 picture of the shapes world, whatever its caption: a small convolutional network that judges each place,
see `reward_models/artifact.py`. Weights are float16. Trained from nothing on {learn} pictures of {prompts} captions ({steps} steps
of 64), calibrated on other captions (temperature {temperature:.2f}) and measured on yet others, by

    python scripts/build_assets.py --only artifact        # part of `make assets`

No held-out caption was shown. Learned from are clean pictures (rendered, through the policy's decoder, drawn more than {good} clean by
the verifier, which stands for a rater), each corrupted in one of the ways below or of `t2irl/shapes/corruptions_extra.py`, half
of these through the decoder afterwards; and the base model's own drawings less than {good} clean, some of them drawn in too few steps, each
beside what the verifier reads in it, drawn anew. The clean one of two has to score higher, and the places where they differ are told.

All kinds seen in training, calibration error included:

{table}

Same-prompt pairs by kind of corruption: a clean picture that the policy could draw (through its decoder, or by the base model)
against a broken one of the same caption. *Never seen*: its whole family of similar kinds, those of `corruptions_extra.py` included, was
left out of the training; mean of {seeds} trainings. Not counted are broken pictures that the verifier finds more than {good}
clean, which is how much a drawing needs to be called clean: the decoder repairs half of the fine textures. *All pairs* counts
them as well; *verifier* is how often its own cleanliness is right on those.

| kind | never seen | seen | pairs | never seen, all pairs | verifier, all pairs |
|---|---|---|---|---|---|
{rows}

Mean over the kinds never seen: **{unseen:.3f}**{spread}; the worst is `{worst}`. On all pairs: {unrated:.3f}.
*climbed* is a picture driven up the gradient of tiny-clip. *drawn badly* are the base model's own drawings, of other captions
than those learned from, that the verifier finds less than {bad} clean.

Base model (assets/tiny-sd3): median {median:.3f}, quartiles {lower:.3f} and {upper:.3f}; the same in `artifact.json`.

`examples.png` and `examples.jsonl` hold {examples} of the pictures for calibration with their labels, which `artifact_adaptive` learns
from together with what it mines.
"""
