"""The pipeline as a whole: what it leaves alone, what it must not depend on, and base-model scores."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from t2irl.advantages import group_advantages, normalise
from t2irl.algebra.pipeline import Credit, Pipeline
from t2irl.config import Run
from t2irl.errors import ConfigError, RunError
from t2irl.rewards.combine import RewardSet
from t2irl.train import Parts
from tests.invariants.toy import merged, toy_parts, toy_run

BRIGHT = {"type": "tests.invariants.toy:Brightness"}
NAMES = ("a", "b", "c", "spare")
NAN = float("nan")


class Clock:
    """A stand-in for the run's context: times nothing."""

    def timed(self, stage: str, total: int) -> Any:
        """Nothing."""
        return nullcontext(lambda n: None)


def a_run(combine: dict[str, Any] | None, **changes: Any) -> Run:
    """A run of the rewards a, b, c and `spare` of weight 0."""
    rewards: dict[str, dict[str, Any]] = {name: dict(BRIGHT) for name in NAMES}
    rewards["spare"]["weight"] = 0
    for name, weight in changes.pop("weights", {}).items():
        rewards[name]["weight"] = weight
    tree = {**toy_run().model_dump(), "rewards": rewards, "combine": combine, "heldout_rewards": {"gold": BRIGHT}}
    return Run.model_validate(merged(tree, {"advantage": {"std": "global"}, **changes}))


def pipeline(combine: dict[str, Any] | None, **changes: Any) -> Pipeline:
    """Its pipeline, with known scores of the base model: of every reward 0, 1, ..., 100."""
    run = a_run(combine, **changes)
    made = Pipeline(run, RewardSet(run.rewards, torch.device("cpu"), 16, toy_parts(toy_run()).family.work))
    made.base.pooled = {name: torch.arange(101, dtype=torch.float64) for name in made.needed}
    return made


def table(seed: int = 0, size: int = 16) -> dict[str, Tensor]:
    """Scores of 4 groups of 4 images; `spare` is NaN."""
    drawn = torch.rand(4, size, generator=torch.Generator().manual_seed(seed)) * 100
    return dict(zip(NAMES, drawn, strict=True)) | {"spare": torch.full((size,), NAN)}


IDS = torch.tensor([5, 5, 5, 5, 2, 2, 2, 2, 9, 9, 9, 9, 0, 0, 0, 0])
SUM_LIKE = [
    {},
    {"aggregate": {"type": "mean"}},
    {"aggregate": {"type": "wco"}},
    {"aggregate": {"type": "median"}},
    {"aggregate": {"type": "uwo"}},
    {"aggregate": {"type": "softmin"}},
    {"aggregate": {"type": "kl_dro"}},
    {"aggregate": {"type": "win_rate"}},
    {"aggregate": {"type": "constraints"}, "rewards": {"b": {"constraint": {"at": 60}}}},
    {"rewards": {name: {"transform": {"type": "log_sigmoid", "temperature": 10}} for name in "abc"}},
    {"gate": {"type": "hard", "reward": "a", "quantile": 0.5}},
    {"gate": {"type": "product", "reward": "a"}},
    {"penalty": {"rewards": ["c"]}, "rewards": {"c": {"transform": {"type": "centred_sigmoid"}}}},
    {"gate": {"type": "hinge", "reward": "a", "quantile": 0.5}, "aggregate": {"type": "uwo"}},
    {"gate": {"type": "product", "reward": "a"}, "aggregate": {"type": "softmin"}},
    {
        "gate": {"type": "ramp", "reward": "a", "at": 50, "width": 10},
        "aggregate": {"type": "wco"},
        "rewards": {name: {"transform": {"type": "unit"}} for name in "bc"},
    },
    {"aggregate": {"type": "median"}, "disagreement": {"measure": "max_pairwise", "tolerance": 0.5}},
]
KINDS = [str(sorted((k, v.get("type", "")) for k, v in combine.items())) for combine in SUM_LIKE]


def test_without_the_section_nothing_changes_by_a_bit() -> None:
    for changes in ({}, {"advantage": {"std": "group", "combine": "advantages"}}, {"weights": {"b": -0.3}}):
        plain = pipeline(None, **changes)
        credit = plain.credit(table(), IDS)
        expected = group_advantages(table(), plain.weights, IDS, plain.run.advantage)
        assert torch.equal(credit.advantages, expected)
        apart = "advantage" in changes  # whose curve has a scale
        assert credit.factors is None and plain.needed == []
        assert bool(credit.metrics) == bool(plain.state_dict()) == apart
        some = torch.randn(4)
        assert credit.filtered(some, slice(4, 8)) is some


