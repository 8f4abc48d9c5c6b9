"""A small vision transformer that learns to see from pictures alone, without captions: assets/tiny-dinov2.

No label is in it. Whole picture: two views of one picture (shifted, resized, gently bent) must be more alike than views of
other pictures, of its near twin (one object of another colour or shape, or left out), and of the same picture spoilt. So
what is drawn and how well it is drawn must both show in its vector. Patches: say whether they are spoilt, and paint what
they should be. `views.py` makes the pictures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from reward_models.vision import VisionBackbone
from shapes_models.stage import Stage
from shapes_models.views import UNSEEN, WAYS, as_tensor, draw_pairs, hybrid, places, read, spoil
from t2irl.evaluation.posthoc import posthoc_auc
from t2irl.shapes.captions import sample_captions
from t2irl.shapes.render import SIZE, Scene, render, sample_scene

DINO_STEPS, DINO_SCENES, DINO_PICTURES = 1_000, 32, 8_000
PATCH, WIDTH, TEMPERATURE = 8, 96, 0.1
SPOILT_FROM = 0.02  # root mean square change of a patch, of 1, from which it counts as spoilt
SEEN = 512  # pictures that the figures of the card are measured on


def normalise(images: Tensor) -> Tensor:
    """As preprocessor_config.json says."""
    return images * 2 - 1


class Student(nn.Module):
    """The backbone with the heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Dinov2Model(dino_config())
        self.backbone.set_attn_implementation("eager")  # in bfloat16 on a CPU twice as fast as the fused one
        self.whole, self.mean = (nn.Linear(WIDTH, 64) for _ in range(2))
        self.spoilt_whole, self.spoilt_patch = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)
        self.paint = nn.Linear(WIDTH, 3 * PATCH * PATCH)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Two vectors of each picture (B, 64), logits of being spoilt (B,) and of each patch (B, N), painted patches."""
        tokens = self.backbone(normalise(images)).last_hidden_state
        whole, patches = tokens[:, 0], tokens[:, 1:]
        vectors = [F.normalize(v.float(), dim=-1) for v in (self.whole(whole), self.mean(patches.mean(1)))]
        spoilt = self.spoilt_whole(whole)[:, 0].float(), self.spoilt_patch(patches)[..., 0].float()
        return vectors, *spoilt, self.paint(patches).float()


def dino_config() -> Dinov2Config:
    """0.3 M parameters: 64 patches of 8 px, four blocks."""
    return Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=3, mlp_ratio=2, image_size=SIZE, patch_size=PATCH,
        layerscale_value=1.0, initializer_range=0.05,
    )  # fmt: skip


def make_dino(work: Path, folder: Path, seed: int) -> None:
    """Train it, write its folder and its card."""
    model = build_dino(work, seed)
    write_dino(folder, model)
    write_dino_card(folder, torch.load(work / "dino.pt", weights_only=True)["seconds"])


def cut(images: Tensor) -> Tensor:
    """The patches of pictures, (B, N, 192)."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


