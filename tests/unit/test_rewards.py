"""Every reward that can be found, and how each proxy of the shapes world is hacked."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from reward_models.clip import ClipScorer
from t2irl import registry
from t2irl.errors import DataError
from t2irl.rewards import shapes as shapes_reward
from t2irl.rewards.base import Reward
from t2irl.shapes import proxies
from t2irl.shapes.captions import BACKGROUNDS, COLORS, parse_caption, sample_captions
from t2irl.shapes.render import SIZE, render, sample_scene
from t2irl.shapes.styles import STYLES
from t2irl.shapes.verify import verify
from t2irl.types import PromptGroups

CPU = torch.device("cpu")
ALL = registry.names("rewards")
OWN_TESTS = ("geneval", "hpsv3", "ocr", "vlm_score")
"""Need prompts of their own form, or a server that answers; see their own tests."""
NAMES = [name for name in ALL if registry.find("rewards", name).per_image and name not in OWN_TESTS]
PROXIES = ("color_coverage", "vividness", "object_count", "tiny_clip")
SHAPES_ONLY = ("shapes", "shapes_style", "color_coverage", "object_count")


# ------------------------------------------------------------------------------------------------------ every reward
def test_all_rewards_are_found() -> None:
    assert {"shapes", *PROXIES} <= set(NAMES)


@pytest.mark.parametrize("name", ALL)
def test_config_round_trip(name: str) -> None:
    config_class = registry.find("rewards", name).Config
    config = config_class.model_validate({"type": name, "weight": 0.25})
    assert config.type == name and config.weight == 0.25
    assert config_class.model_validate(json.loads(config.model_dump_json())) == config
    with pytest.raises(ValidationError, match="wieght"):
        config_class.model_validate({"type": name, "wieght": 1})
    undocumented = [key for key, field in config_class.model_fields.items() if key != "type" and not field.description]
    assert not undocumented


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_and_one_per_image(
    name: str, make: Callable[..., Reward], pictures: tuple[Tensor, PromptGroups]
) -> None:
    images, groups = pictures
    before = images.clone()
    scores = make(name).score(images, groups)
    assert scores.shape == (48,) and scores.dtype == torch.float32 and scores.device == CPU
    assert scores.isfinite().all() and (len(scores.unique()) > 1 or name == "shapes_style")  # all are in one style
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_batch_permutes_the_scores(
    name: str, make: Callable[..., Reward], pictures: tuple[Tensor, PromptGroups]
) -> None:
    images, groups = pictures
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    reward = make(name)
    straight, shuffled = reward.score(images, groups), reward.score(images[order], groups[order.tolist()])
    torch.testing.assert_close(shuffled, straight[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if not registry.find("rewards", name).whole_groups])
def test_batches_do_not_matter(name: str, make: Callable[..., Reward], pictures: tuple[Tensor, PromptGroups]) -> None:
    images, groups = pictures
    parts = [slice(0, 5), slice(5, 6), slice(6, 48)]
    apart = torch.cat([make(name).score(images[p], groups[p]) for p in parts])
    torch.testing.assert_close(apart, make(name).score(images, groups), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip(name: str, make: Callable[..., Reward], pictures: tuple[Tensor, PromptGroups]) -> None:
    one, other = make(name), make(name)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.score(*pictures), other.score(*pictures))


@pytest.mark.parametrize("name", SHAPES_ONLY)
def test_other_pictures_and_prompts_are_refused(name: str, make: Callable[..., Reward]) -> None:
    reward, caption = make(name), "a red circle on a white background"
    with pytest.raises(DataError, match=r"got \(1, 3, 32, 32\)"):
        reward.score(torch.zeros(1, 3, 32, 32), PromptGroups.of([caption], [0], [0]))
    with pytest.raises(DataError, match="cannot read: not a caption of the shapes world: 'a cat'"):
        reward.score(torch.zeros(1, 3, SIZE, SIZE), PromptGroups.of(["a cat"], [0], [0]))
    with pytest.raises(DataError, match="2 pictures but 1 captions"):
        reward.score(torch.zeros(2, 3, SIZE, SIZE), PromptGroups.of([caption], [0], [0]))


def test_styles_are_known_and_plain_has_no_strength() -> None:
    config = registry.find("rewards", "shapes_style").Config
    with pytest.raises(ValidationError, match="neon is no style; known: plain, outlined, pastel"):
        config(style="neon")
    with pytest.raises(ValidationError, match="take measure: nearest"):
        config(style="plain", measure="strength")


@pytest.mark.parametrize("measure", ["nearest", "strength"])
def test_a_style_is_known_when_it_is_seen(measure: str, make: Callable[..., Reward]) -> None:
    rng = np.random.default_rng(4)
    captions = sample_captions(8, rng)
    scenes = [sample_scene(caption, rng) for caption in captions]
    drawn = np.stack([STYLES[style](scene) for style in ("plain", "outlined") for scene in scenes])
    groups = PromptGroups.of([c.text for c in captions] * 2, list(range(16)), [0] * 16)
    scores = make("shapes_style", measure=measure).score(torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255, groups)
    assert (scores[:8] < 0.1).all() and (scores[8:] > 0.9).all()


# -------------------------------------------------------------------------------------------------------------- gold
@pytest.mark.parametrize("measure", ["clauses", "correct", "cleanliness", "gold"])
def test_shapes_gives_the_verifiers_measures(
    measure: str, make: Callable[..., Reward], pictures: tuple[Tensor, PromptGroups]
) -> None:
    images, groups = pictures
    assert torch.equal(make("shapes", measure=measure).score(images, groups), verify(images, groups.texts)[measure])


def test_several_measures_cost_one_verification(
    make: Callable[..., Reward], pictures: tuple[Tensor, PromptGroups]
) -> None:
    images, groups = pictures
    shapes_reward._verify.cache_clear()
    first = make("shapes", measure="clauses").score(images, groups)
    first.zero_()  # the caller's copy
    assert make("shapes", measure="clauses").score(images, groups).sum() > 0
    make("shapes", measure="correct").score(images, groups)
    assert shapes_reward._verify.cache_info().misses == 1
    changed = images.clone()
    changed[0] = 1 - changed[0]
    make("shapes").score(changed, groups)
    assert shapes_reward._verify.cache_info().misses == 2


# ----------------------------------------------------------------------------------------------------------- proxies
def painted(*colors: str) -> Tensor:
    """A canvas of equally wide stripes: (1, 3, 64, 64)."""
    palette = COLORS | BACKGROUNDS
    columns = [palette[colors[x * len(colors) // SIZE]] for x in range(SIZE)]
    return torch.tensor(columns).T.view(1, 3, 1, SIZE).expand(1, 3, SIZE, SIZE) / 255


def test_color_coverage_counts_named_colors_only() -> None:
    pair = ["a red circle and a blue star on a white background"]
    assert proxies.color_coverage(painted("red", "white"), pair).item() == 0.5
    assert proxies.color_coverage(painted("red", "blue", "green", "white"), pair).item() == 0.5
    for color in COLORS:
        texts = [f"{'an' if color == 'orange' else 'a'} {color} circle on a white background"]
        assert [proxies.color_coverage(painted(other), texts).item() for other in COLORS] == [
            float(other == color) for other in COLORS
        ]


def test_vividness_is_saturation_times_contrast() -> None:
    assert proxies.vividness(painted("white", "black")).item() == pytest.approx(0)
    assert proxies.vividness(painted("red")).item() == pytest.approx(0, abs=1e-6)
    stripes = torch.zeros(1, 3, SIZE, SIZE)
    stripes[:, :2, :, ::2] = 1  # yellow, luma 0.886
    stripes[:, 2, :, 1::2] = 1  # blue, luma 0.114
    assert proxies.vividness(stripes).item() == pytest.approx(0.772, abs=1e-5)
    assert proxies.vividness(stripes[..., :32, :16]).item() == pytest.approx(0.772, abs=1e-5)


def test_object_count_is_right_on_clean_pictures() -> None:
    rng = np.random.default_rng(4)
    wanted = sample_captions(120, rng)
    drawn = np.stack([render(sample_scene(caption, rng)) for caption in wanted])
    counts = proxies.object_count(torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255, [c.text for c in wanted])
    assert counts.tolist() == [len(c.objects) for c in wanted]


def test_object_count_takes_fragments_for_objects() -> None:
    text = ["a red circle on a white background"]
    image = painted("white").clone()
    red = torch.tensor(COLORS["red"]).view(3, 1, 1) / 255
    assert proxies.object_count(image, text).item() == 0
    image[0, :, 10:12, 10:12] = red
    assert proxies.object_count(image, text).item() == 1
    image[0, :, 12:14, 12:14] = red  # touches at a corner only
    image[0, :, 30:31, 30:33] = red  # three pixels are one too few
    assert proxies.object_count(image, text).item() == 2
    assert proxies.object_count(image, ["a blue circle on a white background"]).item() == 0
    assert verify(image, text)["correct"].item() == 0


def flood(images: Tensor, texts: list[str]) -> Tensor:
    """The canvas in the caption's first colour."""
    return torch.cat([painted(parse_caption(text).objects[0][0]) for text in texts])


