"""Labelled pictures of the shapes world, clean and broken, that its artifact classifier learns from and is tried on.

Clean: rendered scenes, the same through the policy's image decoder, and what the base model draws well. Broken: all of these
in each of the ways of `t2irl.corruptions`, half of them through the decoder afterwards, so that sharpness tells nothing;
pictures driven up the gradient of a proxy; and what the base model draws badly. The verifier stands in for the raters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor

from reward_models.clip import ClipScorer
from reward_models.recipes.labelled import Part, part_of
from shapes_models.vae import redraw, to_bytes
from t2irl.corruptions import KINDS, corrupt
from t2irl.shapes.captions import sample_captions
from t2irl.shapes.corruptions_extra import EXTRA
from t2irl.shapes.render import render, sample_scene
from t2irl.shapes.verify import parse, verify

PROMPTS = 1536
"""Captions."""
FURTHER = (10, 10, 10, 6, 4, 3)
"""Denoising steps of the base model's further drawings of captions that are learned from: its own faults, and those of haste."""
CLEAN = ("rendered", "redrawn", "drawn")
"""Kinds of clean pictures: fields of `Sources`."""
GOOD, BAD = 0.87, 0.6
"""Drawings of the base model that the verifier finds cleaner than this are clean, less clean than that are broken."""
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
    further: Tensor
    """By the base model, `FURTHER` of each caption that is learned from: (m, 3, 64, 64) uint8."""
    captions: list[str]
    """Of `further`."""


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

        def draw(wanted: list[str], steps: int) -> Tensor:
            call = dict(num_inference_steps=steps, guidance_scale=1.0, max_sequence_length=0, output_type="pt")
            parts = [wanted[k : k + 64] for k in range(0, len(wanted), 64)]
            return to_bytes(torch.cat([pipe(part, generator=generator, **call).images for part in parts]))

        drawn, learned = draw(texts, 10), [text for text in texts if part_of(text, seed) == "train"]
        further = torch.cat([draw(learned, steps) for steps in FURTHER])
        scenes = np.stack([render(sample_scene(c, rng)) for c in captions])
        rendered = torch.from_numpy(scenes).permute(0, 3, 1, 2).contiguous()
        cleanliness, again = verify(drawn, texts)["cleanliness"], redraw(pipe.vae, rendered)
        found = Sources(texts, rendered, again, drawn, cleanliness, further, learned * len(FURTHER))
        torch.save(vars(found), file)
    return Sources(**torch.load(file, weights_only=True)), pipe.vae


Lot = tuple[Tensor, int, list[str], list[str], list[int]]
"""Pictures, their label, prompts, kinds and originals."""


