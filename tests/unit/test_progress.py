"""What the user sees while a run goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from t2irl.utils import progress as module
from t2irl.utils.progress import HEARTBEAT_S, Progress, duration

METRICS = {
    "reward/shapes/mean": 0.5123,
    "reward/total/mean": 0.5123,
    "advantage/zero_variance_groups": 0.12,
    "time/rollout_s": 1.94,
    "time/score_s": 0.3,
    "time/update_s": 1.6,
    "time/iteration_s": 3.9,
    "data/images_total": 128,
}


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replaces the module's clock."""
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def plain(enabled: bool = True, iterations: int = 150, start: int = 0) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(enabled, iterations, start, Console(file=out, force_terminal=False, width=80)), out


def terminal(start: int = 0) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(True, 150, start, Console(file=out, force_terminal=True, width=160, legacy_windows=False)), out


def test_plain_line_says_rewards_seconds_and_time_left(clock: Clock) -> None:
    progress, out = plain()
    with progress:
        progress.iteration(11, METRICS)
        clock.now += 4.0
        progress.iteration(12, METRICS)
    assert out.getvalue().splitlines()[1] == (
        "iteration 12/150  reward/shapes 0.512  zero-variance 0.12  3.9 s (rollout 1.9 score 0.3 update 1.6)  left 9:12"
    )


def test_time_left_uses_this_iteration_until_two_ends_are_known(clock: Clock) -> None:
    progress, out = plain(iterations=11)
    with progress:
        progress.iteration(1, METRICS)
    assert out.getvalue().rstrip().endswith("left 0:39")


def test_time_left_counts_what_happens_between_iterations(clock: Clock) -> None:
    progress, out = plain(iterations=10)
    with progress:
        for finished, gap in ((1, 0.0), (2, 4.0), (3, 20.0)):
            clock.now += gap
            progress.iteration(finished, METRICS)
    assert out.getvalue().splitlines()[-1].endswith("left 1:24")  # 7 x (4 + 20) / 2


def test_two_rewards_show_each_and_the_total() -> None:
    progress, out = plain()
    progress.iteration(1, {"reward/a/mean": 1.0, "reward/b/mean": 2.0, "reward/total/mean": 3.0})
    assert "reward/a 1.000  reward/b 2.000  reward/total 3.000" in out.getvalue()


def test_the_base_model_prints_its_measures_only() -> None:
    progress, out = plain()
    progress.iteration(0, {"heldout/correct": 0.5, "heldout/cleanliness": 0.84, "time/evaluate_s": 7.0})
    assert out.getvalue() == "held out before training: correct 0.500  cleanliness 0.840  (7.0 s)\n"


def test_measures_follow_the_line_of_their_iteration() -> None:
    progress, out = plain()
    progress.iteration(20, METRICS | {"heldout/correct": 0.61})
    first, second = out.getvalue().splitlines()
    assert first.startswith("iteration 20/150") and second == "held out after iteration 20: correct 0.610"


def test_names_are_not_read_as_markup() -> None:
    progress, out = plain()
    progress.print("[bold]as it is[/bold]")
    progress.iteration(1, {"reward/[red]x/mean": 0.5})
    assert "[bold]as it is[/bold]" in out.getvalue() and "reward/[red]x 0.500" in out.getvalue()


def test_long_lines_are_not_broken() -> None:
    progress, out = plain()
    progress.print("word " * 60)
    assert len(out.getvalue().splitlines()) == 1


def test_a_long_stage_gives_signs_of_life(clock: Clock) -> None:
    progress, out = plain()
    with progress, progress.stage("rollout", 128) as advance:
        advance(16)
        assert out.getvalue() == ""
        clock.now += HEARTBEAT_S + 1
        advance(16)
        advance(16)
    assert out.getvalue() == "  rollout 32/128  0:31\n"


def test_disabled_is_silent() -> None:
    progress, out = plain(enabled=False)
    with progress, progress.stage("rollout", 4) as advance:
        advance()
        advance(3)
        progress.iteration(1, METRICS | {"heldout/correct": 0.5})
        progress.print("nothing")
    assert out.getvalue() == ""


def test_a_terminal_gets_nested_bars() -> None:
    progress, out = terminal()
    with progress, progress.stage("rollout", 128) as advance:
        progress.iteration(0, {"heldout/correct": 0.4})
        advance(64)
        progress.iteration(1, METRICS)
    shown = out.getvalue()
    assert "━" in shown and "1/150" in shown and "64/128" in shown
    assert "reward/shapes 0.512" in shown and "3.9 s/iteration" in shown and "33 images/s" in shown
    assert "left " in shown and "held out before training: correct 0.400" in shown


def test_a_resumed_bar_starts_where_the_run_stands_and_knows_no_speed_yet() -> None:
    progress, out = terminal(start=40)
    with progress:
        progress.iteration(41, METRICS | {"data/images_total": 41 * 128})
        first = out.getvalue()
        progress.iteration(42, METRICS | {"data/images_total": 42 * 128})
    assert "40/150" in first and "images/s" not in first
    assert "33 images/s" in out.getvalue()


def test_an_error_gives_the_terminal_back() -> None:
    progress, out = terminal()
    with pytest.raises(KeyError), progress, progress.stage("update", 2):
        raise KeyError
    assert out.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (542, "9:02"), (3600, "1:00:00"), (90061, "25:01:01"), (-3, "0:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
