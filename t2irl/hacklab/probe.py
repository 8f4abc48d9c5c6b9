"""How easily a reward is hacked, before any training: best-of-k and planted hacks on the base model's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2irl import registry
from t2irl.config import Run
from t2irl.data import load_prompts
from t2irl.errors import ConfigError
from t2irl.evaluation.agreement import kendall_tau, starc_distance
from t2irl.evaluation.evaluate import sample_fixed
from t2irl.evaluation.hacks import HACKS, LIMIT, rise
from t2irl.evaluation.monitors import compare
from t2irl.evaluation.overoptimization import best_of_k, best_of_n_kl
from t2irl.hacklab import uncertainty
from t2irl.launch import write_json
from t2irl.policy import Policy
from t2irl.rewards.combine import RewardSet
from t2irl.rollout import Noise
from t2irl.types import PromptGroups


@dataclass(frozen=True)
class Samples:
    """Pictures of the base model, each prompt's together, and their scores."""

    groups: PromptGroups
    images: Tensor
    """(P x n, 3, H, W) uint8, ordered by picture, then by prompt."""
    sets: Mapping[str, RewardSet]
    """Rewards trained on and held out."""
    scores: Mapping[str, Tensor]
    """By the name of the reward: (P x n,)."""


def sample(run: Run, prompts: int, images: int) -> Samples:
    """Draw `images` pictures of each of `prompts` held-out prompts with the base model, and score them."""
    texts = load_prompts(run.data.heldout, "data.heldout").texts
    if len(texts) < prompts:
        raise ConfigError(f"--prompts {prompts}: {run.data.heldout} has {len(texts)}; use at most these")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = registry.build("models", run.model, device)
    algorithm = registry.build("algorithms", run.algorithm)
    policy = Policy(run, family, registry.build("dynamics", run.rollout.dynamics), algorithm.reduction)
    sets = {}
    for kind, configs in (("rewards", run.rewards), ("heldout_rewards", run.heldout_rewards)):
        sets[kind] = RewardSet(configs, device, run.rollout.batch_size, family.work, run.seed)
        sets[kind].prepare(
            load_prompts(run.data.prompts, "data.prompts").texts, texts, family, trained=kind == "rewards"
        )
    with policy.reference():
        sampled = sample_fixed(policy, run, texts[:prompts], prompts * images, Noise(run.seed, "evaluation"))
    groups, pictures = sampled.groups, sampled.images
    scores = {
        name: values for reward_set in sets.values() for name, values in reward_set.score(pictures, groups).items()
    }
    if bad := [name for name, values in scores.items() if values.isnan().any()]:
        raise ConfigError(f"{', '.join(bad)}: does not apply to every picture, so it cannot be probed; leave it out")
    return Samples(groups, pictures, sets, scores)


def probe(run: Run, gold: str, prompts: int, images: int) -> dict[str, Any]:
    """Measure every reward of the run against the held-out reward `gold`. Numbers and lists only.

    Raises ConfigError when `gold` is not among the held-out rewards that score single pictures.
    """
    if gold not in run.heldout_rewards:
        raise ConfigError(f"--gold {gold}: not among heldout_rewards: {', '.join(run.heldout_rewards) or 'none'}")
    found = sample(run, prompts, images)
    if gold not in found.scores:
        raise ConfigError(f"--gold {gold}: it measures whole sets of pictures; give a reward that scores each")
    ids, truth = torch.tensor(found.groups.ids), found.scores[gold]
    changed = {name: _changed(found, name) for name in HACKS}
    result: dict[str, Any] = {"gold": gold, "prompts": prompts, "images": images, "kl": [best_of_n_kl(k) for k in
                              range(1, images + 1)], "rewards": {}}  # fmt: skip
    for name, values in found.scores.items():
        # Pictures come one of each prompt at a time; best-of-k wants a row for each prompt.
        rows = [v.view(images, prompts).T for v in (values, truth)]
        curve = best_of_k(*rows).tolist()
        stats = compare({name: values}, {name: 1.0}, {gold: truth}, ids)
        result["rewards"][name] = {
            "mean": stats["monitor/total/mean"], "std": stats["monitor/total/std"],
            "tau": kendall_tau(values, truth, ids), "starc": starc_distance(values, truth, ids),
            "best_of_k": curve, "best_k": 1 + max(range(images), key=lambda k: curve[k]),
            "hacks": {hack: dict(zip(("share", "rise"), rise(values, scores[name]), strict=True))
                      for hack, scores in changed.items()},
        }  # fmt: skip
    result["uncertainty"] = uncertainty.check(run, found, gold)
    return result


def _changed(found: Samples, hack: str) -> dict[str, Tensor]:
    """Scores of the pictures after a planted hack."""
    pictures = HACKS[hack](found.images.float() / 255).mul(255).round().byte()
    return {n: v for reward_set in found.sets.values() for n, v in reward_set.score(pictures, found.groups).items()}


def report(result: Mapping[str, Any]) -> str:
    """The numbers as Markdown: warnings first, then best-of-k and the planted hacks."""
    rewards = result["rewards"]
    lines = [f"{result['images']} pictures of each of {result['prompts']} held-out prompts, base model.", ""]
    lines += [f"- **warning**: {text}" for text in warnings(result)] or ["- no warning"]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= result["images"]]
    gold = result["gold"]
    lines += ["", f"### {gold} of the best of k by each reward", ""]
    lines += _table(
        ["reward", f"tau with {gold}", "STARC distance", *(f"k = {k}" for k in ks), "best k"],
        [
            [
                name,
                _number(r["tau"]),
                _number(r["starc"]),
                *(_number(r["best_of_k"][k - 1]) for k in ks),
                str(r["best_k"]),
            ]
            for name, r in rewards.items()
        ],
    )
    lines += ["", "### Planted hacks: mean rise in standard deviations, share of pictures whose score rises", ""]
    lines += _table(
        ["hack", *rewards],
        [
            [hack, *(f"{r['hacks'][hack]['rise']:+.2f} ({r['hacks'][hack]['share']:.0%})" for r in rewards.values())]
            for hack in HACKS
        ],
    )
    lines += uncertainty.section(result["uncertainty"], result["gold"])
    return "\n".join(lines) + "\n"


def warnings(result: Mapping[str, Any]) -> list[str]:
    """What should be looked at before a reward is trained on."""
    found = []
    for name, reward in result["rewards"].items():
        liked = [f"{hack} {r['rise']:+.2f}" for hack, r in reward["hacks"].items() if r["rise"] > LIMIT]
        if liked:
            found.append(f"{name} likes planted hacks (standard deviations): {', '.join(liked)}")
        if name != result["gold"] and reward["best_of_k"][-1] < reward["best_of_k"][0]:
            found.append(
                f"picking by {name} lowers {result['gold']}: {reward['best_of_k'][0]:.3f} at random, "
                f"{reward['best_of_k'][-1]:.3f} for the best of {result['images']}"
            )
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(words)} |" for words in (head, ["---"] * len(head), *rows)]


def _number(value: float) -> str:
    return f"{value:.3f}"


def write_probe(run: Run, gold: str, prompts: int, images: int, out: Path) -> str:
    """Probe, write `probe.json` and `probe.md` into `out`; returns what to say."""
    result = probe(run, gold, prompts, images)
    text = report(result)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "probe.json", result)
    (out / "probe.md").write_text(text, encoding="utf-8")
    return f"{text}\nResults: {out}"