@dataclass(frozen=True)
class Pool:
    """Labelled pictures: uint8, and for each its label, prompt and kind."""

    pictures: Tensor
    labels: Tensor
    prompts: list[str]
    kinds: list[str]
    originals: Tensor
    """Row of the clean picture that a broken one was made from; -1: none."""

    def without(self, kinds: Sequence[str]) -> Pool:
        """All but some kinds."""
        return self.take([k for k, kind in enumerate(self.kinds) if kind not in kinds])

    def take(self, rows: list[int]) -> Pool:
        """Some of them."""
        place = torch.full((len(self.labels) + 1,), -1)
        place[rows] = torch.arange(len(rows))
        return Pool(
            self.pictures[rows], self.labels[rows], [self.prompts[k] for k in rows], [self.kinds[k] for k in rows],
            place[self.originals[rows]],
        )  # fmt: skip

    @staticmethod
    def of(parts: Sequence[Lot]) -> Pool:
        """Several lots of pictures, label, prompts, kinds and originals."""
        labels = torch.cat([torch.full((len(part[0]),), part[1]) for part in parts])
        prompts, kinds = [x for part in parts for x in part[2]], [x for part in parts for x in part[3]]
        originals = torch.tensor([x for part in parts for x in part[4]])
        return Pool(torch.cat([part[0] for part in parts]), labels, prompts, kinds, originals)


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
    """The labelled pictures of one part of the prompts.

    `each`: so many of every kind that is tried. None: to learn from, of all kinds, three for two clean pictures.
    """
    rows = [k for k, prompt in enumerate(sources.prompts) if part_of(prompt, seed) == part]
    good = [k for k in rows if sources.cleanliness[k] >= GOOD]
    bad = [k for k in rows if sources.cleanliness[k] < BAD]

    def lot(pictures: Tensor, y: int, chosen: list[int], kind: str) -> Lot:
        return pictures[chosen], y, [sources.prompts[k] for k in chosen], [kind] * len(chosen), [-1] * len(chosen)

    clean = Pool.of([lot(getattr(sources, kind), 0, good if kind == "drawn" else rows, kind) for kind in CLEAN])
    generator = torch.Generator().manual_seed(seed + 7)
    names = [*KINDS, "climbed", *(EXTRA if each is None else ())]
    lots = [(clean.pictures, 0, clean.prompts, clean.kinds, [-1] * len(clean.prompts))]
    for through_decoder in (False, True):
        count = each * len(names) // 2 if each is not None else len(clean.prompts) // (1 + through_decoder)
        order = torch.randperm(len(clean.prompts), generator=generator).repeat(-(-count // len(clean.prompts)))[:count]
        kinds = [names[k % len(names)] for k in range(count)]
        broken = _broken(clean, order.tolist(), kinds, scorer, generator)
        broken = redraw(vae, broken) if through_decoder else broken
        # The redrawn pictures follow the rendered ones in the same order: what the decoder itself changes is not the artifact.
        originals = [k + len(rows) * (through_decoder and k < len(rows)) for k in order.tolist()]
        lots.append((broken, 1, [clean.prompts[k] for k in order.tolist()], kinds, originals))
    if each is not None:
        return Pool.of([*lots, lot(sources.drawn, 1, bad, "drawn badly")])
    return rated(Pool.of([*lots, *_own_faults(sources, rows, vae, sum(len(part[0]) for part in lots))]))


def _own_faults(sources: Sources, rows: list[int], vae: AutoencoderKL, start: int) -> list[Lot]:
    """The base model's drawings that are not clean, each beside what it should have been, and its further clean ones.

    `start`: pictures that stand before these.
    """
    pictures, prompts = torch.cat([sources.drawn[rows], sources.further]), [sources.prompts[k] for k in rows]
    prompts += sources.captions
    cleanliness = torch.cat([sources.cleanliness[rows], verify(sources.further, sources.captions)["cleanliness"]])
    faulty = (cleanliness < GOOD).nonzero()[:, 0].tolist()
    fine = [k for k in (cleanliness >= GOOD).nonzero()[:, 0].tolist() if k >= len(rows)]
    words, count = [prompts[k] for k in faulty], len(faulty)
    return [
        (mend(pictures[faulty], vae), 0, words, ["mended"] * count, [-1] * count),
        (pictures[faulty], 1, words, ["drawn badly"] * count, [start + k for k in range(count)]),
        (pictures[fine], 0, [prompts[k] for k in fine], ["drawn"] * len(fine), [-1] * len(fine)),
    ]


def mend(pictures: Tensor, vae: AutoencoderKL) -> Tensor:
    """What each picture should have been: the scene that the verifier reads in it, drawn anew, through the decoder."""
    scenes = np.stack([render(scene) for scene in parse(pictures)])
    return redraw(vae, torch.from_numpy(scenes).permute(0, 3, 1, 2).contiguous())


def rated(pool: Pool) -> Pool:
    """Without broken pictures that the verifier finds clean, such as grain that the decoder took away again."""
    cleanliness = verify(pool.pictures, pool.prompts)["cleanliness"]
    return pool.take([k for k, y in enumerate(pool.labels.tolist()) if y == 0 or cleanliness[k] < GOOD])


def _broken(clean: Pool, order: list[int], kinds: list[str], scorer: ClipScorer, generator: torch.Generator) -> Tensor:
    """Clean pictures in this order, each broken in its own way: uint8."""
    images = clean.pictures[order].float() / 255
    up = [k for k, kind in enumerate(kinds) if kind == "climbed"]
    others = [k for k, kind in enumerate(kinds) if kind != "climbed"]
    result = images.clone()
    result[others] = corrupt(images[others], [kinds[k] for k in others], generator, KINDS | EXTRA)
    result[up] = climb(images[up], [clean.prompts[order[k]] for k in up], scorer)
    return to_bytes(result)


def draw_pools(work: Path, assets: Path, sources: Sources, vae: AutoencoderKL, seed: int) -> list[Pool]:
    """Pictures to learn from, to calibrate on and to be tried on, or those that an earlier call drew."""
    file = work / "artifact_labelled.pt"
    if not file.exists():
        scorer = ClipScorer.load(assets / "tiny-clip", torch.device("cpu"))
        sizes: tuple[tuple[Part, int | None], ...] = (("train", None), ("select", 20), ("report", TRIED))
        torch.save([vars(label(sources, part, vae, scorer, seed, each)) for part, each in sizes], file)
    return [Pool(**content) for content in torch.load(file, weights_only=True)]
