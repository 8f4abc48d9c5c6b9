"""`t2irl eval`, `t2irl grid` and `t2irl compare`: which one, and what they share."""

from __future__ import annotations

from collections.abc import Sequence


def run(command: str, argv: Sequence[str]) -> int:
    """Run one of the commands with these words; returns the exit code."""
    if command == "eval":
        from t2irl.evaluation.eval_command import evaluate_command as chosen
    elif command == "grid":
        from t2irl.evaluation.grid_command import grid_command as chosen
    else:
        from t2irl.evaluation.compare_command import compare_command as chosen
    return chosen(argv)
