"""The search for an instruction: formulas, the search on a scorer that can be computed, the whole of it against a server."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_models import judges
from reward_models.recipes import tune_instruction
from reward_models.recipes.labelled import Labelled
from reward_models.recipes.tune_instruction import JudgeScore, Settings, balanced_accuracy, log_likelihood, tune
from tests.judges import brightness, serving

ITEMS = [Labelled(Path(f"{k}.png"), k % 2, f"prompt {k}", "") for k in range(40)]
LEARN, SELECT = ITEMS[:20], ITEMS[20:]


def quality(instruction: str) -> int:
    """What an instruction is worth: the number in it."""
    return int(re.findall(r"-?\d+", instruction)[0])


def scorer(instruction: str, items: Sequence[Labelled]) -> Tensor:
    """Right for every picture from 5 on, the surer the better; wrong below."""
    p = 1 / (1 + math.exp(-(quality(instruction) - 4.5)))
    return torch.tensor([p if x.label else 1 - p for x in items], dtype=torch.float64)


class Climber:
    """A critic whose rewrites are one better; it notes what it was shown."""

    def __init__(self, step: int = 1) -> None:
        self.step, self.shown, self.seeds = step, [], []

    def reason(self, instruction: str, wrong: Sequence[Labelled], seed: int) -> str:
        self.shown.append(list(wrong))
        self.seeds.append(seed)
        return "too vague"

    def rewrite(self, instruction: str, reason: str, seed: int) -> str:
        assert reason == "too vague"
        return f"level {quality(instruction) + self.step} seed {seed}"

    def paraphrase(self, instruction: str, seed: int) -> str:
        return instruction.replace("level", "Level")


def test_the_score_is_the_mean_log_likelihood() -> None:
    p, labels = torch.tensor([0.8, 0.4, 1.0]), torch.tensor([1, 0, 0])
    expected = (math.log(0.8) + math.log(0.6) + math.log(1e-8)) / 3
    assert log_likelihood(p, labels) == pytest.approx(expected, rel=1e-6)
    assert log_likelihood(torch.tensor([1.0, 0.0]), torch.tensor([1, 0])) == pytest.approx(0, abs=1e-7)
    assert balanced_accuracy(torch.tensor([0.9, 0.5, 0.6, 0.1]), torch.tensor([1, 1, 0, 0])) == pytest.approx(0.75)


def test_the_search_climbs_as_long_as_there_are_errors() -> None:
    critic, said = Climber(), []
    beam = tune("level 2", LEARN, SELECT, scorer, critic, Settings(rounds=20), seed=1, say=said.append)
    # Below 5 every picture is wrong, from 5 on none is: then there is nothing left to learn from.
    assert quality(beam[0].text) == 5 and len(beam) == 4
    assert [found.score for found in beam] == sorted((found.score for found in beam), reverse=True)
    assert beam[0].score == log_likelihood(scorer("level 5", SELECT), torch.tensor([x.label for x in SELECT]))
    assert 1 < len(said) < 20  # it stopped by itself


def test_errors_come_from_the_pictures_to_learn_from_alone() -> None:
    critic = Climber()
    tune("level 1", LEARN, SELECT, scorer, critic, Settings(rounds=2, errors=3), seed=2)
    shown = [x for wrong in critic.shown for x in wrong]
    assert shown and all(x in LEARN for x in shown) and all(len(wrong) == 3 for wrong in critic.shown)
    assert len(set(critic.seeds)) == len(critic.seeds)


def test_a_rewrite_that_is_worse_does_not_survive() -> None:
    beam = tune("level 4", LEARN, SELECT, scorer, Climber(-1), Settings(rounds=5, beam=2), seed=3)
    assert beam[0].text in ("level 4", "Level 4") and beam[0].score == pytest.approx(
        math.log(1 / (1 + math.exp(0.5))), abs=1e-6
    )


def test_selection_looks_at_the_held_out_pictures() -> None:
    def misled(instruction: str, items: Sequence[Labelled]) -> Tensor:
        """Better on what is learned from, worse on what is held out."""
        level = quality(instruction)
        p = 0.3 + 0.02 * level if items[0] in LEARN else 0.9 - 0.1 * level
        return torch.tensor([p if x.label else 1 - p for x in items], dtype=torch.float64)

    assert quality(tune("level 0", LEARN, SELECT, misled, Climber(), Settings(rounds=3), seed=0)[0].text) == 0


def test_the_search_repeats_itself_and_keeps_few_children() -> None:
    first, second = (tune("level 2", LEARN, SELECT, scorer, Climber(), Settings(rounds=3), seed=7) for _ in range(2))
    assert first == second
    asked: list[str] = []

    def counting(instruction: str, items: Sequence[Labelled]) -> Tensor:
        asked.append(instruction)
        return scorer(instruction, items)

    tune("level 2", LEARN, SELECT, counting, Climber(), Settings(rounds=1, children=2), seed=7)
    assert len(set(asked)) == 3  # the start and two children


def test_a_judge_is_asked_once_for_each_picture(tmp_path: Path) -> None:
    for k in range(3):
        Image.new("RGB", (8, 8), (80 * k,) * 3).save(tmp_path / f"{k}.png")
    items = [Labelled(tmp_path / f"{k}.png", 0, "", "") for k in range(3)]

    class Counting:
        asked = 0

        def log_answers(self, pictures: Sequence[Image.Image], instruction: str) -> Tensor:
            self.asked += len(pictures)
            return torch.tensor([[0.1, 0.3], [0.0, 0.1], [0.4, 0.4]], dtype=torch.float64).log()[-len(pictures) :]

        def reply(self, *args: object) -> str:
            raise AssertionError

    judge = Counting()
    score = JudgeScore(judge)
    assert score("?", items).tolist() == pytest.approx([0.25, 1.0, 0.5])  # the second one was not answered
    assert score("?", [*items[::-1], items[0]]).tolist() == pytest.approx([0.5, 1.0, 0.25, 0.25]) and judge.asked == 3


def test_the_command_line_against_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dark pictures are broken. The judge sees it only when it is asked about darkness, which the critic finds out."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judges, "WAIT", 0.0)
    lines = []
    for k in range(60):
        label, shade = k % 2, 20 + k if k % 2 else 200 - k
        Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / f"{k}.png")
        lines.append(json.dumps({"path": f"{k}.png", "label": label, "prompt": f"prompt {k}"}) + "\n")
    (tmp_path / "labelled.jsonl").write_text("".join(lines))
    (tmp_path / "start.md").write_text("Is it bad?")
    with serving() as stub:
        stub.reply = lambda text: "Darkness is not asked for." if "Name one flaw" in text else "Is it dark?"
        plain = stub.answer

        def answer(picture: Image.Image) -> dict[str, float]:
            asked = stub.requests[-1]["messages"][0]["content"][0]["text"]
            return plain(picture) if "dark" in asked else {"NO": 0.9, "YES": 0.05}

        stub.answer = answer
        monkeypatch.setattr(
            judges.ServerJudge, "_likeliest", _one_by_one
        )  # so that the last request is the present one
        arguments = [
            f"--images={tmp_path / 'labelled.jsonl'}",
            f"--server={stub.url}",
            f"--out={tmp_path / 'beam.json'}",
            "--api-key-env=TUNING_KEY",
        ]
        monkeypatch.setenv("TUNING_KEY", "s3cret")
        assert tune_instruction.main([*arguments, f"--start={tmp_path / 'start.md'}", "--rounds=2", "--seed=1"]) == 0
    found = json.loads((tmp_path / "beam.json").read_text())
    assert found["beam"][0]["text"] == "Is it dark?" == (tmp_path / "beam.md").read_text().strip()
    assert found["start"]["report"]["balanced_accuracy"] == 0.5 and found["beam"][0]["report"]["balanced_accuracy"] == 1
    assert sum(found["pictures"].values()) == 60 and "0.500 -> 1.000" in capsys.readouterr().out
    assert {headers.get("Authorization") for headers in stub.headers} == {"Bearer s3cret"}
    assert tune_instruction.main([f"--images={tmp_path / 'none.jsonl'}", *arguments[1:]]) == 1
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--server=http://127.0.0.1:9/v1", "--api-key-env=NO_SUCH_KEY"],
            "--api-key-env NO_SUCH_KEY: no such environment",
        ),
        (["--model=x", "--api-key-env=KEY"], "--api-key-env KEY belongs to --server, which is missing"),
        (["--model=x", "--server-model=judge"], "--server-model judge belongs to --server, which is missing"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert tune_instruction.main(["--images=a.jsonl", "--out=b.json", *options]) == 1
    assert message in capsys.readouterr().err


def _one_by_one(
    self: judges.ServerJudge, pictures: Sequence[Image.Image], instruction: str
) -> list[list[tuple[str, float]]]:
    return [self._first_tokens(picture, instruction) for picture in pictures]


def test_the_stub_says_what_it_should() -> None:
    assert sum(brightness(Image.new("RGB", (4, 4), (255,) * 3)).values()) == pytest.approx(1.0)
