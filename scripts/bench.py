"""Time an iteration of training against the bare denoiser calls that it needs.

    python scripts/bench.py configs/tiny/cps.yaml --iterations 5

Per iteration: seconds of rollout, decoding, scoring and update of the real code, beside the same number of denoiser
calls on tensors of the same shapes with nothing around them. Arms alternate, medians are printed, and written as JSON
with `--json FILE`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from t2irl.batches import micro_batches, updates
from t2irl.config import Run
from t2irl.geometry import even_chunks
from t2irl.launch import launch
from t2irl.loading import load_run
from t2irl.monitor import UpdateLog
from t2irl.rollout import Noise, rollout
from t2irl.train import Parts, build, own_groups, update_policy


class Timer:
    """Seconds by name."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work()` and note its time."""
        self.sync()
        started = time.perf_counter()
        result = work()
        self.sync()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def bare_rollout(parts: Parts, steps: int, batch_size: int, images: int) -> None:
    """The denoiser calls of a rollout and nothing else."""
    family = parts.family
    text = parts.policy.text(parts.prompts[:1])
    with torch.no_grad():
        for chunk in even_chunks(images, batch_size):
            n = chunk.stop - chunk.start
            x, t, rows = (
                torch.randn(n, *family.latent_shape, device=family.device),
                torch.full((n,), 0.5),
                text[[0] * n],
            )
            for _ in range(steps):
                parts.policy.velocity(x, t.to(family.device), rows)


def bare_update(parts: Parts, rows: list[list[int]]) -> None:
    """The forward and backward passes of an iteration's updates and nothing else; `rows`: sizes of their batches."""
    family = parts.family
    text = parts.policy.text(parts.prompts[:1])
    for sizes in rows:
        for n in sizes:
            x, t = (
                torch.randn(n, *family.latent_shape, device=family.device),
                torch.full((n,), 0.5, device=family.device),
            )
            parts.policy.velocity(x, t, text[[0] * n]).sum().backward()
        parts.optimizer.adamw.zero_grad(set_to_none=True)


def iteration(run: Run, parts: Parts, timer: Timer, number: int) -> None:
    """One iteration of the real code and its bare counterpart."""
    levels = parts.family.levels(run.rollout.steps)
    parts.clock.iteration = number
    groups, window = own_groups(run, parts), parts.geometry.trained_timesteps(number, run.seed)
    trajectory = timer(
        "rollout",
        lambda: rollout(parts.policy, groups, levels, window, Noise(run.seed, number), run.rollout.batch_size),
    )
    timer("bare rollout", lambda: bare_rollout(parts, run.rollout.steps, run.rollout.batch_size, len(groups)))
    timer(
        "decode",
        lambda: [parts.family.pictures(trajectory.final[c]) for c in even_chunks(len(groups), run.rollout.batch_size)],
    )
    timer("score", lambda: parts.rewards.score(trajectory.images, groups, whole=True))
    # No advantage is 0 here, so that nothing is skipped and both arms do the same work.
    advantages = torch.randn(len(groups), generator=torch.Generator().manual_seed(number))
    chosen = list(updates(trajectory, advantages, parts.geometry, run.seed, number, skip=True))

    def real() -> None:
        log = UpdateLog(parts.family.device)
        for images in chosen:
            update_policy(run, parts, images, trajectory.levels, log)

    timer("update", real)
    share = 1.0
    rows = [
        [
            len(b.t)
            for b in micro_batches(i, trajectory.levels, parts.policy, parts.prompts, run.update.batch_size, share)
        ]
        for i in chosen
    ]
    timer("bare update", lambda: bare_update(parts, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", type=Path, default=[Path("configs/tiny/cps.yaml")])
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--run_dir", str(Path(folder) / "run"), "--tracking.trackers", "[]"]
        run = load_run(args.config or [Path("configs/tiny/cps.yaml")], [*overrides, *fixed])
        with launch(run, "never") as ctx:
            parts = build(run, ctx)
            timer = Timer(ctx.device)
            iteration(run, parts, timer, 0)  # warm-up
            timer.seconds.clear()
            for number in range(1, args.iterations + 1):
                iteration(run, parts, timer, number)
    median = {name: statistics.median(values) for name, values in timer.seconds.items()}
    result = {
        "images": parts.geometry.images, "steps": run.rollout.steps, "window": parts.geometry.window_size, "seconds": median,
        "rollout_over_bare": median["rollout"] / (median["bare rollout"] + median["decode"]),
        "update_over_bare": median["update"] / median["bare update"],
    }  # fmt: skip
    for name, seconds in median.items():
        print(f"{name:<14} {seconds:7.3f} s")
    print(f"rollout / (bare denoiser calls + decoding)  {result['rollout_over_bare']:.3f}")
    print(f"update / bare forward and backward passes   {result['update_over_bare']:.3f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
