"""Checkpoints: whole or not there, checked when read, and nothing lost when the disk is full."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2irl import checkpoint
from t2irl.errors import CheckpointError
from t2irl.types import Clock

CPU = torch.device("cpu")
FILES = ["manifest.json", "state.pt", "weights.safetensors"]


def contents(size: int = 100) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of several dtypes, one of them not contiguous, and a nested state."""
    weights = {
        "trained.a": torch.arange(size, dtype=torch.float32),
        "trained.b": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16().t(),
        "average.a": torch.full((size,), 1 / 3, dtype=torch.float64),
    }
    state = {"optimizer": {"step": torch.tensor(7.0), "moments": [torch.ones(2), None]}, "rewards": {}, "lr": 1e-4}
    return weights, state


def write(folder: Path, iteration: int, keep: int = 3, size: int = 100) -> Path:
    """A checkpoint of the contents above."""
    return checkpoint.save(folder, Clock(iteration, 2 * iteration, 128 * iteration), *contents(size), keep)


def damage(file: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_round_trip(tmp_path: Path) -> None:
    """Clock, weights and state come back bit for bit, dtypes included."""
    path = write(tmp_path, 12)
    assert path == tmp_path / "iteration_000012"
    assert sorted(p.name for p in path.iterdir()) == FILES
    clock, weights, state = checkpoint.load(path, CPU)
    assert clock == Clock(iteration=12, update=24, images=1536)
    expected_weights, expected_state = contents()
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor)
    assert state["rewards"] == {}
    assert state["lr"] == expected_state["lr"]
    assert torch.equal(state["optimizer"]["step"], torch.tensor(7.0))
    assert state["optimizer"]["moments"][1] is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    """Rotation goes by iteration, and leaves everything else in the folder alone."""
    (tmp_path / "iteration_best").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for iteration in (5, 10, 95, 100):
        write(tmp_path, iteration, keep=2)
    assert [checkpoint.iteration_of(p) for p in checkpoint.available(tmp_path)] == [95, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iteration_000095",
        "iteration_000100",
        "iteration_best",
        "notes.txt",
    ]


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    """As after a signal right behind a regular checkpoint."""
    write(tmp_path, 3)
    write(tmp_path, 3, size=7)
    assert len(checkpoint.load(tmp_path / "iteration_000003", CPU)[1]["trained.a"]) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["iteration_000003"]


def test_left_overs_of_a_killed_save_are_not_checkpoints(tmp_path: Path) -> None:
    """A half-written folder has a name of its own, is never read, and does not hinder the next save."""
    write(tmp_path, 3)
    half = tmp_path / ".iteration_000004.tmp"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    found = checkpoint.load_newest(tmp_path, CPU, pytest.fail)
    assert found is not None
    assert found[0].iteration == 3
    write(tmp_path, 4)
    assert [checkpoint.iteration_of(p) for p in checkpoint.available(tmp_path)] == [3, 4]
    assert not half.exists()


@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors"])
def test_damage_is_found_by_hash(tmp_path: Path, name: str) -> None:
    """One flipped bit is enough; the error names checkpoint and file."""
    path = write(tmp_path, 3)
    damage(path / name)
    with pytest.raises(CheckpointError, match=rf"{path}: {name} is damaged") as error:
        checkpoint.load(path, CPU)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "no text"])
def test_broken_files_are_checkpoint_errors(tmp_path: Path, name: str, how: str) -> None:
    """Whatever is wrong with a file, the error is one that the user can read."""
    path = write(tmp_path, 3)
    file = path / name
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut short": file.read_bytes()[:-20], "no text": b"\xff\xfe\x00\x01"}[how])
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.load(path, CPU)


@pytest.mark.parametrize(
    "manifest", ["{}", "[]", '{"clock": 1, "sha256": {}}', '{"clock": {"hour": 1}, "sha256": {}}', '{"sha256": []}']
)
def test_strange_manifests_are_checkpoint_errors(tmp_path: Path, manifest: str) -> None:
    """A manifest that is JSON but not ours."""
    path = write(tmp_path, 3)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.load(path, CPU)


def test_a_manifest_without_hashes_is_not_trusted(tmp_path: Path) -> None:
    """Deleting the hashes must not make a damaged file readable."""
    path = write(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": {}}))
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.load(path, CPU)


def test_state_is_read_without_running_code(tmp_path: Path) -> None:
    """A state file that would call a function when unpickled is refused, even with a fitting hash."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = checkpoint.save(tmp_path / "c", Clock(1), {"a": torch.ones(1)}, {"bomb": Bomb()}, 1)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path, CPU)
    assert not (tmp_path / "ran").exists()


def test_the_newest_good_one_is_taken(tmp_path: Path) -> None:
    """A damaged checkpoint is reported and passed over."""
    for iteration in (1, 2, 3):
        write(tmp_path, iteration)
    damage(tmp_path / "iteration_000003" / "state.pt")
    said: list[str] = []
    found = checkpoint.load_newest(tmp_path, CPU, said.append)
    assert found is not None
    assert found[0].iteration == 2
    assert len(said) == 1
    assert "iteration_000003" in said[0]
    assert "damaged" in said[0]


def test_all_damaged_is_an_error_and_none_is_not(tmp_path: Path) -> None:
    """Starting afresh over a run whose checkpoints are broken would lose it; an empty folder is simply new."""
    assert checkpoint.load_newest(tmp_path, CPU, pytest.fail) is None
    assert checkpoint.load_newest(tmp_path / "nowhere", CPU, pytest.fail) is None
    for iteration in (1, 2):
        damage(write(tmp_path, iteration) / "weights.safetensors")
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* --run_dir"):
        checkpoint.load_newest(tmp_path, CPU, said.append)
    assert len(said) == 2


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["weights", "state"])
def test_full_disk(tmp_path: Path, what: str) -> None:
    """A save that runs out of space is a clear error, leaves no rubbish, and the old checkpoint stays good."""
    old = write(tmp_path, 1)
    big, small = {"x": torch.zeros(100_000)}, {"x": torch.zeros(10)}
    weights, state = (big, small) if what == "weights" else (small, big)
    with files_no_larger_than(50_000), pytest.raises(CheckpointError) as error:
        checkpoint.save(tmp_path, Clock(2), weights, dict(state), 1)
    assert str(tmp_path / "iteration_000002") in str(error.value)
    assert f"last good checkpoint is {old}" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [old.name]
    assert checkpoint.load(old, CPU)[0].iteration == 1
    # With room again, the same save works.
    checkpoint.save(tmp_path, Clock(2), weights, dict(state), 1)
    assert [p.name for p in tmp_path.iterdir()] == ["iteration_000002"]


def test_full_disk_at_the_first_save(tmp_path: Path) -> None:
    """The message does not promise a checkpoint that is not there."""
    with files_no_larger_than(1000), pytest.raises(CheckpointError, match="no earlier checkpoint"):
        write(tmp_path / "checkpoints", 1, size=10_000)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_full_disk_while_saving_an_iteration_again(tmp_path: Path) -> None:
    """The checkpoint that was to be replaced stays."""
    old = write(tmp_path, 3)
    with files_no_larger_than(1000), pytest.raises(CheckpointError):
        write(tmp_path, 3, size=10_000)
    assert checkpoint.load(old, CPU)[0].iteration == 3


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot save"):
        write(tmp_path / "checkpoints", 1)
