"""Held-out measurement: fixed pictures whatever the batch size and the number of processes, means of every measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2irl.config import Run
from t2irl.evaluation import evaluate as module
from t2irl.evaluation.evaluate import evaluate, sample_fixed
from t2irl.rewards.base import Reward
from t2irl.rollout import Noise
from t2irl.train import Parts
from t2irl.types import PromptGroups
from tests.invariants.toy import toy_parts, toy_run

Folder = Callable[..., Path]
PROMPTS = ("a red circle", "a large blue square", "a photo")
HERE = "tests.unit.test_evaluate"


class Darkness(Reward):
    """1 - brightness; does not apply to the prompt "a photo"."""

    class Config(Reward.Config):
        """No settings."""

        type: str = f"{HERE}:Darkness"

    may_skip = True

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """See the class."""
        skipped = torch.tensor([text == "a photo" for text in groups.texts])
        return (1 - images.mean((1, 2, 3))).masked_fill(skipped, math.nan)


class Undecided(Reward):
    """Applies to nothing."""

    class Config(Reward.Config):
        """No settings."""

        type: str = f"{HERE}:Undecided"

    may_skip = True

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """See the class."""
        return torch.full((len(groups),), math.nan)


def setup(folder: Path, batch_size: int = 8, **evaluation: Any) -> tuple[Run, Parts]:
    """A run whose policy and its average were moved."""
    changes = {
        "model": {"type": "sd3", "path": folder, "max_sequence_length": 4},
        "rollout": {"batch_size": batch_size, "steps": 3},
        "heldout_rewards": {"darkness": {"type": f"{HERE}:Darkness"}, "undecided": {"type": f"{HERE}:Undecided"}},
        "evaluation": {"images": 7, **evaluation},
    }
    run = toy_run(changes)
    parts = toy_parts(run)
    generator = torch.Generator().manual_seed(4)
    assert parts.policy.average is not None
    for name, p in parts.policy.trained.items():
        p.data.add_(0.3 * torch.randn(p.shape, generator=generator))
        parts.policy.average[name].add_(0.3 * torch.randn(p.shape, generator=generator))
    return run, parts


def fixed(run: Run, parts: Parts, count: int = 7, part: tuple[int, int] = (0, 1)) -> tuple[PromptGroups, Tensor]:
    """Fixed pictures of the trained weights."""
    found = sample_fixed(parts.policy, run, PROMPTS, count, Noise(0, "evaluation"), part=part)
    return found.groups, found.images


def off_by(a: Tensor, b: Tensor) -> int:
    """Largest difference of two sets of uint8 pictures."""
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_matter(sd3_folder: Folder, batch_size: int) -> None:
    """The noise is the same to the last bit, a picture up to the rounding of another batch shape."""
    (run, parts), (small_run, small) = setup(sd3_folder()), setup(sd3_folder(), batch_size)
    (groups, images), (small_groups, small_images) = fixed(run, parts), fixed(small_run, small)
    assert groups == small_groups
    assert groups.ids == (0, 1, 2, 0, 1, 2, 0)
    assert groups.members == (0, 0, 0, 1, 1, 1, 2)
    assert images.shape == (7, 3, 16, 16)
    assert off_by(images, small_images) <= 1
    assert off_by(images[0], images[3]) > 10  # one prompt, other noise
    whole = Noise(0, "evaluation").draw(groups, 1, (4, 8, 8))
    pieces = [Noise(0, "evaluation").draw(groups[i : i + 1], 1, (4, 8, 8)) for i in range(7)]
    assert torch.equal(whole, torch.cat(pieces))
    rewards, small_rewards = (parts.rewards, parts.heldout), (small.rewards, small.heldout)
    means = evaluate(parts.policy, run, PROMPTS, rewards)
    small_means = evaluate(small.policy, small_run, PROMPTS, small_rewards)
    assert small_means == pytest.approx(means, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(("count", "processes"), [(7, 2), (7, 3), (4, 3), (2, 4)])
def test_the_parts_of_all_processes_are_the_whole(sd3_folder: Folder, count: int, processes: int) -> None:
    run, parts = setup(sd3_folder())
    groups, images = fixed(run, parts, count)
    shares = [fixed(run, parts, count, (i, processes)) for i in range(processes)]
    assert [i for g, _ in shares for i in g.ids] == list(groups.ids)
    assert [m for g, _ in shares for m in g.members] == list(groups.members)
    assert [text for g, _ in shares for text in g.texts] == groups.texts
    assert off_by(torch.cat([x for _, x in shares if len(x)]), images) <= 1
    assert max(len(g) for g, _ in shares) == -(-count // processes)


def test_means_of_processes_are_the_means_of_the_whole(sd3_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes play one after another; the tables that they would gather are put together here."""
    run, parts = setup(sd3_folder())
    rewards = (parts.rewards, parts.heldout)
    whole = evaluate(parts.policy, run, PROMPTS, rewards)
    sent: list[list[Tensor]] = []
    monkeypatch.setattr(module.distributed, "world_size", lambda: 3)
    monkeypatch.setattr(module.distributed, "any_process", lambda flag, device: flag)
    for rank in range(3):
        sent.append([])
        monkeypatch.setattr(module.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(module.distributed, "gather_rows", lambda rows, device: (sent[-1].append(rows), rows)[1])
        evaluate(parts.policy, run, PROMPTS, rewards)
    tables = iter([torch.cat(rows) for rows in zip(*sent, strict=True)])
    monkeypatch.setattr(module.distributed, "gather_rows", lambda rows, device: next(tables))
    assert evaluate(parts.policy, run, PROMPTS, rewards) == pytest.approx(whole, abs=1e-5, nan_ok=True)


def test_means_are_of_the_averaged_weights_and_of_what_applies(sd3_folder: Folder) -> None:
    run, parts = setup(sd3_folder())
    told: list[int] = []
    means = evaluate(parts.policy, run, PROMPTS, (parts.rewards, parts.heldout), told.append)
    assert sum(told) == 7
    with parts.policy.averaged():
        groups, images = fixed(run, parts)
    pictures = images.float() / 255
    kept = torch.tensor([text != "a photo" for text in groups.texts])
    assert list(means) == ["brightness", "darkness", "undecided"]
    lengths = sum(len(text) for text in groups.texts) / 7  # the toy's brightness depends on the prompt as well
    assert means["brightness"] == pytest.approx(pictures.mean().item() + 0.01 * lengths, abs=1e-6)
    assert means["darkness"] == pytest.approx(1 - pictures[kept].mean().item(), abs=1e-6)
    assert math.isnan(means["undecided"])
    live = fixed(run, parts)[1].float() / 255
    assert abs(live.mean() - pictures.mean()).item() > 1e-3


def test_steps_and_guidance_of_the_evaluation(sd3_folder: Folder) -> None:
    run, parts = setup(sd3_folder(), steps=2, guidance_scale=3.0)
    work = parts.family.work
    fixed(run, parts)
    assert (work["denoiser_forward_calls"], work["denoiser_forward_images"]) == (2, 2 * 2 * 7)
    plain_run, plain = setup(sd3_folder())
    work = plain.family.work
    fixed(plain_run, plain)
    assert (work["denoiser_forward_calls"], work["denoiser_forward_images"]) == (3, 3 * 7)
    assert work["encoded_prompts"] == 3
    assert work["decoded_images"] == 7


def test_a_batch_encodes_only_its_own_prompts(sd3_folder: Folder) -> None:
    """Not all prompts of the evaluation for each of its batches, which without a cache would be many times the work."""
    run, parts = setup(sd3_folder(), batch_size=1)
    parts.family.config = parts.family.config.model_copy(update={"text_cache": 0})
    fixed(run, parts, 3)
    assert parts.family.work["encoded_prompts"] == 3
