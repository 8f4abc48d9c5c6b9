"""One optimiser step: gradients summed over processes, checked, clipped; learning-rate schedule; fp16 loss scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from t2irl.config import Run
from t2irl.errors import RunError
from t2irl.sharding import moments, whole
from t2irl.types import Clock
from t2irl.utils.distributed import sum_gradients

if TYPE_CHECKING:
    from t2irl.sharding import Company


class Optimizer:
    """AdamW on float32 parameters. `total_updates` is the length of the learning-rate schedule.

    `company`: keeps backward passes the same on all processes, where parameters are spread over them.
    """

    def __init__(
        self, run: Run, parameters: Sequence[torch.nn.Parameter], total_updates: int, device: torch.device,
        company: Company | None = None,
    ):  # fmt: skip
        self.company = company
        self.config, self.parameters, self.total_updates = run.optimizer, list(parameters), total_updates
        self.fp16 = run.model.precision == "fp16"
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=self.config.lr, betas=self.config.betas, eps=self.config.eps,
            weight_decay=self.config.weight_decay, fused=True,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.fp16)

    def lr(self, update: int) -> float:
        """Learning rate of an update, counted from 0."""
        warmup = self.config.warmup_updates
        if update < warmup:
            return self.config.lr * (update + 1) / warmup
        done = min((update - warmup) / max(self.total_updates - warmup, 1), 1.0)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return self.config.lr * factor[self.config.schedule]

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch; nothing crosses processes yet, unless parameters are spread over them."""
        loss = self.scaler.scale(loss)
        loss.backward() if self.company is None else self.company.backward(loss)

    def step(self, clock: Clock) -> tuple[Tensor, float]:
        """Sum gradients over processes, clip and step. Returns the norm before clipping and the learning rate.

        Raises RunError when the norm is not finite; in fp16 the step is skipped instead, as loss scaling expects.
        """
        sum_gradients(self.parameters)
        self.scaler.unscale_(self.adamw)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm, foreach=True)
        if not self.fp16 and not bool(norm.isfinite()):
            raise RunError(
                f"the gradient of update {clock.update} (iteration {clock.iteration}) is not finite. The last checkpoint is "
                f"good. A smaller optimizer.lr (now {self.config.lr:g}), clip_range or noise_level usually helps"
            )
        lr = self.lr(clock.update)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        return norm.detach(), lr

    def state_dict(self) -> dict[str, Any]:
        """Moments and loss scale. Spread ones are put together on the main process: all processes call it."""
        return {"adamw": whole(self.adamw.state_dict()), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave. Betas, decay and learning rate stay those of the config, so that a continued run
        may change them."""
        kept = [{k: v for k, v in g.items() if k != "params"} for g in self.adamw.param_groups]
        saved = dict(moments(state["adamw"]["state"], self.parameters))
        self.adamw.load_state_dict({**state["adamw"], "state": saved})
        for group, settings in zip(self.adamw.param_groups, kept, strict=True):
            group.update(settings)
        self.scaler.load_state_dict(state["scaler"])
