"""Scores of the base model by rewards that change during the run, and levels of a prompt's own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from t2irl.algebra import heads
from t2irl.algebra.base import BaseScores
from t2irl.errors import ConfigError
from t2irl.train import Parts
from tests.invariants.toy import merged, toy_parts, toy_run

BRIGHT = {"type": "tests.invariants.toy:Brightness"}
GROWING = {"type": "tests.end_to_end.plugins:Growing"}
ENSEMBLE = {"aggregate": {"type": "uwo"}, "base_images": 30}
NAN = float("nan")


class Clock:
    """A stand-in for the run's context: times nothing."""

    def timed(self, stage: str, total: int) -> Any:
        """Nothing."""
        return nullcontext(lambda n: None)


def parts_of(combine: dict[str, Any], **changes: Any) -> Parts:
    """A run of the rewards `brightness`, and `growing`, whose scale changes in every second update."""
    tree = {"rewards": {"growing": GROWING}, "heldout_rewards": {"gold": BRIGHT}, "combine": combine}
    return toy_parts(toy_run(merged(tree, changes)))


def iterate(parts: Parts, times: int = 1) -> None:
    """What an iteration does about the base model's scores, and what the reward learns in it."""
    for _ in range(times):
        parts.pipeline.meet(cast(Any, Clock()), parts)
        parts.rewards.update(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), cast(Any, None))
        parts.clock.iteration += 1


def test_a_reward_that_has_changed_scores_the_base_models_pictures_again() -> None:
    parts = parts_of(ENSEMBLE)
    base, work = parts.pipeline.base, parts.family.work
    iterate(parts, 2)
    first, bright = base.pooled["growing"], base.pooled["brightness"]
    drawn, scored = work["decoded_images"], work["scored_images"]
    assert base.versions == {"brightness": 0, "growing": 0} and drawn > 0
    iterate(parts)
    assert base.versions == {"brightness": 0, "growing": 1}
    # Only that reward, and nothing was drawn.
    assert work["scored_images"] == scored + 30 and work["decoded_images"] == drawn
    assert base.pooled["brightness"] is bright
    fresh = BaseScores()
    fresh.measure(parts, ["growing"], 30)
    assert torch.equal(base.pooled["growing"], fresh.pooled["growing"])
    assert float(base.pooled["growing"].mean()) > 2 * float(first.mean())
    # The next iteration finds nothing changed.
    scored = work["scored_images"]
    iterate(parts)
    assert work["scored_images"] == scored


def test_standardised_scores_do_not_see_the_change() -> None:
    """A reward that only changes its unit standardises to the same numbers before and after."""
    parts = parts_of(ENSEMBLE)
    iterate(parts)
    before = heads.standardise(parts.pipeline.base.pooled["growing"], parts.pipeline.base.pooled["growing"])
    iterate(parts, 2)
    after = heads.standardise(parts.pipeline.base.pooled["growing"], parts.pipeline.base.pooled["growing"])
    assert abs(float(after.mean())) < 1e-9 and float(after.std(correction=0)) == pytest.approx(1)
    assert float(torch.corrcoef(torch.stack([before, after]))[0, 1]) > 0.5


def test_prompts_are_drawn_again_for_a_reward_that_has_changed_when_they_come_next() -> None:
    own = {"transform": {"type": "standardise"}, "bound": {"type": "clip", "quantile": 0.5, "per_prompt": 3}}
    parts = parts_of({"rewards": {"growing": own, "brightness": own}}, iterations=20)
    base = parts.pipeline.base
    iterate(parts, 2)
    lines, bright = list(base.by_prompt), {line: table["brightness"] for line, table in base.by_prompt.items()}
    old = {line: base.by_prompt[line]["growing"] for line in lines}
    iterate(parts, 12)  # so that all 24 prompts come again; the version is 6 by then
    assert parts.rewards.rewards["growing"].version == 7 and base.versions["growing"] == 6
    parts.pipeline.meet(cast(Any, Clock()), parts)
    for line in lines:
        assert base.by_prompt[line]["brightness"] is bright[line]
    met = [line for line in lines if "growing" in base.by_prompt[line]]
    for line in met:
        fresh = BaseScores()
        fresh.meet(parts, ["growing"], [line], 3)
        torch.testing.assert_close(base.by_prompt[line]["growing"], fresh.by_prompt[line]["growing"])
        assert not torch.equal(base.by_prompt[line]["growing"], old[line])


def test_what_was_measured_is_resumed_exactly_and_measured_again_where_it_must_be() -> None:
    for iterations in (1, 2, 3):  # 2: the reward has changed, and its pictures were not scored again yet
        whole = parts_of(ENSEMBLE)
        iterate(whole, iterations)
        resumed = toy_parts(whole.geometry.run)
        resumed.load_state_dict(whole.state_dict())
        resumed.clock.iteration = whole.clock.iteration
        for parts in (whole, resumed):
            iterate(parts, 2)
        one, two = whole.pipeline.base, resumed.pipeline.base
        assert one.versions == two.versions and one.pooled.keys() == two.pooled.keys()
        assert all(torch.equal(one.pooled[n], two.pooled[n]) for n in one.pooled)