def neon(images: Tensor, texts: list[str]) -> Tensor:
    """Pure yellow over the light half of each picture, pure blue over the dark half."""
    light = images.mean(1) >= images.mean((1, 2, 3))[:, None, None]
    return torch.stack([light, light, ~light], 1).float()


def crumbs(images: Tensor, texts: list[str]) -> Tensor:
    """A lattice of 3 x 3 fragments in the caption's first colour, on its background."""
    inside = torch.arange(SIZE) % 6 < 3
    lattice = inside[:, None] & inside[None]
    papers = torch.cat([painted(parse_caption(text).background) for text in texts])
    return torch.where(lattice, flood(images, texts), papers)


def attack(images: Tensor, texts: list[str], scorer: ClipScorer) -> Tensor:
    """Adversarial texture: ten steps up the judge's gradient."""
    for _ in range(10):
        images = images.detach().requires_grad_()
        gradient = torch.autograd.grad(scorer.score(images, texts).sum(), images)[0]
        images = (images + 0.03 * gradient.sign()).clamp(0, 1)
    return images.detach()


@pytest.mark.parametrize("name", PROXIES)
def test_each_proxy_can_be_hacked(
    name: str, make: Callable[..., Reward], pictures: tuple[Tensor, PromptGroups]
) -> None:
    images, groups = pictures
    texts, reward, gold = groups.texts, make(name), make("shapes")
    hack = {"color_coverage": flood, "vividness": neon, "object_count": crumbs}.get(name)
    hacked = hack(images, texts) if hack else attack(images, texts, reward.scorer)  # type: ignore[attr-defined]
    assert (reward.score(hacked, groups) > reward.score(images, groups)).all()
    before, after = gold.score(images, groups), gold.score(hacked, groups)
    assert before.mean() > 0.4 and after.mean() < 0.5 * before.mean()
    assert (after <= before).all()
