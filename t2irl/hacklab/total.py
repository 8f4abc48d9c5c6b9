"""What a run would optimise, as one more reward to probe: of all that it trains on together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from t2irl.algebra.pipeline import Pipeline
from t2irl.config import TOTAL, Run
from t2irl.rewards.combine import RewardSet


def total_of(
    run: Run, rewards: RewardSet, base: Mapping[str, Tensor], ids: Tensor
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function from scores of pictures (N,) by reward to {TOTAL: (N,)}, NaN where nothing applies; to {} where one reward
    is all there is, or one that learns is among them, which a probe knows untrained.

    `base` stands for the base model's scores, and for those of each prompt's own images, `per_prompt`; `ids`: (N,) prompts.
    """
    pipeline = Pipeline(run, rewards)
    alone = len(pipeline.names) < 2 and run.combine is None
    if alone or pipeline.optimised.learning:
        return lambda scores: {}
    pipeline.base.pooled = {name: base[name][~base[name].isnan()].double() for name in pipeline.names}
    return lambda scores: {
        TOTAL: pipeline.optimised.signal({n: scores[n].double() for n in rewards.rewards}, ids, True)
    }
