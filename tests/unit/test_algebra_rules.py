"""What `combine` refuses, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from t2irl.algebra.config import CentredSigmoid, Combine, LogSigmoid, Standardise, Unit
from t2irl.algebra.heads import transform
from t2irl.algebra.rules import needs_base, needs_own, needs_pooled, transform_of
from t2irl.config import Run
from tests.invariants.toy import merged, toy_run

BRIGHT = {"type": "tests.invariants.toy:Brightness"}
LOG, UNIT = {"transform": {"type": "log_sigmoid"}}, {"transform": {"type": "unit"}}
CHANCE, TIERS = {"transform": {"type": "centred_sigmoid"}}, {"bound": {"type": "tiers"}}
HINGE = {"type": "hinge", "reward": "a", "quantile": 0.5}
RAMP = {"type": "ramp", "reward": "a", "at": 0.5, "width": 0.1}
PRODUCT = {"type": "product", "reward": "a"}
ENSEMBLES = ("mean", "median", "wco", "uwo", "mean_minus_std", "softmin", "kl_dro", "win_rate")


def a_run(combine: dict[str, Any] | None, **changes: Any) -> Run:
    """A run of the rewards a, b, c (weight 1), `spare` (weight 0) and a held-out one."""
    rewards = {name: dict(BRIGHT) for name in ("a", "b", "c")} | {"spare": {**BRIGHT, "weight": 0}}
    for name, weight in changes.pop("weights", {}).items():
        rewards[name]["weight"] = weight
    whole = {"heldout_rewards": {"gold": BRIGHT}, "advantage": {"std": "global"}, **changes}
    tree = {**toy_run().model_dump(), "rewards": rewards, "combine": combine}
    return Run.model_validate(merged(tree, whole))


def refusal(combine: dict[str, Any], **changes: Any) -> str:
    """What is said about it."""
    with pytest.raises(ValidationError) as error:
        a_run(combine, **changes)
    return str(error.value)


@pytest.mark.parametrize(
    "combine",
    [
        {},
        {"rewards": {"a": LOG, "b": LOG, "c": {"transform": {"type": "log_probability"}}}},
        {"aggregate": {"type": "wco"}, "filter": {"type": "best_worst", "count": 2}},
        {"aggregate": {"type": "softmin"}, "rewards": {"a": UNIT, "b": UNIT}, "penalty": {"rewards": ["c"]}},
        {"aggregate": {"type": "win_rate"}, "penalty": {"rewards": ["c"], "violation_below": 0.1}},
        {"gate": {"type": "hard", "reward": "a", "quantile": 0.5}, "penalty": {"rewards": ["c"]}},
        {"gate": {"type": "ramp", "reward": "a", "at": 0.5, "width": 0.1}},
        {"gate": {"type": "product", "reward": "a"}},
        {"aggregate": {"type": "constraints"}, "rewards": {"b": {"constraint": {"at": 0.3}}}},
        {"rewards": {"a": {"bound": {"type": "tiers"}}, "b": {"bound": {"type": "clip", "at": 0.5}}}},
        {"gate": {"type": "hard", "reward": "a", "at": 0}, "rewards": {"b": {"transform": {"type": "tanh"}, "bound": {"type": "tiers"}}}},
        # a gate beside what makes the number
        *({"gate": HINGE, "aggregate": {"type": kind}} for kind in ENSEMBLES),
        *({"gate": PRODUCT, "aggregate": {"type": kind}} for kind in ENSEMBLES),
        *({"gate": RAMP, "aggregate": {"type": kind}, "rewards": {"b": UNIT, "c": UNIT}} for kind in ("mean", "median", "wco", "softmin", "kl_dro")),
        {"gate": RAMP, "aggregate": {"type": "win_rate"}},
        {"gate": RAMP, "aggregate": {"type": "uwo", "coefficient": 1}, "rewards": {"b": CHANCE, "c": TIERS}},
        {"penalty": {"rewards": ["a"]}, "aggregate": {"type": "uwo", "ddof": 1}, "rewards": {"b": CHANCE, "c": TIERS}},
        {"gate": {**HINGE, "per_prompt": 4}, "rewards": {"b": LOG, "c": LOG}},
        {"gate": HINGE, "penalty": {"rewards": ["c"]}},
        {"gate": {**RAMP, "reward": "b", "at": None, "quantile": 0.5, "per_prompt": 2}},
        {"aggregate": {"type": "wco"}, "disagreement": {"measure": "max_pairwise", "cost": 0.2, "tolerance": 1}},
    ],
)  # fmt: skip
def test_what_goes_together(combine: dict[str, Any]) -> None:
    run = a_run(combine)
    assert run.combine is not None
    assert Combine.model_validate(run.combine.model_dump(mode="json")) == run.combine


@pytest.mark.parametrize(
    "combine, changes, said",
    [
        ({"rewards": {"d": {}}}, {}, "combine.rewards.d: no reward is called 'd'"),
        ({"rewards": {"gold": {}}}, {}, "combine.rewards.gold: 'gold' is a held-out reward"),
        ({"gate": {"type": "hard", "reward": "spare", "at": 0}}, {}, "combine.gate.reward: 'spare' has weight 0"),
        ({"penalty": {"rewards": ["c", "c"]}}, {}, "combine.penalty.rewards: 'c' stands there twice"),
        ({"penalty": {"rewards": []}}, {}, "combine.penalty.rewards"),
        ({}, {"heldout_rewards": {}}, "combine needs a reward under heldout_rewards"),
        # 1. one mechanism makes the number
        ({"rewards": {"a": LOG}, "aggregate": {"type": "wco"}}, {}, "combine.rewards.a.transform.type = log_sigmoid and combine.aggregate.type = wco: each"),
        ({"rewards": {"a": LOG}, "gate": {"type": "hard", "reward": "b", "at": 0}}, {}, "log_sigmoid and combine.gate.type = hard"),
        ({"gate": {"type": "hard", "reward": "b", "at": 0}, "aggregate": {"type": "median"}}, {}, "combine.gate.type = hard and combine.aggregate.type = median"),
        ({"rewards": {"b": LOG, "a": {"constraint": {"at": 0}}}, "aggregate": {"type": "constraints"}}, {}, "log_sigmoid and combine.aggregate.type = constraints"),
        # 2. who normalises what
        ({"rewards": {"a": LOG}}, {"advantage": {"std": "group"}}, "log_sigmoid with advantage.std = group"),
        ({"rewards": {"a": LOG}}, {"advantage": {"std": "none", "combine": "advantages"}}, "advantage.combine = advantages normalises each"),
        ({"aggregate": {"type": "wco"}}, {"advantage": {"combine": "advantages"}}, "combine.aggregate.type = wco does not allow; use scores"),
        ({"penalty": {"rewards": ["c"]}}, {"advantage": {"combine": "advantages"}}, "combine.penalty does not allow"),
        ({"aggregate": {"type": "constraints"}, "rewards": {"a": {"constraint": {"at": 0}}}}, {"advantage": {"std": "none"}}, "advantage.std = none: combine.aggregate.type = constraints"),
        # ensembles
        ({"aggregate": {"type": "wco"}, "penalty": {"rewards": ["b", "c"]}}, {}, "wco needs at least two rewards, but only a"),
        ({"aggregate": {"type": "uwo"}}, {"weights": {"b": 2}}, "rewards.b.weight = 2: combine.aggregate.type = uwo has no weights"),
        ({"aggregate": {"type": "mean"}}, {"weights": {"b": -1}}, "takes weights above 0"),
        # constraints
        ({"rewards": {"a": {"constraint": {"at": 0}}}}, {}, "combine.rewards.a.constraint needs combine.aggregate: {type: constraints}, not sum"),
        ({"aggregate": {"type": "constraints"}}, {}, "needs a constraint on at least one reward"),
        ({"aggregate": {"type": "constraints"}, "rewards": {n: {"constraint": {"at": 0}} for n in "abc"}}, {}, "nothing stands against them"),
        ({"aggregate": {"type": "constraints"}, "rewards": {"a": {"constraint": {"at": 0}}}}, {"weights": {"a": 2}}, "the weight of a reward with a constraint follows from it"),
        ({"aggregate": {"type": "constraints"}, "rewards": {"a": {"constraint": {"at": 0}}}, "penalty": {"rewards": ["c"]}}, {}, "no single score to multiply"),
        ({"aggregate": {"type": "constraints"}, "rewards": {"a": {"constraint": {"at": 0, "quantile": 0.5}}}}, {}, "Give either `at` (a score) or `quantile`"),
        # factors and what is below 0
        ({"gate": {"type": "hard", "reward": "a", "at": 0}, "rewards": {"b": {"transform": {"type": "tanh"}}}}, {}, "combine.rewards.b.transform.type is tanh"),
        ({"penalty": {"rewards": ["c"]}, "aggregate": {"type": "wco"}}, {}, "is by default standardise, which gives numbers below 0"),
        ({"penalty": {"rewards": ["c"]}, "aggregate": {"type": "uwo"}, "rewards": {"a": UNIT, "b": UNIT}}, {}, "combine.penalty with combine.aggregate.type = uwo: what it gives can be below 0, where a factor would reward, unless all its rewards are in [0, 1] (transform centred_sigmoid or bound tiers; not so: a, b)"),
        ({"penalty": {"rewards": ["c"]}, "gate": {"type": "product", "reward": "a"}}, {}, "combine.penalty with combine.gate.type = product"),
        ({"penalty": {"rewards": ["c"]}, "rewards": {"c": UNIT}}, {}, "a penalty is a factor in [0, 1]"),
        ({"penalty": {"rewards": ["c"]}}, {"weights": {"c": -1}}, "its exponent"),
        ({"penalty": {"rewards": ["c"]}}, {"weights": {"b": -1}}, "rewards.b.weight = -1: combine.penalty"),
        ({"penalty": {"rewards": ["a", "b", "c"]}}, {}, "nothing is left for the penalties"),
        ({"penalty": {"rewards": ["a"]}, "gate": {"type": "hard", "reward": "a", "at": 0}}, {}, "it is a penalty already"),
        # gates beside what makes the number
        ({"gate": HINGE, "aggregate": {"type": "constraints"}, "rewards": {"b": {"constraint": {"at": 0}}}}, {}, "there is no single score behind it; give a a constraint instead"),
        ({"gate": {**HINGE, "type": "hard"}, "aggregate": {"type": "uwo"}}, {}, "keep one (as a penalty, a gate of type hinge goes with all of them)"),
        ({"gate": HINGE, "rewards": {"a": UNIT}}, {}, "combine.rewards.a: combine.gate.type = hinge takes its score as it is"),
        ({"gate": HINGE}, {"weights": {"a": -1}}, "the weight of a hinge is what a unit of score costs"),
        ({"gate": HINGE}, {"advantage": {"combine": "advantages"}}, "which combine.gate.type = hinge does not allow; use scores"),
        ({"gate": {**HINGE, "quantile": None, "at": 1, "per_prompt": 2}}, {}, "per_prompt = 2 needs a quantile: at = 1"),
        ({"gate": RAMP, "aggregate": {"type": "median"}}, {}, "combine.rewards.b.transform.type is by default standardise, which gives numbers below 0, and combine.gate.type = ramp"),
        ({"gate": RAMP, "rewards": {"b": LOG}}, {}, "use unit or centred_sigmoid, or a gate of type hinge"),
        ({"gate": RAMP, "aggregate": {"type": "wco"}, "rewards": {"b": UNIT, "c": UNIT}}, {"weights": {"a": 2}}, "before wco a ramp has no weight"),
        ({"gate": RAMP, "aggregate": {"type": "uwo", "coefficient": 1.1}, "rewards": {"b": CHANCE, "c": TIERS}}, {}, "not so: none) and coefficient = 1.1 is at most 1"),
        ({"gate": RAMP, "aggregate": {"type": "uwo", "ddof": 1, "coefficient": 0.6}, "rewards": {"b": CHANCE, "c": TIERS}}, {}, "is at most 0.5"),
        ({"gate": RAMP, "aggregate": {"type": "mean_minus_std"}, "rewards": {"b": CHANCE, "c": TIERS}}, {}, "mean_minus_std: what it gives can be below 0"),
        ({"gate": RAMP, "aggregate": {"type": "wco"}, "penalty": {"rewards": ["c"]}, "rewards": {"b": UNIT}}, {}, "wco needs at least two rewards, but only b"),
        ({"gate": PRODUCT, "rewards": {"b": LOG}}, {}, "combine.gate.type = product takes standardised rewards"),
        # disagreement
        ({"disagreement": {}}, {}, "combine.disagreement with combine.aggregate.type = sum: only what is standardised can disagree"),
        ({"aggregate": {"type": "uwo"}, "disagreement": {}}, {}, "which subtracts one already; use mean"),
        # filters and levels
        ({"filter": {"type": "best", "count": 5}}, {}, "combine.filter.count = 5: a group has 4 images"),
        ({"filter": {"type": "best_worst", "count": 3}}, {}, "use at most 2"),
        ({"rewards": {"a": {"bound": {"type": "clip"}}}}, {}, "neither is there"),
        ({"rewards": {"a": {"bound": {"type": "tiers", "quantiles": [0.5, 0.5]}}}}, {}, "ascend"),
        ({"rewards": {"a": {"transform": {"type": "unit", "low": 0.9, "high": 0.1}}}}, {}, "should be below high"),
        ({"rewards": {"a": {"tranform": {}}}}, {}, "tranform"),
    ],
)  # fmt: skip
def test_what_does_not(combine: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    assert said in refusal(combine, **changes)


def test_only_what_needs_the_base_model_asks_for_it() -> None:
    assert needs_base(a_run(None)) == []
    assert needs_base(a_run({"rewards": {"a": {"transform": {"type": "log_probability"}}}})) == []
    fixed = {"transform": {"type": "log_sigmoid", "at": 1.0}, "bound": {"type": "clip", "at": 0.5}}
    assert needs_base(a_run({"rewards": {"a": fixed}})) == []
    assert needs_base(a_run({"rewards": {"a": {**fixed, "bound": {"type": "clip", "quantile": 0.5}}}})) == ["a"]
    scaled = {"transform": {"type": "log_sigmoid", "at": 1.0, "unit": "deviation"}}
    assert needs_base(a_run({"rewards": {"a": scaled}})) == ["a"]
    assert needs_base(a_run({"gate": {"type": "hard", "reward": "b", "quantile": 0.5}})) == ["b"]
    assert needs_base(a_run({"gate": {"type": "product", "reward": "b"}})) == ["a", "c"]
    assert needs_base(a_run({"aggregate": {"type": "wco"}})) == ["a", "b", "c"]
    assert needs_base(a_run({"aggregate": {"type": "win_rate", "temperature": 0}})) == []
    hinge = a_run({"gate": {**HINGE, "per_prompt": 4}, "aggregate": {"type": "wco"}})
    assert needs_pooled(hinge) == ["b", "c"] and needs_own(hinge) == {"a": 4}
    both = {
        "transform": {"type": "log_sigmoid", "per_prompt": 3},
        "bound": {"type": "clip", "quantile": 0.9, "per_prompt": 5},
    }
    assert (
        needs_own(a_run({"rewards": {"b": both}})) == {"b": 5} and needs_pooled(a_run({"rewards": {"b": both}})) == []
    )
    both["bound"] = {"type": "tiers"}
    assert needs_own(a_run({"rewards": {"b": both}})) == {"b": 3} and needs_pooled(a_run({"rewards": {"b": both}})) == [
        "b"
    ]


def test_rewards_that_are_compared_are_standardised_by_default() -> None:
    run = a_run({"aggregate": {"type": "win_rate"}, "rewards": {"a": UNIT}, "penalty": {"rewards": ["c"]}})
    assert transform_of(run, "a") == Unit() and transform_of(run, "b") == Standardise()
    assert transform_of(run, "c") is None  # a factor, not compared
    assert transform_of(a_run({}), "a") is None


def test_a_temperature_in_deviations_is_free_of_the_unit() -> None:
    base, scores = torch.tensor([0.0, 2.0, 4.0]), torch.tensor([1.0, 5.0])
    for kind in (LogSigmoid, CentredSigmoid):
        how = kind(temperature=0.5, unit="deviation")
        found = transform(how, scores, base)
        torch.testing.assert_close(found, transform(how, scores * 100, base * 100))
        same = kind(temperature=0.5 * (8 / 3) ** 0.5)  # the deviation of `base`
        torch.testing.assert_close(found, transform(same, scores, base))
