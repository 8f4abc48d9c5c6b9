"""One optimiser step: schedule, clipping, what is not finite, and what a continued run keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from t2irl.config import Run
from t2irl.errors import RunError
from t2irl.optimizer import Optimizer
from t2irl.types import Clock

CPU = torch.device("cpu")


def run_with(settings: Mapping[str, Any] | None = None, precision: str = "fp32") -> Run:
    """A run with these optimiser settings; nothing else of it is used."""
    return Run.model_validate(
        {
            "model": {"type": "sd3", "path": "nowhere", "precision": precision},
            "data": {"prompts": "a.txt", "heldout": "b.txt"},
            "rewards": {"shapes": {"type": "shapes"}},
            "optimizer": settings or {},
        }
    )


def make(
    settings: Mapping[str, Any] | None = None, total: int = 10, precision: str = "fp32"
) -> tuple[Optimizer, nn.Parameter]:
    """An optimiser of one parameter, the vector (3, 4)."""
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    return Optimizer(run_with(settings, precision), [parameter], total, CPU), parameter


# The schedule.


def schedule(total: int, **settings: Any) -> list[float]:
    """The learning rate of every update, and of two beyond the end."""
    optimizer, _ = make({"lr": 1.0, **settings}, total)
    return [optimizer.lr(n) for n in range(total + 2)]


def test_constant() -> None:
    assert schedule(4) == [1.0] * 6


def test_linear_decay_reaches_0_at_the_end_and_stays_there() -> None:
    assert schedule(4, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])


def test_cosine_decay() -> None:
    expected = [0.5 * (1 + math.cos(math.pi * min(n / 4, 1))) for n in range(6)]
    assert expected[2] == pytest.approx(0.5)
    assert schedule(4, schedule="cosine") == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warm_up_rises_to_the_peak_without_a_step_of_0(kind: str) -> None:
    found = schedule(8, schedule=kind, warmup_updates=4)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    if kind == "constant":
        assert found[5:] == [1.0] * 5
    else:
        assert found[6] == pytest.approx(0.5)
        assert found[8] == pytest.approx(0.0)


def test_a_warm_up_as_long_as_the_run() -> None:
    assert schedule(3, schedule="cosine", warmup_updates=3)[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_steps_use_the_rate_of_their_update() -> None:
    """The first step of AdamW moves every entry by the learning rate, so the rate can be read off."""
    optimizer, parameter = make({"lr": 0.1, "weight_decay": 0, "schedule": "linear"}, total=10)
    before = parameter.detach().clone()
    optimizer.backward(parameter.sum())
    _, lr = optimizer.step(Clock(iteration=2, update=5))
    assert lr == pytest.approx(0.05)
    torch.testing.assert_close(before - parameter.detach(), torch.full((2,), 0.05))


# Steps.


def test_gradients_add_up_until_the_step_and_are_then_gone() -> None:
    """Two micro-batches are one gradient; the next update starts from none."""
    optimizer, parameter = make({"max_grad_norm": 1e9})
    for factor in (1.0, 2.0):
        optimizer.backward(factor * (parameter * torch.tensor([3.0, 4.0])).sum())
    norm, _ = optimizer.step(Clock())
    assert norm.item() == pytest.approx(15.0)
    assert parameter.grad is None


def test_clipping_scales_the_gradient_and_reports_the_norm_before() -> None:
    optimizer, parameter = make({"max_grad_norm": 0.5})
    optimizer.backward((parameter * torch.tensor([3.0, 4.0])).sum())
    norm, _ = optimizer.step(Clock())
    assert norm.item() == pytest.approx(5.0)
    first_moment = optimizer.adamw.state[parameter]["exp_avg"] / (1 - 0.9)
    torch.testing.assert_close(first_moment, torch.tensor([0.3, 0.4]))


def test_weight_decay_is_decoupled() -> None:
    """Without a gradient the weights shrink by lr x decay and nothing else moves them."""
    optimizer, parameter = make({"lr": 0.1, "weight_decay": 0.2})
    optimizer.step(Clock())
    torch.testing.assert_close(parameter.detach(), torch.tensor([3.0, 4.0]) * (1 - 0.1 * 0.2))


def test_a_missing_gradient_counts_as_0() -> None:
    """A process whose images were all skipped still takes the step."""
    optimizer, _ = make()
    norm, _ = optimizer.step(Clock())
    assert norm.item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run(bad: float) -> None:
    """Before it reaches the weights, with update and iteration named."""
    optimizer, parameter = make({"lr": 3e-4})
    optimizer.backward((parameter * torch.tensor([bad, 1.0])).sum())
    with pytest.raises(RunError, match=r"update 7 \(iteration 3\) is not finite.*0\.0003") as error:
        optimizer.step(Clock(iteration=3, update=7))
    assert error.value.exit_code == 4
    assert parameter.tolist() == [3.0, 4.0]


def test_fp16_skips_the_step_and_lowers_the_loss_scale_instead() -> None:
    """In fp16 an overflow is expected now and then; the scaled gradients are unscaled before clipping."""
    optimizer, parameter = make({"lr": 0.1, "weight_decay": 0, "max_grad_norm": 1e9}, precision="fp16")
    scale = optimizer.scaler.get_scale()
    assert scale > 1
    optimizer.backward((parameter * torch.tensor([float("inf"), 1.0])).sum())
    optimizer.step(Clock())
    assert parameter.tolist() == [3.0, 4.0]
    assert optimizer.scaler.get_scale() == scale / 2
    optimizer.backward((parameter * torch.tensor([3.0, 4.0])).sum())
    norm, _ = optimizer.step(Clock())
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([2.9, 3.9]))


# Continuing.


def train(optimizer: Optimizer, parameter: nn.Parameter, updates: range) -> None:
    """Some updates on a quadratic."""
    for n in updates:
        optimizer.backward(((parameter - n) ** 2).sum())
        optimizer.step(Clock(update=n))


def test_continuing_is_not_having_stopped() -> None:
    """N + M updates equal N, saved, restored, M: bit for bit."""
    whole, straight = make({"schedule": "cosine", "warmup_updates": 2})
    train(whole, straight, range(8))
    before, parameter = make({"schedule": "cosine", "warmup_updates": 2})
    train(before, parameter, range(5))
    after, continued = make({"schedule": "cosine", "warmup_updates": 2})
    continued.data.copy_(parameter.data)
    after.load_state_dict(before.state_dict())
    train(after, continued, range(5, 8))
    assert torch.equal(continued, straight)


def test_a_continued_run_takes_its_settings_from_its_own_config() -> None:
    """Moments come from the checkpoint; learning rate, betas, eps and decay may have been changed by the user."""
    before, parameter = make({"lr": 1e-2})
    train(before, parameter, range(3))
    changed = {"lr": 5e-3, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3}
    after, continued = make(changed)
    after.load_state_dict(before.state_dict())
    (group,) = after.adamw.param_groups
    assert {key: group[key] for key in changed} == changed
    assert torch.equal(after.adamw.state[continued]["exp_avg"], before.adamw.state[parameter]["exp_avg"])
    assert after.adamw.state[continued]["step"].item() == 3
    assert after.step(Clock(update=3))[1] == 5e-3


def test_the_loss_scale_is_part_of_the_state() -> None:
    before, parameter = make(precision="fp16")
    before.backward((parameter * float("inf")).sum())
    before.step(Clock())
    after, _ = make(precision="fp16")
    after.load_state_dict(before.state_dict())
    assert after.scaler.get_scale() == before.scaler.get_scale() == 2.0**15


def test_state_survives_a_file(tmp_path) -> None:
    """As the checkpoint stores it: readable with `weights_only`."""
    before, parameter = make()
    train(before, parameter, range(2))
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after, continued = make()
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(after.adamw.state[continued]["exp_avg_sq"], before.adamw.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize(
    "bad", [{"lr": 0}, {"lr": "fast"}, {"betas": (0.9, 1.0)}, {"max_grad_norm": 0}, {"schedule": "step"}]
)
def test_senseless_settings_are_refused(bad: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        run_with(bad)
