"""When to say that a run hacks its reward: rules on the measurements so far, pure. Imports no torch.

Everything is read from the lines of metrics.jsonl, so a resumed run knows what an uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from t2irl.strict import Strict

Rule = Literal[
    "below_base", "off_peak", "tau_halved", "diversity_low", "duplicates", "gap_opens", "primary_falls", "few_count"
]
Row = Mapping[str, Any]
ERRORS = 2.0
"""Standard errors from which a fall counts."""
DIVERSITY = 0.7
"""Share of the base model's diversity that should be left."""
MORE_DUPLICATES = 0.1
"""Rise of the share of duplicates over the base model's that should not be exceeded."""
SHARE = 0.5
"""Effective share of a group, by the weights of `uncertainty`, below which few of its pictures decide."""
TAU_FLOOR = 0.1
"""Agreement with the base model's pictures below which its halving says nothing."""


class Monitors(Strict):
    """What is watched for reward hacking at every evaluation, and what happens then."""

    prompts: NonNegativeInt = 16
    """Held-out prompts whose pictures are compared with one another and scored by trained and held-out rewards; 0: none."""
    images: int = Field(default=4, ge=2)
    """Pictures of each of these prompts."""
    features: Path | None = None
    """Folder of a vision transformer by whose features (the vector of the whole picture) pictures are compared: DINOv2, DINOv3,
    SigLIP or CLIP, of transformers, timm or open_clip. Take another one than the rewards do. null: their pixels, shrunk to
    16 x 16."""
    heldout: str | None = None
    """The held-out reward that rules, early stop and best checkpoint look at; null: the first one."""
    patience: PositiveInt = 3
    """Evaluations in a row that a fall must be seen in."""
    stop: tuple[Rule, ...] = ()
    """Rules that end the run when they fire: below_base (held-out reward below the base model's by two standard errors),
    off_peak (below its own best), tau_halved (trained and held-out reward agree half as well as at the start), diversity_low,
    duplicates, gap_opens (the trained reward rises away while the held-out one falls), primary_falls (the same of the total and
    the reward of `combine.gate`), few_count (weights by uncertainty leave less than half of a group)."""
    best: Literal["none", "keep", "export"] = "keep"
    """The checkpoint of the best held-out reward: keep it in `best`, beside the newest ones in `checkpoints`, or also write it
    to `export_best` at the end."""

    def watched(self, heldout_rewards: Mapping[str, Any]) -> str | None:
        """Name of the held-out reward that is looked at; None if there is none."""
        return self.heldout or next(iter(heldout_rewards), None)

    def problem(
        self, heldout_rewards: Mapping[str, Any], primary: str | None = None, weighted: bool = False
    ) -> str | None:
        """Why these settings cannot work with the run's held-out rewards and the reward of its gate, if they cannot.

        `weighted`: whether a regulariser weighs images by uncertainty.
        """
        if self.heldout is not None and self.heldout not in heldout_rewards:
            known = ", ".join(heldout_rewards) or "none"
            return f"monitors.heldout = {self.heldout} is not among heldout_rewards: {known}"
        if not heldout_rewards and (self.stop or self.best == "export"):
            key = "stop" if self.stop else "best"
            return f"monitors.{key} needs a held-out reward to look at: add one to heldout_rewards"
        if "primary_falls" in self.stop and primary is None:
            return "monitors.stop = primary_falls needs a primary reward, which combine.gate names: add one, or drop the rule"
        if "few_count" in self.stop and not weighted:
            return "monitors.stop = few_count looks at weights, which only a regulariser of type uncertainty has; add one, or drop it"
        if self.features is not None and self.prompts == 0:
            return f"monitors.features = {self.features} needs pictures to look at: set monitors.prompts above 0"
        needy = [rule for rule in self.stop if self.prompts == 0 and rule != "few_count"]
        return f"monitors.stop = {needy[0]} needs pictures to measure: set monitors.prompts above 0" if needy else None


@dataclass(frozen=True)
class Fired:
    """A rule that fired, and the first iteration at which it did."""

    rule: Rule
    iteration: int
    text: str
    metric: str


def measured(rows: Sequence[Row], watched: str) -> list[Row]:
    """The lines of evaluations."""
    return [row for row in rows if row.get(f"heldout/{watched}") is not None]


def best_iteration(rows: Sequence[Row], watched: str) -> int | None:
    """The first iteration, after at least one, whose held-out reward is the highest; None before the first such."""
    trained = [row for row in measured(rows, watched) if row["iteration"] > 0]
    return max(trained, key=lambda row: row[f"heldout/{watched}"])["iteration"] if trained else None


def primary_of(combine: Any) -> str | None:
    """The reward that the gate of a `combine` section names, as settings or as read from a file; None without one."""
    tree = combine.model_dump() if isinstance(combine, Strict) else combine
    return ((tree or {}).get("gate") or {}).get("reward")


def fired(rows: Sequence[Row], watched: str, patience: int, images: int, primary: str | None = None) -> list[Fired]:
    """Rules that fired so far, each once. `images`: pictures of an evaluation, for the standard error of its means. `primary`: the
    trained reward without which the others do not count."""
    found: dict[str, Fired] = {}
    evaluated = measured(rows, watched)
    for end in range(2, len(evaluated) + 1):
        seen = evaluated[:end]
        for rule, (metric, judge) in RULES.items():
            name = primary if rule == "primary_falls" else watched
            text = None if rule in found or name is None else judge(seen, name, patience, images)
            if text:
                found[rule] = Fired(rule, seen[-1]["iteration"], text, metric.format(watched=name))
    return list(found.values())


