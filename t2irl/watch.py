"""What follows from the monitors: alarms in the log, early stop, and the checkpoint of the best held-out reward."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from t2irl import checkpoint
from t2irl.evaluation.monitors import relative
from t2irl.evaluation.rules import best_iteration, fired, primary_of
from t2irl.export import as_dict, export
from t2irl.launch import Context, read_metrics
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts


def watch(ctx: Context, parts: Parts, metrics: Mapping[str, float]) -> dict[str, float]:
    """Judge an evaluation by all before it: warn, stop, keep the best. Returns measures relative to the base model's.

    The main process reads metrics.jsonl and decides; all processes learn what it decided.
    """
    run, iteration = ctx.run, parts.clock.iteration
    found: dict[str, float] = {}
    stopped, best = None, False
    if ctx.is_main:
        rows = [row for row in read_metrics(ctx.folder) if row["iteration"] < iteration]
        base = rows[0] if rows else metrics
        found = relative(metrics, base, tuple(run.heldout_rewards))
        watched = run.monitors.watched(run.heldout_rewards)
        if watched is not None:
            rows.append({"iteration": iteration, **metrics, **found})
            for alarm in fired(rows, watched, run.monitors.patience, run.evaluation.images, primary_of(run.combine)):
                if alarm.iteration == iteration:
                    ctx.warn(f"{alarm.rule} at iteration {iteration}: {alarm.text}")
                    stopped = stopped or (alarm.rule if alarm.rule in run.monitors.stop else None)
            best = run.monitors.best != "none" and best_iteration(rows, watched) == iteration
    found, ctx.stopped, best = distributed.gather_objects((found, stopped, best))[0]
    if best:
        _keep_best(ctx, parts)
    if ctx.stopped is not None and iteration < run.iterations:
        ctx.say(f"stopping early at iteration {iteration}: {ctx.stopped} is among monitors.stop")
    return found


def _keep_best(ctx: Context, parts: Parts) -> None:
    """Write a checkpoint into `best` and drop the one before it."""
    folder = ctx.folder / "best"
    kept = ctx.keep(parts, folder, 2)
    for old in checkpoint.available(folder) if ctx.is_main else ():
        if old != kept:
            shutil.rmtree(old, ignore_errors=True)


def export_best(ctx: Context, parts: Parts) -> dict[str, Any] | None:
    """Which checkpoint is in `best`; with `monitors.best: export` its weights are also written to `export_best`.

    None if none was kept. Called by all processes where weights are spread over them, else by the main one alone; the policy has its own
    weights again afterwards.
    """
    distributed.meet()  # the main process may be drawing with the present weights
    there = checkpoint.available(ctx.folder / "best")
    if not there or ctx.run.monitors.best == "none":
        return None
    found: dict[str, Any] = {"iteration": checkpoint.iteration_of(there[-1])}
    if ctx.run.monitors.best == "export":
        _, weights, _ = checkpoint.load(there[-1], ctx.device, mapped=ctx.sharded)
        with parts.policy.restored(weights):
            if ctx.is_main:
                exported = export(parts.policy, ctx.run, ctx.folder, parts.heldout_prompts[0], "export_best")
                found["export"] = as_dict(exported)
            distributed.meet()
    return found
