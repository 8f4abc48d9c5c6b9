"""Rollout engines that get the trained weights through `sync` alone: a copy of the policy, and a process of its own."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from t2irl import registry
from t2irl.config import Run
from t2irl.engines.base import Request, RolloutEngine
from t2irl.errors import RunError
from t2irl.policy import Policy
from t2irl.rollout import Finished, rollout
from t2irl.types import Trajectory


def take(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a policy."""
    assert weights.keys() == policy.trained.keys()
    for name, parameter in policy.trained.items():
        parameter.data.copy_(weights[name])


def drawn(policy: Policy, r: Request, finished: Finished) -> Trajectory:
    """The rollout of a request."""
    return rollout(policy, r.groups, r.levels, r.window, r.noise, r.batch_size, None, finished)


class Copy(RolloutEngine):
    """Draws with a copy of the policy as it was when the run began, and whatever `sync` brings."""

    def __init__(self, config: Any, run: Run, policy: Policy):
        super().__init__(config, run, policy)
        self.copy, self.synced = copy.deepcopy(policy), []

    def sync(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Take them over."""
        self.synced.append(version)
        take(self.copy, weights)

    def generate(self, request: Request, finished: Finished) -> Trajectory:
        """By the copy."""
        assert request.version == self.synced[-1]
        return drawn(self.copy, request, finished)


class Deaf(Copy):
    """Hears of the first weights only."""

    def sync(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Forget later ones."""
        if self.synced:
            self.synced.append(version)
        else:
            super().sync(version, weights)


class Silent(Copy):
    """Gives no log-densities, and tells of no batch."""

    def generate(self, request: Request, finished: Finished) -> Trajectory:
        """By the copy."""
        found = super().generate(request, lambda rows, images: None)
        return replace(found, log_probs=torch.full_like(found.log_probs, torch.nan))


class Apart(RolloutEngine):
    """Draws in a process of its own, which loads the model by itself. Pictures of a batch come back as soon as it is done."""

    class Config(RolloutEngine.Config):
        """One setting."""

        rollouts: int = 1_000
        """After so many the process ends."""

    def __init__(self, config: Any, run: Run, policy: Policy):
        super().__init__(config, run, policy)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, run.model_dump(mode="json"), config.rollouts), daemon=True
        )
        self.process.start()
        theirs.close()

    def sync(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """Send them."""
        send(self.pipe, dict(weights))

    def generate(self, request: Request, finished: Finished) -> Trajectory:
        """Ask for it, and listen."""
        try:
            send(self.pipe, request)
            while not isinstance(said := receive(self.pipe), Trajectory):
                finished(*said)
        except (EOFError, OSError) as error:
            raise RunError("the process that draws is gone") from error
        return said

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


def send(pipe: Connection, thing: Any) -> None:
    """By value: `pipe.send` would share the memory of tensors."""
    pipe.send_bytes(pickle.dumps(thing))


def receive(pipe: Connection) -> Any:
    """What `send` sent."""
    return pickle.loads(pipe.recv_bytes())


def serve(pipe: Connection, tree: dict[str, Any], rollouts: int) -> None:
    """What the process does: weights come as mappings, everything else is a request."""
    run = Run.model_validate(tree)
    family = registry.build("models", run.model, torch.device("cpu"))
    algorithm = registry.build("algorithms", run.algorithm)
    policy = Policy(run, family, registry.build("dynamics", run.rollout.dynamics), algorithm.reduction)
    while rollouts:
        asked = receive(pipe)
        if isinstance(asked, dict):
            take(policy, asked)
        else:
            rollouts -= 1
            send(pipe, drawn(policy, asked, lambda rows, images: send(pipe, (rows, images))))
