"""Adversaries that judge a picture beside a reference image of its prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from reward_models.critics import most_alike, relation
from t2irl import registry
from t2irl.adversary.augment import augment
from t2irl.adversary.companions import Companions, Condition
from t2irl.adversary.learning import decision
from t2irl.adversary.losses import auc
from t2irl.adversary.pairs import Pairs
from t2irl.errors import ConfigError, DataError
from t2irl.references import ReferenceImages
from t2irl.rewards.combine import RewardSet
from t2irl.scoring import Scorer
from t2irl.types import PromptGroups
from tests.adversaries import iterate
from tests.end_to_end.runs import assert_equal

CPU = torch.device("cpu")
Make = Callable[..., Any]
Pictures = tuple[Tensor, PromptGroups]
FILES = {"a": [f"a{k}" for k in range(5)], "b": ["b0", "b1"], "c": ["c0", "c1", "c2"]}


def companions(**settings: Any) -> Companions:
    """Of three prompts, the features of a file its number."""
    references = ReferenceImages({text: tuple(map(Path, files)) for text, files in FILES.items()})
    condition = Condition.model_validate(settings)

    def features(files: Sequence[Path]) -> tuple[Tensor]:
        return (torch.tensor([[float(file.name[1:])] for file in files]),)

    return Companions(condition, Pairs(references, 0.0, True, 3), features, 3)


# ------------------------------------------------------------------------------------------------------ which they are
def test_a_picture_is_never_its_own_companion() -> None:
    few = companions(images=3)
    for text, files in FILES.items():
        for shown in (None, *map(Path, files)):
            found = few.of(text, shown)
            assert shown not in found and len(set(found)) == len(found) == min(3, len(files) - (shown is not None))
            assert {file.name[0] for file in found} == {text}
    assert few.of("unknown", None) == []
    texts, keys, shown = ["a"] * 40 + ["b"] * 10, [(0, k) for k in range(50)], [Path("a2")] * 40 + [Path("b1")] * 10
    drawn = few.draw(texts, keys, shown, 1)
    assert set(drawn[40:]) == {Path("b0")} and set(drawn[:40]) == set(few.of("a", Path("a2")))
    assert drawn != few.draw(texts, keys, shown, 2)  # others in another iteration,
    assert drawn[7:] == few.draw(texts[7:], keys[7:], shown[7:], 1)  # and the same whatever process holds the pair


def test_strangers_are_of_other_prompts_of_the_rollout() -> None:
    texts, keys = ["a"] * 30 + ["b"] * 30, [(k // 30, k % 30) for k in range(60)]
    found = companions().strangers(texts, keys, [*texts, "c"], 1)
    for text, file in zip(texts, found, strict=True):
        assert file.name[0] != text
    assert {file.name[0] for file in found} == {"a", "b", "c"}
    assert {file.name[0] for file in companions().strangers(texts, keys, texts, 1)} == {"a", "b"}
    assert companions().strangers(["a"] * 4, keys[:4], ["a", "unknown"], 1) == []  # nobody to be taken for
    assert companions(mismatched=0).strangers(texts, keys, texts, 1) == []


def test_a_score_is_the_mean_over_companions() -> None:
    groups = PromptGroups.of(["a", "b", "unknown"], [0, 1, 2, 0], [0, 0, 0, 1])
    some = companions(images=3)
    shown = [None, Path("b0"), None, Path("a1")]
    own = torch.arange(4.0)[:, None]
    found = some.mean(lambda features, rows: (features[0] * 10 + features[1])[:, 0], (own,), groups, shown)
    expected = [
        10 * k + torch.tensor([float(file.name[1:]) for file in some.of(text, file)]).mean().item()
        for k, (text, file) in enumerate(zip(groups.texts, shown, strict=True))
    ]
    assert found[[0, 1, 3]].tolist() == pytest.approx([expected[k] for k in (0, 1, 3)])
    assert found[2].isnan()  # it has no companion, so nothing is said


# ---------------------------------------------------------------------------------------------------------- the critic
def test_relation_and_most_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    patches, others = (torch.randn(2, n, 6, generator=generator) for n in (5, 7))
    found = most_alike(patches, others)
    for b in range(2):
        for k in range(5):
            cosines = torch.nn.functional.cosine_similarity(patches[b, k], others[b], dim=-1)
            assert torch.equal(found[b, k], others[b, cosines.argmax()])
    assert torch.equal(found, most_alike(patches * 3, others[:, torch.randperm(7, generator=generator)]))
    same, product = relation(patches, patches).split(6, -1)[::-1]
    assert torch.equal(product, patches.square()) and not same.any()
    torch.testing.assert_close(relation(patches, found), relation(found, patches))


# ----------------------------------------------------------------------------------------------------------- learning
@pytest.fixture
def swapped(pictures: Pictures, reference_index: Path) -> Pictures:
    """A policy whose pictures are flawless, but of other prompts: its rollout images are reference images of the next one."""
    groups = pictures[1]
    images = ReferenceImages.load(ReferenceImages.Config(index=reference_index), groups.prompts, "test")
    after = {text: groups.prompts[(k + 1) % len(groups.prompts)] for k, text in enumerate(groups.prompts)}
    shown = [images.of(after[t])[m] for t, m in zip(groups.texts, groups.members, strict=True)]
    return torch.stack(images.pictures(shown, 64)).float() / 255, groups


def test_it_reads_the_prompt(make: Make, swapped: Pictures) -> None:
    """By itself each picture is as good as a reference image; beside one of its prompt it is the wrong one."""
    settings = {"lr": 1e-2, "turns": {"type": "fixed", "updates": 10}, "loss": "bce", "heldout": 0.25}
    areas = {}
    for name, condition in (("alone", None), ("beside", {"images": 3})):
        reward = make("adversarial_dino", condition=condition, **settings)
        for _ in range(10):
            metrics = iterate(reward, *swapped)
        drawn = reward.pairs.draw(swapped[1], 99)
        rows = [k for k, file in enumerate(drawn.kept) if file]
        seen = reward._about(drawn.kept, swapped[1], reward._score)
        areas[name] = auc(seen.detach(), reward.score(*swapped)[rows])
        assert metrics["heldout_auc"] == pytest.approx(areas[name], abs=0.25)
    assert areas["beside"] > 0.75 and areas["alone"] < 0.65


def test_mismatched_pairs_teach_what_the_policy_does_not_show(
    make: Make, pictures: Pictures, swapped: Pictures
) -> None:
    """A policy that draws what was asked for shows no wrong prompts; the second loss does."""
    images, groups = pictures
    spoilt = torch.nn.functional.avg_pool2d(images, 5, 1, 2, count_include_pad=False)
    gaps = {}
    for weight in (0.0, 2.0):
        reward = make(
            "adversarial_dino", lr=1e-2, turns={"type": "fixed", "updates": 10}, loss="bce", heldout=0,
            condition={"mismatched": weight},
        )  # fmt: skip
        for _ in range(8):
            iterate(reward, spoilt, groups)
        right = torch.stack(
            [reward.references.images.picture(reward.references.images.of(t)[0], 64) for t in groups.texts]
        )
        wrong = reward.score(swapped[0], groups)
        gaps[weight] = auc(reward.score(right.float() / 255, groups).detach(), wrong.detach())
    assert gaps[2.0] > 0.9 and gaps[2.0] > gaps[0.0] + 0.05


def test_score_loss_and_diagnostics_see_the_same(make: Make, pictures: Pictures) -> None:
    images, groups = pictures
    reward = make("adversarial_dino", condition={"images": 1}, heldout=0)
    with torch.no_grad():
        score, features = reward.score(images, groups), reward.critic.embed(images)
        files = [reward.companions.of(text, None)[0] for text in groups.texts]
        beside = (*features, *reward.reference_features(files))
        judged = decision(reward.critic, reward.critic.judge(beside, groups.texts, [0] * 48))
        torch.testing.assert_close(score, judged)
        shown = [reward.pairs.parts(text)[0][0] for text in groups.texts]
        beside = [
            next(file for file in reward.companions._order[t] if file != f)
            for t, f in zip(groups.texts, shown, strict=True)
        ]
        pair = (*reward.reference_features(shown), *reward.reference_features(beside))
        seen = reward._about(shown, groups, reward._score)  # a reference image is not its own companion
        torch.testing.assert_close(seen, reward.critic.score(pair, groups.texts, [0] * 48))
        alone = make("adversarial_dino").critic.settings()
    assert reward.critic.settings() == alone | {"pairs": True}


def test_strangers_are_changed_as_their_pair_is(
    make: Make, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain strangers beside changed reference images could be told by that alone."""
    images, groups = pictures
    for augmented in (False, True):
        reward = make("adversarial_dino", condition={}, heldout=0, augment={"jitter": 0.3 if augmented else 0})
        seen: list[Any] = []
        inner = reward.learner._judged
        monkeypatch.setattr(reward.learner, "_judged", lambda b, s, f=inner, to=seen: (to.append((b, s)), f(b, s))[1])
        iterate(reward, images, groups)
        batch, stream = seen[0]
        plain, shown = reward.reference_features(batch.strangers), reward.learner._strangers(batch, stream)
        assert torch.allclose(plain[0], shown[0], atol=1e-5) != augmented
        if augmented:
            pixels = reward.reference_pictures(batch.strangers).float() / 255
            seeds = reward.learner._seeds(batch, f"augment {stream}")
            torch.testing.assert_close(shown, reward.critic.embed(augment(pixels, reward.config.augment, seeds)))


