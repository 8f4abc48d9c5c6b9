"""Reference images spoilt on purpose, which an adversary learns to turn down."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from t2irl import registry
from t2irl.adversary.losses import auc
from t2irl.adversary.negatives import Negatives, spoil
from t2irl.corruptions import KINDS
from t2irl.types import PromptGroups
from tests.adversaries import iterate
from tests.end_to_end.runs import assert_equal

Make = Callable[..., Any]
Pictures = tuple[Tensor, PromptGroups]


def bytes_of(images: Tensor) -> Tensor:
    """Pictures as files hold them."""
    return images.mul(255).round().to(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoilt_picture_depends_on_its_seed_alone(pictures: Pictures, kind: str) -> None:
    given, settings = bytes_of(pictures[0][:6]), Negatives(kinds=(kind,))
    found = spoil(given, settings, range(6))
    assert found.shape == given.shape and found.dtype == torch.uint8
    assert (found != given).flatten(1).any(1).sum() >= 5  # an empty picture has no object to take a piece from
    assert torch.equal(found[2:4], spoil(given[2:4], settings, [2, 3]))
    assert not torch.equal(found, spoil(given, settings, range(6, 12)))


def test_every_kind_is_drawn(pictures: Pictures) -> None:
    given = bytes_of(pictures[0][:1]).expand(60, -1, -1, -1)
    one = {kind: spoil(given, Negatives(kinds=(kind,)), range(60)) for kind in ("blur", "grain")}
    both = spoil(given, Negatives(kinds=("blur", "grain")), range(60))
    sharpness = [(x[..., 1:].float() - x[..., :-1].float()).abs().mean((1, 2, 3)) for x in (*one.values(), both)]
    limit = (sharpness[0].max() + sharpness[1].min()) / 2
    assert sharpness[0].max() < limit < sharpness[1].min()
    assert 15 < int((sharpness[2] > limit).sum()) < 45


@pytest.mark.parametrize(
    "kind, loss",
    [
        ("adversarial_dino", "hinge"),
        ("adversarial_dino", "bce"),
        ("adversarial_dino", "bt"),
        ("adversarial_clip", "bce"),
    ],
)
def test_it_learns_of_faults_that_the_policy_does_not_have(
    make: Make, pictures: Pictures, kind: str, loss: str
) -> None:
    """The policy's pictures are reference images: only spoilt ones say what a fault is."""
    areas = {}
    for weight in (None, 2.0):
        reward = make(
            kind, lr=1e-2 if kind == "adversarial_dino" else 3e-3, turns={"type": "fixed", "updates": 8}, loss=loss, heldout=0,
            negatives=None if weight is None else {"kinds": ["grain", "neon"], "weight": weight},
        )  # fmt: skip
        images, groups = pictures
        for _ in range(5 if kind == "adversarial_dino" else 2):
            iterate(reward, images, groups)
        broken = spoil(bytes_of(images), Negatives(kinds=("grain", "neon")), range(1000, 1048)).float() / 255
        areas[weight] = auc(reward.score(images, groups).detach(), reward.score(broken, groups).detach())
    assert areas[2.0] > 0.7 and areas[2.0] > areas[None] + 0.1


def test_the_weight_counts(make: Make, pictures: Pictures) -> None:
    """The second loss is added to that of the pairs, in its weight, and is absent without the setting."""
    images, groups = pictures
    losses = {}
    for weight in (None, 1.0, 3.0):
        reward = make("adversarial_dino", heldout=0, negatives=weight and {"kinds": ["blur"], "weight": weight})
        losses[weight] = iterate(reward, images, groups)["loss"]
    assert losses[3.0] - losses[1.0] == pytest.approx(2 * (losses[1.0] - losses[None]), rel=1e-4)
    assert losses[1.0] > losses[None] + 0.1


def test_resumed(make: Make, pictures: Pictures) -> None:
    images, groups = pictures
    settings = {"negatives": {"kinds": ["blur", "ghost"]}, "condition": {"images": 1}, "lr": 1e-3}
    whole, resumed = make("adversarial_dino", **settings), make("adversarial_dino", **settings)
    iterate(whole, images, groups)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))  # else they would share moments
    assert iterate(whole, images.roll(1, -1), groups) == iterate(resumed, images.roll(1, -1), groups)
    assert_equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"negatives": {"kinds": ["rust"]}}, "rust is no way to spoil a picture; known: grain"),
        ({"negatives": {"kinds": []}}, "kinds"),
        ({"negatives": {"weight": 0}}, "weight"),
        ({"negatives": {}, "augment": {"jitter": 0.1}}, "remove negatives or augment"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        registry.find("rewards", "adversarial_dino").Config.model_validate({"type": "adversarial_dino", **settings})
