"""What a run shows: held-out measurements and grids along the way, export, summary and report at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from t2irl.evaluation.evaluate import evaluate, sample_fixed
from t2irl.evaluation.grids import draw_grid
from t2irl.evaluation.monitors import monitor
from t2irl.evaluation.report import write_report
from t2irl.export import as_dict, export
from t2irl.footprint import compared, sentence
from t2irl.launch import Context, read_metrics, write_json
from t2irl.rollout import Noise
from t2irl.utils import distributed
from t2irl.watch import export_best, watch

if TYPE_CHECKING:
    from t2irl.train import Parts

STAGES = ("base", "rollout", "score", "adversary", "update", "evaluate", "grid")
GRID_COLUMNS = 6


def due(iteration: int, every: int, last: int) -> bool:
    """Whether something happens after this iteration: at the start, at the end, and every `every` (0: not in between)."""
    return iteration in (0, last) or (every > 0 and iteration % every == 0)


def show(ctx: Context, parts: Parts, metrics: dict[str, float]) -> None:
    """Evaluate and draw when due, then log the iteration."""
    run, iteration = ctx.run, parts.clock.iteration
    if due(iteration, run.evaluation.every, run.iterations):
        if run.monitors.prompts:
            parts.pipeline.meet(ctx, parts)  # the first evaluation comes before the first rollout
        with ctx.timed("evaluate", run.evaluation.images) as advance:
            means = evaluate(parts.policy, run, parts.heldout_prompts, (parts.rewards, parts.heldout), advance)
            found = monitor(parts)
        metrics = metrics | {f"heldout/{name}": value for name, value in means.items()} | found
        metrics |= watch(ctx, parts, metrics)
    if due(iteration, run.grids.every, run.iterations):
        with ctx.timed("grid", run.grids.prompts * run.grids.images), distributed.together(ctx.device):
            draw(ctx, parts)
    parts.family.work.clear()  # counters tell what training costs
    metrics = metrics | ctx.take_seconds()
    ctx.tracker.log(metrics, iteration)
    ctx.progress.iteration(iteration, metrics)


def draw(ctx: Context, parts: Parts) -> None:
    """The grid of fixed prompts and noise, scored, of the averaged weights; drawn by the main process."""
    if not ctx.is_main:
        return
    run, iteration = ctx.run, parts.clock.iteration
    prompts = parts.heldout_prompts[: run.grids.prompts]
    count = len(prompts) * run.grids.images
    with parts.policy.averaged():
        sampled = sample_fixed(parts.policy, run, prompts, count, Noise(run.seed, "grid"))
    groups, images = sampled.groups, sampled.images
    scores = {**parts.rewards.score(images, groups), **parts.heldout.score(images, groups)}
    path = ctx.folder / "grids" / f"iteration_{iteration:06d}.png"
    table = {name: values.tolist() for name, values in scores.items()}
    draw_grid(images.cpu(), groups.texts, table, GRID_COLUMNS, path, f"{ctx.folder.name}, iteration {iteration}")
    ctx.tracker.image("grid", path, iteration)


def finish(ctx: Context, parts: Parts) -> None:
    """Export, prove the export, write summary.json and report.html. Main process only; the others wait."""
    memory = compared(ctx.footprint, parts.geometry, len(parts.prompts) + len(parts.heldout_prompts), ctx.sharded)
    if ctx.is_main:
        exported = export(parts.policy, ctx.run, ctx.folder, parts.heldout_prompts[0])
        parts.rewards.export(ctx.folder / "export" / "rewards")
    best = export_best(ctx, parts) if ctx.is_main or ctx.sharded else None
    if ctx.is_main:
        summary = summarise(ctx, parts) | {"export": as_dict(exported), "warnings": ctx.warnings, "memory": memory}
        summary |= {"stopped": ctx.stopped, "best": best}
        write_json(ctx.folder / "summary.json", summary)
        report = write_report(ctx.folder)
        ctx.say(_closing(summary, exported.snippet, str(report)))
    distributed.barrier()


def summarise(ctx: Context, parts: Parts) -> dict[str, Any]:
    """Held-out means before and after, and what they cost, from the whole run's metrics."""
    lines = read_metrics(ctx.folder)
    measured = [
        {k.removeprefix("heldout/"): v for k, v in line.items() if k.startswith("heldout/")}
        for line in lines
        if any(k.startswith("heldout/") for k in line)
    ]
    timed = [stage for stage in STAGES if any(f"time/{stage}_s" in line for line in lines)]
    seconds = {stage: sum(line.get(f"time/{stage}_s") or 0.0 for line in lines) for stage in timed}
    return {
        "base": measured[0],
        "final": measured[-1],
        "images_evaluated": ctx.run.evaluation.images,
        "iterations": parts.clock.iteration,
        "updates": parts.clock.update,
        "images_sampled": parts.clock.images,
        "seconds": seconds | {"total": sum(seconds.values())},
    }


def _closing(summary: dict[str, Any], snippet: str, report: str) -> str:
    """The last words of a run."""
    base, final = summary["base"], summary["final"]
    both = [(n, base[n], v) for n, v in final.items() if v is not None and base.get(n) is not None]
    rows = [f"  {name:<20} {before:8.3f} -> {after:8.3f}  ({after - before:+.3f})" for name, before, after in both]
    return "\n".join(
        [
            f"held out, {summary['images_evaluated']} pictures, before -> after:",
            *rows,
            f"memory: {sentence(summary['memory'])}",
            f"report: {report}",
            "use the result:",
            "",
            *(f"    {line}" for line in snippet.splitlines()),
        ]
    )
