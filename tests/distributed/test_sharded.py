"""Weights spread over two processes (FSDP2 over gloo) are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import sharded
from tests.distributed.test_processes import together
from tests.end_to_end.runs import assert_equal

pytestmark = pytest.mark.slow
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """All scenarios in two processes."""
    return together(tmp_path_factory.mktemp("two"), ",".join(sharded.SCENARIOS), module="tests.distributed.sharded")


@pytest.mark.parametrize("scenario", ["lora", "full", "guards"])
def test_two_processes_train_as_one_does(two: Found, scenario: str) -> None:
    """Weights, average and snapshots after every update, and metrics; although some make calls that others do not."""
    alone, (first, second) = sharded.SCENARIOS[scenario](), (process[scenario] for process in two)
    assert first["metrics"] == second["metrics"]
    assert [a + b for a, b in zip(first["held"], second["held"], strict=True)] == alone["held"]
    moved = max(float((alone["weights"][-1][n] - w).abs().max()) for n, w in alone["weights"][0].items())
    assert moved > 0.005
    for found, expected in zip(first["weights"], alone["weights"], strict=True):
        assert found.keys() == expected.keys()
        for name, weights in expected.items():
            torch.testing.assert_close(found[name], weights, rtol=0, atol=0.02 * moved)
    for found, expected in zip(first["metrics"], alone["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=0.03, abs=1e-3)
    both = [
        sum(process["work"][name] for process in (first, second))
        for name in ("denoiser_forward_images", "denoiser_backward_images")
    ]
    assert both == [
        alone["work"][name] for name in ("denoiser_forward_images", "denoiser_backward_images")
    ]  # stand-ins do not count


@pytest.mark.parametrize("scenario", ["lora", "full", "guards"])
def test_each_process_holds_half(two: Found, scenario: str) -> None:
    """Of weights, copies and moments; of a tensor with an odd number of rows one has a row more."""
    for process in two:
        mine, all_of_it = (sum(column) for column in zip(*process[scenario]["sizes"], strict=True))
        assert mine == pytest.approx(all_of_it / 2, rel=0.02)


def test_a_process_without_images_takes_part_in_everything(two: Found) -> None:
    """One image with signal in two processes."""
    alone, (first, second) = sharded.lonely(), (process["lonely"] for process in two)
    assert sorted(a + b for a, b in zip(first["held"], second["held"], strict=True)) == [0, 1]
    assert first["metrics"] == second["metrics"]
    for name, weights in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weights, rtol=0, atol=1e-5)


def test_one_process_draws_and_gathers_while_others_wait(two: Found) -> None:
    """Under whatever weights, one set within another; its trouble reaches the others."""
    alone, (first, second) = sharded.alone(), (process["alone"] for process in two)
    pictures = ("trained", "average", "average again", "reference", "moved", "everyone")
    for name in pictures:
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second["everyone"], alone["everyone"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first["average"], first["average again"], rtol=0, atol=0)
    assert (alone["trained"] - alone["average"]).abs().max() > 0.01
    torch.testing.assert_close(alone["moved"], alone["trained"])
    assert_equal(first["weights"], alone["weights"])
    assert first["failed"] == "no more ink" and "no more ink" in second["failed"]


def test_what_is_saved_fits_one_process_and_many(two: Found) -> None:
    """To the bit, moments as well; a run goes on from its checkpoint as if it had not stopped."""
    first = two[0]["state"]
    assert_equal(first["unspread"], first["saved"])
    assert_equal(first["both"][0], first["both"][1])
    assert_equal(first["restored"], first["saved"][0])
    assert any(not torch.equal(first["both"][0][name], w) for name, w in first["saved"][0].items())


def test_loss_scaling_skips_on_all_processes(two: Found) -> None:
    """An infinite gradient in one part: no step anywhere, and half the scale."""
    for process in two:
        assert process["scaled"]["scales"] == [2.0**15, 2.0**15]
    start, skipped, stepped = two[0]["scaled"]["weights"]
    assert_equal(skipped, start)
    assert any(not torch.equal(stepped[name], w) for name, w in start.items())


CASES = [*sharded.FAMILIES, "sd3, checkpointed", "sd3, bf16", "sd3, bf16 adapters"]


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_kind_of_denoiser(two: Found, name: str) -> None:
    """Summed over processes, one of which called twice; and what is exported has the weights to the bit."""
    for process in two:
        mine, all_of_it = (sum(column) for column in zip(*process["families"][name]["parts"], strict=True))
        assert mine == pytest.approx(all_of_it / 2, rel=0.05)
    found = two[0]["families"][name]
    error = (found["gradients"] - found["expected"]).norm() / found["expected"].norm()
    assert error < (0.03 if "bf16" in name else 1e-5)
    assert found.get("saved", True)
