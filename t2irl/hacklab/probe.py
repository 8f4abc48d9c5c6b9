"""How easily a reward is hacked, before any training: best-of-k and planted hacks on the base model's pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2irl import registry
from t2irl.config import TOTAL, Run
from t2irl.data import load_prompts
from t2irl.errors import ConfigError
from t2irl.evaluation.agreement import error_correlation, kendall_tau, starc_distance
from t2irl.evaluation.evaluate import sample_fixed
from t2irl.evaluation.hacks import HACKS, LIMIT, rise
from t2irl.evaluation.overoptimization import best_of_k, best_of_n_kl
from t2irl.hacklab import uncertainty
from t2irl.hacklab.tables import table
from t2irl.hacklab.total import total_of
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
    """By the name of the reward: (P x n,), NaN for pictures that it cannot judge."""


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
    if nothing := [name for name, values in scores.items() if values.isnan().all()]:
        raise ConfigError(
            f"{', '.join(nothing)}: applies to none of the {prompts * images} pictures, so there is nothing to probe; leave it "
            f"out, or give prompts that it is made for as data.heldout ({run.data.heldout})"
        )
    return Samples(groups, pictures, sets, scores)


def probe(run: Run, gold: str | None, prompts: int, images: int) -> dict[str, Any]:
    """Measure every reward of the run, and `total`, what it makes of them: the planted hacks, and the rest against the held-out
    reward `gold` if there is one.

    Numbers and lists only; what cannot be said, for want of pictures that both rewards can judge, is None. Raises ConfigError
    when `gold` is not among the held-out rewards that score single pictures, and for a reward that judges no picture.
    """
    if gold is not None and gold not in run.heldout_rewards:
        raise ConfigError(f"--gold {gold}: not among heldout_rewards: {', '.join(run.heldout_rewards) or 'none'}")
    found = sample(run, prompts, images)
    if gold is not None and gold not in found.scores:
        raise ConfigError(f"--gold {gold}: it measures whole sets of pictures; give a reward that scores each")
    if not found.scores:
        raise ConfigError("no reward of the config scores single pictures, so there is nothing to probe")
    total = total_of(run, found.sets["rewards"], found.scores, torch.tensor(found.groups.ids))
    changed = {name: scores | total(scores) for name in HACKS for scores in [_changed(found, name)]}
    found = replace(found, scores={**found.scores, **total(found.scores)})
    rewards: dict[str, Any] = {}
    for name, values in found.scores.items():
        known = values[~values.isnan()].double()
        rewards[name] = {"mean": float(known.mean()), "std": float(known.std(correction=0)),
                         "left_out": len(values) - len(known)}  # fmt: skip
        rewards[name] |= {} if gold is None else _against(values, found.scores[gold], found.groups, (prompts, images))
        rewards[name]["hacks"] = {hack: _rise(values, scores[name]) for hack, scores in changed.items()}
    return {
        "gold": gold, "prompts": prompts, "images": images, "kl": [best_of_n_kl(k) for k in range(1, images + 1)],
        "rewards": rewards, "correlation": _correlations(found, None),
        "error_correlation": {} if gold is None else _correlations(found, gold),
        "uncertainty": [] if gold is None else uncertainty.check(run, found, gold),
    }  # fmt: skip


def _against(values: Tensor, truth: Tensor, groups: PromptGroups, shape: tuple[int, int]) -> dict[str, Any]:
    """Agreement with gold and the best-of-k curve, of the pictures that both judge; `shape`: prompts, pictures of each."""
    both = ~(values.isnan() | truth.isnan())
    if not both.any():
        return {"tau": None, "starc": None, "best_of_k": None, "best_k": None}
    ids = torch.tensor(groups.ids)[both]
    # Pictures come one of each prompt at a time; best-of-k wants a row for each prompt.
    rows = [v.view(shape[1], shape[0]).T for v in (values, truth)]
    curve = best_of_k(*rows).tolist()
    return {
        "tau": _known(kendall_tau(values[both], truth[both], ids)), "starc": starc_distance(values[both], truth[both], ids),
        "best_of_k": curve, "best_k": 1 + max(range(len(curve)), key=lambda k: curve[k]),
    }  # fmt: skip


def _rise(plain: Tensor, changed: Tensor) -> dict[str, Any]:
    share, mean = (_known(value) for value in rise(plain, changed))
    return {"share": share, "rise": mean, "left_out": int((changed.isnan() & ~plain.isnan()).sum())}


def _correlations(found: Samples, gold: str | None) -> dict[str, dict[str, float | None]]:
    """Correlation of every two rewards within prompts, or with `gold` that of their errors, on the pictures that all can judge."""
    left_out = (gold,) if gold is None else (gold, TOTAL)  # the error of the whole is no second opinion on its parts
    names, ids = [name for name in found.scores if name not in left_out], torch.tensor(found.groups.ids)
    # The error against a constant is the score itself.
    truth = torch.zeros(len(ids)) if gold is None else found.scores[gold]
    square: dict[str, dict[str, float | None]] = {name: {name: 1.0} for name in names}
    for pair in combinations(names, 2):
        three = torch.stack([*(found.scores[name] for name in pair), truth])
        known = ~three.isnan().any(0)
        first, second, true = three[:, known]
        value = _known(error_correlation(first, second, true, ids[known])) if known.any() else None
        square[pair[0]][pair[1]] = square[pair[1]][pair[0]] = value
    return {name: {other: square[name][other] for other in names} for name in names} if len(names) > 1 else {}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _changed(found: Samples, hack: str) -> dict[str, Tensor]:
    """Scores of the pictures after a planted hack; batch by batch, as large ones need much memory."""
    sets = list(found.sets.values())
    batches: list[dict[str, Tensor]] = []
    for rows in sets[0].batches(len(found.groups)):
        groups = found.groups[rows]
        pictures = HACKS[hack](found.images[rows].float() / 255, groups.texts).mul(255).round().byte()
        batches.append({n: v for one in sets for n, v in one.score(pictures, groups).items()})
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def report(result: Mapping[str, Any]) -> str:
    """The numbers as Markdown: warnings first, then best-of-k, correlation of errors, and the planted hacks."""
    rewards = result["rewards"]
    lines = [f"{result['images']} pictures of each of {result['prompts']} held-out prompts, base model.", ""]
    lines += [f"- **warning**: {text}" for text in warnings(result)] or ["- no warning"]
    lines += [f"- {text}" for text in _left_out(result)]
    if result["gold"] is None:
        lines += ["- best of k, agreement with gold and correlation of errors are left out: they take a held-out reward as the "
                  "truth, `--gold NAME`"]  # fmt: skip
    else:
        lines += _gold_tables(result)
    if result["correlation"]:
        lines += ["", "### Correlation of rewards within prompts", "", *_square(result["correlation"])]
        lines += [
            "",
            "A reward guards against what it dislikes: beside a proxy one below 0 holds it better than one at 0. `total` is what the run "
            "would optimise: the less it goes with a proxy and the more with the others, the less of the proxy's hack is in it.",
        ]
    lines += ["", "### Planted hacks: mean rise in standard deviations, share of pictures whose score rises", ""]
    lines += table(
        ["hack", *rewards], [[hack, *(_risen(r["hacks"][hack]) for r in rewards.values())] for hack in HACKS]
    )
    lines += uncertainty.section(result["uncertainty"], result["gold"])
    return "\n".join(lines) + "\n"


def _gold_tables(result: Mapping[str, Any]) -> list[str]:
    rewards, gold, errors = result["rewards"], result["gold"], result["error_correlation"]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= result["images"]]
    rows = []
    for name, r in rewards.items():
        curve = [r["best_of_k"] and r["best_of_k"][k - 1] for k in ks]
        rows.append([name, *map(_number, (r["tau"], r["starc"], *curve)), str(r["best_k"] or "-")])
    lines = ["", f"### {gold} of the best of k by each reward", ""]
    lines += table(["reward", f"tau with {gold}", "STARC distance", *(f"k = {k}" for k in ks), "best k"], rows)
    if errors:
        lines += ["", f"### Correlation of errors: standardised reward less standardised {gold}, within prompts", ""]
        lines += _square(errors)
        lines += ["", f"1: wrong alike, no second opinion. 0.5: two that know nothing of {gold} or of each other."]
    return lines


def _square(pairs: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    return table(["reward", *pairs], [[n, *(_number(v) for v in row.values())] for n, row in pairs.items()])


def warnings(result: Mapping[str, Any]) -> list[str]:
    """What should be looked at before a reward is trained on."""
    found, gold = [], result["gold"]
    for name, reward in result["rewards"].items():
        liked = [f"{hack} {r['rise']:+.2f}" for hack, r in reward["hacks"].items() if (r["rise"] or 0) > LIMIT]
        if liked:
            found.append(f"{name} likes planted hacks (standard deviations): {', '.join(liked)}")
        curve = reward["best_of_k"] if gold not in (None, name) else None
        if curve and curve[-1] < curve[0]:
            found.append(
                f"picking by {name} lowers {gold}: {curve[0]:.3f} at random, {curve[-1]:.3f} for the best of {len(curve)}"
            )
    return found


def _left_out(result: Mapping[str, Any]) -> list[str]:
    """What is said of pictures that a reward cannot judge."""
    found, total = [], result["prompts"] * result["images"]
    for name, reward in result["rewards"].items():
        if reward["left_out"]:
            found.append(f"{name} cannot judge {reward['left_out']} of {total} pictures; they are left out")
        after = [f"{hack} {r['left_out']}" for hack, r in reward["hacks"].items() if r["left_out"]]
        if after:
            found.append(f"{name} can no longer judge pictures after a hack; they are left out: {', '.join(after)}")
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _risen(hack: Mapping[str, Any]) -> str:
    return "-" if hack["rise"] is None else f"{hack['rise']:+.2f} ({hack['share']:.0%})"


def _finite(value: Any) -> Any:
    """An infinite rise is None: JSON has no such number."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value


def write_probe(run: Run, gold: str | None, prompts: int, images: int, out: Path) -> str:
    """Probe, write `probe.json` and `probe.md` into `out`; returns what to say."""
    result = probe(run, gold, prompts, images)
    text = report(result)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "probe.json", _finite(result))
    (out / "probe.md").write_text(text, encoding="utf-8")
    return f"{text}\nResults: {out}"
