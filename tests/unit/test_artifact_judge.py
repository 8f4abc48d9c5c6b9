"""The judge that is asked about artifacts: its token rule, a small Qwen2.5-VL, a server, and how it fails."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from reward_models import judges
from reward_models.judges import LocalJudge, cleanliness, spellings, to_pictures
from t2irl.errors import ConfigError, DataError, RunError
from t2irl.rewards.artifact_judge import ArtifactJudge
from t2irl.rewards.combine import RewardSet
from t2irl.types import PromptGroups
from tests.judges import Stub, qwen_tokenizer, serving

CPU = torch.device("cpu")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A server on this machine, no proxy in between, no pauses."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judges, "WAIT", 0.0)
    with serving() as found:
        yield found


def build(**settings: Any) -> ArtifactJudge:
    return ArtifactJudge(ArtifactJudge.Config.model_validate(settings), CPU)


def shades(*values: float) -> tuple[Tensor, PromptGroups]:
    """Pictures of one grey each."""
    images = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    return images, PromptGroups.of(["a cat"], [0] * len(values), list(range(len(values))))


# -------------------------------------------------------------------------------------------------------- token rule
def test_the_reward_is_the_normalised_probability_of_no() -> None:
    yes, no = torch.tensor([0.1, 0.45, 0.6, 0.3]), torch.tensor([0.3, 0.45, 0.2, 0.0])
    score, answered = cleanliness(yes.log(), no.log())
    torch.testing.assert_close(score, torch.tensor([0.75, 0.5, 0.25, 0.0], dtype=torch.float64), rtol=0, atol=1e-7)
    assert answered.all() and score.dtype == torch.float64


def test_silence_scores_nothing_instead_of_everything() -> None:
    log_yes, log_no = torch.tensor([0.01, 0.0, 0.11]).log(), torch.tensor([0.18, 0.0, 0.11]).log()
    score, answered = cleanliness(log_yes, log_no)
    assert score.tolist() == [0, 0, pytest.approx(0.5)] and answered.tolist() == [False, False, True]
    score, answered = cleanliness(log_yes, log_no, least=0)
    assert score[0].item() == pytest.approx(18 / 19) and answered.tolist() == [True, False, True]


def test_only_the_difference_counts_above_the_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    yes, no = (torch.rand(50, generator=generator, dtype=torch.float64) * 0.3 + 0.15 for _ in range(2))
    same = torch.sigmoid(no.log() - yes.log())
    torch.testing.assert_close(cleanliness(yes.log(), no.log())[0], same)
    torch.testing.assert_close(cleanliness(no.log(), yes.log())[0], 1 - same)


def test_all_spellings_count() -> None:
    assert spellings("yes") == ("YES", " YES", "Yes", " Yes", "yes", " yes")
    tokenizer = qwen_tokenizer()
    assert all(len(tokenizer.encode(way)) == 1 for way in (*spellings("yes"), *spellings("no")))


# -------------------------------------------------------------------------------------------------- a model run here
def test_a_local_judge_agrees_with_the_whole_distribution(qwen_folder: Path) -> None:
    judge = LocalJudge.load(qwen_folder, CPU, torch.float32)
    pictures = to_pictures(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    answers = judge.log_answers(pictures, "Broken?")
    inputs = judge._inputs("Broken?", [[picture] for picture in pictures])
    probabilities = judge.model(**inputs).logits[:, -1].double().softmax(-1)
    for column, word in enumerate(("yes", "no")):
        ids = [judge.tokenizer.encode(way)[0] for way in spellings(word)]
        torch.testing.assert_close(answers[:, column].exp(), probabilities[:, ids].sum(-1))
    assert len(set(answers[:, 0].tolist())) == 3  # it looks at the picture
    assert not torch.allclose(answers, judge.log_answers(pictures, "Another question"))


def test_pictures_of_several_sizes_are_judged_one_by_one(qwen_folder: Path) -> None:
    judge = LocalJudge.load(qwen_folder, CPU, torch.float32)
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    mixed = [to_pictures(noise)[0], to_pictures(noise[..., :32])[0], to_pictures(noise)[1]]
    alone = torch.cat([judge.log_answers([picture], "Broken?") for picture in mixed])
    torch.testing.assert_close(judge.log_answers(mixed, "Broken?"), alone, rtol=0, atol=1e-5)


def test_a_large_picture_is_shrunk(qwen_folder: Path) -> None:
    large = to_pictures(torch.rand(1, 3, 64, 64))
    counts = [
        int((LocalJudge.load(qwen_folder, CPU, torch.float32, limit)._inputs("?", [large])["input_ids"] == pad).sum())
        for limit in (64 * 64, 32 * 32)
        for pad in [LocalJudge.load(qwen_folder, CPU, torch.float32).pad]
    ]
    assert counts == [16, 4]  # patches of 8 px, merged two by two


def test_a_local_judge_writes_the_same_for_the_same_seed(qwen_folder: Path) -> None:
    judge = LocalJudge.load(qwen_folder, CPU, torch.float32)
    pictures = to_pictures(torch.rand(2, 3, 32, 32))
    state = torch.get_rng_state()
    texts = [judge.reply("Why?", shown, seed, 0.7, 8) for shown in (pictures, []) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and texts[3] == texts[4] != texts[5]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_whole_reward_on_a_local_judge(qwen_folder: Path) -> None:
    images, groups = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(3)), shades(0, 0, 0, 0, 0)[1]
    free, strict = (build(path=qwen_folder, precision="fp32", answer_mass=mass) for mass in (0, 1))
    assert len(free.score(images, groups).unique()) == 5 and free.report() == {"unanswered": 0}
    assert strict.score(images, groups).tolist() == [0] * 5 and strict.report() == {"unanswered": 1}
    assert strict.report() == {}


# ---------------------------------------------------------------------------------------------------------- a server
def test_a_server_is_asked_as_the_paper_says(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ask.md").write_text("Broken? YES or NO.\n")
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    reward = build(server=stub.url + "/", instruction=tmp_path / "ask.md", api_key_env="JUDGE_KEY")
    scores = reward.score(*shades(0.0, 0.2, 1.0))
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.2, 1.0]))
    assert reward.report() == {"unanswered": 0}
    for request, headers in zip(stub.requests, stub.headers, strict=True):
        text, image = request["messages"][0]["content"]
        assert (request["model"], request["max_tokens"], request["temperature"]) == ("judge", 1, 0)
        assert request["logprobs"] and request["top_logprobs"] == 20 and text["text"] == "Broken? YES or NO."
        picture = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].split(",")[1])))
        assert picture.format == "PNG" and picture.size == (16, 16)
        assert headers["Authorization"] == "Bearer s3cret"


def test_a_server_that_answers_something_else_earns_nothing(stub: Stub) -> None:
    stub.answer = lambda picture: {"Sorry": 0.9, "Yes": 0.05}
    reward = build(server=stub.url)
    assert reward.score(*shades(0.5, 1.0)).tolist() == [0, 0] and reward.report() == {"unanswered": 1}


def test_a_missing_spelling_counts_as_impossible(stub: Stub) -> None:
    stub.answer = lambda picture: {"No": 0.5, "Maybe": 0.1}
    assert build(server=stub.url).score(*shades(0.5)).tolist() == [1]
    stub.answer = lambda picture: {"YES": 0.5}
    assert build(server=stub.url).score(*shades(0.5)).tolist() == [0]


def test_several_instructions_are_averaged(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "beam.json").write_text(json.dumps({"beam": [{"text": "One?"}, {"text": "Two?"}]}))
    reward = build(server=stub.url, instruction=tmp_path / "beam.json", parallel=1)
    assert reward.judges == 2 and reward.each(*shades(0.2, 1.0)).shape == (2, 2)
    torch.testing.assert_close(reward.score(*shades(0.2)), torch.tensor([0.2]))
    assert [r["messages"][0]["content"][0]["text"] for r in stub.requests[-2:]] == ["One?", "Two?"]


def test_every_instruction_is_a_judge_of_the_ensemble_and_asked_once(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "beam.json").write_text(json.dumps({"beam": [{"text": "One?"}, {"text": "Two?"}]}))
    settings = {"server": stub.url, "instruction": tmp_path / "beam.json", "parallel": 1}
    config = ArtifactJudge.Config.model_validate(settings)
    rewards = RewardSet({"clean": config}, CPU, 2, Counter())
    answers = iter([{"NO": share, "YES": 1 - share} for share in (0.1, 0.2, 0.5, 0.6, 0.3, 0.9)])
    stub.answer = lambda picture: next(answers)
    scores = rewards.score(shades(0.2, 0.5, 1.0)[0].mul(255).byte(), shades(0, 0, 0)[1])["clean"]
    expected = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.6, 0.9]], dtype=torch.float64)  # batches of two and one
    torch.testing.assert_close(rewards.each["clean"], expected)
    torch.testing.assert_close(scores, expected.mean(0).float())
    assert len(stub.requests) == 6


def test_a_busy_server_is_asked_again(stub: Stub) -> None:
    reward = build(server=stub.url, tries=3)
    stub.failures = [503, 429]
    assert reward.score(*shades(0.4)).tolist() == [pytest.approx(0.4)] and len(stub.requests) == 3
    stub.failures = [500] * 3
    with pytest.raises(RunError, match=r"no usable answer in 3 tries \(the last one: HTTP 500.*not now"):
        reward.score(*shades(0.4))
    stub.failures = [400]
    with pytest.raises(RunError, match=r"refused the request \(HTTP 400"):
        reward.score(*shades(0.4))
    assert len(stub.requests) == 7  # a bad request is not repeated


def test_a_dead_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judges, "WAIT", 0.0)
    with serving() as stub:
        reward = build(server=stub.url, tries=2)
    with pytest.raises(
        RunError, match=rf"{stub.url}/chat/completions: no usable answer in 2 tries.*Is the server running"
    ):
        reward.score(*shades(0.4))
    with pytest.raises(DataError, match=r"server = http.*models: no usable answer in 2 tries"):
        build(server=stub.url, tries=2)


def test_a_server_without_log_probabilities_is_refused(stub: Stub) -> None:
    reward = build(server=stub.url)
    reward.judge._chat = lambda *args: {"message": {"content": "NO"}}  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="no log-probabilities of tokens"):
        reward.score(*shades(0.4))


def test_an_unknown_model_of_the_server_is_refused(stub: Stub) -> None:
    with pytest.raises(DataError, match="no model 'other'; it offers judge"):
        build(server=stub.url, model="other")


# --------------------------------------------------------------------------------------------------------- bad input
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="path and server are both missing"):
        build()
    with pytest.raises(ValidationError, match="path and server are both there"):
        build(path=tmp_path, server="http://x/v1")
    with pytest.raises(ValidationError, match="model = judge belongs to `server`"):
        build(path=tmp_path, model="judge")
    with pytest.raises(DataError, match=r"lacks config\.json, preprocessor_config\.json"):
        build(path=tmp_path)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="api_key_env = NO_SUCH_KEY: no such environment variable"):
        build(server="http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY")
    (tmp_path / "empty.md").write_text(" \n")
    with pytest.raises(DataError, match=r"instruction = .*empty\.md: is empty"):
        build(path=tmp_path, instruction=tmp_path / "empty.md")
    (tmp_path / "beam.json").write_text("{}")
    with pytest.raises(DataError, match=r"beam\.json: cannot be read: KeyError"):
        build(path=tmp_path, instruction=tmp_path / "beam.json")


def test_another_model_than_a_vision_language_model_is_refused(dino_folder: Path) -> None:
    with pytest.raises(DataError, match="model_type = 'dinov2', which transformers cannot ask about pictures"):
        build(path=dino_folder)


def test_jpeg_changes_the_picture_and_png_does_not() -> None:
    image = torch.linspace(0, 1, 16).view(1, 1, 1, 16).expand(1, 3, 16, 16).mul(255).round() / 255
    exact, lossy = (torch.tensor(list(to_pictures(image, jpeg)[0].tobytes())) for jpeg in (False, True))
    assert exact.tolist() == image[0].permute(1, 2, 0).mul(255).round().int().flatten().tolist()
    assert 0 < (exact - lossy).abs().double().mean() < 5


def test_log_sums() -> None:
    assert judges._log_sum([math.log(0.25), math.log(0.5)]) == pytest.approx(math.log(0.75))
    assert judges._log_sum([]) == -math.inf
