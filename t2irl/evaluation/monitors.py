"""What is measured at every evaluation to see a reward being hacked, on pictures of a few held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2irl.evaluation.agreement import kendall_tau, starc_distance
from t2irl.evaluation.diversity import diversity
from t2irl.evaluation.evaluate import sample_fixed
from t2irl.geometry import even_chunks
from t2irl.policy import Policy
from t2irl.rollout import Noise
from t2irl.types import Trajectory
from t2irl.utils import distributed

if TYPE_CHECKING:
    from t2irl.train import Parts

SDE_NOISE = 0.7
"""Noise level a of the Flow-SDE whose paths the divergence is measured on, whatever the run's own dynamics."""
LEVELS = 8
"""Noise levels at which it is measured; each picture serves one of them."""


def monitor(parts: Parts) -> dict[str, float]:
    """Divergence from the reference policy, agreement of what is optimised with held-out rewards, diversity: of the averaged weights.

    Equal on all processes; empty with `monitors.prompts: 0`. What the pipeline needs of the base model must have been measured.
    """
    policy, run = parts.policy, parts.geometry.run
    if run.monitors.prompts == 0:
        return {}
    prompts = parts.heldout_prompts[: run.monitors.prompts]
    noise = Noise(run.seed, "evaluation")
    part = (distributed.rank(), distributed.world_size())
    with policy.averaged():
        trajectory = sample_fixed(policy, run, prompts, len(prompts) * run.monitors.images, noise, part=part)
    mine: dict[str, Any] = {}
    images, groups = trajectory.images, trajectory.groups
    with distributed.together(policy.family.device):
        scores = [parts.rewards.score(images, groups), parts.heldout.score(images, groups)] if len(groups) else []
    if len(groups):
        mine["scores"] = scores
        mine["features"] = parts.look(images).cpu()
        mine["ids"] = torch.tensor(groups.ids)
        mine["kl"] = path_kl(policy, trajectory, noise, run.rollout.batch_size)
    every = [process for process in distributed.gather_objects(mine) if process]
    trained, heldout = (
        {name: torch.cat([process["scores"][k][name] for process in every]) for name in every[0]["scores"][k]}
        for k in range(2)
    )
    features, ids, kl = (torch.cat([process[key] for process in every]) for key in ("features", "ids", "kl"))
    found = {"policy/kl_reference": float(kl.mean())}
    optimised = parts.pipeline.optimised
    found |= agreement(optimised.signal(trained, ids, heldout=True), heldout, ids)
    level = optimised.level(trained, ids, heldout=True)
    found |= moments({**({} if level is None else {"total": level}), **trained, **heldout})
    spread, duplicates = diversity(features, ids, cosine=run.monitors.features is not None)
    return found | {"diversity/pairwise": spread, "diversity/duplicates": duplicates}


def path_kl(policy: Policy, trajectory: Trajectory, noise: Noise, batch_size: int) -> Tensor:
    """Divergence of the policy's paths from the reference policy's in nats, a sample for each picture: (B,) float64, CPU.

    For two stochastic flows of equal noise sigma(t) = a sqrt(t / (1 - t)) (Flow-SDE) it is, by Girsanov's theorem, the
    integral over t of (1 + a^2 / 2)^2 (1 - t) / (2 a^2 t) |v - v_ref|^2, summed over the latent. States are the policy's
    finished pictures, noised again, instead of paths: a flow passes through the same distribution. The integral is the
    mean over midpoints of `LEVELS` equal stretches of (0, 1), or up to the noise that the model knows, of which each picture
    takes one.
    """
    groups = trajectory.groups
    places = torch.tensor([((i + m) % LEVELS + 0.5) / LEVELS for i, m in zip(groups.ids, groups.members, strict=True)])
    top = policy.family.highest_level  # paths begin there
    middle = top * places
    factor = top * (1 + SDE_NOISE**2 / 2) ** 2 / (2 * SDE_NOISE**2) * ((1 - middle) / middle).double()
    found = []
    with torch.no_grad(), policy.averaged():
        for chunk in even_chunks(len(groups), batch_size):
            clean = trajectory.final[chunk]
            part, t = groups[chunk], middle[chunk].to(clean.device)
            fresh = noise.draw(part, 2, policy.family.latent_shape)[:, 1].to(clean.device)
            x = clean.lerp(fresh, t.view(-1, 1, 1, 1))
            text = policy.text(part.texts)
            ours = policy.velocity(x, t, text)
            with policy.reference():
                theirs = policy.velocity(x, t, text)
            found.append((ours - theirs).double().square().flatten(1).sum(1).cpu())
    return factor * torch.cat(found)


def moments(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean and standard deviation (population) of name -> (N,) scores, those that are NaN left out; nothing for one that is NaN throughout."""
    found: dict[str, float] = {}
    for name, values in scores.items():
        known = values[~values.isnan()].double()
        if len(known):
            found |= {
                f"monitor/{name}/mean": float(known.mean()),
                f"monitor/{name}/std": float(known.std(correction=0)),
            }
    return found


def agreement(signal: Tensor, heldout: Mapping[str, Tensor], ids: Tensor) -> dict[str, float]:
    """How far what is optimised (N,) and every held-out reward (N,) agree within prompts; NaN where one does not apply."""
    found: dict[str, float] = {}
    for name, values in heldout.items():
        both = ~(signal.isnan() | values.isnan())
        if both.any():
            tau = kendall_tau(signal[both], values[both], ids[both])
            found |= {} if math.isnan(tau) else {f"hack/tau/{name}": tau}
            found[f"hack/starc/{name}"] = starc_distance(signal[both], values[both], ids[both])
    return found


def relative(now: Mapping[str, float], base: Mapping[str, Any], heldout: Sequence[str]) -> dict[str, float]:
    """Measures relative to those before training: diversity ratio, and gap of what is optimised and each held-out reward.

    gap = (total - its base mean) / its base std - the same of the held-out reward, in standard deviations of the base model's
    pictures. Left out where the base model's pictures all score the same, or were not measured, and where the total cannot do
    without a reward that learns.
    """
    found = {}
    if base.get("diversity/pairwise") and "diversity/pairwise" in now:
        found["diversity/ratio"] = now["diversity/pairwise"] / base["diversity/pairwise"]
    total = _standardised("total", now, base)
    for name in heldout:
        value = _standardised(name, now, base)
        if total is not None and value is not None:
            found[f"hack/gap/{name}"] = total - value
    return found


def _standardised(name: str, now: Mapping[str, float], base: Mapping[str, Any]) -> float | None:
    mean, std = base.get(f"monitor/{name}/mean"), base.get(f"monitor/{name}/std")
    value = now.get(f"monitor/{name}/mean")
    return None if value is None or mean is None or not std else (value - mean) / std
