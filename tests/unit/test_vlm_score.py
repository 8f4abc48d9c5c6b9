"""Scores asked of a vision-language model: formulas on probabilities, marks in replies, a model in here and a server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from reward_models import judges
from reward_models.vlm_scores import LEVELS, mark
from t2irl.errors import ConfigError, DataError, RunError
from t2irl.rewards.vlm_score import VlmScore
from t2irl.types import PromptGroups
from tests.judges import Stub, serving

CPU = torch.device("cpu")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judges, "WAIT", 0.0)
    with serving() as found:
        yield found


def build(**settings: Any) -> VlmScore:
    return VlmScore(VlmScore.Config.model_validate(settings), CPU)


def shades(*values: float) -> tuple[Tensor, PromptGroups]:
    images = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    return images, PromptGroups.of(["a cat", 'a "dog"'], [k % 2 for k in range(len(values))], list(range(len(values))))


def test_vqa_score_is_the_probability_of_yes(stub: Stub) -> None:
    """Of the published question about each picture's own prompt; the stub says yes as the picture is dark."""
    images, groups = shades(0.2, 0.4, 0.6, 0.0)
    scores = build(server=stub.url).score(images, groups)
    assert scores.tolist() == pytest.approx([0.9 * (1 - x) for x in (0.2, 0.4, 0.6, 0.0)], abs=0.01)
    asked = {r["messages"][0]["content"][0]["text"] for r in stub.requests}
    assert asked == {f'Does this figure show "{p}"? Please answer yes or no.' for p in ("a cat", 'a "dog"')}


def test_levels_are_an_expectation_over_five_words(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda picture: {"Excellent": 0.2, " good": 0.2, "f": 0.1, "Poor": 0.0, "bad": 0.1, "The": 0.4}
    expected = (5 * 0.2 + 4 * 0.2 + 3 * 0.1 + 1 * 0.1) / 0.6
    assert build(server=stub.url, ask="levels").score(*shades(0.5)).tolist() == pytest.approx([expected], abs=1e-5)
    stub.answer = lambda picture: {"The": 1.0}
    reward = build(server=stub.url, ask="levels", missing="skip")
    assert reward.may_skip and reward.score(*shades(0.5)).isnan().all()
    (tmp_path / "q.txt").write_text("Is {prompt} {here}?")
    build(server=stub.url, ask="levels", question=tmp_path / "q.txt").score(*shades(0.5))
    assert stub.requests[-1]["messages"][0]["content"][0]["text"] == "Is a cat {here}?"
    assert len({word[0] for word in LEVELS}) == 5


def test_marks_are_read_from_replies(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("A mark, please, for [{prompt}].")
    stub.reply = lambda text: "It shows a cat. Final Score: 4.5" if "[a cat]" in text else "I cannot say."
    scores = build(server=stub.url, ask="unified", question=tmp_path / "q.txt", missing="skip").score(
        *shades(0.1, 0.2, 0.3)
    )
    assert [math.isnan(x) for x in scores.tolist()] == [False, True, False] and scores[0] == 4.5
    assert stub.requests[0]["temperature"] == 0
    with pytest.raises(ValidationError, match="ask: unified needs `question`"):
        build(server=stub.url, ask="unified")
    assert mark("Final Score: 3 ... **Final score:** 2") == 2 or mark("Final Score: 3") == 3
    assert mark("FINAL SCORE:5") == 5
    for text in ("", "Final Score: 9", "Final Score: none", "Score: 3"):
        assert math.isnan(mark(text))


def test_a_model_in_here(qwen_folder: Path) -> None:
    """The same numbers alone and in a batch; levels agree with the whole distribution."""
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    groups = PromptGroups.of(["a cat", "a dog"], [0, 1, 0], [0, 0, 1])
    for ask in ("vqa", "levels"):
        reward = build(path=qwen_folder, precision="fp32", ask=ask)
        scores = reward.score(images, groups)
        alone = torch.cat([reward.score(images[k : k + 1], groups[[k]]) for k in range(3)])
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
        assert scores.isfinite().all() and len(scores.unique()) == 3
    assert ((scores >= 1) & (scores <= 5)).all()


def test_what_is_wrong_is_named(tmp_path: Path, stub: Stub) -> None:
    with pytest.raises(ValidationError, match="path and server are both there"):
        VlmScore.Config(path=tmp_path, server="http://x/v1")
    for name in ("model", "api_key_env"):
        with pytest.raises(ValidationError, match=f"{name} = judge belongs to `server`, which is missing"):
            VlmScore.Config.model_validate({"path": tmp_path, name: "judge"})
    with pytest.raises(ConfigError, match="NO_SUCH_KEY: no such environment variable"):
        build(server=stub.url, api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="reward vlm_score: path and server are both missing"):
        build()
    with pytest.raises(DataError, match="reward vlm_score: path = "):
        build(path=tmp_path)
    with pytest.raises(DataError, match="question = nowhere"):
        build(server=stub.url, question="nowhere")
    reward = build(server=stub.url, tries=2)
    stub.failures += [500] * 9
    with pytest.raises(RunError, match=r"reward vlm_score: .*HTTP 500"):
        reward.score(*shades(0.5))