FULL = {
    "lr": 1e-3, "turns": {"type": "fixed", "updates": 2}, "replay": {"size": 40, "add": 12, "share": 0.5},
    "augment": {"jitter": 0.2}, "patch_sampling": "random", "patches": 16, "penalty": {"on": "features", "weight": 0.1},
    "batch_size": 20, "condition": {"images": 2, "mismatched": 0.5},
}  # fmt: skip


def test_resumed_and_exported(make: Make, spoilt: Pictures, reference_index: Path, tmp_path: Path) -> None:
    images, groups = spoilt
    whole = make("adversarial_dino", **FULL)
    iterate(whole, images, groups)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    expected = [iterate(whole, images.roll(k, -1), groups) for k in (1, 2)]
    resumed = make("adversarial_dino", **FULL)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [iterate(resumed, images.roll(k, -1), groups) for k in (1, 2)] == expected
    assert_equal(whole.state_dict(), resumed.state_dict())
    whole.export(tmp_path / "out")
    references = {"index": reference_index}
    used = {"frozen": tmp_path / "out", "patch_sampling": "random", "patches": 16}
    one = make("adversarial_dino", condition={"images": 2}, references=references, **used)
    assert not one.learns and one.score(images, groups).isfinite().all()
    with pytest.raises(ConfigError, match="references is missing"):
        make("adversarial_dino", condition={}, **used)
    with pytest.raises(ConfigError, match="pairs: None here, True there"):
        make("adversarial_dino", **used)


