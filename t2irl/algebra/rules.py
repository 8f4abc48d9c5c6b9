"""Which settings of `combine` go together, and with the rest of a run. Reads configs alone; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from t2irl import registry
from t2irl.algebra.config import (
    Best,
    BestWorst,
    CentredSigmoid,
    Combine,
    Constraints,
    Head,
    LogProbability,
    LogSigmoid,
    Mean,
    MeanMinusStd,
    Standardise,
    Sum,
    Tiers,
    Transform,
    Uwo,
    WinRate,
)
from t2irl.algebra.config_gates import HardGate, HingeGate, Level, ProductGate, PromptLevel, RampGate

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


def only_gates(combine: Combine) -> bool:
    """Whether the gate's reward has no other part: a hinge, or a ramp before something else than a sum."""
    gate = combine.gate
    return isinstance(gate, HingeGate) or (isinstance(gate, RampGate) and not isinstance(combine.aggregate, Sum))


def main_rewards(run: Run) -> list[str]:
    """The rewards that the score is made of: trained on, and neither a penalty nor a gate alone."""
    combine = run.combine
    assert combine is not None
    left_out = set(combine.penalty.rewards) if combine.penalty else set()
    if combine.gate and only_gates(combine):
        left_out.add(combine.gate.reward)
    return [name for name, config in run.rewards.items() if config.weight != 0 and name not in left_out]


def aggregated(run: Run) -> list[str]:
    """The rewards that `aggregate` is of: the main ones, but for the gate's."""
    assert run.combine is not None
    gate = run.combine.gate
    return [name for name in main_rewards(run) if gate is None or name != gate.reward]


def transform_of(run: Run, name: str) -> Transform | None:
    """A reward's transform; where rewards are compared with each other and none is given, `standardise`."""
    combine = run.combine
    assert combine is not None
    given, aggregate = head_of(combine, name).transform, combine.aggregate
    if given is not None or name not in aggregated(run):
        return given
    side = isinstance(combine.gate, ProductGate)
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
    apart = isinstance(combine.aggregate, Constraints) or run.advantage.combine == "advantages"
    for name, config in run.regularizers.items():
        if config.type == "uncertainty" and apart:
            yield (
                f"regularizers.{name} (uncertainty) is for the one score that combine makes, but constraints and "
                "advantage.combine: advantages normalise each reward by itself; use one of the two"
            )
        elif config.type != "uncertainty" and registry.find("regularizers", config.type).comes_first:
            yield f"regularizers.{name} ({config.type}) replaces the advantages that combine makes; use one of the two"
    yield from _one_scalar(run, combine)
    yield from _aggregate(run, combine)
    yield from _constraints(run, combine)
    yield from _gate(run, combine)
    yield from _penalty(run, combine)
    yield from _disagreement(run, combine)
    yield from _filter(run, combine)


def _one_scalar(run: Run, combine: Combine) -> Iterator[str]:
    """Exactly one mechanism makes one number of several rewards; none of them normalises rewards by themselves but constraints."""
    logs = [name for name in main_rewards(run) if _type(head_of(combine, name).transform) in LOGARITHMIC]
    found = [f"combine.rewards.{name}.transform.type = {_type(head_of(combine, name).transform)}" for name in logs[:1]]
    if isinstance(combine.gate, HardGate):
        found.append("combine.gate.type = hard")
    if not isinstance(combine.aggregate, Sum):
        found.append(f"combine.aggregate.type = {combine.aggregate.type}")
    if len(found) > 1:
        instead = (
            " (as a penalty, a gate of type hinge goes with all of them)" if isinstance(combine.gate, HardGate) else ""
        )
        yield f"{' and '.join(found)}: each of them says by itself how rewards become one number; keep one{instead}"
    if run.advantage.combine == "advantages" and (found or combine.gate or combine.penalty):
        other = f"combine.gate.type = {combine.gate.type}" if combine.gate else "combine.penalty"
        which = found[0] if found else other
        yield f"advantage.combine = advantages normalises each reward by itself, which {which} does not allow; use scores"
    if logs and run.advantage.std == "group":
        yield (
            f"{found[0]} with advantage.std = group: dividing by the group's deviation undoes the pull of a reward that is not "
            "satisfied yet; use global or none"
        )


def _aggregate(run: Run, combine: Combine) -> Iterator[str]:
    aggregate, names = combine.aggregate, aggregated(run)
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
    head, weight = head_of(combine, gate.reward), run.rewards[gate.reward].weight
    if gate.reward in factors:
        yield f"combine.gate.reward = {gate.reward}: it is a penalty already"
    if not aggregated(run):
        yield f"{where} needs another reward than {gate.reward}, whose gate it is"
    if isinstance(combine.aggregate, Constraints):
        yield f"{where} with combine.aggregate.type = constraints: there is no single score behind it; give {gate.reward} a constraint instead"
    elif only_gates(combine) and (head.transform or head.bound):
        yield f"combine.rewards.{gate.reward}: {where} takes its score as it is; leave out transform and bound"
    if isinstance(gate, HingeGate):
        if weight < 0:
            yield f"rewards.{gate.reward}.weight = {weight:g}: the weight of a hinge is what a unit of score costs; use more than 0"
    elif isinstance(gate, ProductGate):
        yield from _not_negative(run, [gate.reward], where)
        for name in aggregated(run):
            if isinstance(how := transform_of(run, name), LogSigmoid | LogProbability):
                yield f"combine.rewards.{name}.transform.type = {how.type}: {where} takes standardised rewards; leave it out, or use a gate of type hinge"
    elif isinstance(gate, RampGate) or isinstance(combine.aggregate, Sum):
        if only_gates(combine) and weight != 1:
            yield f"rewards.{gate.reward}.weight = {weight:g}: before {combine.aggregate.type} a ramp has no weight; use 1"
        yield from _multiplied(run, combine, where)


