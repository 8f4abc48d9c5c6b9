"""Rewards that learn: what they learn from, that scoring and learning see the same, that nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2irl import registry
from t2irl.adversary.learning import decision
from t2irl.adversary.losses import auc
from t2irl.adversary.memory import EQUAL_BATCH
from t2irl.errors import ConfigError, UserError
from t2irl.models.base import ModelFamily
from t2irl.types import PromptGroups
from tests.adversaries import changed, iterate, parameters

CPU = torch.device("cpu")
Make = Callable[..., Any]
Pictures = tuple[Tensor, PromptGroups]


# -------------------------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize(
    "name, settings",
    [
        ("adversarial_dino", {"turns": {"type": "fixed", "updates": 4}, "loss": "hinge"}),
        (
            "adversarial_dino",
            {
                "turns": {"type": "fixed", "updates": 4},
                "loss": "bce",
                "label_smoothing": 0.1,
                "penalty": {"on": "features", "weight": 0.1},
            },
        ),
        (
            "adversarial_dino",
            {"turns": {"type": "fixed", "updates": 4}, "loss": "bt", "feature_norm": "none"},
        ),
        ("adversarial_clip", {"turns": {"type": "fixed", "updates": 2}, "tune_layers": 1}),
        ("adversarial_clip", {"turns": {"type": "fixed", "updates": 2}, "loss": "bce"}),
        ("adversarial_clip", {"turns": {"type": "fixed", "updates": 2}, "loss": "hinge"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_it_learns_what_tells_the_two_apart(name: str, settings: dict[str, Any], make: Make, spoilt: Pictures) -> None:
    """Judged on reference images that it never learned from, by the score that the policy gets."""
    images, groups = spoilt
    reward = make(name, lr=3e-3, heldout=0.25, **settings)
    first = iterate(reward, images, groups)
    for _ in range(24):
        last = iterate(reward, images, groups)
    assert last["heldout_auc"] > 0.9 and last["gap"] > 0 and last["gap"] > first["gap"]
    assert last["heldout_accuracy"] > 0.8 and last["loss"] < first["loss"]
    drawn = reward.pairs.draw(groups, 99)
    kept = [k for k, file in enumerate(drawn.kept) if file]
    pixels = reward.reference_pictures([drawn.kept[k] for k in kept]).float() / 255
    assert auc(reward.score(pixels, groups[kept]), reward.score(images, groups)) > 0.9


def test_score_and_loss_see_the_same(make: Make, spoilt: Pictures) -> None:
    """The published code trains the head on features as they are and asks it about unit vectors."""
    images, groups = spoilt

    def both(**settings: Any) -> tuple[Tensor, Tensor]:
        reward = make("adversarial_dino", **settings)
        with torch.no_grad():
            features = reward.critic.embed(images)
            seeds = [0] * len(images)
            return reward.score(images, groups), decision(
                reward.critic, reward.critic.judge(features, groups.texts, seeds)
            )

    for norm in ("l2", "none"):
        score, seen = both(feature_norm=norm)
        torch.testing.assert_close(score, seen)
    score, seen = both(feature_norm="none", score_feature_norm="l2", global_loss_weight=1.0)
    assert (score - seen).abs().max() > 1e-3  # published, and reachable
    expected, _ = both(feature_norm="l2")
    torch.testing.assert_close(score, expected)


def test_the_order_of_patches_does_not_matter(make: Make, spoilt: Pictures) -> None:
    reward = make("adversarial_dino")
    with torch.no_grad():
        whole, patches = reward.critic.embed(spoilt[0][:6])
        order = torch.randperm(patches.shape[1], generator=torch.Generator().manual_seed(0))
        a, b = (reward.critic.score((whole, x), [""] * 6, [0] * 6) for x in (patches, patches[:, order]))
    torch.testing.assert_close(a, b)
    assert torch.equal(reward.score(*spoilt), reward.score(*spoilt))


def test_random_patches_belong_to_the_picture_and_the_iteration(make: Make, spoilt: Pictures) -> None:
    images, groups = spoilt
    reward = make("adversarial_dino", patch_sampling="random", patches=8, turns={"type": "trigger", "margin": 1e9})
    score = reward.score(images, groups)
    torch.testing.assert_close(reward.score(images[20:], groups[20:]), score[20:], rtol=0, atol=1e-6)
    everything = make("adversarial_dino").score(images, groups)
    assert 1e-5 < (score - everything).abs().max() < 1
    iterate(reward, images, groups)  # nobody learns, but the iteration is another one
    assert not torch.equal(reward.score(images, groups), score)


def test_a_step_in_float32_moves_everything_and_nothing_frozen(make: Make, spoilt: Pictures) -> None:
    """With bf16 parameters most of the published learning rate's steps are lost to rounding."""
    fixed = {"type": "fixed"}
    cases = [
        ("adversarial_dino", {}, {"head_precision": "bf16"}, 1e-4),
        ("adversarial_clip", {"turns": fixed}, {"turns": fixed, "tuned_precision": "bf16"}, 5e-6),
    ]
    for name, right, published, lr in cases:
        reward = make(name, lr=lr, **right)
        network = reward.critic.backbone if name == "adversarial_dino" else reward.critic.scorer.model
        own = {id(p) for p in reward.critic.trained.values()}
        frozen = {n: p.clone() for n, p in network.named_parameters() if id(p) not in own}
        before = parameters(reward)
        iterate(reward, *spoilt)
        assert changed(before, reward) > 0.95
        assert all(p.dtype == torch.float32 for p in reward.critic.trained.values())
        now = dict(network.named_parameters())
        assert all(torch.equal(p, now[n]) and not now[n].requires_grad for n, p in frozen.items())
        coarse = make(name, lr=lr, **published)
        before = parameters(coarse)
        iterate(coarse, *spoilt)
        assert coarse.learner.adamw.param_groups[0]["params"][0].dtype == torch.bfloat16
        assert changed(before, coarse) < (0.6 if name == "adversarial_clip" else 0.95)


