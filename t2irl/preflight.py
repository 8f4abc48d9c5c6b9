"""What can be seen to be wrong with a run's files before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from t2irl import registry
from t2irl.config import Run


def check_files(run: Run, prompts: Sequence[str], heldout: Sequence[str]) -> None:
    """Ask every reward and regulariser, such as those with reference images. Called on all processes alike.

    Raises ConfigError or DataError in the words that the start of the run would use.
    """
    for configs, trained in ((run.rewards, True), (run.heldout_rewards, False)):
        for config in configs.values():
            reward = registry.find("rewards", config.type)
            reward.check(config, reward.prompts_of(config, prompts, heldout, trained))
    for name, config in run.regularizers.items():
        registry.find("regularizers", config.type).check(name, config, prompts)
