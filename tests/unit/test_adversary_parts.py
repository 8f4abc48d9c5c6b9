"""Losses, augmentation, replay, memory and the networks of adversaries, each on its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reward_models.clip import ClipScorer
from reward_models.critics import ClipCritic
from reward_models.heads import PatchHead
from t2irl.adversary.augment import Augment, augment
from t2irl.adversary.losses import accuracy, auc, gradient_penalty, pair_loss
from t2irl.adversary.memory import Memory, Recent
from t2irl.adversary.replay import Old, Replay, ReplayBuffer

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ losses
def test_losses_are_the_published_formulas() -> None:
    real, fake = torch.tensor([[0.5, -1.0], [2.0, 3.0]]), torch.tensor([[-2.0, 0.0], [0.5, -0.5]])
    hinge = [0.5 * ((0.5 + 2.0) / 2 + (0.0 + 1.0) / 2), 0.5 * (0.0 + (1.5 + 0.5) / 2)]
    assert pair_loss("hinge", real, fake).tolist() == pytest.approx(hinge)
    one = pair_loss("bce", torch.tensor([[1.0]]), torch.tensor([[-2.0]]))
    assert one.item() == pytest.approx(0.5 * (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))))
    bt = pair_loss("bt", real, fake)
    assert torch.equal(bt, F.softplus(fake.mean(1) - real.mean(1)))
    # A softmax over the two scores with the label "reference", as the published code has it.
    both = torch.stack([real.mean(1), fake.mean(1)], 1)
    torch.testing.assert_close(bt, F.cross_entropy(both, torch.zeros(2, dtype=torch.long), reduction="none"))


@pytest.mark.parametrize("kind", ["bce", "bt"])
def test_smoothing_moves_the_best_logit_to_a_finite_place(kind: str) -> None:
    leads = torch.linspace(0, 12, 400)[:, None]
    losses = pair_loss(kind, leads, torch.zeros_like(leads), 0.1)  # type: ignore[arg-type]
    assert leads[losses.argmin()].item() == pytest.approx(math.log(0.9 / 0.1), abs=0.05)
    assert pair_loss(kind, leads, torch.zeros_like(leads)).argmin() > 380  # type: ignore[arg-type]


def test_accuracy_and_auc() -> None:
    real, fake = torch.tensor([3.0, 1.0, -1.0]), torch.tensor([2.0, -2.0, 0.5])
    assert accuracy("hinge", real, fake) == pytest.approx(3 / 6)
    assert accuracy("bt", real, fake) == pytest.approx(2 / 3)
    wins = sum(float(r > f) + 0.5 * float(r == f) for r in [1.0, 2.0, 2.0] for f in [2.0, 0.0])
    assert auc(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 0.0])) == pytest.approx(wins / 6)
    assert auc(noise(4000), noise(4000, seed=1)) == pytest.approx(0.5, abs=0.02)
    assert auc(noise(50) + 100, noise(70)) == 1 and auc(noise(50) - 100, noise(70)) == 0


def test_gradient_penalty_of_a_known_function() -> None:
    x, y = noise(5, 3).requires_grad_(), noise(5, 2, 4, seed=1).requires_grad_()
    weights = torch.tensor([1.0, 2.0, 2.0])
    found = gradient_penalty((x * weights).sum(1) + 3 * y[:, 0, 0] + y[:, 1].square().sum(1), (x, y))
    torch.testing.assert_close(found, 0.5 * (9 + 9 + (2 * y[:, 1]).square().sum(1)))
    unused = gradient_penalty(x[:, 0], (x, y))  # a part that the loss leaves out
    torch.testing.assert_close(unused, torch.full((5,), 0.5))
    found.sum().backward()
    assert y.grad is not None and torch.allclose(y.grad[:, 1], 4 * y[:, 1])  # it can be learned from


# ------------------------------------------------------------------------------------------------------ augmentation
@pytest.mark.parametrize("settings", [{"flip": True}, {"jitter": 0.5}, {"translate": 0.25}, {"cutout": 0.5}])
def test_augmentation_is_seeded_by_picture(settings: dict[str, float]) -> None:
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    how = Augment.model_validate(settings)
    changed = augment(images, how, range(6))
    assert torch.equal(changed[2:5], augment(images[2:5], how, range(2, 5)))
    assert torch.equal(changed, augment(images, how, range(6)))
    assert not torch.equal(changed, augment(images, how, range(6, 12))) and not torch.equal(changed, images)
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 1


def test_augmentation_does_what_it_says() -> None:
    assert not Augment().active and Augment(cutout=0.1).active
    images = torch.arange(256.0).view(1, 1, 16, 16).expand(40, 3, 16, 16) / 255
    assert torch.equal(augment(images, Augment(), range(40)), images)
    flipped = augment(images, Augment(flip=True), range(40))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)]
    assert 8 < sum(mirrored) < 32
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, images, strict=True))
    moved = augment(images, Augment(translate=0.25), range(40))
    step = (moved[:, 0, 8, 8] - images[:, 0, 8, 8]) * 255
    down, right = (step / 16).round(), step - 16 * (step / 16).round()
    assert round(float(down.abs().max())) == 4 and round(float(right.abs().max())) == 4
    gray = augment(torch.zeros(40, 3, 16, 16), Augment(cutout=0.5), range(40))
    assert (gray.sum((1, 2, 3)) == 0.5 * 3 * 64).all() and len({tuple(g[0].argmax(0).tolist()) for g in gray}) > 5


def test_augmentation_lets_gradients_through() -> None:
    images = torch.full((2, 3, 8, 8), 0.5, requires_grad=True)
    augment(images, Augment(flip=True, jitter=0.2, translate=0.2, cutout=0.2), [1, 2]).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------- replay and memory
def old(k: int) -> Old:
    """A picture of one colour."""
    return Old(torch.full((3, 2, 2), k % 256, dtype=torch.uint8), f"prompt {k}", k, k % 4)


def test_replay_keeps_the_newest_and_round_trips() -> None:
    buffer = ReplayBuffer(Replay(size=10, add=4, share=0.5))
    assert buffer.draw(16, 0, 0) == [] and buffer.state_dict() == {}
    for iteration in range(5):
        buffer.add([old(100 * iteration + k) for k in range(16)], 0, iteration)
    lines = [x.prompt for x in buffer.images]
    assert len(lines) == 10 and lines == sorted(lines) and min(lines) >= 200
    other = ReplayBuffer(buffer.settings)
    other.load_state_dict(buffer.state_dict())
    drawn, again = buffer.draw(12, 3, 7), other.draw(12, 3, 7)
    assert len(drawn) == 6
    for a, b in zip(drawn, again, strict=True):
        assert torch.equal(a.picture, b.picture) and (a.text, a.prompt, a.member) == (b.text, b.prompt, b.member)
    assert [x.prompt for x in buffer.draw(12, 3, 8)] != [x.prompt for x in drawn]


def test_memory_is_bounded_and_keeps_what_is_used() -> None:
    memory = Memory(limit=3 * 40)
    big = torch.zeros(4, 10)
    for k in range(3):
        memory.put(k, (big[k],))
    assert memory.get(0) is not None
    memory.put(3, (big[3],))
    assert [memory.get(k) is not None for k in range(4)] == [True, False, True, True]
    memory.put(3, (big[3], big[3]))
    assert memory.held == 120 and memory.get(0) is None
    kept = memory.get(3)
    assert kept is not None and kept[0].untyped_storage().nbytes() == 40
    memory.put(9, (torch.zeros(1000),))
    assert memory.held == 0


def test_recent_features_are_those_of_the_same_pictures() -> None:
    images = torch.randint(0, 256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float() / 255
    recent = Recent(10_000)

    def score(pictures: Tensor) -> None:
        recent.add(pictures, (pictures.mean((1, 2, 3)),))

    score(torch.rand(5, 3, 4, 4))  # an evaluation
    score(images[:4])
    score(images[4:])
    found = recent.take(images)
    assert found is not None and torch.equal(found[0], images.mean((1, 2, 3)))
    assert recent.take(images) is None
    for wrong in (images.flip(0), images[:5], torch.rand(6, 3, 4, 4)):
        score(wrong)
        assert recent.take(images) is None
    small = Recent(100)
    small.add(images, (images,))
    assert small.take(images) is None


# ------------------------------------------------------------------------------------------------------------- heads
def test_head_is_the_formula_and_seeded() -> None:
    head = PatchHead(6, 5)
    head.reset(3)
    x = noise(2, 7, 6)
    expected = F.gelu(x @ head.first.weight.T + head.first.bias) @ head.last.weight[0] + head.last.bias
    torch.testing.assert_close(head(x), expected)
    assert head(x[:, 0]).shape == (2,)
    twin, other = PatchHead(6, 5), PatchHead(6, 5)
    twin.reset(3)
    other.reset(4)
    assert torch.equal(twin(x), head(x)) and not torch.equal(other(x), head(x))
    assert sum(p.numel() for p in PatchHead(768, 512).parameters()) == 394_241  # the published head


def test_spectral_norm_bounds_the_slope() -> None:
    head = PatchHead(6, 16, spectral_norm=True)
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(50)
    x = noise(64, 6).requires_grad_()
    (slope,) = torch.autograd.grad(head(x).sum(), x)
    assert slope.norm(dim=1).max() < 1.13  # GELU's own largest slope
    before = {n: p.clone() for n, p in head.named_parameters()}
    head(x).sum().backward()
    assert all(torch.equal(before[n], p) for n, p in head.named_parameters()) and not list(head.buffers())
    plain = PatchHead(6, 16)
    plain.load_state_dict(head.state_dict())
    assert torch.autograd.grad(plain(x).sum(), x)[0].norm(dim=1).max() > 10


# ----------------------------------------------------------------------------------------------------- CLIP that learns
def test_clip_critic_is_clip(clip_folder: Path, pictures: tuple[Tensor, object]) -> None:
    images, texts = pictures[0][:5], [f"text {k}" for k in range(5)]
    plain = ClipScorer.load(clip_folder, CPU)
    expected = plain.model.logit_scale.exp() * plain.score(images, texts) / 26
    for blocks in (1, 2):
        critic = ClipCritic(ClipScorer.load(clip_folder, CPU), blocks, 26.0)
        torch.testing.assert_close(critic.score(critic.embed(images), texts, []), expected)


def test_only_the_last_blocks_of_clip_learn(clip_folder: Path, pictures: tuple[Tensor, object]) -> None:
    """A flag set on a module would freeze nothing: every parameter is asked."""
    critic = ClipCritic(ClipScorer.load(clip_folder, CPU), 1, 1.0)
    open_ones = {n for n, p in critic.scorer.model.named_parameters() if p.requires_grad}
    assert open_ones and all(n.startswith("vision_model.encoder.layers.1.") for n in open_ones)
    assert len(open_ones) == len(critic.trained)
    critic.judge(critic.embed(pictures[0][:4]), list("abcd"), [])["score"].sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in critic.trained.items() if "k_proj.bias" not in n
    )
    assert all(p.grad is None for n, p in critic.scorer.model.named_parameters() if n not in open_ones)


def test_clip_critic_refuses_blocks_that_are_not_there(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match="tune_layers = 3: the image tower has 2 blocks, so use 1 to 2"):
        ClipCritic(ClipScorer.load(clip_folder, CPU), 3, 1.0)
