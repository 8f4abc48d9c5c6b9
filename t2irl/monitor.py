"""The numbers of an iteration, by the names of the metric glossary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from t2irl.advantages import constant_groups, total_score, within_group_std
from t2irl.launch import Context
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts

WORK = (
    "denoiser_forward_calls", "denoiser_forward_images", "denoiser_backward_images", "decoded_images", "encoded_prompts",
    "reward_calls", "scored_images", "moved_parts",
)  # fmt: skip
"""Work counters, summed over processes and logged as work/<name> in every iteration."""


class UpdateLog:
    """Collects what the updates of an iteration report, on the device; nothing is copied until the iteration ends."""

    def __init__(self, device: torch.device):
        self.device = device
        self.terms: dict[str, Tensor] = {}
        self.values: dict[str, list[Tensor]] = {}
        self.norms: list[Tensor] = []
        self.first: dict[str, list[Tensor]] = {}
        self.lr = 0.0

    def add(self, terms: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        """A micro-batch: its loss terms (already shares of the update) and per-transition metrics."""
        for name, term in terms.items():
            self.terms[name] = self.terms.get(name, torch.zeros((), device=self.device)) + term.detach()
        target = self.values if self.norms else self.first
        for name, values in metrics.items():
            target.setdefault(name, []).append(values)

    def end_update(self, norm: Tensor, lr: float) -> None:
        """An optimiser step: gradient norm before clipping and learning rate."""
        self.norms.append(norm)
        self.lr = lr

    def metrics(self) -> dict[str, float]:
        """Means over transitions and updates, all processes together.

        A process that held no image of any update has nothing to report, so names are gathered with the numbers. Nothing
        at all when there was no update, because an adversary kept the rollout for itself.
        """
        if not self.norms:
            return {}
        first = {name: torch.cat(parts).double() for name, parts in self.first.items()}
        every = {
            name: torch.cat([*self.first.get(name, []), *self.values.get(name, [])]).double()
            for name in {**self.first, **self.values}
        }
        mine = {
            "sum": {n: float(v.sum()) for n, v in every.items()},
            "count": {n: float(len(v)) for n, v in every.items()},
            "first sum": {n: float(v.sum()) for n, v in first.items()},
            "first count": {n: float(len(v)) for n, v in first.items()},
            "first max": {n: float(v.max()) for n, v in first.items()},
            "term": {n: float(t) / len(self.norms) for n, t in self.terms.items()},
        }
        processes = distributed.gather_objects(mine)
        total = {kind: _add([process[kind] for process in processes]) for kind in mine}
        found = {_metric(n): value / total["count"][n] for n, value in total["sum"].items() if n != "log_ratio_abs"}
        if "ratio" in total["first sum"]:
            found["policy/ratio_first"] = total["first sum"]["ratio"] / total["first count"]["ratio"]
        if "log_ratio_abs" in total["first sum"]:
            found["policy/log_ratio_first"] = max(p["first max"].get("log_ratio_abs", 0.0) for p in processes)
        found |= {n if n.startswith("regularizer/") else f"loss/{n}": value for n, value in total["term"].items()}
        found["policy/loss"] = float(sum(total["term"].values()))
        found["policy/grad_norm"] = float(torch.stack(self.norms).mean())
        found["policy/lr"] = self.lr
        return found


def _metric(name: str) -> str:
    return "policy/ratio_mean" if name == "ratio" else f"policy/{name}"


def _add(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sum of tables, name by name."""
    total: dict[str, float] = {}
    for table in tables:
        for name, value in table.items():
            total[name] = total.get(name, 0.0) + value
    return total


def iteration_metrics(
    ctx: Context, parts: Parts, scores: Mapping[str, Tensor], ids: Tensor, advantages: Tensor, log: UpdateLog
) -> dict[str, float]:
    """Metrics of the iteration that just ended. `scores`, `ids`, `advantages` are those of all processes."""
    metrics: dict[str, float] = {}
    for name, values in scores.items():
        applies = ~values.isnan()
        metrics[f"reward/{name}/mean"] = float(values[applies].mean())
        metrics[f"reward/{name}/std_within_group"] = within_group_std(values[applies], ids[applies])
    total = total_score(scores, parts.rewards.weights)
    metrics["reward/total/mean"] = float(total.mean())
    metrics["advantage/zero_variance_groups"] = float(
        constant_groups(total, ids, ctx.run.advantage.floor).float().mean()
    )
    metrics["advantage/abs_mean"] = float(advantages.abs().mean())
    metrics |= log.metrics()
    for name, regularizer in parts.regularizers.items():
        metrics |= {f"regularizer/{name}/{key}": value for key, value in regularizer.metrics().items()}
    if parts.geometry.recorded:
        metrics["policy/omitted_timesteps"] = 1 - parts.geometry.window_size / ctx.run.rollout.steps
    _check_first_ratio(ctx, parts, metrics)
    work = torch.tensor([[parts.family.work[name] for name in WORK]])
    metrics |= {
        f"work/{n}": v for n, v in zip(WORK, distributed.gather_rows(work, ctx.device).sum(0).tolist(), strict=True)
    }
    parts.family.work.clear()
    seconds = ctx.take_seconds()
    metrics |= seconds | {"time/iteration_s": sum(seconds.values())}
    metrics["data/images_total"] = parts.clock.images
    metrics["data/passes_over_prompts"] = parts.clock.images / ctx.run.rollout.group_size / len(parts.prompts)
    return metrics | ctx.memory()


def _check_first_ratio(ctx: Context, parts: Parts, metrics: Mapping[str, float]) -> None:
    """At the first update nothing has moved yet, so every ratio should be 1; a tenth of the clip range is tolerated."""
    clip = min(parts.algorithm.clip_range) if parts.algorithm.clip_range else None
    worst = metrics.get("policy/log_ratio_first", 0.0)
    if clip is not None and worst > 0.1 * clip:
        ctx.warn(
            f"at the first update of an iteration a log-ratio is {worst:.1e}, more than a tenth of clip_range {clip:g}: clipping "
            "acts on rounding. Use a higher model.precision, equal rollout and update batch sizes, or a wider clip_range"
        )
