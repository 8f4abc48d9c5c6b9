"""Losses of an adversary and measures of how well it tells reference images from rollout images. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossKind = Literal["hinge", "bce", "bt"]


def pair_loss(kind: LossKind, real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
    """Loss of each pair of a reference image and a rollout image, (B,), from logits (B, n) of their n parts.

    hinge: half of max(0, 1 - real) + max(0, 1 + fake). bce: half of the two cross-entropies; reference images have the
    target 1 - smoothing. bt: Bradley-Terry, -log sigmoid(real - fake) of the mean logits; with smoothing the other order
    counts that much.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1))
    if kind == "bce":
        of_real = (1 - smoothing) * F.softplus(-real) + smoothing * F.softplus(real)
        return 0.5 * (of_real.mean(1) + F.softplus(fake).mean(1))
    lead = real.mean(1) - fake.mean(1)
    return (1 - smoothing) * F.softplus(-lead) + smoothing * F.softplus(lead)


def gradient_penalty(decision: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """R1: half the squared norm of each decision's gradient with respect to its own inputs, (B,), differentiable."""
    gradients = torch.autograd.grad(
        decision.sum(), inputs, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return 0.5 * torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0)


def accuracy(kind: LossKind, real: Tensor, fake: Tensor) -> float:
    """Share of right decisions about the pairs (n,) and (n,): at the threshold 0, for bt within each pair."""
    if kind == "bt":
        return float((real > fake).double().mean())
    return float(torch.cat([real > 0, fake < 0]).double().mean())


def auc(real: Tensor, fake: Tensor) -> float:
    """Probability that a reference image (n,) has a higher value than a rollout image (m,), ties counting half."""
    low = fake.double().sort().values
    below = torch.searchsorted(low, real.double(), right=False) + torch.searchsorted(low, real.double(), right=True)
    return float(below.double().mean() / (2 * len(low)))