@pytest.mark.parametrize("on", ["features", "inputs"])
def test_the_penalty_flattens_the_slope(on: str, make: Make, spoilt: Pictures) -> None:
    def slope(**settings: Any) -> float:
        reward = make("adversarial_dino", lr=3e-3, **settings)
        for _ in range(12):
            metrics = iterate(reward, *spoilt)
        drawn = [file for file in reward.pairs.draw(spoilt[1], 0).learned if file][:8]
        pixels = reward.reference_pictures(drawn).float().div(255).requires_grad_()
        features = reward.critic.embed(pixels)
        value = decision(reward.critic, reward.critic.judge(features, [""] * 8, [0] * 8)).sum()
        target = (pixels,) if on == "inputs" else features
        assert metrics["penalty"] > 0 or "penalty" not in settings
        return sum(float(g.square().sum()) for g in torch.autograd.grad(value, target))

    assert slope(penalty={"on": on, "weight": 30.0}) < 0.5 * slope()


# ------------------------------------------------------------------------------------------------------------- turns
def test_the_trigger_keeps_an_adversary_that_is_ahead_still(make: Make, spoilt: Pictures) -> None:
    images, groups = spoilt
    reward = make("adversarial_clip", lr=3e-3)
    before, metrics = parameters(reward), iterate(reward, images, groups)
    ahead = metrics["gap"] >= 0
    assert (changed(before, reward) == 0) == ahead and metrics["learned"] == (0 if ahead else 1)
    for margin, steps in ((1e9, 0), (-1e9, 3)):
        reward = make("adversarial_clip", lr=3e-3, turns={"type": "trigger", "margin": margin, "updates": 3})
        before = parameters(reward)
        assert iterate(reward, images, groups)["learned"] == steps
        assert (changed(before, reward) > 0) == (steps > 0) and reward.policy_turn


def test_an_adversary_may_keep_the_rollout(make: Make, spoilt: Pictures) -> None:
    reward = make("adversarial_dino", turns={"type": "fixed", "learn": 2, "rest": 1, "skip_policy": True})
    turns = []
    for _ in range(6):
        learned = iterate(reward, *spoilt)["learned"]
        turns.append((learned, reward.policy_turn))
    assert turns == [(1, False), (1, False), (0, True)] * 2