def test_an_empty_section_is_the_same_sum() -> None:
    found = pipeline({}, weights={"b": 2.5}).credit(table(), IDS)
    expected = pipeline(None, weights={"b": 2.5}).credit(table(), IDS)
    assert torch.equal(found.advantages, expected.advantages)


@pytest.mark.parametrize("combine", SUM_LIKE, ids=KINDS)
def test_groups_sum_to_zero_and_order_does_not_matter(combine: dict[str, Any]) -> None:
    credit = pipeline(combine, advantage={"std": "global", "clip": 100}).credit(table(), IDS)
    for group in IDS.unique():
        assert abs(float(credit.advantages[group == IDS].sum())) < 1e-9
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    moved = pipeline(combine, advantage={"std": "global", "clip": 100}).credit(
        {n: x[order] for n, x in table().items()}, IDS[order]
    )
    assert torch.allclose(moved.advantages, credit.advantages[order], rtol=0, atol=1e-12)
    assert moved.metrics == pytest.approx(credit.metrics)


@pytest.mark.parametrize("combine", SUM_LIKE, ids=KINDS)
def test_auxiliary_rewards_have_no_part(combine: dict[str, Any]) -> None:
    other = table() | {"spare": torch.randn(16)}
    assert torch.equal(
        pipeline(combine).credit(other, IDS).advantages, pipeline(combine).credit(table(), IDS).advantages
    )


@pytest.mark.parametrize("kind", ["mean", "median", "wco", "uwo", "softmin", "kl_dro", "win_rate"])
def test_compared_rewards_do_not_depend_on_the_scale_of_one(kind: str) -> None:
    """Score and base scores 7 x + 3: the same advantages."""
    one, two = (pipeline({"aggregate": {"type": kind}}) for _ in range(2))
    two.base.pooled["b"] = 7 * two.base.pooled["b"] + 3
    scores = {n: x.double() for n, x in table().items()}
    stretched = scores | {"b": 7 * scores["b"] + 3}
    assert torch.allclose(one.credit(scores, IDS).advantages, two.credit(stretched, IDS).advantages, atol=1e-9)


def test_a_satisfied_reward_gives_way_to_the_other() -> None:
    """A logical AND: with `a` far above its anchor, what `a` does no longer matters; in a sum it would decide."""
    scores = {n: torch.zeros(16) for n in NAMES} | {"spare": torch.full((16,), NAN)}
    scores["a"] = 500 + torch.tensor([30.0, 20, 10, 0] * 4)
    scores["b"] = torch.tensor([0.0, 1, 2, 3] * 4)
    ands = {name: {"transform": {"type": "log_sigmoid", "at": 10.0}} for name in "ab"}
    both = pipeline({"rewards": ands}).credit(scores, IDS).advantages
    assert both[:4].argsort().tolist() == [0, 1, 2, 3]
    assert pipeline({}).credit(scores, IDS).advantages[:4].argsort().tolist() == [3, 2, 1, 0]


def test_side_rewards_count_only_behind_the_gate() -> None:
    scores = table() | {"a": torch.tensor([1.0, 2, 51, 52] * 4)}
    credit = pipeline({"gate": {"type": "hard", "reward": "a", "quantile": 0.5}}).credit(scores, IDS)
    more = scores | {"b": torch.where(scores["a"] < 50, scores["b"] * 3, scores["b"])}
    again = pipeline({"gate": {"type": "hard", "reward": "a", "quantile": 0.5}}).credit(more, IDS)
    assert torch.equal(credit.advantages, again.advantages)
    assert credit.metrics["combine/gate_open"] == 0.5


def test_constraints_weigh_normalised_advantages() -> None:
    made = pipeline({"aggregate": {"type": "constraints", "initial": 1.0}, "rewards": {"b": {"constraint": {"at": 60, "sense": "at_most"}}}})  # fmt: skip
    scores, advantage = table(), made.run.advantage
    credit = made.credit(scores, IDS)
    w = torch.tensor(1.0, dtype=torch.float64).sigmoid()
    expected = (1 - w) * normalise(scores["a"].double() + scores["c"].double(), IDS, advantage)
    expected = expected - w * normalise(scores["b"].double(), IDS, advantage)
    assert torch.allclose(credit.advantages, expected, atol=1e-12)
    assert credit.metrics["constraint/b/weight"] == pytest.approx(-float(w))
    assert credit.metrics["constraint/b/gap"] == pytest.approx(60 - float(scores["b"].double().mean()))


