"""How much signal a rollout holds: do gradients of independent rollouts of the same policy agree?

    python scripts/gradient_signal.py configs/tiny/demo.yaml --rollouts 12

Nothing is trained. For each rollout the policy gradient of a config is computed, without its regularisers; printed is the mean
cosine of all pairs, with its jackknife standard error, over all trained weights and by kind of layer. With a cosine c,
k rollouts together have a ratio of signal to noise, in power, of about k c / (1 - c). Overrides are as in `t2irl train`;
`--policy.tune '{type: full}'` looks at all weights.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from t2irl.advantages import group_advantages
from t2irl.batches import micro_batches, updates
from t2irl.config import Run
from t2irl.launch import launch
from t2irl.loading import load_run
from t2irl.rollout import Noise, rollout
from t2irl.train import Parts, build, own_groups


def gradient(run: Run, parts: Parts, number: int) -> list[Tensor]:
    """Gradient of the algorithm's loss over a whole rollout, one tensor a trained weight, in float16 on the CPU."""
    parts.clock.iteration = number
    policy, groups, window = parts.policy, own_groups(run, parts), parts.geometry.trained_timesteps(number, run.seed)
    levels, noise = parts.family.levels(run.rollout.steps), Noise(run.seed, number, run.rollout.same_noise)
    trajectory = rollout(policy, groups, levels, window, noise, run.rollout.batch_size)
    scores = parts.rewards.score(trajectory.images, groups, whole=True)
    ids = torch.tensor(groups.ids)
    advantages = group_advantages(scores, parts.rewards.weights, ids, run.advantage).float()
    share = 1 / (parts.geometry.images * parts.geometry.window_size)
    for images in updates(trajectory, advantages, parts.geometry, run.seed, number, skip=True):
        for batch in micro_batches(images, trajectory.levels, policy, parts.prompts, run.update.batch_size, share):
            sum(parts.algorithm.loss(policy.predict(batch), batch).terms.values(), torch.zeros(())).backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trained.values()]
    for p in policy.trained.values():
        p.grad = None
    scale = 1 / max(float(torch.cat([g.flatten() for g in found]).norm()), 1e-30)
    return [(g * scale * 1e3).half().cpu() for g in found]


def agreement(gradients: list[Tensor]) -> tuple[float, float]:
    """Mean cosine over all pairs of vectors and its jackknife standard error."""
    unit = torch.nn.functional.normalize(torch.stack(gradients).double(), dim=1)
    cosine, n = unit @ unit.T, len(gradients)
    rows = (cosine.sum(1) - 1) / (n - 1)  # mean cosine of each rollout with the others
    mean = rows.mean()
    without = (n * mean - 2 * rows) / (n - 2)  # the mean when one rollout is left out
    return float(mean), float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())


def kind(name: str) -> str:
    """`transformer_blocks.3.attn.to_q.lora_A.default.weight` -> `attn.to_q`."""
    name = re.sub(r"\.(lora_[AB]\.default\.)?(weight|bias)$", "", name)
    return re.sub(r"^.*?\.\d+\.", "", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--rollouts", type=int, default=12)
    args, overrides = parser.parse_known_args()
    if args.rollouts < 3:
        parser.error(f"--rollouts {args.rollouts}: at least 3 are needed for a standard error")
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--run_dir", str(Path(folder) / "run"), "--tracking.trackers", "[]"]
        run = load_run([args.config], [*overrides, *fixed])
        with launch(run, "never") as ctx:
            parts = build(run, ctx)
            with torch.no_grad():  # a fresh adapter's one half is 0, and so is the other half's gradient
                for name, p in parts.policy.trained.items():
                    if ".lora_B." in name:
                        p.add_(1e-4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p.device))
            found = [gradient(run, parts, number) for number in range(args.rollouts)]
    names = list(parts.policy.trained)
    kinds = {"all": list(range(len(names)))}
    for place, name in enumerate(names):
        kinds.setdefault(kind(name), []).append(place)
    print(f"{args.rollouts} rollouts of {parts.geometry.images} images\n{'layers':<40} cosine   +-")
    for label, places in kinds.items():
        mean, error = agreement([torch.cat([g[i].flatten() for i in places]) for g in found])
        print(f"{label:<40} {mean:+.3f}  {error:.3f}")


if __name__ == "__main__":
    main()
