"""Diversity and distances of feature sets against known answers, and against the libraries that have them where installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2irl.evaluation.distances import (
    cmmd,
    frechet,
    frechet_gaussians,
    kid,
    kid_subsets,
    overlap,
    vendi,
    within_prompts,
)


def rng(seed: int = 0) -> np.random.Generator:
    """Random numbers of a test."""
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n", range(1, 7))
def test_vendi_counts_different_pictures(n: int) -> None:
    """n unrelated pictures are n, whatever the order; copies of them count as often as they are, not more."""
    for order in (1.0, 2.0, math.inf):
        assert vendi(np.eye(n), order) == pytest.approx(n)
        assert vendi(np.ones((n, n)), order) == pytest.approx(1)
    twice = np.kron(np.eye(n), np.ones((2, 2)))
    assert vendi(twice) == pytest.approx(n)


def test_vendi_of_unequal_shares_is_the_exponential_of_their_entropy() -> None:
    kernel = np.zeros((4, 4))
    kernel[:3, :3] = 1
    kernel[3, 3] = 1
    shares = np.array([0.75, 0.25])
    assert vendi(kernel) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert vendi(kernel, math.inf) == pytest.approx(1 / 0.75)
    assert vendi(kernel, 2.0) == pytest.approx(1 / (shares**2).sum())


def test_within_prompts_of_a_collapsed_a_varied_and_a_mixed_prompt() -> None:
    e = np.eye(4)
    features = np.stack([np.repeat(e[:1], 4, 0), e, e[[0, 0, 1, 1]]]) * 3.0
    found = within_prompts(features)
    np.testing.assert_allclose(found.pairwise, [0, 1, 4 / 6])
    np.testing.assert_allclose(found.vendi, [1, 4, 2])
    np.testing.assert_allclose(found.vendi_inf, [1, 4, 2])
    np.testing.assert_allclose(found.duplicates, [1, 0, 2 / 6])
    assert np.isnan(within_prompts(features[:, :1]).vendi).all()


@given(st.integers(2, 6), st.integers(0, 100))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_diversity_does_not_depend_on_order_or_scale(n: int, seed: int) -> None:
    x = rng(seed).normal(size=(1, n, 5))
    first, second = within_prompts(x), within_prompts(7.0 * x[:, rng(seed + 1).permutation(n)])
    for a, b in zip(vars(first).values(), vars(second).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    assert 1 - 1e-9 <= first.vendi_inf[0] <= first.vendi[0] <= n + 1e-9


def test_frechet_distance_of_known_gaussians() -> None:
    """Commuting covariances: |m1 - m2|^2 + sum of (s1 - s2)^2 over the axes, in any rotation."""
    rotation, _ = np.linalg.qr(rng().normal(size=(4, 4)))
    s1, s2, gap = np.array([1.0, 2.0, 0.5, 0.0]), np.array([3.0, 2.0, 0.1, 0.0]), np.array([1.0, 0, 0, 2.0])
    covariances = [rotation @ np.diag(s**2) @ rotation.T for s in (s1, s2)]
    found = frechet_gaussians(gap, covariances[0], np.zeros(4), covariances[1])
    assert found == pytest.approx(gap @ gap + ((s1 - s2) ** 2).sum())
    assert frechet_gaussians(gap, covariances[0], gap, covariances[0]) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_samples_nears_that_of_their_distributions() -> None:
    x, y = rng(1).normal(0, 1, (20000, 3)), rng(2).normal(0.5, 2, (20000, 3))
    assert frechet(x, y) == pytest.approx(3 * 0.25 + 3 * 1.0, rel=0.03)
    one, other = rng(3).normal(size=(50, 1)), rng(4).normal(size=(50, 1))
    gap = one.mean() - other.mean()
    assert frechet(one, other) == pytest.approx(gap**2 + (one.std(ddof=1) - other.std(ddof=1)) ** 2)


def test_kernel_distance_is_unbiased() -> None:
    """Tiny samples of one distribution: the mean over many of them is 0, while the biased estimate is far above."""
    draws = np.array([kid(rng(s).normal(size=(5, 3)), rng(10_000 + s).normal(size=(5, 3))) for s in range(3000)])
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean()) < 3.5 * error
    assert draws.min() < 0 < draws.max()


def test_kernel_distance_of_dependent_pairs_is_unbiased_without_the_pairs() -> None:
    """As with pictures of two checkpoints from the same noise: with the pairs a small drift would look like less than none."""
    paired, plain = [], []
    for s in range(3000):
        x = rng(s).normal(size=(5, 3))
        paired.append(kid(x, x.copy(), paired=True))
        plain.append(kid(x, x.copy()))
    assert np.mean(paired) == pytest.approx(0, abs=1e-9)
    assert np.mean(plain) < -1
    moved = [kid(x, x + 0.5, paired=True) for x in (rng(s).normal(size=(5, 3)) for s in range(3000))]
    fresh = [kid(rng(s).normal(size=(5, 3)), rng(9_000 + s).normal(size=(5, 3)) + 0.5) for s in range(3000)]
    assert np.mean(moved) == pytest.approx(np.mean(fresh), abs=4 * np.std(fresh) / 3000**0.5)


def test_kernel_distance_by_hand() -> None:
    """One dimension, k(x, y) = (xy + 1)^3: x = {0, 1}, y = {2, 3}."""
    k = lambda a, b: (a * b + 1) ** 3  # noqa: E731
    expected = k(0, 1) + k(2, 3) - 2 * np.mean([k(0, 2), k(0, 3), k(1, 2), k(1, 3)])
    assert kid(np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])) == pytest.approx(expected)


def test_subsets_spread_around_the_distance() -> None:
    x, y = rng(0).normal(size=(400, 4)), rng(1).normal(0.3, 1, (400, 4))
    mean, std = kid_subsets(x, y, 100, 200, rng(2))
    assert mean == pytest.approx(kid(x, y), abs=4 * std / 200**0.5) and std > 0
    smaller, _ = kid_subsets(x[:10], y[:10], 1000, 5, rng(3))
    assert math.isfinite(smaller)


def test_cmmd_by_hand_and_its_limits() -> None:
    """Unit vectors at a right angle are root 2 apart: 2 - 2 exp(-2 / 200), x 1000."""
    x, y = np.array([[3.0, 0.0]]), np.array([[0.0, 0.5]])
    assert cmmd(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)))
    z = rng(0).normal(size=(3000, 8))
    assert cmmd(z, z) == pytest.approx(0, abs=1e-9)  # more rows than are held at a time
    assert cmmd(z, 5 * z) == pytest.approx(0, abs=1e-9)


def test_overlap_of_equal_of_distant_and_of_narrower_sets() -> None:
    x = rng(0).normal(size=(200, 3))
    same = overlap(x, x, 5)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = overlap(x + 100, x, 5)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    narrow = overlap(0.2 * rng(1).normal(size=(200, 3)), x, 5)
    assert narrow.precision > 0.95 and narrow.recall < 0.2 and narrow.coverage < 0.7


def test_overlap_by_hand() -> None:
    """On a line, k = 1: radii of y = {0, 1, 10} are 1, 1, 9; of x = {0.5, 30} both 29.5."""
    found = overlap(np.array([[0.5], [30.0]]), np.array([[0.0], [1.0], [10.0]]), 1)
    # 0.5 lies in the balls of 0, 1 and 10 (9.5 > 9: not that one); 30 in none.
    assert (found.precision, found.density) == (0.5, 1.0)
    assert found.coverage == pytest.approx(2 / 3)
    assert found.recall == 1.0


def test_as_torch_fidelity_has_them() -> None:
    """FID, KID and precision and recall of the same features, where torch-fidelity is installed."""
    torch = pytest.importorskip("torch")
    fid_module = pytest.importorskip("torch_fidelity.metric_fid")
    kid_module = pytest.importorskip("torch_fidelity.metric_kid")
    prc_module = pytest.importorskip("torch_fidelity.metric_prc")
    x, y = (torch.from_numpy(rng(s).normal(s, 1 + s, (300, 6))).float() for s in (0, 1))
    statistics = [fid_module.fid_features_to_statistics(z) for z in (x, y)]
    theirs = fid_module.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet(x.numpy(), y.numpy()) == pytest.approx(theirs, rel=1e-4)
    options = {"kid_subsets": 1, "kid_subset_size": 300, "verbose": False}
    theirs = kid_module.kid_features_to_metric(x, y, **options)["kernel_inception_distance_mean"]
    assert kid(x.numpy(), y.numpy()) == pytest.approx(theirs, rel=1e-4)
    theirs = prc_module.prc_features_to_metric(x, y, prc_neighborhood=3, prc_batch_size=100, verbose=False)
    ours = overlap(y.numpy(), x.numpy(), 3)
    # Neighbours at the very edge may fall on either side, since theirs are counted in float32.
    assert sorted([ours.precision, ours.recall]) == pytest.approx(
        sorted([theirs["precision"], theirs["recall"]]), abs=0.01
    )
