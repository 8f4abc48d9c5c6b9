"""How far two rewards agree on the same pictures: STARC distance and Kendall's tau, both within prompts. Pure, float64.

Rewards enter group-relative methods by differences between pictures of one prompt alone, so that is where they are compared.
Bounds that the STARC paper proves need every picture that there could be; on samples of a policy the distance describes
those samples and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from t2irl.advantages import centred


def canonical(values: Tensor, groups: Tensor) -> Tensor:
    """A reward without what shaping could add: c(R)(x, c) = R(x, c) - mean of R over the pictures of c. (N,) -> (N,) float64.

    Skalse et al. 2024 (STARC), definition 3, for a bandit of one step: potential shaping is an offset for each prompt.
    `groups`: (N,) int64, equal for pictures of a prompt.
    """
    return centred(values, groups)


def starc_distance(first: Tensor, second: Tensor, groups: Tensor) -> float:
    """0.5 |c1 / |c1| - c2 / |c2||, which is sqrt((1 - rho) / 2) with the pooled correlation rho within prompts.

    From 0 (equal up to scale and an offset for each prompt) to 1 (opposed); 0.7 for unrelated rewards. (N,) each. As in the
    paper the zero reward is its own normal form: next to another it is at 0.5, and two of them are at 0.
    """
    units = []
    for values in (first, second):
        form = canonical(values, groups)
        norm = form.norm()
        # A reward that is constant but for rounding is the zero reward.
        zero = norm <= 1e-12 * values.double().norm()
        units.append(torch.zeros_like(form) if zero else form / norm)
    return float((units[0] - units[1]).norm() / 2)


def kendall_tau(first: Tensor, second: Tensor, groups: Tensor) -> float:
    """Kendall's tau-b over all pairs of pictures of one prompt, pooled over prompts; NaN if a reward ties every pair.

    (concordant - discordant) / sqrt(pairs not tied in the first x pairs not tied in the second), from -1 to 1. (N,) each.
    """
    agree, untied = 0.0, [0.0, 0.0]
    for group in torch.unique(groups):
        rows = groups == group
        signs = [torch.sign(v.double()[rows][:, None] - v.double()[rows][None]) for v in (first, second)]
        agree += float((signs[0] * signs[1]).sum())
        untied = [total + float(sign.abs().sum()) for total, sign in zip(untied, signs, strict=True)]
    return agree / (untied[0] * untied[1]) ** 0.5 if untied[0] and untied[1] else float("nan")


def standardised(values: Tensor, groups: Tensor) -> Tensor:
    """Differences within prompts in units of their pooled spread, (N,) float64; 0 for a reward that is constant but for rounding."""
    form = canonical(values, groups)
    spread = form.square().mean().sqrt()
    zero = spread <= 1e-12 * values.double().square().mean().sqrt()
    return torch.zeros_like(form) if zero else form / spread


def error_correlation(first: Tensor, second: Tensor, gold: Tensor, groups: Tensor) -> float:
    """Correlation of the errors of two rewards: of what each says of a picture beyond what gold says of it. (N,) each.

    An error is the standardised score less standardised gold, both as differences within prompts in units of their pooled
    spread; a constant is 0. 1 for two rewards that are wrong alike, which are no second opinion in an ensemble, whatever
    gold they hold. Two that know nothing of gold or of each other have 0.5, since both lack the same gold. NaN if one has no
    error.
    """
    truth = standardised(gold, groups)
    a, b = (standardised(values, groups) - truth for values in (first, second))
    sizes = float(a.norm() * b.norm())
    return float(a @ b) / sizes if sizes > 1e-12 * len(a) else float("nan")