def test_the_running_mean_of_a_constraint_begins_anew_and_its_multiplier_stays() -> None:
    combine = {"aggregate": {"type": "constraints"}, "rewards": {"growing": {"constraint": {"at": 0.1}}}}
    parts = parts_of(combine)
    multiplier = cast(Any, parts.pipeline.multipliers).table["growing"]
    iterate(parts)
    parts.pipeline.credit({"brightness": torch.rand(16), "growing": torch.rand(16)}, torch.arange(16) // 4)
    value = multiplier.value
    iterate(parts)
    assert multiplier.weight > 0 and value != 0
    iterate(parts)
    assert multiplier.weight == multiplier.mean == 0 and multiplier.value == value


def test_a_reward_that_learns_and_does_not_say_when_has_no_base_scores() -> None:
    with pytest.raises(ConfigError, match=r"rewards.moody learns without a `version`.*use `at`"):
        parts_of(
            {"rewards": {"moody": {"transform": {"type": "tanh"}}}},
            rewards={"moody": {"type": "tests.end_to_end.plugins:Moody"}},
        )


# ------------------------------------------------------------------------------------------ levels of a prompt's own
def known(parts: Parts, tables: dict[int, list[float]]) -> BaseScores:
    """Base scores of `brightness` on prompts."""
    base = parts.pipeline.base
    base.by_prompt = {n: {"brightness": torch.tensor(x, dtype=torch.float64)} for n, x in tables.items()}
    return base


def total(parts: Parts, bright: list[float], growing: list[float], lines: list[int]) -> Tensor:
    scores = {"brightness": torch.tensor(bright), "growing": torch.tensor(growing)}
    return parts.pipeline.total(scores, torch.tensor(lines), {})


@pytest.mark.parametrize("per_prompt", [0, 3])
def test_a_hinge_charges_what_is_below_the_base_models_median(per_prompt: int) -> None:
    """r - k max(0, t - R), t the median on the prompt, or of all."""
    gate = {"type": "hinge", "reward": "brightness", "quantile": 0.5, "per_prompt": per_prompt}
    parts = parts_of({"gate": gate}, rewards={"brightness": {**BRIGHT, "weight": 2.0}})
    known(parts, {4: [0.0, 0.5, 0.75], 7: [0.0, 0.25, 1.0]})
    parts.pipeline.base.pooled["brightness"] = torch.tensor([0.125], dtype=torch.float64)
    found = total(parts, [0.25, 0.75, 0.0, 0.25, NAN], [-1.0, 1.0, 2.0, 3.0, 4.0], [4, 4, 7, 7, 7])
    expected = [-1.5, 1.0, 1.5, 3.0, 4.0] if per_prompt else [-1.0, 1.0, 1.75, 3.0, 4.0]
    assert found.tolist() == expected


def test_a_hinge_is_a_clipped_reward_up_to_a_constant_of_the_prompt() -> None:
    gate = {"type": "hinge", "reward": "brightness", "quantile": 0.5, "per_prompt": 3}
    clip = {"bound": {"type": "clip", "quantile": 0.5, "per_prompt": 3}}
    lines, groups = [4, 4, 7, 7], torch.tensor([0, 0, 1, 1])
    totals = []
    for combine in ({"gate": gate}, {"rewards": {"brightness": clip}}):
        parts = parts_of(combine)
        known(parts, {4: [0.0, 0.5, 0.75], 7: [0.0, 0.25, 1.0]})
        totals.append(total(parts, [0.25, 0.75, 0.0, 0.5], [1.0, 2.0, 3.0, 4.0], lines))
    apart = totals[1] - totals[0]
    assert [apart[groups == k].unique().tolist() for k in (0, 1)] == [[0.5], [0.25]]


def test_a_prompt_without_scores_takes_the_level_of_all_prompts_met() -> None:
    for gate, combine in (
        (True, {"gate": {"type": "hinge", "reward": "brightness", "quantile": 0.5, "per_prompt": 2}}),
        (False, {"rewards": {"brightness": {"bound": {"type": "clip", "quantile": 0.5, "per_prompt": 2}}}}),
    ):
        parts = parts_of(combine)
        known(parts, {4: [1.0, 3.0], 7: [NAN, NAN], 9: [5.0, NAN]})
        found = total(parts, [0.0, 9.0, 0.0, 9.0], [0.0] * 4, [4, 4, 7, 7])
        assert found.tolist() == ([-2.0, 0.0, -3.0, 0.0] if gate else [0.0, 2.0, 0.0, 3.0])
        known(parts, {7: [NAN, NAN]})  # nothing to take a level from: no limit
        assert total(parts, [0.0, 9.0], [0.0] * 2, [7, 7]).tolist() == ([0.0, 0.0] if gate else [0.0, 9.0])


def test_a_prompts_own_bound_is_on_the_scale_of_its_own_anchor() -> None:
    head = {
        "transform": {"type": "log_sigmoid", "quantile": 0.5, "per_prompt": 3},
        "bound": {"type": "clip", "quantile": 0.9, "per_prompt": 3},
    }
    parts = parts_of({"rewards": {"brightness": head}}, advantage={"std": "global"})
    assert parts.pipeline.pooled == [] and parts.pipeline.own == {"brightness": 3}
    known(parts, {4: [0.0, 1.0, 2.0], 7: [10.0, 11.0, 12.0]})
    found = total(parts, [9.0, 0.5, 99.0, 10.5], [0.0] * 4, [4, 4, 7, 7])
    top = torch.nanquantile(heads.log_sigmoid(torch.tensor([0.0, 1.0, 2.0]).double(), torch.ones(3).double()), 0.9)
    low = heads.log_sigmoid(torch.tensor(0.5).double(), torch.tensor(1.0).double())
    torch.testing.assert_close(found, torch.stack([top, low, top, low]))
