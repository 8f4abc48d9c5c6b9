"""What all tests share: one thread, no network, the repository root as current folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before any import of torch or transformers, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs are relative to the repository root."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder for a run, not there yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tests.tiny.make_sd3` without the folder: each set of arguments is made once. For tests that only read."""
    from tests.tiny import make_sd3

    made: dict[str, Path] = {}

    def folder(**settings: Any) -> Path:
        key = repr(sorted(settings.items()))
        if key not in made:
            made[key] = make_sd3(tmp_path_factory.mktemp("sd3"), **settings)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a case of `tests.families`, with changed settings if any: each is made once. For tests that only read."""
    from tests.families import CASES

    made: dict[str, Path] = {}

    def folder(name: str, **changes: Any) -> Path:
        key = repr((name, sorted(changes.items())))
        if key not in made:
            case = CASES[name]
            made[key] = case.make(tmp_path_factory.mktemp(name), **case.settings | changes)
        return made[key]

    return folder
