"""The artifact classifier of the shapes world, assets/tiny-artifact: its labelled pictures, its training, its card.

Clean: rendered scenes, the same through the policy's image decoder, and what the base model draws well. Broken: all of these
in each of the ways of `t2irl.shapes.corruptions`, half of them through the decoder afterwards, so that sharpness tells nothing;
pictures driven up the gradient of a proxy; and what the base model draws badly. The verifier stands in for the raters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from reward_models.artifact import ArtifactClassifier, Design, scores
from reward_models.clip import ClipScorer
from reward_models.recipes.labelled import Part, part_of
from reward_models.recipes.train_artifact import Settings, fit, pair_accuracy, report, with_temperature
from shapes_models.vae import to_float
from t2irl.shapes.captions import sample_captions
from t2irl.shapes.corruptions import FAMILIES, KINDS, corrupt
from t2irl.shapes.render import SIZE, render, sample_scene
from t2irl.shapes.verify import verify

PROMPTS, DETAIL = 1536, 16
GOOD, BAD = 0.87, 0.6
"""Drawings of the base model that the verifier finds cleaner than this are clean, less clean than that are broken."""
TRAINING = Settings(steps=500, lr=4e-3, bf16=True)
EXAMPLES, ACROSS = 192, 16
"""Labelled pictures that are written beside the classifier, and how many stand in a row."""
TRIED = 48
"""Pictures of each kind on which a classifier is tried."""


@dataclass(frozen=True)
class Sources:
    """Pictures of the same prompts, each (n, 3, 64, 64) uint8."""

    prompts: list[str]
    rendered: Tensor
    redrawn: Tensor
    """Rendered, then through the policy's image encoder and decoder."""
    drawn: Tensor
    """By the base model."""
    cleanliness: Tensor
    """Of `drawn`, by the verifier: (n,)."""


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] -> uint8."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