def _penalty(run: Run, combine: Combine) -> Iterator[str]:
    penalty = combine.penalty
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
    if isinstance(combine.gate, ProductGate):
        yield "combine.penalty with combine.gate.type = product: what it gives can be below 0, where a factor would reward; use hard, ramp or hinge"
    elif not isinstance(combine.aggregate, Constraints):
        yield from _multiplied(run, combine, "combine.penalty")


def _multiplied(run: Run, combine: Combine, where: str) -> Iterator[str]:
    """What is made of the rewards is multiplied by factors in [0, 1], so it may not be below 0."""
    aggregate, names = combine.aggregate, main_rewards(run) if where == "combine.penalty" else aggregated(run)
    if isinstance(aggregate, WinRate):
        return  # in [0, 1]
    if isinstance(aggregate, MeanMinusStd):
        yield f"{where} with combine.aggregate.type = mean_minus_std: what it gives can be below 0, where a factor would reward; use wco or softmin, or a gate of type hinge"
    elif isinstance(aggregate, Uwo):
        # Of numbers in [0, 1] the variance is at most mean - mean^2.
        most, heads = 1 - aggregate.ddof / max(len(names), 1), {name: head_of(combine, name) for name in names}
        loose = [
            n
            for n, h in heads.items()
            if not isinstance(h.bound, Tiers) and not isinstance(h.transform, CentredSigmoid)
        ]
        if loose or aggregate.coefficient > most:
            yield (
                f"{where} with combine.aggregate.type = uwo: what it gives can be below 0, where a factor would reward, unless "
                f"all its rewards are in [0, 1] (transform centred_sigmoid or bound tiers; not so: {', '.join(loose) or 'none'}) and "
                f"coefficient = {aggregate.coefficient:g} is at most {most:g}; mend that, or use a gate of type hinge"
            )
    else:
        yield from _not_negative(run, names, where)


def _disagreement(run: Run, combine: Combine) -> Iterator[str]:
    aggregate = combine.aggregate
    if combine.disagreement is None:
        return
    if isinstance(aggregate, Uwo | MeanMinusStd):
        yield f"combine.disagreement with combine.aggregate.type = {aggregate.type}, which subtracts one already; use mean"
    elif isinstance(aggregate, Sum | WinRate | Constraints):
        yield f"combine.disagreement with combine.aggregate.type = {aggregate.type}: only what is standardised can disagree; use mean, median, wco, softmin or kl_dro"


def _not_negative(run: Run, names: list[str], where: str) -> Iterator[str]:
    """Rewards that `where` multiplies by factors in [0, 1] and that can be below 0 by their settings."""
    assert run.combine is not None
    for name in names:
        transform, bound = transform_of(run, name), head_of(run.combine, name).bound
        if _type(transform) in NEGATIVE and _type(bound) != "tiers":
            how = "is" if head_of(run.combine, name).transform else "is by default"
            yield (
                f"combine.rewards.{name}.transform.type {how} {_type(transform)}, which gives numbers below 0, and {where} multiplies "
                "by factors below 1, which would then reward; use unit or centred_sigmoid, or a gate of type hinge"
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


def needs_pooled(run: Run) -> list[str]:
    """Rewards whose settings need scores of the base model's images of all prompts together."""
    return [name for name, (pooled, _) in _base_uses(run).items() if pooled]


def needs_own(run: Run) -> dict[str, int]:
    """Rewards whose settings need scores of the base model's images of each prompt, and of how many."""
    return {name: count for name, (_, count) in _base_uses(run).items() if count}


def needs_base(run: Run) -> list[str]:
    """Rewards whose settings need scores of the base model's images, of one kind or the other."""
    return [name for name, (pooled, count) in _base_uses(run).items() if pooled or count]


def _base_uses(run: Run) -> dict[str, tuple[bool, int]]:
    """Reward trained on -> whether it needs scores of all prompts together, and how many images of each prompt."""
    combine = run.combine
    found: dict[str, tuple[bool, int]] = {}
    for name in [name for name, config in run.rewards.items() if config.weight != 0] if combine else ():
        assert combine is not None
        head, how, gate = head_of(combine, name), transform_of(run, name), combine.gate
        levels: list[Level] = [level for level in (head.bound, head.constraint) if isinstance(level, Level)]
        if gate and gate.reward == name and not isinstance(gate, ProductGate):
            levels.append(gate)
        counts = [level.per_prompt for level in levels if isinstance(level, PromptLevel)]
        pooled = isinstance(head.bound, Tiers)
        if isinstance(how, LogSigmoid):
            counts.append(how.per_prompt if how.at is None else 0)
            pooled = pooled or how.unit == "deviation" or (how.at is None and not how.per_prompt)
        else:
            pooled = pooled or not (how is None or isinstance(how, LogProbability))
        for level in levels:
            own = isinstance(level, PromptLevel) and level.per_prompt > 0
            pooled = pooled or (level.quantile is not None and not own)
        found[name] = pooled, max(counts, default=0)
    return found
