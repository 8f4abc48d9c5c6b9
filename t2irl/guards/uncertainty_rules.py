"""Whether an `uncertainty` regulariser can judge the rewards that it is for. Reads configs alone.

Each function gives what is wrong as the end of a sentence, None if nothing is. `c` is the settings, `run` the whole config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2irl import registry
from t2irl.config import Run
from t2irl.guards.auxiliary import auxiliary_problem, unknown_problem
from t2irl.rewards.base import Reward

if TYPE_CHECKING:
    from t2irl.regularizers.uncertainty import Uncertainty


def combined_problem(c: Uncertainty.Config, run: Run) -> str | None:
    """Why it cannot be for the one score that `combine` makes."""
    if run.combine is None:
        return None
    if c.rewards is not None:
        return (
            f"has rewards: {list(c.rewards)}, but with combine it is for the one score of all of them: leave that out"
        )
    if c.estimator == "ensemble":
        return "has estimator ensemble, the judges of one reward, but combine makes one score of several: use another estimator"
    return None


def members_problem(c: Uncertainty.Config, run: Run) -> str | None:
    """Why the rewards cannot be judged by the members, or by judges of their own."""
    names = c.judged(run)
    if c.estimator == "ensemble" and not c.members:
        alone = [n for n in names if registry.find("rewards", run.rewards[n].type).judges is Reward.judges]
        return (
            f"needs members: names of rewards of weight 0 that judge as {alone[0]} does, which is one judge alone"
            if alone
            else None
        )
    if c.estimator == "ensemble" and len(names) != 1:
        return f"has estimator ensemble for {len(names)} rewards: name the one that its members judge in rewards"
    return auxiliary_problem(run, c.members, "members") if c.estimator in ("ensemble", "cross_reward") else None


def doubt_problem(c: Uncertainty.Config, run: Run) -> str | None:
    """Why `doubt` cannot listen to its reward."""
    if c.doubt is None:
        return None
    if c.doubt.reward in c.judged(run):
        return f"has doubt.reward: {c.doubt.reward!r}, one of the rewards that it judges: name others in rewards"
    return unknown_problem(run, c.doubt.reward, "doubt.reward")
