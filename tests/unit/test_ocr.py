"""Legible text: the rule by hand, the order of lines, and the real recogniser on drawn text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from reward_models import ocr
from reward_models.ocr import edit_distance, in_order, legibility, wanted_text
from t2irl.errors import ConfigError, DataError
from t2irl.rewards.ocr import Ocr
from t2irl.types import PromptGroups

CPU = torch.device("cpu")
WORDS = st.text("abcd ", max_size=8)


def test_the_wanted_text_is_the_first_in_quotes() -> None:
    assert wanted_text('a sign that says "Open 24 h" and "no"') == "Open 24 h"
    assert wanted_text("a sign that says “Open”") == "Open"
    assert wanted_text("a sign") is None is wanted_text('a "') is wanted_text('a "  " sign')


def test_the_rule_by_hand() -> None:
    assert legibility("OPEN 24h", "Open 24 h") == 1
    assert legibility("xx open yy", "open") == 1  # published: more text costs nothing
    assert legibility("xx open yy", "open", extra=0.5) == pytest.approx(1 - 0.5 * 4 / 4)
    assert legibility("opem", "open") == pytest.approx(0.75)
    assert legibility("", "open") == 0 == legibility("qqqqqqqqqqqq", "open")


@given(WORDS, WORDS, WORDS)
@settings(deadline=None, derandomize=True)
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) >= abs(len(a) - len(b))
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert edit_distance(a, b) <= max(len(a), len(b))
    assert edit_distance("kitten", "sitting") == 3


def test_lines_are_read_in_order() -> None:
    def box(left: float, top: float) -> list[list[float]]:
        return [[left, top], [left + 10, top], [left + 10, top + 10], [left, top + 10]]

    assert in_order([(box(40, 2), "b"), (box(0, 30), "c"), (box(0, 0), "a"), (box(20, 33), "d")]) == "a b c d"
    assert in_order([]) == ""


def sign(text: str) -> torch.Tensor:
    """Black on white."""
    picture = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(picture).text((20, 20), text, fill="black", font=ImageFont.load_default(48))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def test_the_reward_reads_what_is_written() -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="needs the extra `ocr`")
    prompts = ('a sign "HELLO 42"', 'a sign "HELP 42"', 'a sign "qwqw"')
    groups = PromptGroups.of(prompts, [0, 1, 2], [0, 0, 0])
    images = torch.stack([sign("HELLO 42")] * 3)
    scores = Ocr(Ocr.Config(), CPU).score(images, groups)
    assert scores.tolist() == pytest.approx([1, 1 - 2 / 6, 0])
    assert Ocr(Ocr.Config(), CPU).score(torch.ones(1, 3, 64, 64), groups[:1]).tolist() == [0]
    bare = PromptGroups.of(["a sign", prompts[0]], [0, 1], [0, 0])
    with pytest.raises(DataError, match="the prompt 'a sign' has no text in double quotes"):
        Ocr(Ocr.Config(), CPU).score(images[:2], bare)
    skipping = Ocr(Ocr.Config(missing="skip"), CPU)
    assert skipping.may_skip and skipping.score(images[:2], bare).isnan().tolist() == [True, False]


def test_a_missing_engine_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "paddleocr", None)
    with pytest.raises(ConfigError, match=r"reward ocr: engine paddleocr is not installed: pip install 'paddleocr<3'"):
        Ocr(Ocr.Config(engine="paddleocr"), CPU)
    assert ocr.make_reader
