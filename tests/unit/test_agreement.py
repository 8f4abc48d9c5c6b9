"""Pure measures of over-optimisation: known rewards, closed forms, and oracles from scipy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from t2irl.evaluation.agreement import canonical, error_correlation, kendall_tau, starc_distance
from t2irl.evaluation.distances import within_prompts
from t2irl.evaluation.diversity import coarse_pixels, diversity
from t2irl.evaluation.overoptimization import Fit, best_of_k, best_of_n_kl, fit

GROUPS = torch.arange(6).repeat_interleave(8)


def draw(seed: int, n: int = 48) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_canonical_reward_forgets_offsets_of_prompts() -> None:
    assert canonical(torch.tensor([1.0, 3.0, 10.0, 14.0]), torch.tensor([0, 0, 1, 1])).tolist() == [-1, 1, -2, 2]
    shaped = draw(0) + 5 * draw(1, 6)[GROUPS]
    assert torch.allclose(canonical(shaped, GROUPS), canonical(draw(0), GROUPS))
    assert canonical(shaped, GROUPS).sum().abs() < 1e-9


def test_starc_distance_on_known_rewards() -> None:
    reward, other = draw(0), draw(2)
    assert starc_distance(reward, 3 * reward + 5 * draw(1, 6)[GROUPS], GROUPS) < 1e-7
    assert starc_distance(reward, -reward, GROUPS) == pytest.approx(1)
    centred = [canonical(v, GROUPS) for v in (reward, other)]
    rho = float(centred[0] @ centred[1] / centred[0].norm() / centred[1].norm())
    assert starc_distance(reward, other, GROUPS) == pytest.approx(math.sqrt((1 - rho) / 2))
    assert starc_distance(reward, other, GROUPS) == pytest.approx(starc_distance(other, reward, GROUPS))
    constant = torch.full((48,), 0.1)
    assert starc_distance(reward, constant, GROUPS) == pytest.approx(0.5)
    assert starc_distance(constant, 2 * constant, GROUPS) == 0


@pytest.mark.parametrize("levels", [3, 1000])
def test_kendall_tau_is_scipys_and_is_pooled_within_prompts(levels: int) -> None:
    a, b = (draw(0) * levels / 3).round(), (draw(0) * levels / 9 + draw(1) * levels / 3).round()
    one = torch.zeros(48, dtype=torch.int64)
    assert kendall_tau(a, b, one) == pytest.approx(stats.kendalltau(a.numpy(), b.numpy()).statistic)
    shifted = kendall_tau(a + 1000 * GROUPS, b - 1000 * GROUPS, GROUPS)
    assert shifted == pytest.approx(kendall_tau(a, b, GROUPS)) and shifted != pytest.approx(kendall_tau(a, b, one))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    assert kendall_tau(a[order], b[order], GROUPS[order]) == pytest.approx(shifted)
    assert math.isnan(kendall_tau(a, torch.ones(48), GROUPS))


def test_best_of_k_is_the_mean_over_all_subsets() -> None:
    proxy, gold = draw(0, 14).view(2, 7), draw(1, 14).view(2, 7)
    curve = best_of_k(proxy, gold)
    for k in range(1, 8):
        picks = [g[max(c, key=lambda i: float(p[i]))] for p, g in zip(proxy, gold, strict=True)
                 for c in itertools.combinations(range(7), k)]  # fmt: skip
        assert float(curve[k - 1]) == pytest.approx(float(torch.stack(picks).mean()))
    assert float(curve[0]) == pytest.approx(float(gold.mean()))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(best_of_k(proxy[:, order], gold[:, order]), curve)


def test_best_of_k_shares_ties() -> None:
    ties = best_of_k(torch.ones(1, 5), draw(0, 5)[None])
    assert torch.allclose(ties, draw(0, 5).mean().expand(5))
    half = best_of_k(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[9.0, 1.0, 3.0]]))
    assert half.tolist() == pytest.approx([13 / 3, 2, 2])


@pytest.mark.parametrize(("kind", "peak"), [("best_of_n", 2.0), ("rl", math.exp(3))])
def test_fit_finds_the_curve_and_its_peak(kind: str, peak: float) -> None:
    true = Fit(kind, 4.0, 1.0)  # type: ignore[arg-type]
    d = torch.linspace(0.1, 9, 20, dtype=torch.float64)
    found = fit(d, torch.tensor([true.gold(float(x)) for x in d], dtype=torch.float64), true.kind)
    assert (found.a, found.b) == pytest.approx((4.0, 1.0)) and found.peak == pytest.approx(peak)
    assert true.gold(peak) > max(true.gold(peak * 1.01), true.gold(peak * 0.99))
    assert Fit(true.kind, 1.0, -1.0).peak is None


def test_divergence_of_best_of_n() -> None:
    assert best_of_n_kl(1) == 0 and best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)


def test_diversity_sees_copies_and_not_other_prompts() -> None:
    flat = torch.tensor([0, 255, 0, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    assert diversity(coarse_pixels(flat), torch.tensor([0, 0, 1, 1])) == pytest.approx((1.0, 0.0))
    assert diversity(coarse_pixels(flat), torch.tensor([0, 1, 0, 1])) == pytest.approx((0.0, 1.0))
    assert math.isnan(diversity(coarse_pixels(flat), torch.arange(4))[0])


def test_scores_that_are_missing_are_left_out_of_best_of_k() -> None:
    proxy, gold, nan = draw(0, 15).view(3, 5), draw(1, 15).view(3, 5), float("nan")
    proxy[0, 4], gold[0, 1], proxy[2] = nan, nan, nan
    left = [best_of_k(proxy[:1, [0, 2, 3]], gold[:1, [0, 2, 3]]), best_of_k(proxy[1:2], gold[1:2])]
    curve = best_of_k(proxy, gold)
    assert torch.allclose(curve[:3], (left[0] + left[1][:3]) / 2)
    assert torch.allclose(curve[3:], (left[0][2] + left[1][3:]) / 2)  # there are no more than three to pick from
    assert best_of_k(proxy[2:], gold[2:]).isnan().all()


def test_diversity_of_features_is_their_angle() -> None:
    """Whatever their length: 1 - cosine, and duplicates from a cosine of 0.95 on, as in `t2irl eval`."""
    features = torch.tensor([[1.0, 0, 0], [0, 5, 0], [2, 0, 0.5], [0, 3, 0]])
    groups = torch.tensor([0, 1, 0, 1])
    found = diversity(features, groups, cosine=True)
    assert found == pytest.approx(((1 - 2 / 4.25**0.5) / 2, 1.0))
    assert diversity(features, torch.tensor([0, 0, 1, 1]), cosine=True) == pytest.approx((1.0, 0.0))
    within = within_prompts(features.double().numpy()[[0, 2, 1, 3]].reshape(2, 2, 3))
    assert found == pytest.approx((within.pairwise.mean(), within.duplicates.mean()))


def test_correlation_of_errors() -> None:
    groups = torch.arange(600).repeat_interleave(8)
    gold, one, other = (draw(seed, 4800) for seed in range(3))

    def errors(first: torch.Tensor, second: torch.Tensor) -> float:
        return error_correlation(first, second, gold, groups)

    offsets = 9 * draw(3, 600)[groups]
    assert errors(one, 3 * one + offsets) == pytest.approx(1)
    assert errors(one, other) == pytest.approx(0.5, abs=0.05)  # they know nothing of gold
    assert errors(gold + one, gold + other) == pytest.approx(
        0.15, abs=0.05
    )  # by hand: (1 - s)^2 / (2 - 2 s), s = sqrt(1/2)
    assert errors(gold + one, gold - one) < -0.5
    assert errors(one, other + one) == pytest.approx(errors(other + one, one)) and errors(one, other + one) > 0.7
    assert math.isnan(errors(gold * 2, one)) and errors(
        torch.full_like(one, 0.1), torch.ones_like(one)
    ) == pytest.approx(1)
