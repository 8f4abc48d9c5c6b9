"""Curves, findings and the metric glossary of a report."""

from __future__ import annotations

import math
import re

import pytest

from t2irl.evaluation.charts import Series, collect, draw, grouped, number, overview, smooth, thin, ticks
from t2irl.evaluation.findings import alarms, headline, measures
from t2irl.evaluation.glossary import glossary, lookup

METRICS = [
    "reward/<name>/mean",
    "reward/<name>/std_within_group",
    "reward/total/mean",
    "reward/<name>/reference_mean",
    "reward/<name>/gap",
    "reward/<name>/heldout_accuracy",
    "reward/<name>/heldout_auc",
    "reward/<name>/learned",
    "reward/<name>/loss",
    "reward/<name>/penalty",
    "reward/<name>/grad_norm",
    "advantage/zero_variance_groups",
    "advantage/abs_mean",
    "policy/ratio_first",
    "policy/ratio_mean",
    "policy/clip_fraction_high",
    "policy/clip_fraction_low",
    "policy/approx_kl",
    "policy/grad_norm",
    "policy/loss",
    "policy/lr",
    "policy/omitted_timesteps",
    "regularizer/<name>",
    "heldout/<measure>",
    "time/rollout_s",
    "time/score_s",
    "time/adversary_s",
    "time/update_s",
    "time/iteration_s",
    "time/evaluate_s",
    "time/grid_s",
    "work/denoiser_forward_images",
    "work/denoiser_backward_images",
    "work/denoiser_forward_calls",
    "work/decoded_images",
    "work/encoded_prompts",
    "work/reward_calls",
    "work/scored_images",
    "data/images_total",
    "data/passes_over_prompts",
    "memory/peak_gib",
]
"""Every metric that a run logs."""


@pytest.mark.parametrize("scale", [0.01, 1, 20], ids=["small", "to 1", "PickScore"])
def test_alarm_when_reward_and_held_out_measure_part(scale: float) -> None:
    """Beyond two standard errors, whatever the unit: 2 x 0.4 x sqrt(2 / 200) = 0.08 of it."""

    def raised(fall: float, std: float | None = 0.4, total: float = 0.01) -> list[str | None]:
        points = {"reward/total/mean": [(i, 0.4 + total * i) for i in range(1, 31)]}
        points |= {"heldout/correct": [(0, 0.4), (30, 0.6)], "heldout/clean": [(0, scale), (30, (1 - fall) * scale)]}
        points |= {} if std is None else {"monitor/clean/std": [(0, std * scale), (30, std * scale)]}
        return [a.metric for a in alarms(points, measures({}, points, ["shapes"]), 200)]

    assert raised(0.09) == ["heldout/clean"] and raised(0.07) == [] and raised(0.09, total=-0.01) == []
    assert raised(0.09, std=0.5) == []
    assert raised(0.09, std=None) == [] and raised(0.11, std=None) == ["heldout/clean"]  # a tenth of the base value


def test_no_alarm_for_a_judge_that_moves() -> None:
    points = {"reward/total/mean": [(1, 0.4), (30, 0.8)], "heldout/dino": [(0, 0.5), (30, -1.0)]}
    assert [a.metric for a in alarms(points, measures({}, points, ["dino"]))] == ["heldout/dino"]
    points["reward/dino/reference_mean"] = [(1, 0.1), (30, 0.4)]
    assert alarms(points, measures({}, points, ["dino"])) == []


def test_alarms_of_the_policy() -> None:
    names = {"advantage/zero_variance_groups": 0.7, "policy/clip_fraction_low": 0.5, "policy/ratio_first": 0.98}
    points = {name: [(i, value) for i in range(20)] for name, value in names.items()}
    assert {a.metric for a in alarms(points, [])} == set(names)
    assert not alarms({name: [(0, 1.0 if "ratio" in name else 0.1)] for name in names}, [])


def test_measures_and_headline() -> None:
    summary = {"base": {"r": 1.0, "m": 0.5, "nan": float("nan")}, "final": {"r": 2.0, "m": 0.5, "nan": 0.1}}
    found = measures(summary, {}, ["r"])
    assert [(m.name, m.trained, m.trend) for m in found] == [("m", False, "level"), ("r", True, "up")]
    assert headline(found, None) == "On held-out pictures, m stayed at 0.500 and r rose from 1.000 to 2.000."
    assert headline([], 256) == ""


