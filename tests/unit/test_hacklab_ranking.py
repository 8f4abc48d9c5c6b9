"""The ranking of a grid: its order, and the picture of it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from t2irl.hacklab.ranking import mean_gain, ranked, ranking
from t2irl.hacklab.results import spread

SVG = "{http://www.w3.org/2000/svg}"


def row(method: str, proxy: str, *gains: float) -> dict[str, Any]:
    return {"method": method, "proxy": proxy, "stats": {"gold_gain": spread(gains)}}


ROWS = [
    row("grpo", "vivid", -0.3, -0.4), row("held", "vivid", -0.1, 0.1), row("<new>", "vivid", 0.5),
    row("grpo", "honest", 0.2, 0.2), row("held", "honest", 0.1, 0.1),
]  # fmt: skip


def test_the_best_mean_over_proxies_comes_first_and_the_less_measured_last() -> None:
    order = ranked(ROWS)
    assert list(order) == ["held", "grpo", "<new>"]
    assert mean_gain(order["held"]) == pytest.approx(0.05) and mean_gain(order["grpo"]) == pytest.approx(-0.075)
    assert list(order["<new>"]) == ["vivid"]


def test_dots_stand_where_the_gains_are() -> None:
    drawn = ET.fromstring(ranking(ROWS, ["grpo", "held", "<new>"]))
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in drawn.iter(f"{SVG}circle")]
    texts = ["".join(t.itertext()) for t in drawn.iter(f"{SVG}text")]
    assert len(dots) == 5 and {"held", "grpo", "<new> *", "trained on vivid", "trained on honest"} <= set(texts)
    assert {"-0.350", "+0.000", "+0.500 (1)", "+0.200", "+0.100"} <= set(texts)
    held, plain, new = dots[:3]  # of the first panel, whose scale runs from -0.42 to 0.5
    assert plain[1] > held[1] and new[1] > plain[1]
    assert (held[0] - plain[0]) / (new[0] - plain[0]) == pytest.approx(0.35 / 0.85, abs=0.01)


def test_one_method_and_no_change_are_drawn() -> None:
    drawn = ET.fromstring(ranking([row("grpo", "vivid", 0.0)], ["grpo"]))
    (dot,) = drawn.iter(f"{SVG}circle")
    assert 0 <= float(dot.attrib["cx"]) <= float(drawn.attrib["width"])