def test_a_filter_comes_after_normalisation_and_shaping() -> None:
    credit = pipeline({"filter": {"type": "best_worst"}}).credit(table(), IDS)
    assert torch.equal(credit.advantages, pipeline({}).credit(table(), IDS).advantages)
    assert credit.factors is not None and (credit.factors > 0).sum() == 8 and float(credit.factors.mean()) == 1
    total = table()["a"] + table()["b"] + table()["c"]
    kept = (credit.factors[:4] > 0).nonzero().flatten().tolist()
    assert sorted(kept) == sorted([int(total[:4].argmax()), int(total[:4].argmin())])
    shaped = torch.ones(4)
    assert torch.equal(credit.filtered(shaped, slice(0, 4)), credit.factors[:4].float())


def test_scores_that_factors_cannot_take_stop_the_run() -> None:
    bad = table() | {"c": torch.full((16,), 0.5), "b": -200 * torch.ones(16)}
    with pytest.raises(RunError, match=r"combine.penalty: the other rewards of image \d+ give -.*unit"):
        pipeline({"penalty": {"rewards": ["c"]}}).credit(bad, IDS)
    with pytest.raises(RunError, match=r"reward 'c' gave .*must be in \[0, 1\].*centred_sigmoid"):
        pipeline({"penalty": {"rewards": ["c"]}}).credit(table(), IDS)
    with pytest.raises(RunError, match=r"reward 'b' gave -200.*must be at least 0.*combine.rewards.b.transform"):
        pipeline({"gate": {"type": "hard", "reward": "a", "at": 0}}).credit(bad, IDS)
    none = {name: torch.full((16,), NAN) for name in NAMES}
    with pytest.raises(RunError, match="no reward applies to image 0"):
        pipeline({"aggregate": {"type": "wco"}}).credit(none, IDS)


def test_bounds_report_who_has_reached_them() -> None:
    head = {"a": {"bound": {"type": "clip", "quantile": 0.5}}, "b": {"bound": {"type": "tiers"}}}
    credit = pipeline({"rewards": head}).credit(table(), IDS)
    assert credit.metrics["reward/a/at_bound"] == float((table()["a"] >= 50).double().mean())
    assert credit.metrics["reward/b/at_bound"] == float((table()["b"] >= 95).double().mean())


# Scores of the base model.


def measured(combine: dict[str, Any], iterations: int = 1) -> tuple[Pipeline, Parts]:
    """A toy run whose policy has moved away from the base model before the base model is measured."""
    run = toy_run({"combine": combine, "heldout_rewards": {"gold": BRIGHT}, "advantage": {"std": "global"}})
    parts = toy_parts(run)
    with torch.no_grad():
        for p in parts.policy.trained.values():
            p.add_(0.5)
    for iteration in range(iterations):
        parts.clock.iteration = iteration
        parts.pipeline.meet(cast(Any, Clock()), parts)
    return parts.pipeline, parts


STANDARD = {"rewards": {"brightness": {"transform": {"type": "standardise"}}}, "base_images": 30}
OWN = {"rewards": {"brightness": {"transform": {"type": "log_sigmoid", "per_prompt": 3}}}}


def test_the_base_model_is_measured_once_whatever_the_policy_is_by_then() -> None:
    first, parts = measured(STANDARD)
    kept = first.base.pooled["brightness"].clone()
    assert len(kept) == 30 and kept.std() > 0
    work = parts.family.work["scored_images"]
    parts.clock.iteration = 1
    first.meet(cast(Any, Clock()), parts)
    assert parts.family.work["scored_images"] == work
    untouched = toy_parts(parts.geometry.run)
    untouched.pipeline.meet(cast(Any, Clock()), untouched)
    assert torch.equal(untouched.pipeline.base.pooled["brightness"], kept)


