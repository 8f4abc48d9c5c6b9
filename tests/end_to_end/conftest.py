"""A model of a few thousand weights and a config for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import base_config
from tests.preference_server import Server


@pytest.fixture(scope="session")
def model(sd3_folder: Callable[..., Path]) -> Path:
    """A random pipeline: pictures of 16 x 16 pixels."""
    return sd3_folder()


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    """The config of a run in `tmp_path`/run."""
    return base_config(tmp_path, model)


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts annotation servers, and ends them."""
    servers: list[Server] = []

    def make(*args: Any, **kwargs: Any) -> Server:
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()
