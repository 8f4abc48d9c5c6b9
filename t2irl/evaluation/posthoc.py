"""A fresh discriminator, trained after the fact: can reference images and the policy's pictures be told apart at all?

The adversary of a run says what it has learned; this one starts from nothing at each evaluation, so that its figures can
be compared between runs with and without an adversary. Pure and deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2irl.adversary.losses import auc

PENALTY = 0.05
"""Factor of half the squared norm of the weights. Fixed: a figure is comparable only with the same one."""
FOLDS = 4


def posthoc_auc(real: Tensor, fake: Tensor, prompts: Sequence[int]) -> float:
    """Area under the ROC curve of logistic regression on features, in [0, 1]; 0.5 means that nothing tells them apart.

    `real`, `fake`: features (n, D) of reference images and pictures of the same prompts, whose numbers are `prompts` (n,).
    Prompts are dealt into four parts, and each part is judged by a regression that never saw its prompts; the mean of the
    four areas is given, NaN with fewer than four prompts.
    """
    different = sorted(set(prompts))
    if len(different) < FOLDS:
        return float("nan")
    part_of = {prompt: k % FOLDS for k, prompt in enumerate(np.random.default_rng(0).permutation(different).tolist())}
    fold = torch.tensor([part_of[prompt] for prompt in prompts])
    real, fake = real.double().cpu(), fake.double().cpu()
    found = []
    for k in range(FOLDS):
        inside = fold == k
        weights, bias = _fit(real[~inside], fake[~inside])
        found.append(auc(real[inside] @ weights + bias, fake[inside] @ weights + bias))
    return sum(found) / FOLDS


def _fit(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (D,) and bias of a logistic regression, float64, features standardised within."""
    x = torch.cat([real, fake])
    y = torch.cat([torch.ones(len(real)), torch.zeros(len(fake))]).double()
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-9)
    x = (x - mean) / std
    w = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w[:-1] + w[-1], y) + 0.5 * PENALTY * w[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[arg-type]
    weights = w.detach()[:-1] / std
    return weights, w.detach()[-1] - weights @ mean
