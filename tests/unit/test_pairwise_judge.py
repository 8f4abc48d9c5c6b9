"""The judge that compares two pictures: win rates by hand, orders, opponents, a small Qwen2.5-VL and a server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageStat
from torch import Tensor

from reward_models import judges
from reward_models.judges import LocalJudge, to_pictures
from t2irl.algebra.base import base_scores
from t2irl.errors import ConfigError, DataError, RunError
from t2irl.geometry import Geometry
from t2irl.rewards.combine import RewardSet
from t2irl.rewards.pairwise_judge import PairwiseJudge, matches
from t2irl.serving.served import Served
from t2irl.types import PromptGroups
from tests.invariants.toy import toy_run
from tests.judges import Stub, serving

CPU = torch.device("cpu")
BIAS = 0.1
"""How much likelier the stub finds the first picture, whatever it is."""


def prefers_light(first: Image.Image, second: Image.Image) -> dict[str, float]:
    """P(first) = 1/2 + half the difference in brightness + BIAS, in several spellings, and something else."""
    a, b = (ImageStat.Stat(picture).mean[0] / 255 for picture in (first, second))
    p = 0.5 + (a - b) / 2 + BIAS
    return {"First": 0.5 * p, " first": 0.3 * p, "second": 0.8 * (1 - p), "Neither": 0.2}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A server on this machine, no proxy in between, no pauses."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judges, "WAIT", 0.0)
    with serving() as found:
        found.answer = prefers_light
        yield found


def build(**settings: Any) -> PairwiseJudge:
    return PairwiseJudge(PairwiseJudge.Config.model_validate(settings), CPU)


def shades(*groups: tuple[float, ...]) -> tuple[Tensor, PromptGroups]:
    """Pictures of one grey each, in groups."""
    flat = [value for group in groups for value in group]
    images = torch.tensor(flat).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    ids = [k for k, group in enumerate(groups) for _ in group]
    members = [k for group in groups for k in range(len(group))]
    return images, PromptGroups.of([f"thing {k}" for k in range(len(groups))], ids, members)


# ------------------------------------------------------------------------------------------------------- by hand
def test_win_rates_by_hand_without_the_judges_liking_for_the_first(stub: Stub) -> None:
    images, groups = shades((0.2, 0.6, 0.4), (0.8, 0.2))
    found = build(server=stub.url).score(images, groups)
    # 1/2 + half the mean difference to the others: the bias is gone
    torch.testing.assert_close(found, torch.tensor([0.35, 0.65, 0.5, 0.8, 0.2]), rtol=0, atol=2e-3)
    assert found[:3].mean() == pytest.approx(0.5, abs=1e-6) and len(stub.requests) == 2 * 3 + 2 * 1
    text, *pictures = stub.requests[0]["messages"][0]["content"]
    assert '"thing 0"' in text["text"] and len(pictures) == 2 and stub.requests[0]["max_tokens"] == 1


def test_order_and_company_of_images_do_not_matter(stub: Stub) -> None:
    images, groups = shades((0.1, 0.9, 0.4, 0.6, 0.3), (0.8, 0.2, 0.5, 0.7))
    reward, order = build(server=stub.url, opponents=2), [4, 7, 0, 8, 2, 5, 1, 6, 3]
    straight = reward.score(images, groups)
    assert torch.equal(reward.score(images[order], groups[order]), straight[order])
    parts = [reward.score(images[part], groups[part]) for part in (slice(0, 5), slice(5, 9))]
    assert torch.equal(torch.cat(parts), straight)  # whatever process a group lies on
    assert straight[:5].mean() == pytest.approx(0.5, abs=1e-6)


# ------------------------------------------------------------------------------------------------------ opponents
@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("opponents", range(1, 8))
def test_everyone_meets_equally_many_others(count: int, opponents: int) -> None:
    pairs = matches(count, opponents, seed=3)
    met = Counter(image for pair in pairs for image in pair)
    assert len(set(pairs)) == len(pairs) and all(a < b for a, b in pairs)
    wanted = min(opponents, count - 1)
    assert set(met.values()) == {wanted + wanted * count % 2} and len(met) == count


def test_opponents_are_drawn_from_the_seed_and_anew_in_each_iteration(stub: Stub) -> None:
    images, groups = shades(tuple(k / 10 for k in range(8)))

    def scores(reward: PairwiseJudge) -> Tensor:
        found = reward.score(images, groups)
        assert reward.report() == {"unanswered": 0}
        return found

    one, other = build(server=stub.url, opponents=2), build(server=stub.url, opponents=2)
    first, second = scores(one), scores(one)
    assert torch.equal(first, scores(other)) and not torch.equal(first, second)
    resumed = build(server=stub.url, opponents=2)
    resumed.load_state_dict(other.state_dict())
    assert torch.equal(scores(resumed), second)
    other.seed = 1
    assert not torch.equal(scores(other), second)
    assert len(stub.requests) == 5 * 8 * 2  # eight pairs a time, both orders


# ------------------------------------------------------------------------------------------- no answer, no company
def test_no_answer_is_a_draw_and_is_told(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda first, second: {"Both": 0.9, "First": 0.1}
    reward = build(server=stub.url)
    assert reward.score(*shades((0.2, 0.9))).tolist() == [0.5, 0.5] and reward.report() == {"unanswered": 1}
    assert build(server=stub.url, answer_mass=0.05).score(*shades((0.2, 0.9))).tolist() == [
        0.5,
        0.5,
    ]  # first, both ways
    stub.failures = [500] * 2
    with pytest.raises(RunError, match=r"reward pairwise_judge: .*no usable answer in 2 tries"):
        build(server=stub.url, tries=2, parallel=1).score(*shades((0.2, 0.9)))
    with pytest.raises(DataError, match=r"reward pairwise_judge: question = .*none\.txt: cannot be read"):
        build(server=stub.url, question=tmp_path / "none.txt")
    (tmp_path / "ask.txt").write_text("{prompt}? first or second\n")
    build(server=stub.url, question=tmp_path / "ask.txt").score(*shades((0.2, 0.9)))
    assert stub.requests[-1]["messages"][0]["content"][0]["text"] == "thing 0? first or second"


def test_pictures_outside_rollouts_have_no_win_rate(stub: Stub) -> None:
    images, groups = shades((0.2, 0.6), (0.4,))
    reward = build(server=stub.url)
    assert reward.score(images, groups).isnan().tolist() == [False, False, True]
    rewards = RewardSet({"pair": reward.config}, CPU, 2, Counter())
    asked, loose = len(stub.requests), rewards.score((images * 255).byte(), groups)
    assert loose["pair"].isnan().all() and len(stub.requests) == asked  # nor does anybody ask
    with pytest.raises(ConfigError, match=r"heldout_rewards\.pair: pairwise_judge compares the images of a group"):
        rewards.prepare([], [], None, trained=False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rewards\.pair: pairwise_judge compares the images of a group"):
        Served({"pair": reward.config}, CPU, 4, None)
    with pytest.raises(
        ConfigError, match=r"combine: rewards\.pair: type pairwise_judge .* no scores of the base model's"
    ):
        base_scores(SimpleNamespace(rewards=rewards), ["pair"], [])  # type: ignore[arg-type]
    assert not rewards.elsewhere  # nothing is gained by asking while pictures are drawn


def test_groups_over_several_processes_are_refused() -> None:
    entry = {"rewards": {"pair": {"type": "pairwise_judge"}}, "rollout": {"prompts": 5, "group_size": 4}}
    run = toy_run(entry)
    assert Geometry.of(run, 1).whole_groups and Geometry.of(run, 5).whole_groups
    with pytest.raises(
        ConfigError, match=r"rewards\.pair: .* 5 over 2 processes .* Use 4 or 6 prompts, or .* 1 or 5 processes"
    ):
        Geometry.of(run, 2)


# ------------------------------------------------------------------------------------------------ a model run here
def test_a_local_judge_sees_both_pictures_in_their_order(qwen_folder: Path) -> None:
    judge = LocalJudge.load(qwen_folder, CPU, torch.float32)
    light, dark, small = to_pictures(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    small = small.resize((32, 64))
    pairs = [(light, dark), (dark, light), (light, small)]
    answers = judge.log_choices(pairs, "Which?", ("first", "second"))
    for row, pair in enumerate(pairs):
        probabilities = judge.model(**judge._inputs("Which?", [list(pair)])).logits[0, -1].double().softmax(-1)
        for column, letters in enumerate(("fF", "sS")):
            ids = [judge.tokenizer.encode(letter)[0] for letter in letters]
            torch.testing.assert_close(answers[row, column].exp(), probabilities[ids].sum())
    assert (answers[0] - answers[1]).abs().min() > 1e-4
    alone = judge.log_words([light], "Which?", ("first", "second"))
    assert (alone - answers[0]).abs().min() > 1e-4


def test_the_whole_reward_on_a_local_judge(qwen_folder: Path) -> None:
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    groups = PromptGroups.of(["a cat", "a dog"], [0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 0, 1])
    few, many = (
        build(path=qwen_folder, precision="fp32", answer_mass=0, batch_size=size).score(images, groups)
        for size in (1, 5)
    )
    torch.testing.assert_close(few, many, rtol=0, atol=1e-5)
    assert len(few[:4].unique()) == 4 and few[:4].mean() == pytest.approx(0.5, abs=1e-6)
    same = build(path=qwen_folder, precision="fp32", answer_mass=0).score(
        images[:1].expand(2, -1, -1, -1), groups[[4, 5]]
    )
    torch.testing.assert_close(same, torch.full((2,), 0.5))