@torch.no_grad()
def redraw(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures uint8 through encoder and decoder, uint8."""
    latents = (vae.encode(to_float(part)).latent_dist.mode() for part in pictures.split(64))
    return torch.cat(
        [torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8), *(to_bytes(vae.decode(z).sample / 2 + 0.5) for z in latents)]
    )


@torch.no_grad()
def draw_sources(work: Path, sd3: Path, seed: int) -> tuple[Sources, AutoencoderKL]:
    """Draw them, or read what an earlier call drew; and the decoder."""
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    file = work / "artifact_sources.pt"
    if not file.exists():
        rng, generator = np.random.default_rng(seed + 5), torch.Generator().manual_seed(seed + 1)
        captions = sample_captions(PROMPTS, rng)
        texts = [c.text for c in captions]
        call = dict(num_inference_steps=10, guidance_scale=1.0, max_sequence_length=0, output_type="pt")
        parts = [texts[k : k + 64] for k in range(0, PROMPTS, 64)]
        drawn = to_bytes(torch.cat([pipe(part, generator=generator, **call).images for part in parts]))
        scenes = np.stack([render(sample_scene(c, rng)) for c in captions])
        rendered = torch.from_numpy(scenes).permute(0, 3, 1, 2).contiguous()
        found = Sources(texts, rendered, redraw(pipe.vae, rendered), drawn, verify(drawn, texts)["cleanliness"])
        torch.save(vars(found), file)
    return Sources(**torch.load(file, weights_only=True)), pipe.vae


@dataclass(frozen=True)
class Pool:
    """Labelled pictures: uint8, and for each its label, prompt and kind."""

    pictures: Tensor
    labels: Tensor
    prompts: list[str]
    kinds: list[str]

    def without(self, kinds: Sequence[str]) -> Pool:
        """All but some kinds."""
        return self.take([k for k, kind in enumerate(self.kinds) if kind not in kinds])

    def take(self, rows: list[int]) -> Pool:
        """Some of them."""
        return Pool(
            self.pictures[rows], self.labels[rows], [self.prompts[k] for k in rows], [self.kinds[k] for k in rows]
        )

    @staticmethod
    def of(parts: Sequence[tuple[Tensor, int, list[str], list[str]]]) -> Pool:
        """Several lots of pictures, label, prompts and kinds."""
        labels = torch.cat([torch.full((len(pictures),), label) for pictures, label, _, _ in parts])
        prompts, kinds = [x for part in parts for x in part[2]], [x for part in parts for x in part[3]]
        return Pool(torch.cat([pictures for pictures, _, _, _ in parts]), labels, prompts, kinds)


def climb(images: Tensor, texts: Sequence[str], scorer: ClipScorer) -> Tensor:
    """Pictures (n, 3, 64, 64) in [0, 1] driven ten steps up the gradient of CLIP's opinion: an over-optimised proxy."""
    found = []
    for start in range(0, len(images), 64):
        part, words = images[start : start + 64], texts[start : start + 64]
        for _ in range(10):
            part = part.detach().requires_grad_()
            gradient = torch.autograd.grad(scorer.score(part, words).sum(), part)[0]
            part = (part + 0.02 * gradient.sign()).clamp(0, 1)
        found.append(part.detach())
    return torch.cat(found)


def label(sources: Sources, part: Part, vae: AutoencoderKL, scorer: ClipScorer, seed: int, each: int | None) -> Pool:
    """The labelled pictures of one part of the prompts. `each`: so many of every kind; None: three for two clean pictures."""
    rows = [k for k, prompt in enumerate(sources.prompts) if part_of(prompt, seed) == part]
    good = [k for k in rows if sources.cleanliness[k] >= GOOD]
    bad = [k for k in rows if sources.cleanliness[k] < BAD]

    def texts(chosen: list[int]) -> list[str]:
        return [sources.prompts[k] for k in chosen]

    lots = [("rendered", sources.rendered, rows), ("redrawn", sources.redrawn, rows), ("drawn", sources.drawn, good)]
    clean = Pool.of([(pictures[chosen], 0, texts(chosen), [kind] * len(chosen)) for kind, pictures, chosen in lots])
    generator = torch.Generator().manual_seed(seed + 7)
    names, lots = [*KINDS, "climbed"], [(clean.pictures, 0, clean.prompts, clean.kinds)]
    for through_decoder in (False, True):
        count = each * len(names) // 2 if each is not None else len(clean.prompts) // (1 + through_decoder)
        order = torch.randperm(len(clean.prompts), generator=generator).repeat(-(-count // len(clean.prompts)))[:count]
        kinds = [names[k % len(names)] for k in range(count)]
        broken = _broken(clean, order.tolist(), kinds, scorer, generator)
        broken = redraw(vae, broken) if through_decoder else broken
        lots.append((broken, 1, [clean.prompts[k] for k in order.tolist()], kinds))
    lots.append((sources.drawn[bad], 1, texts(bad), ["drawn badly"] * len(bad)))
    return Pool.of(lots)


def _broken(clean: Pool, order: list[int], kinds: list[str], scorer: ClipScorer, generator: torch.Generator) -> Tensor:
    """Clean pictures in this order, each broken in its own way: uint8."""
    images = clean.pictures[order].float() / 255
    up = [k for k, kind in enumerate(kinds) if kind == "climbed"]
    others = [k for k, kind in enumerate(kinds) if kind != "climbed"]
    result = images.clone()
    result[others] = corrupt(images[others], [kinds[k] for k in others], generator)
    result[up] = climb(images[up], [clean.prompts[order[k]] for k in up], scorer)
    return to_bytes(result)


def train(pool: Pool, seed: int, say: bool = True) -> ArtifactClassifier:
    """A classifier of a pool."""
    torch.manual_seed(seed)
    model = ArtifactClassifier(Design(SIZE, DETAIL), None, torch.device("cpu"))
    fit(model, pool.pictures, pool.labels, TRAINING, seed, lambda text: print(f"  {text}", flush=True) if say else None)
    return model


def by_kind(model: ArtifactClassifier, pool: Pool, kinds: Sequence[str]) -> dict[str, float]:
    """Accuracy on same-prompt pairs, kind by kind; the clean side is what the policy can draw: redrawn or drawn."""
    clean, found = -scores(model, pool.pictures), {}
    for kind in kinds:
        rows = [k for k, own in enumerate(pool.kinds) if own in (kind, "redrawn", "drawn")]
        found[kind] = pair_accuracy(clean[rows], pool.labels[rows], [pool.prompts[k] for k in rows])[0]
    return found


def make_artifact(work: Path, assets: Path, seed: int, folds: int = len(FAMILIES)) -> None:
    """Train it, write its folder and its card; `folds`: families of kinds to leave out, one training each."""
    started = time.process_time()
    sources, vae = draw_sources(work, assets / "tiny-sd3", seed)
    scorer = ClipScorer.load(assets / "tiny-clip", torch.device("cpu"))
    file = work / "artifact_pools.pt"
    if not file.exists():
        sizes: tuple[tuple[Part, int | None], ...] = (("train", None), ("select", 20), ("report", TRIED))
        torch.save([vars(label(sources, part, vae, scorer, seed, each)) for part, each in sizes], file)
    pools = [Pool(**content) for content in torch.load(file, weights_only=True)]
    learn, select, tried = pools
    print(f"{len(learn.labels)} pictures to learn from, {time.process_time() - started:.0f} s", flush=True)
    unseen: dict[str, float] = {}
    for family in FAMILIES[:folds]:
        left_out = (*family, "climbed") if "grain" in family else family
        unseen |= by_kind(train(learn.without(left_out), seed, say=False), tried, left_out)
        print("never seen: " + ", ".join(f"{kind} {unseen[kind]:.3f}" for kind in left_out), flush=True)
    model = train(learn, seed)
    with_temperature(model, select.pictures, select.labels)
    measured = report(model, tried.pictures, tried.labels, tried.prompts)
    seen = by_kind(model, tried, [*KINDS, "climbed", "drawn badly"])
    values = torch.sigmoid(-scores(model, sources.drawn) / model.design.temperature)
    base = {
        name: round(float(values.quantile(q)), 4) for name, q in (("lower", 0.25), ("median", 0.5), ("upper", 0.75))
    }
    model.design = replace(model.design, base=base)
    rows = [
        f"| {kind} | {unseen[kind]:.3f} | {seen[kind]:.3f} |" if kind in unseen else f"| {kind} | | {seen[kind]:.3f} |"
        for kind in seen
    ]
    words = dict(
        prompts=PROMPTS, learn=len(learn.labels), steps=TRAINING.steps, table=measured.table, rows="\n".join(rows), examples=EXAMPLES, good=GOOD, bad=BAD,
        unseen=float(np.mean(list(unseen.values()))) if unseen else float("nan"), worst=min(unseen, key=unseen.__getitem__, default="none"),
        temperature=model.design.temperature, minutes=(time.process_time() - started) / 60, **base,
    )  # fmt: skip
    model.save(assets / "tiny-artifact", CARD.format(**words), torch.float16)
    write_examples(assets / "tiny-artifact", select, seed)
    print(f"mean over kinds never seen: {words['unseen']:.3f}; all kinds seen: {measured.pairs:.3f}", flush=True)


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

P(no artifact) of a 64 x 64 picture of the shapes world, whatever its caption: five convolutions, see `reward_models/artifact.py`.
Weights are float16. Trained from nothing on {learn} labelled pictures of {prompts} captions ({steps} steps of 64), calibrated on
other captions (temperature {temperature:.2f}) and measured on yet others, by

    python scripts/build_assets.py --only artifact        # part of `make assets`

in {minutes:.0f} minutes of one core, the trainings below included. No held-out caption was shown.

All kinds seen in training:

{table}

Same-prompt pairs by kind of corruption: a clean picture that the policy could draw (through its decoder, or by the base model)
against a broken one of the same caption, half of them through the decoder after they were broken. *Never seen*: its whole family of
similar kinds was left out of the training.

| kind | never seen | seen |
|---|---|---|
{rows}

Mean over the kinds never seen: **{unseen:.3f}**; the worst is `{worst}`. *climbed* is a picture driven up the gradient of tiny-clip.
*drawn badly* are the base model's own drawings that the verifier finds less than {bad} clean; above {good} they count as clean.

Base model (assets/tiny-sd3): median {median:.3f}, quartiles {lower:.3f} and {upper:.3f}; the same in `artifact.json`.

`examples.png` and `examples.jsonl` hold {examples} of the pictures for calibration with their labels, which `artifact_adaptive` learns
from together with what it mines.

Frozen features of tiny-dinov2 do not do: heads on all four of its blocks got 0.58 to 0.69 on pairs of warped, molten, shattered
and doubled pictures when these kinds were left out, which is why this classifier has convolutions of its own.
"""
