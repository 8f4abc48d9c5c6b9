"""How different pictures are, from their features: within a prompt, and between two sets. Pure, float64.

Features are (N, D) arrays. Nothing here knows what made them, so the same numbers come out whatever is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg
from scipy.spatial.distance import cdist

DUPLICATE = 0.95
"""Two pictures of a prompt whose features have a larger cosine are duplicates."""
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
ROWS = 2048
"""Rows of a kernel matrix that are held at a time."""


@dataclass(frozen=True)
class Within:
    """Diversity of the pictures of each prompt, (P,) each."""

    pairwise: np.ndarray
    """Mean of 1 - cosine over pairs."""
    vendi: np.ndarray
    """Effective number of different pictures, 1 to n."""
    vendi_inf: np.ndarray
    """The same by the largest eigenvalue alone: rare pictures do not count."""
    duplicates: np.ndarray
    """Share of pairs with a cosine above `DUPLICATE`."""


def unit(features: np.ndarray) -> np.ndarray:
    """Rows at unit length, float64; a zero row stays zero."""
    x = features.astype(np.float64)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def within_prompts(features: np.ndarray) -> Within:
    """Diversity of (P, n, D) features, by prompt; NaN for a single picture."""
    x = unit(features)
    n = x.shape[1]
    kernels = x @ x.transpose(0, 2, 1)
    if n < 2:
        nothing = np.full(len(x), np.nan)
        return Within(nothing, nothing, nothing, nothing)
    i, j = np.triu_indices(n, 1)
    cosines = kernels[:, i, j]
    values = np.array([vendi(kernel) for kernel in kernels])
    largest = np.array([vendi(kernel, np.inf) for kernel in kernels])
    return Within((1 - cosines).mean(1), values, largest, (cosines > DUPLICATE).mean(1))


def vendi(kernel: np.ndarray, order: float = 1.0) -> float:
    """Vendi score of a kernel (n, n) with ones on its diagonal: exp of the Renyi entropy of the eigenvalues of K / n.

    Friedman and Dieng 2023; order 1 is Shannon's, infinity takes the largest eigenvalue. 1 for equal pictures, n for unrelated ones.
    """
    values = np.linalg.eigvalsh(kernel / len(kernel))
    values = values[values > 1e-12]
    if np.isinf(order):
        return float(1 / values.max())
    if order == 1:
        return float(np.exp(-(values * np.log(values)).sum()))
    return float((values**order).sum() ** (1 / (1 - order)))


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians that fit two sets: |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of S1 S2, which are real and not negative.
    """
    x, y = first.astype(np.float64), second.astype(np.float64)
    return frechet_gaussians(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))


def frechet_gaussians(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """The same for known means and covariances."""
    cov1, cov2 = np.atleast_2d(cov1), np.atleast_2d(cov2)
    values = linalg.eigvals(cov1 @ cov2).real.clip(min=0)
    gap = mean1 - mean2
    return float(gap @ gap + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(values).sum())


def kid(first: np.ndarray, second: np.ndarray, paired: bool = False) -> float:
    """Unbiased squared kernel distance with k(x, y) = (x . y / D + 1)^3; may be below 0 for sets that are alike.

    Binkowski et al. 2018. Takes two pictures or more in each set. `paired`: row i of both sets came from the same noise, so that they
    depend on each other; without such pairs the mean over the others is unbiased all the same (Gretton et al. 2012, lemma 6).
    """
    x, y = first.astype(np.float64), second.astype(np.float64)
    across = _off_diagonal(x, y) if paired else float(_cubic(x, y).mean())
    return _off_diagonal(x, x) + _off_diagonal(y, y) - 2 * across


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal(x: np.ndarray, y: np.ndarray) -> float:
    kernel = _cubic(x, y)
    return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))


def kid_subsets(
    first: np.ndarray, second: np.ndarray, size: int, count: int, rng: np.random.Generator, paired: bool = False
) -> tuple[float, float]:
    """Mean and standard deviation of the kernel distance over `count` pairs of random subsets of `size` pictures.

    With fewer pictures than `size` the subsets have half of the smaller set.
    """
    smaller = min(len(first), len(second))
    size = size if smaller > size else max(2, smaller // 2)
    draws = []
    for _ in range(count):
        rows = rng.choice(len(first), size, replace=False)
        others = rows if paired else rng.choice(len(second), size, replace=False)
        draws.append(kid(first[rows], second[others], paired))
    return float(np.mean(draws)), float(np.std(draws, ddof=1)) if count > 1 else float("nan")


def cmmd(first: np.ndarray, second: np.ndarray) -> float:
    """Squared distance of the means in the space of a Gaussian kernel of width 10, of unit vectors, x 1000 (Jayasumana et al. 2024).

    Biased, as published: 0 for equal sets. Holds a few rows of the kernel at a time.
    """
    x, y = unit(first), unit(second)
    return CMMD_SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for start in range(0, len(x), ROWS):
        total += float(np.exp(-cdist(x[start : start + ROWS], y, "sqeuclidean") / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(x) * len(y))


@dataclass(frozen=True)
class Overlap:
    """Where two sets lie relative to each other, in [0, 1] but for density."""

    precision: float
    """Share of the pictures that lie among the reference images."""
    recall: float
    """Share of the reference images that lie among the pictures: falls when a mode is lost."""
    density: float
    """Precision that counts in how many neighbourhoods a picture lies; above 1 possible."""
    coverage: float
    """Share of the reference images with a picture in their neighbourhood."""


def overlap(pictures: np.ndarray, references: np.ndarray, k: int) -> Overlap:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) with the k nearest neighbours.

    Takes more than k pictures in each set.
    """
    x, y = pictures.astype(np.float64), references.astype(np.float64)
    radius_x, radius_y = _radii(x, k), _radii(y, k)
    inside_y = np.zeros(len(x), int)
    inside_x, covered = np.zeros(len(y), bool), np.zeros(len(y), bool)
    for start in range(0, len(x), ROWS):
        table = cdist(x[start : start + ROWS], y)
        near = table <= radius_y
        inside_y[start : start + ROWS] = near.sum(1)
        covered |= near.any(0)
        inside_x |= (table <= radius_x[start : start + ROWS, None]).any(0)
    return Overlap(
        float((inside_y > 0).mean()), float(inside_x.mean()), float(inside_y.mean() / k), float(covered.mean())
    )


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Distance of each row to its k-th nearest other row."""
    return np.concatenate(
        [np.partition(cdist(x[start : start + ROWS], x), k, axis=1)[:, k] for start in range(0, len(x), ROWS)]
    )