def standard_error(first: Row, second: Row, watched: str, images: int) -> float | None:
    """Of the difference of two evaluations, as if their pictures had nothing in common; None if it was not measured."""
    stds = [row.get(f"monitor/{watched}/std") for row in (first, second)]
    if any(std is None for std in stds):
        return None
    return (sum(std**2 for std in stds if std is not None) / images) ** 0.5


def _fell(since: Row, row: Row, watched: str, images: int) -> bool:
    error = standard_error(since, row, watched, images)
    key = f"heldout/{watched}"
    return error is not None and since[key] - row[key] > ERRORS * error


def _below_base(seen: Sequence[Row], watched: str, patience: int, images: int) -> str | None:
    late = seen[1:][-patience:]
    if len(late) < patience or not all(_fell(seen[0], row, watched, images) for row in late):
        return None
    key = f"heldout/{watched}"
    return f"{watched} is at {seen[-1][key]:.3f}, below the base model's {seen[0][key]:.3f} by more than two standard errors"


def _off_peak(seen: Sequence[Row], watched: str, patience: int, images: int) -> str | None:
    early, late, key = seen[:-patience], seen[-patience:], f"heldout/{watched}"
    if not early:
        return None
    peak = max(early, key=lambda row: row[key])
    if not all(_fell(peak, row, watched, images) for row in late):
        return None
    return f"{watched} is at {seen[-1][key]:.3f}, after {peak[key]:.3f} in iteration {peak['iteration']}"


def _tau_halved(seen: Sequence[Row], watched: str, patience: int, images: int) -> str | None:
    start, now = (row.get(f"hack/tau/{watched}") for row in (seen[0], seen[-1]))
    if start is None or now is None or start < TAU_FLOOR or now >= start / 2:
        return None
    return f"the trained reward and {watched} agree less and less on how to rank pictures: tau {start:.2f} -> {now:.2f}"


def _diversity_low(seen: Sequence[Row], watched: str, patience: int, images: int) -> str | None:
    ratio = seen[-1].get("diversity/ratio")
    if ratio is None or ratio >= DIVERSITY:
        return None
    return f"pictures of one prompt differ {ratio:.0%} as much as the base model's, less than {DIVERSITY:.0%}"


def _duplicates(seen: Sequence[Row], watched: str, patience: int, images: int) -> str | None:
    start, now = (row.get("diversity/duplicates") for row in (seen[0], seen[-1]))
    if start is None or now is None or now <= start + MORE_DUPLICATES:
        return None
    return f"{now:.0%} of the pairs of pictures of one prompt are nearly equal, {start:.0%} were"


def _gap_opens(seen: Sequence[Row], watched: str, patience: int, images: int) -> str | None:
    window = seen[-max(3, patience) :]
    gaps = [row.get(f"hack/gap/{watched}") for row in window]
    if len(window) < 3 or any(gap is None for gap in gaps) or not _fell(window[0], window[-1], watched, images):
        return None
    falling = slope([row[f"heldout/{watched}"] for row in window]) < 0 < slope([gap for gap in gaps if gap is not None])
    if not falling:
        return None
    return f"the trained reward rises away from {watched}, which falls: gap {gaps[0]:.2f} -> {gaps[-1]:.2f} standard deviations"


def _primary_falls(seen: Sequence[Row], primary: str, patience: int, images: int) -> str | None:
    window, key = seen[-max(3, patience) :], f"heldout/{primary}"
    totals, values = ([row.get(name) for row in window] for name in ("monitor/total/mean", key))
    known = [total for total in totals if total is not None]
    if len(window) < 3 or len(known) < len(window) or None in values:
        return None
    if not _fell(window[0], window[-1], primary, images) or not slope([row[key] for row in window]) < 0 < slope(known):
        return None
    return (
        f"the total rises while {primary}, without which the other rewards should not count, falls: {values[0]:.3f} -> "
        f"{values[-1]:.3f}. Raise the level of combine.gate"
    )


def _few_count(seen: Sequence[Row], watched: str, patience: int, images: int) -> str | None:
    late = seen[1:][-patience:]
    for key in late[-1]:
        shares = [row.get(key) for row in late if key.endswith("/effective_share")]
        if len(shares) == patience and all(share is not None and share < SHARE for share in shares):
            return f"{key} is at {shares[-1]:.2f}: few pictures of a group decide"
    return None


def slope(values: Sequence[float]) -> float:
    """Of the least-squares line through values at equal distances."""
    middle = (len(values) - 1) / 2
    return sum((k - middle) * v for k, v in enumerate(values)) / sum((k - middle) ** 2 for k in range(len(values)))


RULES: dict[Rule, tuple[str, Callable[[Sequence[Row], str, int, int], str | None]]] = {
    "below_base": ("heldout/{watched}", _below_base),
    "off_peak": ("heldout/{watched}", _off_peak),
    "tau_halved": ("hack/tau/{watched}", _tau_halved),
    "diversity_low": ("diversity/ratio", _diversity_low),
    "duplicates": ("diversity/duplicates", _duplicates),
    "gap_opens": ("hack/gap/{watched}", _gap_opens),
    "primary_falls": ("heldout/{watched}", _primary_falls),
    "few_count": ("regularizer/<name>/<reward>/effective_share", _few_count),
}
"""Name -> the metric that it is seen in, and what it says of evaluations so far if it fires."""
