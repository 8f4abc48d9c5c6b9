"""Statistics of judgements against tables, worked examples and simulated worlds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from t2irl.errors import ConfigError, DataError
from t2irl.preferences import statistics as s
from t2irl.preferences.record import Record
from t2irl.preferences.summary import Options, as_text, raters, summarise


@pytest.mark.parametrize(("wins", "count"), [(0, 7), (3, 10), (60, 100), (100, 100)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys_where_there_are_no_halves(wins: int, count: int, level: float) -> None:
    interval = stats.binomtest(wins, count).proportion_ci(level, "wilson")
    assert s.wilson(wins, count, level) == pytest.approx((interval.low, interval.high), abs=1e-12)


@given(st.integers(0, 80), st.integers(1, 80))
def test_wilson_mirrors_and_holds_the_share(halves: int, count: int) -> None:
    wins = min(halves / 2, count)
    low, high = s.wilson(wins, count)
    assert 0 <= low <= wins / count + 1e-12 and wins / count <= high + 1e-12 and high <= 1
    assert s.wilson(count - wins, count) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(60, 40, 0.0569), (120, 80, 0.00569), (5, 0, 2 / 32), (1, 1, 1.0), (0, 0, 1.0)]
)
def test_sign_test_is_the_binomial_table(wins: int, losses: int, p: float) -> None:
    assert s.sign_test(wins, losses) == pytest.approx(p, abs=6e-5)
    assert s.sign_test(losses, wins) == s.sign_test(wins, losses)
    n = wins + losses
    exact = sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= math.comb(n, wins)) / 2**n
    assert s.sign_test(wins, losses) == pytest.approx(exact)


def test_cluster_bootstrap_knows_that_votes_on_a_prompt_are_alike() -> None:
    """Ten equal answers on each of 40 prompts tell as much as 40, not as 400."""
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 2, 40).astype(float)
    alike = s.cluster_bootstrap(np.repeat(answers, 10), np.repeat(np.arange(40), 10), 0, 4000)
    assert alike == pytest.approx(s.cluster_bootstrap(answers, range(40), 0, 4000))
    alone = s.cluster_bootstrap(np.repeat(answers, 10), range(400), 0, 4000)
    width = [high - low for low, high in (alike, alone)]
    assert width[0] / width[1] == pytest.approx(math.sqrt(10), rel=0.15)
    error = answers.std() / math.sqrt(40)
    assert width[0] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert s.cluster_bootstrap([1, 1, 1], "abc", 0, 100) == (1, 1)


def within(share: float, level: float, count: int) -> bool:
    """Whether a measured coverage is what it should be, three standard errors either way."""
    return abs(share - level) < 3 * math.sqrt(level * (1 - level) / count)


def test_bradley_terry_finds_a_simulated_world_and_covers_it() -> None:
    """Four models, 60 prompts with moods of their own, ties: intervals at 90 % hold the truth in 90 % of 400 worlds."""
    rng, worlds, level = np.random.default_rng(7), 400, 0.9
    truth = np.array([0.0, 0.4, -0.5, 1.0])
    games = np.array(list(itertools.combinations(range(4), 2)))
    inside, total = np.zeros(4), np.zeros(4)
    prompts = np.repeat(np.arange(60), len(games))
    i, j = np.tile(games, (60, 1)).T
    p = 1 / (1 + np.exp(truth[j] - truth[i]))
    for _ in range(worlds):
        # Two raters who mostly say the same: a tie where they differ. The expected outcome is p in any case.
        first = rng.random(len(p)) < p
        second = np.where(rng.random(len(p)) < 0.5, first, rng.random(len(p)) < p)
        fit = s.bradley_terry(i, j, (first + second.astype(float)) / 2, prompts, level)
        inside += (fit.low <= truth) & (truth <= fit.high)
        total += fit.values
    assert all(within(share, level, worlds) for share in inside[1:] / worlds), inside / worlds
    assert total / worlds == pytest.approx(truth, abs=0.03)


def test_bradley_terry_of_two_models_is_the_log_odds() -> None:
    fit = s.bradley_terry([0] * 100, [1] * 100, [1] * 30 + [0] * 70, range(100))
    assert fit.values == pytest.approx([0, math.log(70 / 30)], abs=1e-2)
    error = math.sqrt(1 / 30 + 1 / 70)
    assert fit.high[1] - fit.values[1] == pytest.approx(stats.t.ppf(0.975, 99) * error, rel=0.02)
    # A tie is half a win for either, whoever is named first.
    swapped = s.bradley_terry([1, 0, 0], [0, 1, 1], [0.5, 1, 0], [0, 1, 2])
    assert swapped.values == pytest.approx([0, 0], abs=1e-9)


def test_bradley_terry_at_its_limits() -> None:
    undefeated = s.bradley_terry([0] * 20, [1] * 20, [1] * 20, range(20))
    assert -12 < undefeated.values[1] < -4, "a model without a win stays finite"
    with pytest.raises(ValueError, match=r"\[2, 3\] were never compared"):
        s.bradley_terry([0, 2], [1, 3], [1, 1], [0, 1])


def test_kappas_and_alpha_are_those_of_the_worked_examples() -> None:
    # Cohen's kappa, 50 proposals: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no.
    pairs = ["yy"] * 20 + ["yn"] * 5 + ["ny"] * 10 + ["nn"] * 15
    assert s.cohen_kappa(*zip(*pairs, strict=True)) == pytest.approx(0.4)
    # Fleiss' kappa, the ten subjects, fourteen raters and five categories of the textbook example.
    table = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
             [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]  # fmt: skip
    assert s.fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)
    # Krippendorff 2011: four observers, twelve units, missing values.
    nan = None
    observers = [[1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
                 [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan]]  # fmt: skip
    units = [[value for value in column if value is not None] for column in zip(*observers, strict=True)]
    for metric, alpha in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)):
        assert s.krippendorff_alpha(units, metric) == pytest.approx(alpha, abs=5e-4)


def test_agreement_at_its_limits() -> None:
    assert s.cohen_kappa("abab", "abab") == 1
    assert s.cohen_kappa("aabb", "abab") == 0
    assert math.isnan(s.cohen_kappa("aa", "aa"))
    assert s.krippendorff_alpha([[1, 1], [2, 2], [3]]) == 1
    assert math.isnan(s.krippendorff_alpha([[1], [2]])) and math.isnan(s.krippendorff_alpha([[1, 1]]))
    with pytest.raises(ValueError, match="same number of raters"):
        s.fleiss_kappa([[2, 1], [1, 1]])
    rng = np.random.default_rng(0)
    assert abs(s.krippendorff_alpha(rng.integers(0, 3, (3000, 2)).tolist())) < 0.04


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=4), min_size=2, max_size=12))
def test_alpha_does_not_depend_on_the_order_of_anything(units: list[list[int]]) -> None:
    turned = [unit[::-1] for unit in units[::-1]]
    for metric in ("nominal", "ordinal", "interval"):
        assert s.krippendorff_alpha(turned, metric) == pytest.approx(s.krippendorff_alpha(units, metric), nan_ok=True)
    renamed = [[3 - value for value in unit] for unit in units]
    assert s.krippendorff_alpha(renamed, "nominal") == pytest.approx(
        s.krippendorff_alpha(units, "nominal"), nan_ok=True
    )


# ------------------------------------------------------------------------------------------------------------- summary
def judgement(number: int, label: str, rater: str = "r", **fields: object) -> Record:
    """An answer on the pictures `number`."""
    known = dict(
        id=f"{rater}/{number}/{len(fields)}", item=f"i{number}", prompt=f"p{number}", image_a=f"{number}a", image_b=f"{number}b",
        model_a="base", model_b="ours", label=label, annotator=rater, shown_left="a" if number % 2 else "b", ms=2000,
    )  # fmt: skip
    return Record.model_validate(known | fields)


def test_a_summary_counts_ties_as_halves_and_names_them() -> None:
    labels = ["b"] * 30 + ["a"] * 10 + ["tie"] * 6 + ["both_bad"] * 4
    records = [judgement(k, label) for k, label in enumerate(labels)]
    found = summarise(records, Options(resamples=500))
    row = found["axes"]["overall"]["pairs"][0]
    assert (row["first"], row["wins"], row["losses"], row["ties"], row["both_bad"]) == ("base", 10, 30, 6, 4)
    assert row["win_rate"] == pytest.approx(15 / 50)
    assert row["wilson"] == s.wilson(15, 50) and row["sign_test"] == s.sign_test(10, 30)
    # The same whoever is called a, and in whatever order.
    turned = [r.swapped() if k % 3 else r for k, r in enumerate(reversed(records))]
    assert {
        k: v
        for k, v in summarise(turned, Options(resamples=500))["axes"]["overall"]["pairs"][0].items()
        if k != "bootstrap"
    } == {k: v for k, v in row.items() if k != "bootstrap"}
    strengths = found["axes"]["overall"]["strengths"]
    assert strengths["baseline"] == "base" and strengths["models"][1]["log_odds"] > 0
    other = summarise(records, Options(baseline="ours", resamples=100))["axes"]["overall"]["strengths"]["models"]
    assert other[1]["log_odds"] == pytest.approx(-strengths["models"][1]["log_odds"])
    assert "| base | ours | 10 | 6 | 4 | 30 | 0.300 |" in as_text(found)
    with pytest.raises(ConfigError, match="there are base, ours"):
        summarise(records, Options(baseline="outs"))
    with pytest.raises(DataError, match="no judgement yet"):
        summarise([judgement(0, "a").model_copy(update={"label": None})])


def test_checks_tell_a_careless_rater_from_a_careful_one() -> None:
    rng = np.random.default_rng(1)
    records: list[Record] = []
    for rater in ("careful", "careless"):
        for k in range(60):
            truth = "b" if k % 3 else "a"
            item = judgement(k, truth, rater)
            # The careless one presses the same key, at once.
            says = truth if rater == "careful" else item.shown_left or "a"
            ms = 3000 if rater == "careful" else 150
            records.append(item.model_copy(update={"label": says, "ms": ms}))
            if k < 10:
                flipped = {"label": truth if rater == "careful" else ("b" if item.shown_left == "a" else "a")}
                records.append(
                    item.model_copy(
                        update={**flipped, "id": f"{item.id}again", "item": f"again{k}", "repeat_of": item.item}
                    )
                )
                known = {
                    "id": f"{item.id}gold",
                    "item": f"gold{k}",
                    "gold": truth,
                    "label": truth if rater == "careful" or rng.random() < 0.5 else "tie",
                }
                records.append(item.model_copy(update=known))
    found = raters(records)
    assert found["careful"]["warnings"] == []
    assert found["careful"]["gold_accuracy"] == 1 and found["careful"]["repeat_consistency"] == 1
    assert len(found["careless"]["warnings"]) == 4, found["careless"]
    assert found["careless"]["left_share"] == 1 and found["careless"]["repeat_consistency"] == 0
    kept = summarise(records, Options(least_gold=0.8, resamples=100))
    assert kept["dropped_raters"] == ["careless"] and kept["axes"]["overall"]["judgements"] == 60
    assert "left out for their gold answers: careless" in as_text(kept)


def test_agreement_speaks_of_pictures_not_of_names() -> None:
    records = []
    for k in range(20):
        for rater in ("x", "y", "z"):
            record = judgement(k, "a" if k % 2 else "b", rater)
            records.append(record.swapped() if rater == "y" else record)
    found = summarise(records, Options(resamples=100))["axes"]["overall"]["agreement"]
    assert found["equal"] == 1 and found["krippendorff_alpha"] == 1 and found["questions"] == 20
    assert [entry["kappa"] for entry in found["cohen_kappa"]] == [1, 1, 1]
    assert found["fleiss_kappa"] == {"questions": 20, "kappa": 1}
    assert "note" in summarise(records[::3], Options(resamples=100))["axes"]["overall"]["agreement"]
