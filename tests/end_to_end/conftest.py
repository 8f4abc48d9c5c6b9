"""A model of a few thousand weights and a config for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.runs import base_config


@pytest.fixture(scope="session")
def model(sd3_folder: Callable[..., Path]) -> Path:
    """A random pipeline: pictures of 16 x 16 pixels."""
    return sd3_folder()


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    """The config of a run in `tmp_path`/run."""
    return base_config(tmp_path, model)
