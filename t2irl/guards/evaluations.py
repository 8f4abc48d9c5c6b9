"""Slightly different versions of the pictures of a rollout, on which a reward shows how sure it is.

All draws are seeded by (seed, purpose, iteration, prompt id, image number), so they depend neither on the number of processes nor on
batches. Versions must not change what a picture shows: leave out `crop` where objects are counted, and so on.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from t2irl.data import noise_seed
from t2irl.dynamics.base import euler
from t2irl.geometry import even_chunks
from t2irl.policy import Policy
from t2irl.types import PromptGroups, Trajectory

Perturbation = Literal["jpeg", "crop", "shift", "gain"]
QUALITY, CROP, SHIFT, GAIN = (85, 95), 0.02, 2, 0.02
"""Largest changes: JPEG quality, cut off share of a side, moved pixels, brightness."""


def perturbed(
    images: Tensor, groups: PromptGroups, kinds: Sequence[Perturbation], seed: int, iteration: int, number: int
) -> Tensor:
    """Version `number` of pictures (B, 3, H, W) uint8: each changed in one of `kinds`, drawn for each image. On the CPU."""
    found = images.cpu().clone()
    for row, prompt, member in zip(found, groups.ids, groups.members, strict=True):
        rng = np.random.default_rng(noise_seed(seed, f"perturbed {number} {iteration}", prompt, member))
        kind = kinds[int(rng.integers(len(kinds)))]
        row.copy_(perturb(row.clone(), kind, rng))
    return found


def perturb(image: Tensor, kind: Perturbation, rng: np.random.Generator) -> Tensor:
    """One picture (3, H, W) uint8, changed so little that nobody would judge it otherwise."""
    height, width = image.shape[1:]
    if kind == "jpeg":
        file = io.BytesIO()
        quality = int(rng.integers(QUALITY[0], QUALITY[1] + 1))
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=quality)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    if kind == "gain":
        return (image * (1 + GAIN * rng.uniform(-1, 1))).round().clamp(0, 255).to(torch.uint8)
    if kind == "shift":
        down, right = rng.integers(-SHIFT, SHIFT + 1, 2).tolist()
        padded = F.pad(image.float()[None], (SHIFT,) * 4, "replicate")[0].to(torch.uint8)
        return padded[:, SHIFT + down : SHIFT + down + height, SHIFT + right : SHIFT + right + width]
    cut = [max(1, round(side * CROP * rng.uniform())) for side in (height, width)]
    top, left = (int(rng.integers(n + 1)) for n in cut)
    part = image[None, :, top : top + height - cut[0], left : left + width - cut[1]].float()
    resized = F.interpolate(part, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def drawn(groups: PromptGroups, shape: tuple[int, ...], seed: int, purpose: str) -> Tensor:
    """Standard normal noise of each image, (B, *shape) float32 on the CPU."""
    generator = torch.Generator()
    noise = torch.empty(len(groups), *shape)
    for row, prompt, member in zip(noise, groups.ids, groups.members, strict=True):
        generator.manual_seed(noise_seed(seed, purpose, prompt, member))
        torch.randn(row.shape, generator=generator, out=row)
    return noise


@torch.no_grad()
def drawn_again(
    policy: Policy, trajectory: Trajectory, noise: Tensor, level: float, steps: int, batch_size: int
) -> Tensor:
    """The pictures as the policy draws them again from `level` in (0, 1], in so many steps of the ODE: (B, 3, H, W) uint8.

    x = (1 - level) x0 + level noise. One step gives the clean picture that is expected at that level, as Ctrl-U compares it at
    neighbouring levels under one noise. The recorded states of the rollout would do as well, but they cover the trained window
    alone.
    """
    groups, found = trajectory.groups, []
    schedule = torch.linspace(level, 0, steps + 1, device=trajectory.final.device)
    with policy.fused():
        for chunk in even_chunks(len(groups), batch_size):
            clean, part = trajectory.final[chunk], groups[chunk]
            x = (1 - level) * clean + level * noise[chunk].to(clean)
            used = sorted(set(part.index))
            text = policy.text([groups.prompts[i] for i in used])[[used.index(i) for i in part.index]]
            for before, after in itertools.pairwise(schedule):
                t, t_next = before.expand(len(part)), after.expand(len(part))
                x = euler(x, policy.velocity(x, t, text), t, t_next)
            found.append(policy.family.pictures(x))
    return torch.cat(found)