# ------------------------------------------------------------------------------------------------------ what it costs
def test_nothing_is_computed_twice(make: Make, spoilt: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollout images go through the backbone once an iteration, reference images once a run."""
    reward = make("adversarial_dino")
    seen: list[int] = []
    embed = reward.critic.embed
    monkeypatch.setattr(reward.critic, "embed", lambda images: (seen.append(len(images)), embed(images))[1])
    used: set[Path] = set()
    before = 0
    for iteration in range(12):
        seen.clear()
        drawn = reward.pairs.draw(spoilt[1], iteration)
        used |= {f for f in (*drawn.learned, *drawn.kept) if f}
        iterate(reward, *spoilt)
        assert reward._features is not None and reward._features.computed == len(used)
        assert sum(seen) % EQUAL_BATCH == 0 and sum(seen) - len(spoilt[0]) <= len(used) - before + 3 * (EQUAL_BATCH - 1)
        before = len(used)
    assert len(used) > 80


# ----------------------------------------------------------------------------------------------------- reference images
def test_some_reference_images_are_never_learned_from(make: Make, pictures: Pictures) -> None:
    groups = pictures[1]
    pairs = make("adversarial_dino", heldout=0.3).pairs
    learned, kept = set(), set()
    for iteration in range(30):
        drawn = pairs.draw(groups, iteration)
        learned |= {(t, f) for t, f in zip(groups.texts, drawn.learned, strict=True) if f}
        kept |= {(t, f) for t, f in zip(groups.texts, drawn.kept, strict=True) if f}
        halves = [pairs.draw(groups[part], iteration) for part in (slice(0, 17), slice(17, 48))]
        assert halves[0].learned + halves[1].learned == drawn.learned  # whatever process holds an image
    assert learned.isdisjoint(kept) and len(learned | kept) == 96
    assert 12 < len(kept) < 48


def test_a_group_meets_every_file_before_any_twice(make: Make) -> None:
    pairs = make("adversarial_dino").pairs
    files = [Path(f"{k}.png") for k in range(3)]
    chosen = [pairs.choose(files, 7, member, 4) for member in range(6)]
    assert set(chosen[:3]) == set(chosen[3:]) == set(files)
    assert chosen != [pairs.choose(files, 7, member, 5) for member in range(6)] or chosen != [
        pairs.choose(files, 7, member, 6) for member in range(6)
    ]
    assert pairs.choose([], 7, 0, 4) is None


def test_a_style_folder_serves_all_prompts(make: Make, reference_index: Path, spoilt: Pictures) -> None:
    reward = make("adversarial_dino", references={"folder": reference_index.parent}, heldout=0.2)
    drawn = reward.pairs.draw(spoilt[1], 0)
    assert None not in drawn.learned and None not in drawn.kept
    assert len(reward.pairs.parts("anything")[0]) + len(reward.pairs.parts("anything")[1]) == 96
    assert iterate(reward, *spoilt)["learned"] == 1


def test_a_missing_reference_image_is_found_at_the_start(
    make: Make, reference_index: Path, tmp_path: Path, pictures: Pictures
) -> None:
    """Before anything is sampled, and from the index alone, so that all processes fail together and none waits."""
    index = json.loads(reference_index.read_text())
    gone = pictures[1].prompts[3]
    index.pop(gone)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=gone):
        make("adversarial_dino", references={"index": tmp_path / "index.json", "root": reference_index.parent})


class Mirror(ModelFamily):
    """A model whose image encoder and decoder turn light to dark."""

    def __init__(self) -> None:
        super().__init__(ModelFamily.Config(type="mirror", path=Path("x")), CPU)

    def encode_images(self, images: Tensor) -> Tensor:
        """The negative."""
        return 1 - images

    def decode(self, latents: Tensor) -> Tensor:
        """As it is."""
        return latents


def test_reencoded_reference_images_go_the_policys_way(make: Make, pictures: Pictures, reference_index: Path) -> None:
    reward = make("adversarial_dino")
    config = type(reward.config).model_validate(reward.config.model_dump(exclude={"reencode"}))  # the default
    other = registry.build("rewards", config, CPU)
    other.prepare(pictures[1].prompts, Mirror())
    reward.update(*pictures)
    with pytest.warns(UserWarning, match=r"leave -?\d+\.\d dB of these reference images"):
        other.update(*pictures)
    files = [file for file in reward.pairs.draw(pictures[1], 0).learned if file][:5]
    plain, redrawn = reward.reference_pictures(files), other.reference_pictures(files)
    assert redrawn.dtype == torch.uint8 and torch.equal(redrawn, 255 - plain)
    with pytest.raises(ConfigError, match="reencode: true needs a model that encodes images, and plain does not"):
        registry.build("rewards", config, CPU).prepare(
            pictures[1].prompts, ModelFamily(ModelFamily.Config(type="plain", path=Path("x")), CPU)
        )
