"""The part of a probe that looks at `uncertainty` regularisers: is a reward unsure where it is wrong?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from t2irl.config import TOTAL, Run
from t2irl.guards.validity import ENOUGH, NEEDS_POLICY, foretells, uncertain
from t2irl.hacklab.tables import table
from t2irl.regularizers.uncertainty import Uncertainty, refuse_unfit

if TYPE_CHECKING:
    from t2irl.hacklab.probe import Samples


def check(run: Run, found: Samples, gold: str) -> list[dict[str, Any]]:
    """Of every reward that such a regulariser is for: the rank correlation of its uncertainty with its error, as of `foretells`; None
    where the estimator needs the policy, and beside `combine`, where it is for the one score of all. Raises ConfigError as a training run would.
    """
    rows = []
    ids, rewards = torch.tensor(found.groups.ids), found.sets["rewards"]
    for name, c in run.regularizers.items():
        if not isinstance(c, Uncertainty.Config):
            continue
        judged = c.judged(run)
        refuse_unfit(name, c, rewards.only(judged))
        if run.combine is not None:  # it is not for single rewards, and their one score needs the base model's
            rows.append({"regularizer": name, "reward": TOTAL, "estimator": c.estimator, "correlation": None})
            continue
        alone = c.estimator in NEEDS_POLICY
        table = {} if alone else uncertain(c, judged, rewards, found.images, found.groups, run.seed)
        for reward in judged:
            scores = found.scores[reward] * (-1 if rewards.weights[reward] < 0 else 1)
            value = None if alone else foretells(table[reward], scores, found.scores[gold], ids)
            rows.append({"regularizer": name, "reward": reward, "estimator": c.estimator, "correlation": value})
    return rows


def section(rows: Sequence[dict[str, Any]], gold: str | None) -> list[str]:
    """The same as lines of Markdown; none without such a regulariser."""
    if not rows:
        return []
    lines = []
    for row in rows:
        value = row["correlation"]
        number, said = f"{value or 0:.3f}", f"above {ENOUGH}"
        if value is None:
            why = "it is of the one score that combine makes" if row["reward"] == TOTAL else "it needs the policy"
            number, said = "-", f"not measured: {why}"
        elif value <= ENOUGH:
            said = f"**not above {ENOUGH}: do not weigh by it**"
        lines.append([row["regularizer"], row["reward"], row["estimator"], number, said])
    head = ["", f"### Uncertainty: rank correlation with the error against {gold}, within prompts", ""]
    return head + table(["regulariser", "reward", "estimator", "correlation", ""], lines)
