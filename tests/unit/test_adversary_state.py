"""Rewards that learn, continued: resume, export, settings that are refused; and the discriminator after the fact."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from t2irl import registry
from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.posthoc import posthoc_auc
from t2irl.loading import load_run
from t2irl.rewards.combine import RewardSet
from t2irl.types import PromptGroups
from tests.adversaries import iterate
from tests.end_to_end.runs import assert_equal

CPU = torch.device("cpu")
Make = Callable[..., Any]
Pictures = tuple[Tensor, PromptGroups]


# ------------------------------------------------------------------------------------------------- resume and export
FULL = {
    "adversarial_dino": {
        "lr": 1e-3, "turns": {"type": "accuracy", "updates": 2, "cap": 3}, "replay": {"size": 40, "add": 12, "share": 0.5},
        "augment": {"jitter": 0.2, "translate": 0.1, "cutout": 0.2}, "patch_sampling": "random", "patches": 16,
        "penalty": {"on": "inputs", "weight": 0.1}, "max_grad_norm": 1.0, "batch_size": 20,
    },
    "adversarial_clip": {"lr": 1e-3, "turns": {"type": "trigger", "cap": 2}, "replay": {"size": 30, "add": 8}, "loss": "bce"},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FULL))
def test_a_resumed_adversary_goes_on_to_the_bit(name: str, make: Make, spoilt: Pictures, tmp_path: Path) -> None:
    images, groups = spoilt
    rollouts = [images.roll(shift, -1) for shift in range(5)]
    whole = make(name, **FULL[name])
    for pictures in rollouts[:2]:
        iterate(whole, pictures, groups)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    version = whole.version
    expected = [iterate(whole, pictures, groups) for pictures in rollouts[2:]]
    resumed = make(name, **FULL[name])
    assert resumed.version == 0
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert whole.version > resumed.version == version > 0
    assert [iterate(resumed, pictures, groups) for pictures in rollouts[2:]] == expected
    assert_equal(whole.state_dict(), resumed.state_dict())
    assert torch.equal(whole.score(images, groups), resumed.score(images, groups))


def test_an_adversary_without_state_is_not_resumed(make: Make) -> None:
    config = make("adversarial_dino").config
    rewards = RewardSet({}, CPU, 8, Counter())
    rewards.rewards = {"dino": make("adversarial_dino", **config.model_dump(include={"lr"}))}
    saved = copy.deepcopy(rewards.state_dict())
    rewards.load_state_dict(saved)
    with pytest.raises(ValueError, match="no state of the reward 'dino', which learns"):
        rewards.load_state_dict({})
    saved["dino"]["learner"]["parameters"].pop("last.bias")
    with pytest.raises(ValueError, match=r"last\.bias: None given, \(1,\) needed"):
        rewards.load_state_dict(saved)


@pytest.mark.parametrize("name", sorted(FULL))
def test_an_exported_adversary_scores_as_it_did(name: str, make: Make, spoilt: Pictures, tmp_path: Path) -> None:
    settings = {"patch_sampling": "random"} if name == "adversarial_dino" else {"scale": 3.0}
    reward = make(name, lr=1e-2, **settings)
    for _ in range(3):
        iterate(reward, *spoilt)
    reward.export(tmp_path / "out")
    frozen = make(name, frozen=tmp_path / "out", **settings)
    assert not frozen.learns and frozen.state_dict() == {}
    rows = slice(0, 9)
    features = reward.critic.embed(spoilt[0][rows])
    expected = reward.critic.score(features, spoilt[1][rows].texts, list(range(9)))
    found = frozen.critic.score(frozen.critic.embed(spoilt[0][rows]), spoilt[1][rows].texts, list(range(9)))
    assert torch.equal(found, expected)
    assert frozen.score(*spoilt).shape == (48,)
    wrong = {"hidden": 99} if name == "adversarial_dino" else {"tune_layers": 1}
    key, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{key}: {value} here"):
        make(name, frozen=tmp_path / "out", **settings, **wrong)
    other = "adversarial_clip" if name == "adversarial_dino" else "adversarial_dino"
    with pytest.raises(ConfigError, match=f"set type: {name}"):
        make(other, frozen=tmp_path / "out")
    (tmp_path / "out" / "adversary.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        make(name, frozen=tmp_path / "out", **settings)
    with pytest.raises(DataError, match=r"adversary\.safetensors and adversary\.json missing"):
        make(name, frozen=tmp_path, **settings)


# ------------------------------------------------------------------------------------------------------------ configs
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label_smoothing": 0.1}, "label_smoothing = 0.1 has no meaning for loss: hinge; use bce or bt"),
        ({"global_weight": 0, "local_weight": 0}, "global_weight and local_weight are both 0"),
        ({"global_loss_weight": 0, "local_loss_weight": 0}, "global_loss_weight and local_loss_weight are both 0"),
        ({"frozen": "x", "references": {"folder": "y"}}, "takes no references"),
        ({"turns": {"type": "fixed", "skip_policy": True}}, "never lets the policy learn"),
        ({"layers": []}, "layers"),
        ({"type": "adversarial_clip", "spectral_norm": True}, "spectral_norm: true is for new weights"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    settings = {"type": "adversarial_dino"} | settings
    with pytest.raises(ValidationError, match=message):
        registry.find("rewards", settings["type"]).Config.model_validate(settings)


def test_the_earlier_name_of_the_feature_cache_is_refused_with_the_new_one() -> None:
    text = ["--rewards.mine.type", "adversarial_dino", "--rewards.mine.cache", "somewhere"]
    with pytest.raises(ConfigError, match=r"cache\): unknown key. Did you mean rewards\.mine\.feature_cache\?"):
        load_run([Path("configs/tiny/demo.yaml")], text)


def test_what_is_missing_is_said(clip_folder: Path, dino_folder: Path, tmp_path: Path) -> None:
    for name, path in (("adversarial_clip", clip_folder), ("adversarial_dino", dino_folder)):
        kind = registry.find("rewards", name)
        with pytest.raises(ConfigError, match=f"reward {name}: references is missing"):
            kind(kind.Config(path=path), CPU)
        with pytest.raises(DataError, match=f"reward {name}: path = .*nowhere"):
            kind(kind.Config(path=tmp_path / "nowhere", references={"folder": tmp_path}), CPU)
    kind = registry.find("rewards", "adversarial_clip")
    with pytest.raises(DataError, match="tune_layers = 9: the image tower has 2 blocks"):
        kind(kind.Config(path=clip_folder, references={"folder": tmp_path}, tune_layers=9), CPU)


def test_sets_refuse_rewards_in_the_wrong_place(make: Make, pictures: Pictures) -> None:
    rewards = RewardSet({}, CPU, 8, Counter())
    rewards.rewards = {"mine": make("adversarial_dino")}
    with pytest.raises(ConfigError, match=r"heldout_rewards\.mine: this adversarial_dino learns"):
        rewards.prepare([], pictures[1].prompts, None, trained=False)  # type: ignore[arg-type]
    rewards.rewards = {"mine": make("posthoc_discriminator")}
    with pytest.raises(ConfigError, match=r"rewards\.mine: posthoc_discriminator measures whole sets"):
        rewards.prepare(pictures[1].prompts, [], None, trained=True)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- after the fact
def test_a_fresh_discriminator_finds_what_is_there_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(240, 12, generator=generator), torch.randn(240, 12, generator=generator)
    prompts = [k // 4 for k in range(240)]
    assert posthoc_auc(real, fake, prompts) == pytest.approx(0.5, abs=0.08)
    shifted = fake.clone()
    shifted[:, 3] += 1.0
    # Two unit normals one apart: the best possible area is Phi(1 / sqrt(2)) = 0.760.
    assert posthoc_auc(real, shifted, prompts) == pytest.approx(0.76, abs=0.05)
    assert posthoc_auc(real, shifted, prompts) == posthoc_auc(real, shifted, prompts)
    assert posthoc_auc(real, shifted + 5, prompts) > 0.99
    assert np.isnan(posthoc_auc(real[:12], fake[:12], prompts[:12]))


def test_a_prompt_is_never_judged_by_a_regression_that_saw_it() -> None:
    """Real and fake of a prompt differ by a trait of that prompt alone: a leak would give an area of 1."""
    generator = torch.Generator().manual_seed(0)
    prompts = [k // 8 for k in range(160)]
    ways = torch.randn(20, 40, generator=generator).repeat_interleave(8, 0) * 5
    grain = torch.randn(2, 160, 40, generator=generator)
    assert posthoc_auc(grain[0] + ways, grain[1] - ways, prompts) < 0.8
    assert posthoc_auc(grain[0] + ways, grain[1] - ways, list(range(160))) > 0.95


def test_posthoc_discriminator_measures_the_whole_set(make: Make, spoilt: Pictures) -> None:
    images, groups = spoilt
    reward = make("posthoc_discriminator", batch_size=7)
    eight_bit = images.mul(255).round().to(torch.uint8)
    assert reward.measure(eight_bit, groups) < 0.1
    same = torch.stack(
        [
            reward.references.picture(list(reward.references.of(t))[m], 64)
            for t, m in zip(groups.texts, groups.members, strict=True)
        ]
    )
    assert reward.measure(same, groups) == pytest.approx(0.5)
    assert not reward.learns and not reward.per_image
