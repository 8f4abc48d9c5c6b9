"""Two processes are one: invariants 29 and 30 of the algorithms specification, over gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2irl.data import images_of, prompt_ids
from t2irl.utils.distributed import transfers
from tests.distributed import worker
from tests.end_to_end.runs import assert_equal

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def together(
    folder: Path, scenarios: str, processes: int = 2, module: str = "tests.distributed.worker"
) -> list[dict[str, Any]]:
    """Run scenarios in `processes` processes; what each of them gives, in process order."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outputs = [folder / f"{rank}.pt" for rank in range(processes)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(processes), str(folder / "store"), str(out), scenarios],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, out in enumerate(outputs)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    codes = [process.returncode for process in running]
    assert codes == [0] * processes, "\n".join(said)
    return [torch.load(out, weights_only=False) for out in outputs]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All scenarios that need no process of their own, in two processes."""
    return together(tmp_path_factory.mktemp("two"), "transfers,gradients,training,matching,combined,prompts,lacking")


# The plan of transfers, without processes.


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_plan_of_transfers(counts: list[int]) -> None:
    """Nobody gives what it lacks or both gives and takes; all end within one of each other; no image moves in vain."""
    moves = transfers(counts)
    after = list(counts)
    for source, target, number in moves:
        assert number > 0
        assert source != target
        after[source] -= number
        after[target] += number
    assert sum(after) == sum(counts)
    assert max(after) - min(after) <= 1
    assert {source for source, _, _ in moves}.isdisjoint(target for _, target, _ in moves)
    # The least that must move: what the fullest processes have above their even share, the larger shares being theirs.
    share, rest = divmod(sum(counts), len(counts))
    even = [share + (place < rest) for place in range(len(counts))]
    least = sum(max(n - e, 0) for n, e in zip(sorted(counts, reverse=True), even, strict=True))
    assert sum(number for _, _, number in moves) == least


def test_balanced_processes_send_nothing() -> None:
    """Within one of each other already, whoever holds the remainder."""
    assert transfers([3, 4, 3, 4]) == []
    assert transfers([5]) == []
    assert transfers([0, 0]) == []


# Transfers.


@pytest.mark.parametrize("counts", worker.COUNTS, ids=str)
def test_balancing_keeps_every_image_once(two: list[dict[str, Any]], counts: list[int]) -> None:
    """As many on each process, within one; all tensors of an image stay together, with their dtypes."""
    parts = [process["transfers"]["balance", tuple(counts)] for process in two]
    sizes = [len(part[0]) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    numbers = []
    for latents, log_probs, advantages, prompt, image in parts:
        assert (latents.dtype, log_probs.dtype, advantages.dtype, prompt.dtype) == (*[torch.float32] * 3, torch.int64)
        mine = prompt - 2**40
        assert torch.equal(latents, mine.float().view(-1, 1, 1, 1, 1).expand(-1, 4, 2, 2, 2))
        assert torch.equal(log_probs, mine.float()[:, None].expand(-1, 3))
        assert torch.equal(advantages, -mine.float())
        assert torch.equal(image, mine)
        numbers += mine.tolist()
    assert sorted(numbers) == list(range(sum(counts)))


def test_rows_gather_in_process_order_and_exactly(two: list[dict[str, Any]]) -> None:
    """64-bit numbers stay what they are (through float32 they would collide), NaN stays NaN."""
    for process in two:
        rows = process["transfers"]["rows"]
        assert rows.dtype == torch.int64
        assert rows.tolist() == [[2**62, 0], [2**53 + 1, 0], [2**62 + 1, 1], [2**53 + 1, -1]]
        gathered = process["transfers"]["nan"]
        assert gathered.dtype == torch.float64
        assert gathered[0].item() == 1.5
        assert bool(gathered[1].isnan())


def test_one_flag_is_everyones(two: list[dict[str, Any]]) -> None:
    """True on all if true on any."""
    for process in two:
        assert process["transfers"]["flags"] == [False, True, True, True]


def test_gradients_are_summed_and_missing_ones_count_as_0(two: list[dict[str, Any]]) -> None:
    """Shapes stay apart in the one transfer."""
    for process in two:
        first, second = process["transfers"]["gradients"]
        assert first.tolist() == [[1.0] * 3] * 2
        assert second.tolist() == [0.0, 3.0, 6.0, 9.0]


# 29. K-repeat.


def test_prompts_over_processes(two: list[dict[str, Any]]) -> None:
    """Invariant 29: P different prompts, each exactly G times with all member numbers, as with one process, in every iteration."""
    alone = worker.prompts()
    for iteration, expected in enumerate(alone["groups"]):
        parts = [process["prompts"]["groups"][iteration] for process in two]
        assert [len(part) for part in parts] == [20, 20]
        union = list(chain(*parts))
        assert union == expected
        assert Counter(line for line, _, _ in union) == dict.fromkeys({line for line, _, _ in union}, 8)
        assert len({line for line, _, _ in union}) == 5
        assert len(set(union)) == 40
        assert all(text == worker.PROMPTS[line] for line, _, text in union)


@pytest.mark.parametrize("processes", [1, 2, 4, 5, 8])
def test_images_over_any_number_of_processes(processes: int) -> None:
    """Invariant 29: the same images in the same order, whether groups fit on a process or straddle two."""
    ids = prompt_ids(3, 24, 5, 0)
    parts = [images_of(ids, 8, processes, rank) for rank in range(processes)]
    assert {len(lines) for lines, _ in parts} == {40 // processes}
    union = [image for lines, members in parts for image in zip(lines, members, strict=True)]
    assert union == [(int(line), member) for line in ids for member in range(8)]


def test_prompts_take_turns(two: list[dict[str, Any]]) -> None:
    """Invariant 29: the delivered iteration is the requested one; four iterations of 5 of 24 prompts repeat none."""
    chosen = [{line for line, _, _ in groups} for groups in worker.prompts()["groups"]]
    for start in range(0, 40, 4):
        assert len(set.union(*chosen[start : start + 4])) == 20
    assert len({frozenset(c) for c in chosen}) > 30


def test_processes_share_the_window(two: list[dict[str, Any]]) -> None:
    """A random window is drawn equally on all processes, and does move."""
    alone = worker.prompts()["windows"]
    assert all(process["prompts"]["windows"] == alone for process in two)
    assert len(set(alone)) > 3


# 30. World size.


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("skip", [True, False])
def test_gradients_do_not_depend_on_the_number_of_processes(two: list[dict[str, Any]], skip: bool, number: int) -> None:
    """Invariant 30: in float64 within 1e-10, with and without skipped images; both processes hold the sum."""
    expected, count = worker.gradients()[skip, number]
    assert expected.norm() > 1e-3
    for process in two:
        found, _ = process["gradients"][skip, number]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    held = [process["gradients"][skip, number][1] for process in two]
    assert sum(held) == count
    assert max(held) - min(held) <= 1
    assert count < 12 if skip else count == 12


def test_skipping_does_not_change_the_gradient_over_processes(two: list[dict[str, Any]]) -> None:
    """Invariant 31 across processes: the survivors are dealt out, the denominator stays."""
    for process in two:
        for number in (0, 1):
            skipped, kept = (process["gradients"][skip, number][0] for skip in (True, False))
            torch.testing.assert_close(skipped, kept, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scenario", ["training", "matching"])
def test_weights_are_identical_on_all_processes_after_every_update(two: list[dict[str, Any]], scenario: str) -> None:
    """Invariant 30: to the last bit, over six updates of three iterations with a KL term."""
    first, second = (process[scenario]["weights"] for process in two)
    assert len(first) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[-1])


@pytest.mark.parametrize("scenario", ["training", "matching"])
def test_two_processes_train_as_one_does(two: list[dict[str, Any]], scenario: str) -> None:
    """The same images, the same weights and the same metrics, up to rounding (a picture's byte may round the other way)."""
    alone = worker.SCENARIOS[scenario]()
    parts = [process[scenario] for process in two]
    for iteration, expected in enumerate(alone["final"]):
        found = torch.cat([part["final"][iteration] for part in parts])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        ids = [i for part in parts for i in part["groups"][iteration][0]]
        assert ids == list(alone["groups"][iteration][0])
    moved = (alone["weights"][-1] - alone["weights"][0]).abs().max().item()
    assert moved > 0.005
    for found, expected in zip(parts[0]["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * moved)
    for iteration, expected in enumerate(alone["metrics"]):
        for part in parts:
            metrics = part["metrics"][iteration]
            assert metrics.keys() == expected.keys()
            assert metrics["policy/ratio_mean"] == pytest.approx(expected["policy/ratio_mean"], abs=1e-4)
            assert metrics["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=0.02)
            assert metrics["regularizer/kl"] == pytest.approx(expected["regularizer/kl"], rel=0.02, abs=1e-6)
        # Sums over all processes and means over all transitions: every process reports the same number.
        assert parts[0]["metrics"][iteration] == parts[1]["metrics"][iteration]


def test_a_pipeline_over_two_processes_is_that_of_one(two: list[dict[str, Any]]) -> None:
    """Base-model scores, multipliers, filter, diversity and chi-square: equal on both, and those of one process up to rounding."""
    alone, (first, second) = worker.combined(), (process["combined"] for process in two)
    assert_equal(first, second)
    for what in ("base", "own"):
        for name, values in alone[what].items():
            torch.testing.assert_close(first[what][name], values, rtol=1e-3, atol=1e-3)
    moved = (alone["weights"][-1] - alone["weights"][0]).abs().max().item()
    assert moved > 0.005
    for found, expected in zip(first["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * moved)
    for found, expected in zip(first["metrics"], alone["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=0.02, abs=1e-3)
    assert (alone["advantages"][0] == 0).sum() == 12  # half of each group was left out
    torch.testing.assert_close(first["advantages"][0], alone["advantages"][0], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("kind", ["adversary", "beside"])
def test_two_adversaries_stay_one(kind: str, tmp_path: Path) -> None:
    """Other pictures on each process, and yet the same parameters, moments, stored images and metrics to the last bit: an
    adversary whose gradients are not summed drifts apart. Up to rounding it is the adversary of one process.
    """
    first, second = (process[kind] for process in together(tmp_path, kind))
    assert_equal(first["state"], second["state"])
    assert first["metrics"] == second["metrics"]
    alone = getattr(worker, kind)()
    moved = (alone["weights"] - alone["start"]).abs()
    assert (moved > 0).float().mean() > 0.9
    assert (first["weights"] - alone["weights"]).abs().mean() < 0.02 * moved.mean()
    torch.testing.assert_close(torch.cat([first["scores"], second["scores"]]), alone["scores"], rtol=0, atol=2e-3)
    for found, expected in zip(first["metrics"], alone["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-2, abs=2e-3)  # as exact as the scores
    replay, expected = (x["state"]["replay"] for x in (first, alone))
    assert replay["rows"] == expected["rows"] and torch.equal(replay["pictures"], expected["pictures"])


def test_a_reference_image_missing_on_one_process_stops_all_of_them(two: list[dict[str, Any]]) -> None:
    """With the same words, and nobody is left waiting: the next thing that crosses processes still works."""
    for process in two:
        fine, missing = process["lacking"]["said"]
        assert fine == "" and "001_0.png: no such file" in missing and "reward adversarial_dino: references" in missing
        assert process["lacking"]["waited"] == [0, 1]
    assert two[0]["lacking"] == two[1]["lacking"]


def test_a_process_without_images_takes_part_in_everything(tmp_path: Path) -> None:
    """One image with signal in two processes: the other one has none, and still reports the same metrics and weights."""
    first, second = (process["lonely"] for process in together(tmp_path, "lonely"))
    assert sorted(a + b for a, b in zip(first["held"], second["held"], strict=True)) == [0, 1]
    assert torch.equal(first["weights"], second["weights"])
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert first["metrics"]["loss/policy"] != 0
    torch.testing.assert_close(first["weights"], worker.lonely()["weights"], rtol=0, atol=1e-6)


def test_guards_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """Uncertain rewards, gate, adaptive reference and diversity: decisions are the same, numbers up to rounding."""
    first, second = (process["guards"] for process in together(tmp_path, "guards"))
    assert_equal(first["state"], second["state"])
    assert first["metrics"] == second["metrics"]
    alone = worker.guards()
    for iteration, chosen in enumerate(alone["chosen"]):
        assert 0 < int(chosen.sum()) < len(chosen)
        assert torch.equal(first["chosen"][iteration], chosen) and torch.equal(second["chosen"][iteration], chosen)
        both = torch.cat([part["advantages"][iteration] for part in (first, second)])
        torch.testing.assert_close(both, alone["advantages"][iteration], rtol=0, atol=0.02)
        for part in (first, second):
            for name, expected in alone["metrics"][iteration].items():
                assert part["metrics"][iteration][name] == pytest.approx(expected, rel=0.05, abs=0.02)
    assert alone["state"]["slow"]["count"] > 0
    assert first["state"]["slow"] == alone["state"]["slow"]
    moved = (alone["weights"][-1] - alone["weights"][0]).abs().max().item()
    torch.testing.assert_close(first["weights"][-1], alone["weights"][-1], rtol=0, atol=0.05 * moved)
    assert torch.equal(first["weights"][-1], second["weights"][-1])
