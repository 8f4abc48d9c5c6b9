"""The real reward server as a process on this machine, and rewards for it that misbehave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from t2irl.rewards.base import Reward
from t2irl.types import PromptGroups

ROOT = Path(__file__).resolve().parents[1]
HERE = "tests.reward_server"


@dataclass
class Server:
    """A server that is running."""

    url: str
    process: subprocess.Popen[str]
    said: str

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def memory(self, what: str = "VmRSS") -> int:
        """Bytes that it holds; with VmHWM the most that it ever held."""
        words = Path(f"/proc/{self.process.pid}/status").read_text().split(f"{what}:")[1].split()
        return int(words[0]) * 1024


@contextmanager
def serving(folder: Path, rewards: dict[str, Any], *options: str, **variables: str) -> Iterator[Server]:
    """`t2irl serve-reward` with these rewards; a free port unless `options` name one."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "served.yaml"
    config.write_text(yaml.safe_dump({"rewards": rewards}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    port = [] if "--port" in options else ["--port", "0"]
    with (folder / "stderr.txt").open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "t2irl", "serve-reward", str(config), *port, *options],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    said = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if line.startswith("serving on "):
                break
        else:
            raise AssertionError(f"exit code {process.wait()}: {(folder / 'stderr.txt').read_text()}")
        yield Server(line.split()[-1], process, said)
    finally:
        process.kill()
        process.wait()


class Config(Reward.Config):
    """Settings of `Odd`."""

    type: Literal["tests.reward_server:Odd"] = "tests.reward_server:Odd"
    pause: float = 0
    """Seconds that a batch takes."""
    factor: float = 1.0
    """Of the score."""


class Odd(Reward):
    """Mean brightness times a factor. Prompts may ask for NaN, for infinity, for an error."""

    Config = Config  # type: ignore[assignment]
    may_skip = True

    def __init__(self, config: Any, device: torch.device):
        super().__init__(config, device)
        self.calls = 0

    def score(self, images: Tensor, groups: PromptGroups) -> Tensor:
        """See the class."""
        self.calls += 1
        if self.calls == int(os.environ.get("ODD_DIES_AT", "0")):  # no setting: its hash would be another one
            os._exit(9)
        if "bug" in groups.texts:
            raise KeyError("a bug")
        time.sleep(self.config.pause)
        odd = {"nan": float("nan"), "inf": float("inf")}
        found = images.mean((1, 2, 3)) * self.config.factor
        return torch.stack([torch.tensor(odd.get(t, float(x))) for t, x in zip(groups.texts, found, strict=True)])
