"""Resumable training stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class Stage:
    """One training stage: linear warm-up and decay, periodic saving, exact continuation, a log line now and then."""

    def __init__(
        self,
        name: str,
        work: Path,
        decay: list[tuple[int, float]],
        modules: dict[str, nn.Module],
        optimizers: list[torch.optim.Optimizer],
    ):
        """`decay`: (step, share of the peak learning rate), joined by straight lines; the last step ends the stage."""
        steps = decay[-1][0]
        self.decay = tuple(zip(*decay, strict=True))
        self.name, self.file, self.steps = name, work / f"{name}.pt", steps
        self.modules, self.optimizers, self.step = modules, optimizers, 0
        self.peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
        self.started, self.before = time.time(), 0.0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.before = state.get("seconds", 0.0)
            self.step = state["step"]
            for name_, module in modules.items():
                module.load_state_dict(state["modules"][name_])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    def run(
        self, loss_at: Callable[[int, torch.Generator], Tensor], seed: int, check: Callable[[], str] | None = None
    ) -> None:
        """Minimise `loss_at(step, generator)`; the generator depends on the step alone, so resuming repeats nothing."""
        losses: list[float] = []
        while self.step < self.steps:
            scale = min((self.step + 1) / 150, 1.0) * float(np.interp(self.step, self.decay[0], self.decay[1]))
            for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * scale
            loss = loss_at(self.step, torch.Generator().manual_seed(seed * 1_000_003 + self.step))
            loss.backward()
            for module in self.modules.values():
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            self.step += 1
            if self.step % 100 == 0:
                done = time.time() - self.started
                print(
                    f"{self.name} {self.step}/{self.steps} loss {np.mean(losses[-100:]):.4f} {done:.0f} s", flush=True
                )
            if self.step % 400 == 0 or self.step == self.steps:
                self.save()
                if check is not None:
                    print(f"  {check()}", flush=True)

    def save(self) -> None:
        state = {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [o.state_dict() for o in self.optimizers],
            "seconds": self.before + time.time() - self.started,
        }
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)


def seconds_spent(work: Path, names: Sequence[str]) -> float:
    """Training time of some stages together."""
    return sum(torch.load(work / f"{name}.pt", weights_only=True)["seconds"] for name in names)