# --------------------------------------------------------------------------------------------------------- bad settings
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"references": {"folder": "x"}}, "those of a folder belong to none; give an index"),
        ({"type": "adversarial_clip"}, "condition is for adversarial_dino"),
        ({"condition": {"images": 0}}, "images"),
        ({"condition": {"mismatched": -1}}, "mismatched"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    settings = {"type": "adversarial_dino", "condition": {}} | settings
    with pytest.raises(ValidationError, match=message):
        registry.find("rewards", settings["type"]).Config.model_validate(settings)


def test_two_reference_images_of_each_prompt_are_needed(
    make: Make, reference_index: Path, tmp_path: Path, pictures: Pictures
) -> None:
    """Held-out prompts included, unless told to skip what has none; and two always remain to learn from."""
    images, groups = pictures
    index = json.loads(reference_index.read_text())
    short, none = groups.prompts[3], groups.prompts[4]

    def given(**settings: Any) -> Any:
        (tmp_path / "index.json").write_text(json.dumps(index))
        references = {"index": tmp_path / "index.json", "root": reference_index.parent}
        return make("adversarial_dino", references=references, **settings)

    index[short] = index[short][:1]
    with pytest.raises(DataError, match=f"1 reference images for '{short}', at_least = 2"):
        given(condition={})
    assert given().pairs.parts(short)
    index[short] = index[short] * 2
    del index[none]
    index[short][1] = index[groups.prompts[5]][0]
    with pytest.raises(DataError, match=f"no reference images for the prompt '{none}'"):
        given(condition={})
    reward = given(condition={"missing": "skip"}, heldout=0.9)
    assert all(len(reward.pairs.parts(text)[0]) >= 2 for text in groups.prompts if text != none)
    found = reward.score(images, groups)
    assert found.isnan().tolist() == [text == none for text in groups.texts] and reward.may_skip
    assert iterate(reward, images, groups)["learned"] == 1
    kind = registry.find("rewards", "adversarial_dino")
    assert kind.prompts_of(reward.config, ["a"], ["b"], True) == ["a", "b"]
    assert kind.prompts_of(make("adversarial_dino").config, ["a"], ["b"], True) == ["a"]


def test_the_policys_encoder_is_not_used_while_it_draws(make: Make, dino_folder: Path, reference_index: Path) -> None:
    rewards = RewardSet({}, CPU, 8, Counter())
    kind, references = registry.find("rewards", "adversarial_dino"), {"index": reference_index}
    config = kind.Config.model_validate({"path": dino_folder, "references": references, "condition": {}})
    rewards.rewards = {"mine": kind(config, CPU)}  # reencode is the default
    with pytest.raises(ConfigError, match="overlap_scoring = true: the reward 'mine' puts reference images through"):
        Scorer(rewards, True)
    assert Scorer(rewards, None).overlap is False
    rewards.rewards = {"mine": make("adversarial_dino", condition={})}
    assert Scorer(rewards, True).overlap