def batch(pairs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two views of n pictures with their twins (n, 2, 3, 64, 64) uint8: what is shown, and what is clean of it, (6 n, ...).

    Each view holds the pictures, their twins, and the pictures spoilt, all three read at the same places: nothing tells
    them apart but what is in them.
    """
    n = len(pairs)
    where = places(2 * n, generator)
    clean, twins = (read(pairs[:, k].float().div(255).repeat(2, 1, 1, 1), where).clamp(0, 1) for k in (0, 1))
    spoilt = spoil(clean, generator, WAYS)
    spoilt[::3] = hybrid(clean, twins, generator)[::3]

    def by_view(*kinds: Tensor) -> Tensor:
        return torch.stack([k.unflatten(0, (2, n)) for k in kinds], 1).flatten(0, 2)

    return by_view(clean, twins, spoilt), by_view(clean, twins, clean)


def loss_of(student: Student, pairs: Tensor, generator: torch.Generator) -> Tensor:
    """Which of the other views shows the same; which pictures and which patches are spoilt; what the patches should be."""
    shown, meant = batch(pairs, generator)
    half = len(shown) // 2
    with torch.autocast("cpu", torch.bfloat16):
        vectors, spoilt, spoilt_patch, painted = student(shown)
    partner, contrast = torch.arange(half), torch.zeros(())
    for v in vectors:
        alike = v[:half] @ v[half:].T / TEMPERATURE
        contrast = contrast + (F.cross_entropy(alike, partner) + F.cross_entropy(alike.T, partner)) / 4
    is_spoilt = (torch.arange(2 * half) % half >= 2 * len(pairs)).float()
    error = cut(shown - meant).square().mean(-1).sqrt()
    told = F.binary_cross_entropy_with_logits(spoilt, is_spoilt)
    told = told + F.binary_cross_entropy_with_logits(spoilt_patch, (error > SPOILT_FROM).float())
    return contrast + told + (painted - cut(normalise(meant))).square().mean()


def build_dino(work: Path, seed: int) -> Dinov2Model:
    """Train it."""
    torch.manual_seed(seed)
    student = Student()
    pictures = draw_pairs(DINO_PICTURES, seed + 8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    stage = Stage("dino", work, [(0, 1.0), (DINO_STEPS, 0.0)], {"student": student}, [optimizer])

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (DINO_SCENES,), generator=generator)
        return loss_of(student, pictures[chosen], generator)

    stage.run(loss_at, seed + 10)
    student.backbone.set_attn_implementation("sdpa")
    return student.backbone.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------- what it has learned
def moved(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene once more: moved by up to 6 px as a whole, each object by 2 px more, sizes 10 % off at most."""
    dx, dy = rng.uniform(-6, 6, 2)
    objects = tuple(
        replace(o, cx=o.cx + dx + rng.uniform(-2, 2), cy=o.cy + dy + rng.uniform(-2, 2), r=o.r * rng.uniform(0.9, 1.1))
        for o in scene.objects
    )
    return replace(scene, objects=objects)


def retrieval(ours: Tensor, theirs: Tensor) -> float:
    """How often the nearest of `theirs` by cosine, centred, is the one of the same place."""
    middle = ours.mean(0)
    table = F.normalize(ours - middle, dim=-1) @ F.normalize(theirs - middle, dim=-1).T
    return float((table.argmax(1) == torch.arange(len(ours))).double().mean())


def probe(clean: Tensor, spoilt: Tensor) -> float:
    """Accuracy of a ridge classifier of clean and spoilt pictures: fitted on the first half, measured on the second."""
    half = len(clean) // 2
    x = torch.cat([clean[:half], spoilt[:half]]).double()
    mean, std = x.mean(0), x.std(0) + 1e-6
    labels = torch.cat([torch.ones(half), -torch.ones(half)]).double()

    def features(values: Tensor) -> Tensor:
        return F.pad((values.double() - mean) / std, (0, 1), value=1.0)

    a = features(x)
    # the same as (a'a + 10)^-1 a'y, without a matrix as wide as the features, which pixels make slow
    weights = a.T @ torch.linalg.solve(a @ a.T + 10 * torch.eye(len(a), dtype=torch.double), labels)
    right = torch.cat([features(clean[half:]) @ weights > 0, features(spoilt[half:]) @ weights < 0])
    return float(right.double().mean())


@torch.no_grad()
def base_model(folder: Path) -> tuple[Tensor, Tensor, list[int]] | None:
    """Of held-out captions: renderings through the VAE of tiny-sd3, its own pictures, the captions' numbers; None without it."""
    if not (folder / "model_index.json").exists():
        return None
    rng = np.random.default_rng(41)
    captions = sample_captions(SEEN, rng, heldout=True)
    texts = [c.text for c in captions]
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    clean = as_tensor([render(sample_scene(c, rng)) for c in captions])
    call = dict(num_inference_steps=10, guidance_scale=1.0, max_sequence_length=0, output_type="pt")
    generator, real, fake = torch.Generator().manual_seed(43), [], []
    for k in range(0, SEEN, 128):
        fake.append(pipe(texts[k : k + 128], generator=generator, **call).images)
        latents = pipe.vae.encode(normalise(clean[k : k + 128].float() / 255)).latent_dist.mode()
        real.append((pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    number = {text: k for k, text in enumerate(dict.fromkeys(texts))}
    eight_bit = [(torch.cat(x) * 255).round() / 255 for x in (real, fake)]
    return eight_bit[0], eight_bit[1], [number[text] for text in texts]


@torch.no_grad()
def figures(folder: Path) -> dict[str, dict[str, float]]:
    """What the card says, of held-out scenes: the written model, the same network untrained, and pixels."""
    rng = np.random.default_rng(31)
    scenes = [sample_scene(c, rng) for c in sample_captions(SEEN, rng, heldout=True)]
    clean = as_tensor([render(s) for s in scenes]).float() / 255
    again = as_tensor([render(moved(s, rng)) for s in scenes]).float() / 255
    spoilt = spoil(clean, torch.Generator().manual_seed(37), WAYS)
    unseen = spoil(clean, torch.Generator().manual_seed(39), UNSEEN)
    torch.manual_seed(0)
    untrained = folder.with_name(f"{folder.name}-untrained")
    shutil.rmtree(untrained, ignore_errors=True)
    write_dino(untrained, Dinov2Model(dino_config()))
    encoders: dict[str, Callable[[Tensor], Tensor]] = {"pixels": lambda x: x.flatten(1)}
    for name, place in (("untrained", untrained), ("tiny-dinov2", folder)):
        backbone = VisionBackbone.load(place, torch.device("cpu"))
        encoders[f"{name}, CLS"] = lambda x, b=backbone: torch.cat([b(part).cls for part in x.split(128)])
        encoders[f"{name}, mean patch"] = lambda x, b=backbone: torch.cat([b(p).patches.mean(1) for p in x.split(128)])
        encoders[f"{name}, all patches"] = lambda x, b=backbone: torch.cat(
            [b(p).patches.flatten(1) for p in x.split(128)]
        )
    shutil.rmtree(untrained)
    drawn = base_model(folder.with_name("tiny-sd3"))
    rows = {}
    for name, encode in encoders.items():
        at_rest = encode(clean)
        rows[name] = {
            "spoilt": probe(at_rest, encode(spoilt)),
            "unseen": probe(at_rest, encode(unseen)),
            "retrieval": retrieval(at_rest, encode(again)),
            "drawn": posthoc_auc(encode(drawn[0]), encode(drawn[1]), drawn[2]) if drawn else float("nan"),
        }
    return rows


def write_dino(folder: Path, model: Dinov2Model) -> None:
    """The model folder, weights in float16."""
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder, safe_serialization=True)
    file = folder / "config.json"  # read as float32, as on a CPU
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    preprocessing = {
        "image_processor_type": "BitImageProcessor",
        "size": SIZE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1) + "\n")


def write_dino_card(folder: Path, seconds: float) -> None:
    """Model card with the figures of the written weights."""
    rows = [f"| {name} | " + " | ".join(f"{v:.3f}" for v in r.values()) + " |" for name, r in figures(folder).items()]
    table = "\n".join(
        [
            "| features | clean or spoilt | spoilt otherwise | equal scene found | told from tiny-sd3 |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )
    numbers = dict(steps=DINO_STEPS, scenes=DINO_SCENES, pictures=DINO_PICTURES, minutes=seconds / 60, seen=SEEN)
    (folder / "README.md").write_text(CARD.format(table=table, **numbers))


CARD = """# tiny-dinov2

A transformers `Dinov2Model` for the shapes world: 64 px, patches of 8 px, four blocks of width 96, 0.3 M parameters in float16.
It was trained from scratch on {pictures} rendered pictures without their captions ({steps} steps of {scenes} pictures, as many
near twins and spoilt ones, two views of each) by

    python scripts/build_assets.py --only dino        # part of `make assets`

in {minutes:.0f} minutes. The architecture is DINOv2's, the training is not: whole pictures are learned by contrast (two views of one
picture against all others, its near twin and its spoilt self), patches by telling and repairing spoilt ones.
`scripts/shapes_models/dino.py` has it all.

What its features know of {seen} held-out scenes:

{table}

*All patches* are the 64 vectors of a picture one after the other: where things are is in them, as in pixels. CLS and mean patch were taught that
a shifted picture is the same, and take other layouts of the same caption for equal: more than half of their errors in the third column are such.

*Clean or spoilt*: share right of a ridge classifier (256 pictures of each kind to fit, 256 of each to measure; chance 0.5). A
picture is spoilt by grain, blur, warping, a second picture shining through, or coarse pixels. *Spoilt otherwise*: the same in
ways that training never showed: smeared, single wrong pixels, squares cut out. *Equal scene found*: how often the
nearest of {seen} pictures is the same scene drawn again, moved by up to 6 px as a whole, each object by 2 px more, sizes up to 10 %
off. *Told from tiny-sd3*: area under the ROC curve of a logistic regression, judged on prompts that it never saw, between
renderings put through the VAE of `tiny-sd3` and what that model draws of the same prompts in 10 steps, guidance 1 (chance 0.5).
"""
