"""The classifier that learns during RL: what it mines, when a refresh is accepted, resume and export."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from reward_models.recipes.train_artifact import Settings, fit
from t2irl import registry
from t2irl.errors import ConfigError, DataError
from t2irl.rewards.artifact import Artifact
from t2irl.rewards.artifact_adaptive import ArtifactAdaptive, accept, choose, standardised
from t2irl.rewards.combine import RewardSet
from t2irl.types import PromptGroups
from tests.artifacts import labelled_pictures, write_classifier, write_labelled
from tests.end_to_end.runs import assert_equal

CPU = torch.device("cpu")
Rollout = tuple[Tensor, PromptGroups]


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """48 pictures uint8, half of them broken beyond doubt, of 24 captions."""
    pictures, _, prompts = labelled_pictures(24, ["mottle", "neon"], 8)
    captions = list(dict.fromkeys(prompts))
    return pictures, PromptGroups.of(captions, [captions.index(text) for text in prompts], [0] * 24 + [1] * 24)


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., RewardSet]:
    """Vividness and an adaptive classifier whose labeller is the verifier."""

    def build(**settings: Any) -> RewardSet:
        tree = {
            "path": write_classifier(tmp_path / "classifier"), "labeller": {"type": "shapes", "measure": "cleanliness"},
            "every": 3, "disagree": 12, "unsure": 12, "labels": 72, "steps": 15, "lr": 3e-3, "batch_size": 16,
        } | settings  # fmt: skip
        vivid = {"type": "vividness", "weight": 1.0}
        configs = {
            "vivid": config_of("vividness", vivid), "artifact": ArtifactAdaptive.Config.model_validate(tree)
        }  # fmt: skip
        found = RewardSet(configs, CPU, 32, Counter(), seed=3)
        found.prepare(["a red circle on a white background"], [], None, trained=True)  # type: ignore[arg-type]
        return found

    return build


def config_of(name: str, tree: dict[str, Any]) -> Any:
    return registry.find("rewards", name).Config.model_validate(tree)


def iterate(rewards: RewardSet, rollout: Rollout, times: int) -> list[dict[str, float]]:
    """Iterations as the loop does them."""
    found = []
    for _ in range(times):
        rewards.score(*rollout)
        found.append(rewards.update(*rollout)[0])
    return found


def adaptive(rewards: RewardSet) -> ArtifactAdaptive:
    reward = rewards.rewards["artifact"]
    assert isinstance(reward, ArtifactAdaptive)
    return reward


# ------------------------------------------------------------------------------------------------------------ mining
def test_mined_are_those_that_are_liked_and_not_clean_then_the_unsure_ones() -> None:
    liked = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.5, 0.6], dtype=torch.float64)
    clean = torch.tensor([0.9, 0.1, 0.95, 0.55, 0.3, 0.2], dtype=torch.float64)
    # Ranks liked 0 5 4 1 2 3, clean 4 0 5 3 2 1: differences -4 5 -1 -2 0 2.
    assert choose(liked, clean, 1, 0) == [1]
    assert choose(liked, clean, 2, 0) == [1, 5]
    assert choose(liked, clean, 0, 2) == [3, 4]
    assert choose(liked, clean, 1, 1) == [1, 3]
    assert choose(liked, clean, 9, 9) == [0, 1, 2, 3, 4, 5]
    assert choose(100 * liked - 3, clean, 2, 1) == choose(liked, clean, 2, 1)


def test_scores_are_standardised_over_all_processes() -> None:
    everyone = torch.tensor([1.0, 3.0, float("nan"), 5.0], dtype=torch.float64)
    mine = standardised(everyone[2:], everyone)
    assert mine[0] == 0 and mine[1].item() == pytest.approx(2 / (8 / 3) ** 0.5)
    assert standardised(everyone[2:3], everyone[2:3]).tolist() == [0]


def test_it_mines_what_the_other_rewards_like(make_set: Callable[..., RewardSet], rollout: Rollout) -> None:
    rewards = make_set(disagree=5, unsure=0)
    metrics = iterate(rewards, rollout, 2)
    assert [m["reward/artifact/mined"] for m in metrics] == [5, 10]
    scores = rewards.score(*rollout)
    gap = scores["vivid"].argsort().argsort() - scores["artifact"].argsort().argsort()
    best = {rollout[1].texts[k] for k in gap.argsort(descending=True)[:5].tolist()}
    assert {x.text for x in adaptive(rewards).mined} == best


def test_a_reward_of_weight_0_is_not_listened_to(make_set: Callable[..., RewardSet], rollout: Rollout) -> None:
    rewards = make_set()
    rewards.score(*rollout)
    rewards.weights["vivid"] = 0.0
    reward = adaptive(rewards)
    rewards.update(*rollout)
    assert reward._liked(48).tolist() == [0] * 48
    reward.rollout_scores = {"vivid": (2.0, torch.arange(48.0)), "artifact": (1.0, torch.rand(48))}
    assert reward._liked(48).argsort().tolist() == list(range(48))


# -------------------------------------------------------------------------------------------------------- refreshing
def test_a_refresh_that_explains_the_held_out_quarter_is_accepted(
    make_set: Callable[..., RewardSet], rollout: Rollout
) -> None:
    rewards = make_set(steps=40)
    before = rewards.score(*rollout)["artifact"]
    metrics = iterate(rewards, rollout, 3)
    assert [m["reward/artifact/refreshed"] for m in metrics] == [0, 0, 1]
    last = metrics[-1]
    assert (
        last["reward/artifact/accepted"] == 1
        and last["reward/artifact/heldout_after"] > last["reward/artifact/heldout_before"]
    )
    assert last["reward/artifact/labelled"] > 30 and adaptive(rewards).mined == []
    assert not torch.equal(rewards.score(*rollout)["artifact"], before)
    assert [adaptive(rewards).version, adaptive(make_set()).version] == [1, 0]


def test_a_refresh_that_does_not_is_rejected(make_set: Callable[..., RewardSet], rollout: Rollout) -> None:
    rewards = make_set(steps=40)
    reward = adaptive(rewards)
    learn = labelled_pictures(64, ["mottle", "neon"], 1)
    fit(reward.classifier, learn[0], learn[1], Settings(steps=80, batch=32), seed=0)
    pictures, labels, prompts = labelled_pictures(48, ["mottle", "neon"], 2)
    kept = torch.tensor([reward._is_kept(text) for text in prompts])
    # What is learned from contradicts what it is tried on.
    reward.pictures, reward.labels, reward.kept = pictures, torch.where(kept, labels, 1 - labels), kept
    before = rewards.score(*rollout)["artifact"]
    parameters = {n: p.clone() for n, p in reward.classifier.trained().items()}
    last = reward._refresh()
    last = {f"reward/artifact/{name}": value for name, value in last.items()}
    assert last["reward/artifact/refreshed"] == 1 and last["reward/artifact/accepted"] == 0
    assert last["reward/artifact/heldout_after"] < last["reward/artifact/heldout_before"]
    assert all(torch.equal(parameters[n], p) for n, p in reward.classifier.trained().items())
    assert torch.equal(rewards.score(*rollout)["artifact"], before)
    assert reward.version == 0  # what was measured by it still holds


def test_better_is_accepted_and_equal_is_not() -> None:
    assert accept(-0.5, -0.4999999) and not accept(-0.5, -0.5)
    assert not accept(-0.5, -0.6) and not accept(-0.5, float("nan"))


def test_one_label_alone_teaches_nothing(make_set: Callable[..., RewardSet], rollout: Rollout) -> None:
    rewards = make_set(broken_below=-1.0)  # nothing is broken
    last = iterate(rewards, rollout, 3)[-1]
    assert last["reward/artifact/refreshed"] == 0 and last["reward/artifact/labelled"] > 0
    assert "reward/artifact/heldout_after" not in last


def test_examples_are_learned_from_as_well(
    make_set: Callable[..., RewardSet], rollout: Rollout, tmp_path: Path
) -> None:
    index = write_labelled(tmp_path / "set", *labelled_pictures(24, ["mottle"], 2))
    rewards = make_set(examples=index, broken_below=-1.0)
    assert iterate(rewards, rollout, 3)[-1]["reward/artifact/refreshed"] == 1  # they hold broken ones


def test_the_same_prompts_are_held_out_in_every_refresh(make_set: Callable[..., RewardSet]) -> None:
    one, other = adaptive(make_set()), adaptive(make_set())
    texts = [f"prompt {k}" for k in range(2000)]
    kept = [one._is_kept(text) for text in texts]
    assert kept == [other._is_kept(text) for text in texts] and sum(kept) / 2000 == pytest.approx(0.25, abs=0.03)


def test_only_the_newest_labels_are_remembered(make_set: Callable[..., RewardSet], rollout: Rollout) -> None:
    rewards = make_set(remember=20)
    iterate(rewards, rollout, 6)
    assert len(adaptive(rewards).pictures) == len(adaptive(rewards).labels) == len(adaptive(rewards).kept) == 20


# ------------------------------------------------------------------------------------------------- resume and export
def test_a_resumed_classifier_goes_on_to_the_bit(
    make_set: Callable[..., RewardSet], rollout: Rollout, tmp_path: Path
) -> None:
    whole = make_set()
    iterate(whole, rollout, 4)  # after a refresh and in the middle of mining
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    expected = iterate(whole, rollout, 3)
    resumed = make_set()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert adaptive(resumed).version == 1
    assert iterate(resumed, rollout, 3) == expected
    assert_equal(whole.state_dict(), resumed.state_dict())


def test_it_is_not_resumed_without_its_state(make_set: Callable[..., RewardSet]) -> None:
    rewards = make_set()
    with pytest.raises(ValueError, match="no state of the reward 'artifact', which learns"):
        rewards.load_state_dict({})
    state = copy.deepcopy(rewards.state_dict())
    state["artifact"]["parameters"].pop("detail.place.bias")
    with pytest.raises(ValueError, match=r"detail\.place\.bias: None given"):
        rewards.load_state_dict(state)


def test_an_exported_classifier_scores_as_it_did(
    make_set: Callable[..., RewardSet], rollout: Rollout, tmp_path: Path
) -> None:
    rewards = make_set()
    iterate(rewards, rollout, 3)
    rewards.export(tmp_path / "out")
    fixed = Artifact(Artifact.Config(path=tmp_path / "out" / "artifact"), CPU)
    images = rollout[0].float() / 255
    torch.testing.assert_close(
        fixed.score(images, rollout[1]), adaptive(rewards).score(images, rollout[1]), rtol=0, atol=0
    )


# --------------------------------------------------------------------------------------------------------- bad input
def test_settings_that_do_not_fit_are_refused(make_set: Callable[..., RewardSet], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="labeller is missing"):
        make_set(labeller=None)
    with pytest.raises(ConfigError, match=r"labeller\.type = artifact_adaptive: expected a fixed reward"):
        path = str(tmp_path / "classifier")
        make_set(labeller={"type": "artifact_adaptive", "path": path, "labeller": {"type": "vividness"}})
    with pytest.raises(ValidationError, match=r"broken_below = 0\.9 is above clean_above = 0\.5"):
        make_set(broken_below=0.9, clean_above=0.5)
    with pytest.raises(ValidationError, match="disagree and unsure are both 0"):
        make_set(disagree=0, unsure=0)
    with pytest.raises(DataError, match=r"examples = .*none\.jsonl: .*No such file"):
        make_set(examples=tmp_path / "none.jsonl")