def test_prompts_are_measured_when_first_met() -> None:
    found, parts = measured(OWN)
    assert len(found.base.by_prompt) == 4 and found.base.pooled == {}
    assert all(len(t["brightness"]) == 3 for t in found.base.by_prompt.values())
    longer, _ = measured(OWN, iterations=6)
    assert len(longer.base.by_prompt) == 24  # all prompts, then none again
    for line, tables in found.base.by_prompt.items():
        assert torch.equal(longer.base.by_prompt[line]["brightness"], tables["brightness"])
    lines = torch.tensor([line for line in found.base.by_prompt for _ in range(4)])
    scores = torch.rand(16)
    credit = found.credit({"brightness": scores}, lines)
    anchors = found.base.anchors("brightness", lines, 0.85)
    assert anchors.unique().numel() == 4
    expected = normalise((scores.double() - anchors).sigmoid().log(), lines, parts.geometry.run.advantage)
    assert torch.allclose(credit.advantages, expected, atol=1e-12)


def test_state_is_restored_exactly() -> None:
    for combine in (STANDARD, OWN):
        old, parts = measured(combine)
        new = toy_parts(parts.geometry.run)
        new.load_state_dict(parts.state_dict())
        assert new.pipeline.base.pooled == old.base.pooled or all(
            torch.equal(new.pipeline.base.pooled[n], x) for n, x in old.base.pooled.items()
        )
        assert new.pipeline.base.by_prompt.keys() == old.base.by_prompt.keys()


def test_a_reward_that_learns_has_no_base_scores() -> None:
    run = toy_run(
        {
            "rewards": {"moody": {"type": "tests.end_to_end.plugins:Moody"}},
            "heldout_rewards": {"gold": BRIGHT},
            "combine": {"rewards": {"moody": {"transform": {"type": "tanh"}}}},
        }
    )
    with pytest.raises(ConfigError, match=r"rewards.moody learns.*use `at`"):
        toy_parts(run)


def known_total(combine: dict[str, Any]) -> tuple[Tensor, Pipeline, dict[str, Tensor]]:
    """The score of each image, the pipeline, and the rewards standardised, or as they are."""
    made, scores = pipeline(combine), {name: x.double() for name, x in table().items()}
    return made.total(scores, IDS, {}), made, scores


def test_gates_beside_an_ensemble_by_hand() -> None:
    """The gate's reward is no member: the ensemble of the others is multiplied, or multiplies, or pays."""
    n = {name: (x.double() - 50) / 850**0.5 for name, x in table().items()}  # of base scores 0 ... 100
    worst, mean = torch.minimum(n["b"], n["c"]), (n["b"] + n["c"]) / 2
    spread = ((n["b"] - n["c"]) / 2).abs()
    hinge, _, raw = known_total(
        {"gate": {"type": "hinge", "reward": "a", "quantile": 0.5}, "aggregate": {"type": "uwo"}}
    )
    torch.testing.assert_close(hinge, mean - 0.5 * spread**2 - (50 - raw["a"]).clamp_min(0))
    product, _, _ = known_total({"gate": {"type": "product", "reward": "a"}, "aggregate": {"type": "wco"}})
    torch.testing.assert_close(product, raw["a"] * (1 + 0.5 * worst))
    ramp, _, _ = known_total(
        {
            "gate": {"type": "ramp", "reward": "a", "at": 50, "width": 10}, "aggregate": {"type": "wco"},
            "rewards": {name: {"transform": {"type": "unit"}} for name in "bc"},
        }
    )  # fmt: skip
    unit = ((torch.minimum(raw["b"], raw["c"]) - 1) / 98).clamp_min(0)
    torch.testing.assert_close(ramp, unit * ((raw["a"] - 50) / 10).sigmoid())
    apart, _, _ = known_total({"aggregate": {"type": "mean"}, "disagreement": {"cost": 2, "tolerance": 0.1}})
    three = torch.stack([n["a"], n["b"], n["c"]])
    torch.testing.assert_close(apart, three.mean(0) - 2 * (three.std(0, correction=0) - 0.1).clamp_min(0))


def test_a_ramp_closing_never_raises_a_score() -> None:
    combine = {
        "gate": {"type": "ramp", "reward": "a", "at": 50, "width": 10}, "aggregate": {"type": "uwo", "coefficient": 1},
        "rewards": {name: {"transform": {"type": "centred_sigmoid", "unit": "deviation"}} for name in "bc"},
    }  # fmt: skip
    lower, made, scores = known_total(combine)
    higher = made.total({**scores, "a": scores["a"] + 5}, IDS, {})
    assert (higher > lower).all()


def test_no_factor_is_a_factor_of_one() -> None:
    credit = Credit(torch.zeros(2), torch.ones(2, dtype=torch.float64))
    assert torch.equal(credit.filtered(torch.tensor([0.1, 0.7]), slice(0, 2)), torch.tensor([0.1, 0.7]))
