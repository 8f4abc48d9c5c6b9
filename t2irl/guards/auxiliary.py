"""Whether the rewards that a regulariser names are there and serve as they should. Reads configs alone."""

from __future__ import annotations

from collections.abc import Sequence

from t2irl import registry
from t2irl.config import Run


def trained_problem(run: Run, names: Sequence[str], key: str) -> str | None:
    """What is wrong with `names` as rewards that are trained on, as the end of a sentence; None if nothing is."""
    for name in names:
        if found := unknown_problem(run, name, key):
            return found
        if run.rewards[name].weight == 0:
            return f"has {key}: {name!r}, a reward of weight 0, which nothing is trained on: give it a weight, or name another"
    return _twice(names, key)


def auxiliary_problem(run: Run, names: Sequence[str], key: str) -> str | None:
    """The same as rewards of weight 0, which never drive the policy. At least one is needed."""
    if not names:
        return f"needs {key}: names of rewards of weight 0 that judge the same pictures"
    for name in names:
        if name in run.heldout_rewards:
            return f"has {key}: {name!r}, a held-out reward, which is not scored on rollouts: move it to rewards, with weight: 0"
        if found := unknown_problem(run, name, key):
            return found
        if run.rewards[name].weight != 0:
            return f"has {key}: {name!r}, which is trained on (weight {run.rewards[name].weight:g}), but only a reward of weight 0 is a witness"
    return _twice(names, key)


def unknown_problem(run: Run, name: str, key: str) -> str | None:
    """The same where any weight will do."""
    if name in run.rewards:
        return None
    near = registry.did_you_mean(name, list(run.rewards))
    return f"has {key}: {name!r}, which is not among the rewards: {', '.join(run.rewards)}.{near}"


def _twice(names: Sequence[str], key: str) -> str | None:
    again = [name for name in names if list(names).count(name) > 1]
    return f"has {key}: {again[0]!r} twice" if again else None