def test_every_metric_is_in_the_glossary_under_its_own_name() -> None:
    assert not [name for name in METRICS if name not in glossary()]
    assert all(lookup(name.replace("<name>", "x").replace("<measure>", "y")) is glossary()[name] for name in METRICS)
    assert lookup("reward/x/unknown") is None and lookup("policy/unknown") is None


def test_glossary_entries_are_whole_and_their_links_differ() -> None:
    entries = glossary().values()
    assert all(e.meaning and e.unit and e.healthy and e.advice and e.section for e in entries)
    assert len({e.anchor for e in entries}) == len(entries)


def test_points_leave_out_what_is_not_finite() -> None:
    found = collect([{"iteration": 1, "time": 5.0, "a": 1, "b": None}, {"iteration": 2, "a": float("nan"), "b": 2.0}])
    assert found == {"a": [(1, 1.0)], "b": [(2, 2.0)]}


def test_groups_order_metrics_and_name_constants() -> None:
    points = {"work/x": [(0, 1.0), (1, 2.0)], "policy/lr": [(0, 3.0), (1, 3.0)], "heldout/m": [(0, 1.0), (1, 2.0)]}
    points |= {"time/rollout_s": [(0, 1.0), (1, 2.0)], "time/update_s": [(0, 2.0), (1, 3.0)]}
    groups = grouped(points, 1)
    assert [g.title for g in groups] == ["Held-out", "Policy", "Time", "Other"]
    assert groups[1].constants == [("policy/lr", 3.0)] and not groups[1].charts
    assert [[s.name for s in c.series] for c in groups[2].charts] == [["time/rollout_s", "time/update_s"]]


def test_overview_needs_one_scale() -> None:
    points = {
        "reward/total/mean": [(1, 0.4), (2, 0.5)],
        "heldout/m": [(0, 0.4), (2, 0.5)],
        "heldout/big": [(0, 20.0), (2, 21.0)],
    }
    chart = overview(points, 2)
    assert chart is not None and [s.name for s in chart.series] == ["reward/total/mean", "heldout/m"]
    assert overview({k: v for k, v in points.items() if k != "heldout/m"}, 2) is None


@pytest.mark.parametrize("values", [[0.1, 0.5, 0.3], [5.0], [1.0, 1.00001], [-3e-9, 2e-9], [-7.0, -7.0]])
def test_curves_stay_within_their_axes(values: list[float]) -> None:
    (group,) = grouped({"a": [(i, v) for i, v in enumerate(values)], "b": [(0, 1.0), (9, 2.0)]}, 9)
    for chart in group.charts:
        left, top, right, bottom = chart.data["box"]
        for x, y in re.findall(r"([\d.]+),([\d.]+)", " ".join(re.findall(r'points="([^"]*)"', chart.svg))):
            assert left - 0.1 <= float(x) <= right + 0.1 and top - 0.1 <= float(y) <= bottom + 0.1


def test_tick_labels_tell_close_values_apart() -> None:
    chart = draw("a", [Series("a", [(0, 0.99996), (1, 1.00004)])], 1)
    labels = re.findall(r'text-anchor="end">([^<]+)<', chart.svg)
    assert len(labels) == len(set(labels)) >= 3


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 150), (0.99995, 1.00005), (-3e-9, 2e-9), (-40, 1e5)])
def test_ticks_are_few_and_within_the_axis(low: float, high: float) -> None:
    found = ticks(low, high, 4)
    slack = (high - low) * 1e-6
    assert 2 <= len(found) <= 6 and all(low - slack <= t <= high + slack for t in found)


def test_thinning_keeps_the_ends_and_the_level() -> None:
    points = [(float(i), math.sin(i)) for i in range(5000)]
    short = thin(points)
    assert len(short) <= 300 and short[0] == points[0] and short[-1] == points[-1]
    assert abs(sum(y for _, y in short) / len(short)) < 0.05
    assert thin(points[:300]) == points[:300]


def test_smoothing_keeps_a_constant_and_quietens_noise() -> None:
    assert smooth([(i, 2.0) for i in range(50)]) == [(i, 2.0) for i in range(50)]
    noise = [(i, (-1.0) ** i) for i in range(100)]
    assert max(abs(y) for _, y in smooth(noise)) <= 0.2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (128.0, "128"), (0.51234, "0.5123"), (3e-4, "0.0003"), (2.5e-7, "2.5e-7"), (1.5e9, "1.5e9")],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text
