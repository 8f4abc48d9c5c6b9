"""Which settings of `combine` go together, and with the rest of a run. Reads configs alone; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from t2irl import registry
from t2irl.algebra.config import (
    Best,
    BestWorst,
    Combine,
    Constraints,
    Head,
    Mean,
    MeanMinusStd,
    ProductGate,
    Standardise,
    Sum,
    Transform,
    Uwo,
    WinRate,
)

if TYPE_CHECKING:
    from t2irl.config import Run

LOGARITHMIC = ("log_sigmoid", "log_probability")
"""Transforms whose sum is a logical AND."""
NEGATIVE = (*LOGARITHMIC, "standardise", "tanh")
"""Transforms that give numbers below 0, so that a factor below 1 would reward."""


def combine_problem(run: Run) -> str | None:
    """Everything in `run.combine` that does not fit, as text; None if all does."""
    if run.combine is None:
        return None
    names = list(_names(run, run.combine))
    # Without the rewards that are meant there is nothing to check the rest against.
    return "; ".join(dict.fromkeys(names or _rules(run, run.combine))) or None


def head_of(combine: Combine, name: str) -> Head:
    """Settings of a reward."""
    return combine.rewards.get(name, Head())


def main_rewards(run: Run) -> list[str]:
    """The rewards that are aggregated: trained on, and no penalty."""
    assert run.combine is not None
    factors = run.combine.penalty.rewards if run.combine.penalty else ()
    return [name for name, config in run.rewards.items() if config.weight != 0 and name not in factors]


def transform_of(run: Run, name: str) -> Transform | None:
    """A reward's transform; where rewards are compared with each other and none is given, `standardise`."""
    combine = run.combine
    assert combine is not None
    given, aggregate = head_of(combine, name).transform, combine.aggregate
    if given is not None or name not in main_rewards(run):
        return given
    side = isinstance(combine.gate, ProductGate) and name != combine.gate.reward
    votes = isinstance(aggregate, WinRate) and aggregate.temperature == 0
    compared = not isinstance(aggregate, Sum | Constraints) and not votes
    return Standardise() if side or compared else None


def _names(run: Run, combine: Combine) -> Iterator[str]:
    """Names that stand for no reward that is trained on."""
    places = {f"combine.rewards.{name}": [name] for name in combine.rewards}
    if combine.gate:
        places["combine.gate.reward"] = [combine.gate.reward]
    if combine.penalty:
        places["combine.penalty.rewards"] = list(combine.penalty.rewards)
    trained = [name for name, config in run.rewards.items() if config.weight != 0]
    for place, names in places.items():
        for name in names:
            if name in run.heldout_rewards:
                yield f"{place}: {name!r} is a held-out reward, which is only measured; name one of {', '.join(trained)}"
            elif name not in run.rewards:
                hint = registry.did_you_mean(name, trained)
                yield f"{place}: no reward is called {name!r}.{hint} Rewards: {', '.join(trained)}"
            elif name not in trained:
                yield f"{place}: {name!r} has weight 0, so nothing is trained on it; give it a weight, or leave it out here"
            elif names.count(name) > 1:
                yield f"{place}: {name!r} stands there twice"


def _rules(run: Run, combine: Combine) -> Iterator[str]:
    if not run.heldout_rewards:
        yield "combine needs a reward under heldout_rewards: what combinations of rewards do is seen only on one that is not among them"
    for name, config in run.regularizers.items():
        if registry.find("regularizers", config.type).comes_first:
            yield f"regularizers.{name} ({config.type}) replaces the advantages that combine makes; use one of the two"
    yield from _one_scalar(run, combine)
    yield from _aggregate(run, combine)
    yield from _constraints(run, combine)
    yield from _gate(run, combine)
    yield from _penalty(run, combine)
    yield from _filter(run, combine)


def _one_scalar(run: Run, combine: Combine) -> Iterator[str]:
    """Exactly one mechanism makes one number of several rewards; none of them normalises rewards by themselves but constraints."""
    logs = [name for name in main_rewards(run) if _type(head_of(combine, name).transform) in LOGARITHMIC]
    found = [f"combine.rewards.{name}.transform.type = {_type(head_of(combine, name).transform)}" for name in logs[:1]]
    if combine.gate:
        found.append(f"combine.gate.type = {combine.gate.type}")
    if not isinstance(combine.aggregate, Sum):
        found.append(f"combine.aggregate.type = {combine.aggregate.type}")
    if len(found) > 1:
        yield f"{' and '.join(found)}: each of them says by itself how rewards become one number; keep one"
    if run.advantage.combine == "advantages" and (found or combine.penalty):
        which = found[0] if found else "combine.penalty"
        yield f"advantage.combine = advantages normalises each reward by itself, which {which} does not allow; use scores"
    if logs and run.advantage.std == "group":
        yield (
            f"{found[0]} with advantage.std = group: dividing by the group's deviation undoes the pull of a reward that is not "
            "satisfied yet; use global or none"
        )


def _aggregate(run: Run, combine: Combine) -> Iterator[str]:
    aggregate, names = combine.aggregate, main_rewards(run)
    if isinstance(aggregate, Sum | Constraints):
        return
    where = f"combine.aggregate.type = {aggregate.type}"
    if len(names) < 2:
        yield f"{where} needs at least two rewards, but only {', '.join(names) or 'none'} is there"
    for name in names:
        weight = run.rewards[name].weight
        if isinstance(aggregate, Mean | WinRate) and weight < 0:
            yield f"rewards.{name}.weight = {weight:g}: {where} takes weights above 0"
        elif not isinstance(aggregate, Mean | WinRate) and weight != 1:
            yield f"rewards.{name}.weight = {weight:g}: {where} has no weights; use 1, or another aggregate (sum, mean, win_rate)"


