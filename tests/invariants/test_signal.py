"""What is optimised, as monitors and guards see it: the score that advantages are made of, and a curve that can rise."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from t2irl.advantages import centred, normalise, total_score
from t2irl.evaluation.agreement import kendall_tau
from t2irl.evaluation.monitors import monitor
from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups
from tests.conftest import ROOT
from tests.invariants.test_algebra import IDS, KINDS, NAN, SUM_LIKE, pipeline, table
from tests.invariants.toy import toy_parts, toy_run


class Darkness(Reward):
    """Ten times what is not bright: a cost."""

    class Config(Reward.Config):
        """No settings of its own."""

        type: Literal["tests.invariants.test_signal:Darkness"] = "tests.invariants.test_signal:Darkness"

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """In [0, 10]."""
        return 10 * (1 - images.mean((1, 2, 3)))


AT_MOST = {"aggregate": {"type": "constraints"}, "rewards": {"b": {"constraint": {"at": 60, "sense": "at_most"}}}}
APART = {"advantage": {"combine": "advantages", "std": "global", "clip": 100}}
RELATIVE: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    ({"aggregate": {"type": "win_rate"}}, {}),
    ({"aggregate": {"type": "win_rate", "temperature": 0}}, {}),
    (AT_MOST, {}),
    (None, APART),
    ({}, APART),
]
NAMED = ["votes", "hard votes", "constraints", "advantages", "advantages, combine"]


@pytest.mark.parametrize("combine", [None, *SUM_LIKE], ids=["none", *KINDS])
def test_advantages_are_made_of_the_signal(combine: dict[str, Any] | None) -> None:
    """Those of the rollout that is at hand, to rounding: whatever there is between scores and their normalisation."""
    made = pipeline(combine, weights={"b": -0.5} if combine is None else {}, advantage={"std": "global", "clip": 100})
    before = made.state_dict().get("multipliers")
    signal = made.optimised.signal(table(), IDS)
    assert made.state_dict().get("multipliers") == before
    advantages = made.credit(table(), IDS).advantages
    again = centred(signal, IDS) if made.multipliers else normalise(signal, IDS, made.run.advantage)
    assert torch.allclose(again, advantages, atol=1e-6)


def test_rewards_that_are_normalised_by_themselves_weigh_what_they_do_in_training() -> None:
    scores = table() | {"c": 1000 * table()["c"]}
    made = pipeline(None, weights={"b": -2.0}, **APART)
    signal = made.optimised.signal(scores, IDS)
    assert torch.allclose(centred(signal, IDS), made.credit(scores, IDS).advantages, atol=1e-6)
    # By group, the spread is one for all of them, which with equal groups is that of each.
    equal = {name: values[:4].repeat(4) + 5 * IDS for name, values in scores.items()}
    made = pipeline(None, advantage={"combine": "advantages", "std": "group", "clip": 100})
    signal = made.optimised.signal(equal, IDS)
    assert torch.allclose(centred(signal, IDS), made.credit(equal, IDS).advantages, atol=1e-3)
    assert float(signal[IDS == 9].mean()) > float(signal[IDS == 0].mean())  # prompts keep their order


def test_a_cost_counts_as_one() -> None:
    """A good reward and a cost that says the opposite of it: the raw sum would rank pictures by the larger scale."""
    gold = torch.rand(16, generator=torch.Generator().manual_seed(1))
    scores = table() | {"a": gold, "b": 50 - 10 * gold, "c": torch.zeros(16)}
    made = pipeline(AT_MOST)
    assert kendall_tau(made.optimised.signal(scores, IDS), gold, IDS) == pytest.approx(1)
    assert kendall_tau(total_score(scores, made.weights), gold, IDS) == pytest.approx(-1)


@pytest.mark.parametrize(("combine", "changes"), RELATIVE, ids=NAMED)
def test_the_curve_rises_with_the_rewards(combine: dict[str, Any] | None, changes: dict[str, Any]) -> None:
    """Where advantages are the same for all that is shifted alike, so that their mean says nothing."""
    made = pipeline(combine, **changes)
    better = table() | {"a": table()["a"] + 40, "b": table()["b"] + (-40 if combine == AT_MOST else 40)}
    first, later = (made.credit(scores, IDS).metrics["reward/total/mean"] for scores in (table(), better))
    votes = combine is not None and combine.get("aggregate", {}).get("type") == "win_rate"
    assert first == pytest.approx(0.5 if votes else 0, abs=1e-9) and later > first + 0.1
    if made.run.advantage.combine == "advantages":
        assert later == pytest.approx(sum(40 / float(table()[n].double().std(correction=0)) for n in "ab"), rel=1e-6)
    new = pipeline(combine, **changes)
    new.load_state_dict(made.state_dict())
    assert new.credit(better, IDS).metrics["reward/total/mean"] == made.credit(better, IDS).metrics["reward/total/mean"]


def test_a_total_on_a_scale_that_stays_is_its_own_curve() -> None:
    for combine in (
        None,
        {},
        {"aggregate": {"type": "wco"}},
        {"gate": {"type": "hard", "reward": "a", "quantile": 0.5}},
    ):
        made = pipeline(combine)
        level = made.optimised.level(table(), IDS)
        assert level is not None and torch.equal(level, made.optimised.signal(table(), IDS))
        if combine is not None:
            assert made.credit(table(), IDS).metrics["reward/total/mean"] == pytest.approx(float(level.mean()))


def test_votes_over_all_pictures_keep_the_order_of_prompts() -> None:
    made, scores = pipeline({"aggregate": {"type": "win_rate"}}), {n: x + 20 * IDS for n, x in table().items()}
    alone, all_ = (made.optimised.signal(scores, IDS, pooled=pooled) for pooled in (False, True))
    assert float(alone[IDS == 9].mean()) == pytest.approx(0.5) and float(all_[IDS == 9].mean()) > 0.7


def test_what_learns_is_left_out_of_curves_or_spoils_them() -> None:
    def level(combine: dict[str, Any] | None, learning: set[str], **changes: Any) -> Tensor | None:
        made = pipeline(combine, **changes)
        made.optimised.learning = learning
        return made.optimised.level(table(), IDS)

    found = level(None, {"b"})
    assert found is not None and torch.allclose(found, table()["a"].double() + table()["c"].double())
    found = level(None, {"b"}, **APART)
    assert found is not None and torch.allclose(found, sum_of_deviations("ac"))
    assert level(AT_MOST, {"b"}) is not None and level(AT_MOST, {"a"}) is not None
    assert level({"aggregate": {"type": "wco"}}, {"b"}) is None and level(None, set("abc")) is None
    assert level({"aggregate": {"type": "win_rate"}}, {"b"}) is None


def sum_of_deviations(names: str) -> Tensor:
    """Of the scores of these rewards from their own means."""
    scores = [table()[name].double() for name in names]
    return torch.stack([(x - x.mean()) / x.std(correction=0) for x in scores]).sum(0)


def test_pictures_that_nothing_applies_to_are_let_through() -> None:
    scores = {name: x.where(IDS != 2, NAN) for name, x in table().items()}
    for combine in (None, *SUM_LIKE):
        made = pipeline(combine)
        for found in (made.optimised.signal(scores, IDS), made.optimised.level(scores, IDS)):
            assert found is not None and torch.equal(found.isnan(), IDS == 2), combine
        none = {name: torch.full((16,), NAN) for name in scores}
        assert made.optimised.signal(none, IDS).isnan().all()


def test_held_out_prompts_have_the_anchors_of_all() -> None:
    how = {"type": "log_sigmoid", "temperature": 10, "per_prompt": 3, "quantile": 0.5}
    made = pipeline({"rewards": {"a": {"transform": how}}}, weights={"b": 0, "c": 0})
    made.base.pooled = {}
    made.base.by_prompt = {
        line: {"a": torch.tensor([line, line + 1.0, NAN], dtype=torch.float64)} for line in (100, 50)
    }
    found = made.optimised.signal(table(), IDS, heldout=True)
    anchor = (51 + 100) / 2  # the median of 50, 51, 100, 101
    assert torch.allclose(found, ((table()["a"].double() - anchor) / 10).sigmoid().log())


def test_monitors_watch_what_is_optimised() -> None:
    """Of a policy that has not moved, by the pixels and by a backbone."""
    bright = {"type": "tests.invariants.toy:Brightness"}
    changes = {
        "rewards": {"good": bright, "cost": {"type": "tests.invariants.test_signal:Darkness"}},
        "heldout_rewards": {"gold": bright},
        "combine": {
            "aggregate": {"type": "constraints"},
            "rewards": {"cost": {"constraint": {"at": 0, "sense": "at_most"}}},
        },
        "monitors": {"prompts": 3, "images": 4},
    }
    found = []
    for features in (None, ROOT / "assets/tiny-dinov2"):
        parts = toy_parts(toy_run(changes | {"monitors": {"prompts": 3, "images": 4, "features": features}}))
        found.append(monitor(parts))
    assert found[0]["hack/tau/gold"] == pytest.approx(1) and found[0]["policy/kl_reference"] == 0
    assert found[0]["monitor/total/mean"] == pytest.approx(0, abs=1e-6) and found[0]["monitor/cost/std"] > 0
    pixels, vision = ({k: v for k, v in one.items() if k.startswith("diversity")} for one in found)
    assert 0 < vision["diversity/pairwise"] < 2 and vision["diversity/pairwise"] != pixels["diversity/pairwise"]
    assert found[0] | vision == found[1]
