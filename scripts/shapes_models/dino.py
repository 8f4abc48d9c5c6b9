"""A small vision transformer that learns to see from pictures alone, without captions: assets/tiny-dinov2.

Two tasks, no label in either. Whole picture: two views of one picture (shifted, cropped, slightly recoloured) must be more alike
than views of other pictures; half of the pictures are spoilt versions of the other half, so that how a picture is spoilt must
show in its vector. Patches: 40 % of them are hidden and painted from the rest.
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
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from reward_models.vision import VisionBackbone
from shapes_models.stage import Stage
from shapes_models.vae import draw
from t2irl.shapes.captions import sample_captions
from t2irl.shapes.corruptions import blur, coarse, ghost, grain, warp
from t2irl.shapes.render import SIZE, Scene, render, sample_scene

DINO_STEPS, DINO_SCENES, DINO_PICTURES = 600, 32, 8_000
PATCH, WIDTH, HIDDEN_SHARE, TEMPERATURE = 8, 96, 0.4, 0.1
SEEN = 512  # pictures that the figures of the card are measured on


SPOILT = (grain, blur, warp, ghost, coarse)
"""Ways in which pictures are spoilt."""


def spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture (B, 3, 64, 64) in [0, 1] spoilt in one of five ways: grain, blur, warped, two in one, coarse pixels."""
    ways = torch.randint(len(SPOILT), (len(images),), generator=generator).tolist()
    return torch.cat([SPOILT[way](images[k : k + 1], generator, images) for k, way in enumerate(ways)]).clamp(0, 1)


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures shifted by up to 8 px, half of them cropped, all slightly recoloured. Never mirrored: left is not right."""
    n, reach = len(images), 8
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    places = torch.randint(2 * reach + 1, (n, 2), generator=generator).tolist()
    shifted = torch.stack(
        [x[:, top : top + SIZE, left : left + SIZE] for x, (top, left) in zip(padded, places, strict=True)]
    )
    for k in range(0, n, 2):
        side = int(torch.randint(44, SIZE, (), generator=generator))
        top, left = torch.randint(SIZE - side + 1, (2,), generator=generator).tolist()
        part = images[k : k + 1, :, top : top + side, left : left + side]
        shifted[k] = F.interpolate(part, [SIZE, SIZE], mode="bilinear", align_corners=False)[0]
    gain = 1 + 0.1 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5)
    level = 0.06 * (torch.rand(n, 1, 1, 1, generator=generator) - 0.5)
    return (shifted * gain + level).clamp(0, 1)


def normalise(images: Tensor) -> Tensor:
    """As preprocessor_config.json says."""
    return images * 2 - 1


class Student(nn.Module):
    """The backbone with the two heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Dinov2Model(dino_config())
        self.project = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, 64))
        self.paint = nn.Linear(WIDTH, 3 * PATCH * PATCH)

    def forward(self, images: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of the pictures (B, 64), and painted patches (B, N, 192). `hidden` (B, N) bool."""
        tokens = self.backbone(normalise(images), bool_masked_pos=hidden).last_hidden_state
        return F.normalize(self.project(tokens[:, 0]).float(), dim=-1), self.paint(tokens[:, 1:]).float()


def dino_config() -> Dinov2Config:
    """0.3 M parameters: 64 patches of 8 px, four blocks."""
    return Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=3, mlp_ratio=2, image_size=SIZE, patch_size=PATCH,
        layerscale_value=1.0,
    )  # fmt: skip


def make_dino(work: Path, folder: Path, seed: int) -> None:
    """Train it, write its folder and its card."""
    model = build_dino(work, seed)
    write_dino(folder, model)
    write_dino_card(folder, torch.load(work / "dino.pt", weights_only=True)["seconds"])


def build_dino(work: Path, seed: int) -> Dinov2Model:
    """Train it."""
    torch.manual_seed(seed)
    student = Student()
    pictures = draw(sample_captions(DINO_PICTURES, np.random.default_rng(seed + 8)), seed + 9)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    stage = Stage("dino", work, [(0, 1.0), (DINO_STEPS, 0.0)], {"student": student}, [optimizer])

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (DINO_SCENES,), generator=generator)
        clean = pictures[chosen].float() / 255
        images = torch.cat([clean, spoil(clean, generator)])
        views = torch.cat([view(images, generator), view(images, generator)])
        hidden = torch.rand(len(views), (SIZE // PATCH) ** 2, generator=generator) < HIDDEN_SHARE
        hidden[: len(images)] = False  # one view is seen whole, as in use
        with torch.autocast("cpu", torch.bfloat16):
            whole, painted = student(views, hidden)
        alike = whole[: len(images)] @ whole[len(images) :].T / TEMPERATURE
        partner = torch.arange(len(images))
        contrast = (F.cross_entropy(alike, partner) + F.cross_entropy(alike.T, partner)) / 2
        patches = F.unfold(normalise(views), PATCH, stride=PATCH).transpose(1, 2)
        return contrast + (painted - patches)[hidden].square().mean()

    stage.run(loss_at, seed + 10)
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


def _tensor(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


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
    weights = torch.linalg.solve(a.T @ a + 10 * torch.eye(a.shape[1], dtype=torch.double), a.T @ labels)
    right = torch.cat([features(clean[half:]) @ weights > 0, features(spoilt[half:]) @ weights < 0])
    return float(right.double().mean())


@torch.no_grad()
def figures(folder: Path) -> dict[str, dict[str, float]]:
    """What the card says, of held-out scenes: the written model, the same network untrained, and pixels."""
    rng = np.random.default_rng(31)
    scenes = [sample_scene(c, rng) for c in sample_captions(SEEN, rng, heldout=True)]
    clean = _tensor([render(s) for s in scenes])
    again = _tensor([render(moved(s, rng)) for s in scenes])
    spoilt = spoil(clean, torch.Generator().manual_seed(37))
    torch.manual_seed(0)
    untrained = folder.with_name(f"{folder.name}-untrained")
    shutil.rmtree(untrained, ignore_errors=True)
    write_dino(untrained, Dinov2Model(dino_config()))
    encoders: dict[str, Callable[[Tensor], Tensor]] = {"pixels": lambda x: x.flatten(1)}
    for name, place in (("untrained", untrained), ("tiny-dinov2", folder)):
        backbone = VisionBackbone.load(place, torch.device("cpu"))
        encoders[f"{name}, CLS"] = lambda x, b=backbone: torch.cat([b(part).cls for part in x.split(128)])
        encoders[f"{name}, mean patch"] = lambda x, b=backbone: torch.cat([b(p).patches.mean(1) for p in x.split(128)])
    shutil.rmtree(untrained)
    rows = {}
    for name, encode in encoders.items():
        at_rest, once_more, bad = encode(clean), encode(again), encode(spoilt)
        rows[name] = {"spoilt": probe(at_rest, bad), "retrieval": retrieval(at_rest, once_more)}
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
    rows = [f"| {name} | {r['spoilt']:.3f} | {r['retrieval']:.3f} |" for name, r in figures(folder).items()]
    table = "\n".join(["| features | clean or spoilt | equal scene found |", "|---|---|---|", *rows])
    numbers = dict(steps=DINO_STEPS, scenes=DINO_SCENES, pictures=DINO_PICTURES, minutes=seconds / 60, seen=SEEN)
    (folder / "README.md").write_text(CARD.format(table=table, **numbers))


CARD = """# tiny-dinov2

A transformers `Dinov2Model` for the shapes world: 64 px, patches of 8 px, four blocks of width 96, 0.3 M parameters in float16.
It was trained from scratch on {pictures} rendered pictures without their captions ({steps} steps of {scenes} pictures, as many
spoilt ones, two views of each) by

    python scripts/build_assets.py --only dino        # part of `make assets`

in {minutes:.0f} minutes. The architecture is DINOv2's, the training is not: whole pictures are learned by contrast (two views of one
picture against all others), patches by painting hidden ones. `scripts/shapes_models/dino.py` has it all.

What its features know of {seen} held-out scenes:

{table}

*Clean or spoilt*: share right of a ridge classifier (256 pictures of each kind to fit, 256 of each to measure; chance 0.5). A
picture is spoilt by grain, blur, warping, a second picture shining through, or coarse pixels. *Equal scene found*: how often the
nearest of {seen} pictures is the same scene drawn again, moved by up to 6 px as a whole, each object by 2 px more, sizes up to 10 %
off.
"""
