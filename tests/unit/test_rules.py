"""Rules of the monitors, and what they are read from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from t2irl.algebra.config import Combine
from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.features import looker
from t2irl.evaluation.glossary import lookup
from t2irl.evaluation.monitors import agreement, moments, path_kl, relative
from t2irl.evaluation.rules import RULES, Monitors, best_iteration, fired, primary_of, slope
from t2irl.loading import load_run
from t2irl.rollout import Noise
from t2irl.types import PromptGroups, Trajectory
from tests.conftest import ROOT
from tests.invariants.toy import toy_parts, toy_run


def rows(gold: list[float], std: float = 0.4, **others: list[float]) -> list[dict[str, Any]]:
    """Evaluations every 10 iterations, with a line without one between them."""
    found: list[dict[str, Any]] = []
    for k, value in enumerate(gold):
        row = {"iteration": 10 * k, "heldout/gold": value, "monitor/gold/std": std}
        found += [row | {name.replace("__", "/"): v[k] for name, v in others.items()}, {"iteration": 10 * k + 5}]
    return found


def names(*args: Any, **kwargs: Any) -> dict[str, int]:
    return {f.rule: f.iteration for f in fired(rows(*args, **kwargs), "gold", 2, 200)}


def test_a_fall_below_the_base_model_must_last_and_be_more_than_noise() -> None:
    # Two standard errors: 2 sqrt(0.4^2 / 200 x 2) = 0.08.
    assert names([0.5, 0.4, 0.5, 0.4, 0.5]) == {}
    assert names([0.5, 0.43, 0.43, 0.43]) == {}
    assert names([0.5, 0.45, 0.41, 0.40, 0.3]) == {"below_base": 30, "off_peak": 30}
    assert names([0.5, 0.45, 0.41, 0.40], std=1.2) == {}


def test_a_fall_from_the_peak_is_seen_above_the_base_model() -> None:
    assert names([0.3, 0.7, 0.6, 0.5, 0.4]) == {"off_peak": 30}
    assert "at 0.500, after 0.700 in iteration 10" in fired(rows([0.3, 0.7, 0.6, 0.5]), "gold", 2, 200)[0].text


def test_rules_on_agreement_and_diversity_fire_once() -> None:
    level = [0.5] * 4
    assert names(level, hack__tau__gold=[0.4, 0.25, 0.19, 0.1]) == {"tau_halved": 20}
    assert names(level, hack__tau__gold=[0.05, 0.0, -0.2, -0.3]) == {}
    assert names(level, diversity__ratio=[1, 0.71, 0.69, 0.9]) == {"diversity_low": 20}
    assert names(level, diversity__duplicates=[0.2, 0.3, 0.31, 0.2]) == {"duplicates": 20}


def test_the_gap_rule_asks_for_a_rising_gap_and_a_falling_reward() -> None:
    assert "gap_opens" in names([0.5, 0.45, 0.3], hack__gap__gold=[0, 1, 2])
    assert names([0.5, 0.55, 0.6], hack__gap__gold=[0, 1, 2]) == {}
    assert "gap_opens" not in names([0.5, 0.45, 0.3], hack__gap__gold=[2, 1, 0])
    assert slope([1, 3, 5]) == 2 and slope([2, 2]) == 0


def test_the_primary_reward_must_not_fall_while_the_total_rises() -> None:
    def rules(first: list[float], total: list[float], primary: str | None = "first") -> dict[str, int]:
        others: dict[str, Any] = {
            "heldout__first": first,
            "monitor__first__std": [0.4] * 4,
            "monitor__total__mean": total,
        }
        return {f.rule: f.iteration for f in fired(rows([0.5] * 4, **others), "gold", 2, 200, primary)}

    assert rules([0.8, 0.75, 0.7, 0.5], [1, 2, 3, 4]) == {"primary_falls": 20}
    assert rules([0.8, 0.75, 0.7, 0.5], [1, 2, 3, 4], None) == {}
    assert rules([0.8, 0.75, 0.7, 0.5], [4, 3, 2, 1]) == {} and rules([0.8, 0.8, 0.79, 0.8], [1, 2, 3, 4]) == {}
    others = {"heldout__first": [0.8, 0.6, 0.4], "monitor__first__std": [0.4] * 3, "monitor__total__mean": [1, 2, 3]}
    (alarm,) = fired(rows([0.5] * 3, **others), "gold", 2, 200, "first")
    assert alarm.metric == "heldout/first" and "falls: 0.800 -> 0.400" in alarm.text
    combine = Combine.model_validate({"gate": {"type": "hard", "reward": "first", "at": 0}})
    assert primary_of(combine) == primary_of(combine.model_dump(mode="json")) == "first"
    assert primary_of(None) is None and primary_of(Combine()) is None


def test_weights_that_leave_few_pictures_are_seen_when_it_lasts() -> None:
    level = [0.5] * 5
    assert names(level, unsure__proxy__effective_share=[0.1, 0.4, 0.6, 0.49, 0.48]) == {"few_count": 40}
    assert names(level, unsure__proxy__effective_share=[0.1, 0.4, 0.6, 0.4, 0.51]) == {}
    assert names(level[:2], unsure__proxy__effective_share=[0.1, 0.1]) == {}  # once is not in a row
    found = fired(rows(level, unsure__proxy__effective_share=[0.9, 0.4, 0.3, 0.9, 0.9]), "gold", 2, 200)[0]
    assert found.text == "unsure/proxy/effective_share is at 0.30: few pictures of a group decide"
    entry = lookup(found.metric)
    assert entry is not None and entry.pattern.endswith("/effective_share")


def test_the_best_is_the_first_highest_after_training_began() -> None:
    assert best_iteration(rows([0.9, 0.4, 0.6, 0.6]), "gold") == 20
    assert best_iteration(rows([0.9]), "gold") is None


def test_relative_measures_are_in_units_of_the_base_model() -> None:
    base = {"diversity/pairwise": 0.2, "monitor/total/mean": 1.0, "monitor/total/std": 2.0,
            "monitor/gold/mean": 0.5, "monitor/gold/std": 0.25, "monitor/flat/mean": 1.0, "monitor/flat/std": 0.0}  # fmt: skip
    now = {"diversity/pairwise": 0.1, "monitor/total/mean": 4.0, "monitor/gold/mean": 0.25, "monitor/flat/mean": 1.0}
    assert relative(now, base, ["gold", "flat"]) == {"diversity/ratio": 0.5, "hack/gap/gold": 2.5}
    assert relative(now, {}, ["gold"]) == {}
    # No total: it cannot do without a reward that learns.
    assert relative({k: v for k, v in now.items() if "total" not in k}, base, ["gold"]) == {"diversity/ratio": 0.5}


def test_comparison_leaves_out_what_does_not_apply() -> None:
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    gold, signal = torch.tensor([1.0, 2, 3, 1, 2, math.nan]), torch.tensor([2.0, 4, 6, 2, 4, 0])
    found = agreement(signal, {"gold": gold, "none": torch.full((6,), math.nan)}, ids)
    assert found == pytest.approx({"hack/tau/gold": 1, "hack/starc/gold": 0}, abs=1e-7)
    assert agreement(signal.where(ids == 0, math.nan), {"gold": -gold}, ids)["hack/tau/gold"] == pytest.approx(-1)
    found = moments({"total": signal, "gold": gold, "none": torch.full((6,), math.nan)})
    assert found["monitor/total/mean"] == pytest.approx(3) and found["monitor/gold/mean"] == pytest.approx(1.8)
    assert found["monitor/gold/std"] == pytest.approx(0.56**0.5) and len(found) == 4


def test_divergence_is_zero_at_first_and_the_integral_of_the_velocities() -> None:
    parts = toy_parts(toy_run())
    shape = parts.family.latent_shape
    prompts = ("a", "b")
    groups = PromptGroups.of(prompts, [i % 2 for i in range(8)], [i // 2 for i in range(8)])
    final = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    trajectory = Trajectory(groups, final[:, :0], final[:, :0], torch.ones(1), final, torch.zeros(8, 3, 2, 2).byte())
    noise = Noise(0, "evaluation")
    assert path_kl(parts.policy, trajectory, noise, 3).tolist() == [0] * 8
    for parameter in (parts.policy.average or parts.policy.trained).values():
        parameter.data += 0.1
    found = path_kl(parts.policy, trajectory, noise, 3)
    assert bool((found > 0).all()) and torch.allclose(found, path_kl(parts.policy, trajectory, noise, 8))
    row = 3  # prompt 1, picture 1: stretch 2 of 8
    t = torch.tensor([2.5 / 8])
    x = (1 - t) * final[row] + t * noise.draw(groups, 2, shape)[row, 1]
    with torch.no_grad(), parts.policy.averaged():
        ours = parts.policy.velocity(x[None], t, parts.policy.text(["b"]))
        with parts.policy.reference():
            theirs = parts.policy.velocity(x[None], t, parts.policy.text(["b"]))
    factor = (1 + 0.245) ** 2 * float((1 - t) / t) / (2 * 0.49)
    assert float(found[row]) == pytest.approx(factor * float((ours - theirs).square().sum()), rel=1e-4)


def test_settings_that_cannot_work_are_refused() -> None:
    assert set(RULES) == set(Monitors.model_fields["stop"].annotation.__args__[0].__args__)  # type: ignore[union-attr]
    known = {"gold": None}
    assert Monitors().problem({}) is None and Monitors(stop=("off_peak",)).problem(known) is None
    assert "not among heldout_rewards: gold" in str(Monitors(heldout="glod").problem(known))
    assert "needs a held-out reward" in str(Monitors(stop=("off_peak",)).problem({}))
    assert "needs a held-out reward" in str(Monitors(best="export").problem({}))
    assert "features = x needs pictures" in str(Monitors(features=Path("x"), prompts=0).problem(known))
    assert "which combine.gate names" in str(Monitors(stop=("primary_falls",)).problem(known))
    assert Monitors(stop=("primary_falls",)).problem(known, "first") is None
    with pytest.raises(DataError, match=r"monitors\.features = assets/prompts: "):
        looker(Path("assets/prompts"), torch.device("cpu"))
    assert "set monitors.prompts above 0" in str(Monitors(stop=("off_peak",), prompts=0).problem(known))
    with pytest.raises(ConfigError, match=r"monitors\.heldout = glod is not among"):
        load_run([ROOT / "configs/tiny/demo.yaml"], ["--monitors.heldout", "glod"])
    assert Monitors(stop=("few_count",), prompts=0).problem(known, weighted=True) is None
    watching = ["--monitors.stop", "[few_count]"]
    with pytest.raises(ConfigError, match=r"monitors\.stop = few_count looks at weights, which only a regulariser"):
        load_run([ROOT / "configs/tiny/demo.yaml"], watching)
    load_run([ROOT / "configs/tiny/uncertainty.yaml"], watching)
