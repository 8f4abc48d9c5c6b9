"""What regularisers are given: the scored rollout of all processes, transitions by image, their place among the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from t2irl.regularizers.base import Regularizer
from t2irl.train import shaped
from t2irl.types import Rollout
from tests.invariants.toy import a_batch, toy_parts, toy_rollout, toy_run

BRIGHT = {"type": "tests.invariants.toy:Brightness"}
HERE = "tests.invariants.test_hooks"


class Add(Regularizer):
    """Adds 1, and remembers its name."""

    def prepare(self, name: str, parts: Any) -> None:
        """Remember."""
        self.name = name

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """One more."""
        return advantages + 1

    def metrics(self) -> dict[str, float]:
        """A number."""
        return {"added": 1.0}


class Replace(Regularizer):
    """Gives 10 to all images."""

    comes_first = True

    def shape(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Ten."""
        return torch.full_like(advantages, 10)


def test_regularisers_are_told_their_names_and_the_rest_of_the_run() -> None:
    """Before anything else is asked of them."""
    parts = toy_parts(toy_run({"regularizers": {"one": {"type": f"{HERE}:Add"}, "two": {"type": f"{HERE}:Add"}}}))
    assert [r.name for r in parts.regularizers.values()] == ["one", "two"]


def test_what_replaces_advantages_comes_before_what_changes_them() -> None:
    """Wherever it stands in the config."""
    parts = toy_parts(toy_run({"regularizers": {"a": {"type": f"{HERE}:Add"}, "b": {"type": f"{HERE}:Replace"}}}))
    assert shaped(torch.zeros(4), None, parts).tolist() == [11.0] * 4


def test_own_rows_of_a_rollout() -> None:
    """The images of this process among those of all."""
    run = toy_run()
    trajectory = toy_rollout(run, toy_parts(run))
    found = Rollout(trajectory, {"r": torch.arange(32)}, torch.arange(32) // 4, 16, 0)
    assert torch.arange(32)[found.own].tolist() == list(range(16, 32))


def test_rows_of_a_batch_and_of_its_prediction_belong_together() -> None:
    """Some transitions of a batch give what they give among the others."""
    run = toy_run({"rollout": {"window": {"type": "fixed", "start": 0, "size": 3}}})
    parts = toy_parts(run)
    batch = a_batch(run, parts)
    assert batch.image.tolist() == [i for i in range(16) for _ in range(3)]
    rows = batch.image % 3 == 1
    part = batch[rows]
    assert len(part.x) == 15 and part.share == batch.share and set(part.image.tolist()) == {1, 4, 7, 10, 13}
    whole, alone = parts.policy.predict(batch)[rows], parts.policy.predict(part)
    torch.testing.assert_close(alone.mean, whole.mean)
    torch.testing.assert_close(alone.log_prob, whole.log_prob)


def test_nothing_to_train_on_is_refused() -> None:
    """All rewards auxiliary."""
    with pytest.raises(ValidationError, match="all rewards have weight 0, so there is nothing to train on"):
        toy_run({"rewards": {"brightness": BRIGHT | {"weight": 0}}})