def _constraints(run: Run, combine: Combine) -> Iterator[str]:
    limited = [name for name, head in combine.rewards.items() if head.constraint]
    if not isinstance(combine.aggregate, Constraints):
        for name in limited:
            yield f"combine.rewards.{name}.constraint needs combine.aggregate: {{type: constraints}}, not {combine.aggregate.type}"
        return
    where = "combine.aggregate.type = constraints"
    if not limited:
        yield f"{where} needs a constraint on at least one reward: combine.rewards.NAME.constraint"
    if set(limited) == set(main_rewards(run)) and not run.regularizers:
        yield f"{where}: every reward has a constraint, so nothing stands against them; add a reward without one, or a regulariser such as kl"
    if run.advantage.std == "none":
        yield f"advantage.std = none: {where} weighs rewards that are each normalised; use group or global"
    if combine.penalty:
        yield f"combine.penalty with {where}: constraints have no single score to multiply; make the penalties constraints, or use another aggregate"
    for name in limited:
        if run.rewards[name].weight != 1:
            yield f"rewards.{name}.weight = {run.rewards[name].weight:g}: the weight of a reward with a constraint follows from it; use 1"


def _gate(run: Run, combine: Combine) -> Iterator[str]:
    gate = combine.gate
    if gate is None:
        return
    where, factors = f"combine.gate.type = {gate.type}", combine.penalty.rewards if combine.penalty else ()
    if gate.reward in factors:
        yield f"combine.gate.reward = {gate.reward}: it is a penalty already"
    if not [name for name in main_rewards(run) if name != gate.reward]:
        yield f"{where} needs another reward than {gate.reward}, whose gate it is"
    if isinstance(gate, ProductGate):
        yield from _not_negative(run, [gate.reward], where)
    else:
        yield from _not_negative(run, [n for n in main_rewards(run) if n != gate.reward], where)


def _penalty(run: Run, combine: Combine) -> Iterator[str]:
    penalty, aggregate = combine.penalty, combine.aggregate
    if penalty is None:
        return
    if not main_rewards(run):
        yield "combine.penalty.rewards: nothing is left for the penalties to multiply; add another reward"
    for name in penalty.rewards:
        kind, weight = _type(head_of(combine, name).transform), run.rewards[name].weight
        if kind in (*NEGATIVE, "unit"):
            yield f"combine.rewards.{name}.transform.type = {kind}: a penalty is a factor in [0, 1]; use centred_sigmoid, a bound of type tiers, or a reward in [0, 1]"
        if weight < 0:
            yield f"rewards.{name}.weight = {weight:g}: the weight of a penalty is its exponent; use more than 0"
    if isinstance(aggregate, Uwo | MeanMinusStd):
        yield f"combine.penalty with combine.aggregate.type = {aggregate.type}: what it gives can be below 0, where a factor would reward; use wco or softmin"
    elif isinstance(combine.gate, ProductGate):
        yield "combine.penalty with combine.gate.type = product: what it gives can be below 0, where a factor would reward; use hard or ramp"
    elif not isinstance(aggregate, WinRate | Constraints):
        yield from _not_negative(run, main_rewards(run), "combine.penalty")


def _not_negative(run: Run, names: list[str], where: str) -> Iterator[str]:
    """Rewards that `where` multiplies by factors in [0, 1] and that can be below 0 by their settings."""
    assert run.combine is not None
    for name in names:
        transform, bound = transform_of(run, name), head_of(run.combine, name).bound
        if _type(transform) in NEGATIVE and _type(bound) != "tiers":
            how = "is" if head_of(run.combine, name).transform else "is by default"
            yield (
                f"combine.rewards.{name}.transform.type {how} {_type(transform)}, which gives numbers below 0, and {where} multiplies "
                "by factors below 1, which would then reward; use unit or centred_sigmoid"
            )
        if run.rewards[name].weight < 0:
            yield f"rewards.{name}.weight = {run.rewards[name].weight:g}: {where} multiplies by factors below 1, which would reward what is below 0"


def _filter(run: Run, combine: Combine) -> Iterator[str]:
    kept, size = combine.filter, run.rollout.group_size
    if isinstance(kept, Best) and kept.count > size:
        yield f"combine.filter.count = {kept.count}: a group has {size} images (rollout.group_size)"
    if isinstance(kept, BestWorst) and 2 * kept.count > size:
        yield f"combine.filter.count = {kept.count} at each end: a group has {size} images (rollout.group_size); use at most {size // 2}"


def _type(config: Transform | object | None) -> str | None:
    return getattr(config, "type", None)


def needs_base(run: Run) -> list[str]:
    """Rewards whose settings need scores of the base model's images."""
    combine = run.combine
    if combine is None:
        return []
    found = []
    for name, config in run.rewards.items():
        if config.weight == 0:
            continue
        head, transform = head_of(combine, name), transform_of(run, name)
        levels = [head.bound, head.constraint]
        if not isinstance(combine.gate, ProductGate) and combine.gate and combine.gate.reward == name:
            levels.append(combine.gate)
        fixed = _type(transform) in (None, "log_probability") or getattr(transform, "at", None) is not None
        fixed = fixed and getattr(transform, "unit", None) != "deviation"
        if (
            not fixed
            or _type(head.bound) == "tiers"
            or any(getattr(level, "quantile", None) is not None for level in levels)
        ):
            found.append(name)
    return found
