"""Whose turn it is, simulated without any network."""

from __future__ import annotations

from itertools import groupby

import pytest
from pydantic import TypeAdapter, ValidationError

from t2irl.turns import AccuracyTurns, AnyTurns, FixedTurns, Observation, TriggerTurns, Turns

NAN = float("nan")
AHEAD, BEHIND = Observation(1.0, 0.5, 0.5), Observation(0.5, 1.0, 0.9)


def run(turns: Turns, seen: list[Observation]) -> str:
    """One letter an iteration: B both learn, A only the adversary, P only the policy, - nobody."""
    letters = {(True, True): "B", (True, False): "A", (False, True): "P", (False, False): "-"}
    return "".join(letters[turn.adversary, turn.policy] for turn in map(turns.next, seen))


def test_by_default_every_rollout_serves_both() -> None:
    assert run(Turns(FixedTurns()), [AHEAD] * 5) == "BBBBB"


def test_the_published_schedule() -> None:
    """d_times 10, two policy updates in a policy iteration: 858 updates after 780 iterations, 66 every 60."""
    turns = Turns(FixedTurns(learn=9, rest=1, skip_policy=True))
    letters = run(turns, [AHEAD] * 780)
    assert letters == "AAAAAAAAAP" * 78
    steps = [1 if letter == "A" else 2 for letter in letters]
    assert sum(steps) == 858 and letters.count("A") == 702
    assert sum(steps[:60]) == 66
    # The published run stops at 1,000 updates: 910 iterations, 91 of them the policy's.
    letters += run(turns, [AHEAD] * 130)
    assert sum(1 if letter == "A" else 2 for letter in letters) == 1001 and letters.count("P") == 91


def test_a_schedule_without_policy_is_refused() -> None:
    with pytest.raises(ValidationError, match="never lets the policy learn; set rest to 1 or more"):
        FixedTurns(skip_policy=True)


def test_fixed_cycle_and_warmup() -> None:
    assert run(Turns(FixedTurns(learn=1, rest=2)), [AHEAD] * 7) == "BPPBPPB"
    assert run(Turns(FixedTurns(learn=1, rest=2, warmup=2)), [AHEAD] * 7) == "AABPPBP"


def test_trigger_learns_only_when_the_policy_is_ahead() -> None:
    level = Observation(1.0, 1.0, 0.5)
    assert run(Turns(TriggerTurns()), [AHEAD, BEHIND, level, AHEAD]) == "BPPB"
    assert run(Turns(TriggerTurns(skip_policy=True)), [AHEAD, BEHIND, level, AHEAD]) == "APPA"
    assert run(Turns(TriggerTurns(margin=0.6)), [AHEAD]) == "P"
    assert run(Turns(TriggerTurns()), [Observation(1.0, NAN, NAN)]) == "P"


def test_the_cap_gives_the_policy_its_turn() -> None:
    """An adversary that cannot keep up would otherwise stop the policy for good."""
    assert run(Turns(TriggerTurns(skip_policy=True, cap=3, cooldown=2)), [AHEAD] * 11) == "AAAPPAAAPPA"
    assert run(Turns(TriggerTurns(skip_policy=True, cap=None)), [AHEAD] * 50) == "A" * 50
    broken = [AHEAD, AHEAD, BEHIND, AHEAD, AHEAD, AHEAD, AHEAD]
    assert run(Turns(TriggerTurns(skip_policy=True, cap=3)), broken) == "AAPAAAP"


def test_accuracy_stays_in_the_band() -> None:
    def seen(*values: float) -> list[Observation]:
        return [Observation(NAN, NAN, value) for value in values]

    turns = Turns(AccuracyTurns(low=0.6, high=0.8))
    assert run(turns, seen(0.5, 0.7, 0.8, 0.81, 0.7, 0.6, 0.59, 0.7, 0.9)) == "BBBPPPBBP"
    assert run(Turns(AccuracyTurns()), seen(NAN, 0.9, NAN, 0.5, NAN)) == "BPPBB"
    assert run(Turns(AccuracyTurns(cap=2, skip_policy=True)), seen(*[0.5] * 6)) == "AAPAAP"


def test_an_adversary_that_gains_and_loses_accuracy_settles_in_the_band() -> None:
    """Learning raises accuracy, the policy's learning lowers it: a closed loop stays near the band."""
    turns, accuracy, course = Turns(AccuracyTurns(low=0.6, high=0.8)), 0.5, []
    for _ in range(400):
        turn = turns.next(Observation(NAN, NAN, accuracy))
        accuracy += (0.04 if turn.adversary else 0.0) - 0.015
        course.append(accuracy)
    assert min(course[50:]) > 0.55 and max(course[50:]) < 0.85
    lengths = [len(list(run)) for _, run in groupby(course[i + 1] > course[i] for i in range(50, 399))]
    assert max(lengths) < 30


@pytest.mark.parametrize(
    "schedule",
    [FixedTurns(learn=2, rest=3, warmup=4), TriggerTurns(cap=3, cooldown=2), AccuracyTurns(cap=4)],
    ids=lambda s: s.type,
)
@pytest.mark.parametrize("stop", [1, 3, 7, 12])
def test_resumed_turns_go_on(schedule: FixedTurns, stop: int) -> None:
    seen = [AHEAD, AHEAD, BEHIND, AHEAD, AHEAD, AHEAD, AHEAD, BEHIND, AHEAD, AHEAD, AHEAD, AHEAD, BEHIND, AHEAD]
    whole, first, second = Turns(schedule), Turns(schedule), Turns(schedule)
    expected = run(whole, seen)
    start = run(first, seen[:stop])
    second.load_state_dict(first.state_dict())
    assert start + run(second, seen[stop:]) == expected
    assert second.state_dict() == whole.state_dict()


def test_config_errors() -> None:
    adapter = TypeAdapter(AnyTurns)
    assert adapter.validate_python({"type": "trigger", "cap": None}).cap is None
    with pytest.raises(ValidationError, match=r"low = 0\.9 is above high = 0\.8"):
        adapter.validate_python({"type": "accuracy", "low": 0.9})
    with pytest.raises(ValidationError, match="cap"):
        adapter.validate_python({"type": "fixed", "cap": 3})
