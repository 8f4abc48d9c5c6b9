"""What a set of judgements says of models and of its raters, as one table of numbers and as text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.statistics import holm
from t2irl.preferences import statistics as s
from t2irl.preferences.record import AXES, Axis, Record, digest

LABELS = ("a", "tie", "b", "both_bad")
FEWEST = 20
"""Side bias is told from this many decisive answers on."""
QUICK_MS = 700
"""Nobody has compared two pictures in less time than this."""


@dataclass(frozen=True)
class Options:
    """Of the summary."""

    baseline: str | None = None
    """The model whose Bradley-Terry strength is 0; None for the first by name."""
    level: float = 0.95
    """Of every interval."""
    resamples: int = 10_000
    """Of the bootstrap."""
    seed: int = 0
    """Of the bootstrap."""
    least_gold: float = 0.0
    """Raters below this accuracy on gold pairs are left out of everything but the table of raters."""


def canonical(record: Record) -> Record:
    """With a and b named so that answers on the same pictures speak of the same names, in whatever order they were given."""
    return record.swapped() if (record.sha_a, record.image_a) > (record.sha_b, record.image_b) else record


def unit(record: Record) -> str:
    """Equal for answers to the same question: the pictures, the text, the axis."""
    sides = sorted([record.sha_a or record.image_a, record.sha_b or record.image_b])
    return digest(record.axis, record.prompt, sides)


def summarise(records: Sequence[Record], options: Options = Options()) -> dict[str, Any]:
    """Everything, ready for JSON. Raises DataError when there is nothing to sum up, ConfigError for an unknown baseline."""
    judged = [record for record in records if record.preference is not None]
    if not judged:
        raise DataError("there is no judgement yet")
    people = raters(judged)
    dropped = sorted(name for name, r in people.items() if r["gold"] and r["gold_accuracy"] < options.least_gold)
    kept = [record for record in judged if record.annotator not in dropped]
    plain = [record for record in kept if not record.is_check]
    axes: dict[Axis, Any] = {}
    for axis in AXES:
        rows = [record for record in plain if record.axis == axis]
        if rows:
            axes[axis] = {
                "judgements": len(rows),
                "labels": dict(Counter(r.label or "soft" for r in rows)),
                "pairs": _pairs(rows, options),
                "strengths": _strengths(rows, options),
                "agreement": agreement(rows),
            }
    return {"judgements": len(judged), "checks": len(kept) - len(plain), "dropped_raters": dropped, "level": options.level,
            "axes": axes, "raters": people}  # fmt: skip


def cluster(record: Record) -> str:
    """What is drawn anew in a bootstrap: the prompt."""
    return record.prompt_id or record.prompt


def _pairs(rows: Sequence[Record], options: Options) -> list[dict[str, Any]]:
    """Each pair of models: wins, share with ties as a half, intervals, exact test, corrected for the number of pairs."""
    found = []
    models = sorted({name for r in rows for name in (r.model_a, r.model_b)})
    for first, second in itertools.combinations(models, 2):
        games = [r if r.model_a == first else r.swapped() for r in rows if {r.model_a, r.model_b} == {first, second}]
        if not games:
            continue
        values = [float(r.preference or 0) for r in games]
        clusters = [cluster(r) for r in games]
        wins, losses = sum(v > 0.5 for v in values), sum(v < 0.5 for v in values)
        found.append({
            "first": first, "second": second, "judgements": len(games), "prompts": len(set(clusters)), "wins": wins,
            "losses": losses, "ties": sum(r.label == "tie" for r in games),
            "both_bad": sum(r.label == "both_bad" for r in games), "win_rate": float(np.mean(values)),
            "wilson": s.wilson(sum(values), len(values), options.level),
            "bootstrap": s.cluster_bootstrap(values, clusters, options.seed, options.resamples, options.level),
            "sign_test": s.sign_test(wins, losses),
        })  # fmt: skip
    for row, p in zip(found, holm([row["sign_test"] for row in found]), strict=True):
        row["sign_test_holm"] = p
    return found


def _strengths(rows: Sequence[Record], options: Options) -> dict[str, Any]:
    games = [r for r in rows if r.model_a != r.model_b]
    models = sorted({name for r in games for name in (r.model_a, r.model_b)})
    if options.baseline is not None and options.baseline not in models:
        raise ConfigError(f"--baseline = {options.baseline!r}: no such model; there are {', '.join(models)}")
    if not games:
        return {"note": "no two models to compare"}
    if options.baseline is not None:
        models = [options.baseline, *(m for m in models if m != options.baseline)]
    first, second = (
        [models.index(name) for name in side] for side in ([r.model_a for r in games], [r.model_b for r in games])
    )
    outcome = [r.preference or 0.0 for r in games]
    try:
        fit = s.bradley_terry(first, second, outcome, [cluster(r) for r in games], options.level)
    except ValueError as error:
        return {"note": f"not comparable: {error}; models by number: {', '.join(models)}"}
    rows_out = [
        {"model": m, "log_odds": float(fit.values[k]), "low": float(fit.low[k]), "high": float(fit.high[k]),
         "elo": float(fit.values[k] * s.ELO)}
        for k, m in enumerate(models)
    ]  # fmt: skip
    return {"baseline": models[0], "models": rows_out}


def agreement(rows: Sequence[Record]) -> dict[str, Any]:
    """Among raters on the same question: share of equal answers, Krippendorff's alpha, Cohen's and Fleiss' kappa."""
    answers: dict[str, dict[str, str]] = {}
    for record in map(canonical, rows):
        if record.label is not None and record.annotator:
            answers.setdefault(unit(record), {})[record.annotator] = record.label
    shared = [unit_answers for unit_answers in answers.values() if len(unit_answers) >= 2]
    if not shared:
        return {"note": "no question was answered by two raters"}
    pairs = [pair for u in shared for pair in itertools.combinations(u.values(), 2)]
    result: dict[str, Any] = {
        "questions": len(shared),
        "equal": sum(x == y for x, y in pairs) / len(pairs),
        "krippendorff_alpha": s.krippendorff_alpha([[LABELS.index(x) for x in u.values()] for u in shared]),
        # Of those who preferred one: a < tie < b.
        "krippendorff_alpha_ordinal": s.krippendorff_alpha(
            [[LABELS.index(x) for x in u.values() if x != "both_bad"] for u in shared], "ordinal"
        ),
    }
    names = sorted({name for u in shared for name in u})
    result["cohen_kappa"] = [
        {"raters": [x, y], "questions": len(both), "kappa": s.cohen_kappa(*zip(*both, strict=True))}
        for x, y in itertools.combinations(names, 2)
        if len(both := [(u[x], u[y]) for u in shared if x in u and y in u]) >= 2
    ]
    most = [u for u in shared if len(u) == len(names)]
    if len(names) > 2 and most:
        counts = [[list(u.values()).count(label) for label in LABELS] for u in most]
        result["fleiss_kappa"] = {"questions": len(most), "kappa": s.fleiss_kappa(counts)}
    return result


def raters(rows: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """How good each rater is: known answers, repetitions, side, speed, agreement with the others' majority."""
    first = {(r.annotator, r.item): r for r in rows if r.repeat_of is None}
    majority = _votes(rows)
    found = {}
    for name in sorted({r.annotator for r in rows if r.annotator}):
        own = [r for r in rows if r.annotator == name]
        gold = [r.label == r.gold for r in own if r.gold is not None]
        again = [
            r.label == first[name, r.repeat_of].label
            for r in own
            if r.repeat_of is not None and (name, r.repeat_of) in first
        ]
        sides = [r.label == r.shown_left for r in own if not r.is_check and r.label in ("a", "b") and r.shown_left]
        times = [r.ms for r in own if r.ms is not None]
        with_others = [hit for r in own if not r.is_check and (hit := _with_majority(r, majority)) is not None]
        found[name] = {
            "judgements": len(own),
            "gold": len(gold), "gold_accuracy": _mean(gold),
            "repeats": len(again), "repeat_consistency": _mean(again),
            "left_share": _mean(sides), "left_p": s.sign_test(sum(sides), len(sides) - sum(sides)),
            "median_ms": float(np.median(times)) if times else None,
            "quick_share": _mean([t < QUICK_MS for t in times]),
            "majority_agreement": _mean(with_others),
        }  # fmt: skip
        found[name]["warnings"] = _warnings(found[name], len(sides))
    return found


def _votes(rows: Sequence[Record]) -> dict[str, Counter[str]]:
    votes: dict[str, Counter[str]] = {}
    for record in map(canonical, rows):
        if not record.is_check and record.label is not None:
            votes.setdefault(unit(record), Counter())[record.label] += 1
    return votes


def _with_majority(record: Record, votes: Mapping[str, Counter[str]]) -> bool | None:
    """Whether an answer is that of most other raters; None where there is no such answer."""
    mine = canonical(record).label
    if mine is None:
        return None
    others = votes[unit(record)] - Counter([mine])
    top = others.most_common(2)
    return None if not top or (len(top) > 1 and top[0][1] == top[1][1]) else top[0][0] == mine


def _mean(values: Sequence[Any]) -> float | None:
    return float(np.mean(values)) if values else None


def _warnings(rater: Mapping[str, Any], decisive: int) -> list[str]:
    """What speaks against a rater's answers."""
    found = []
    # Guessing gives half of the gold answers.
    right = round(rater["gold"] * (rater["gold_accuracy"] or 0))
    if rater["gold"] >= 3 and stats.binomtest(right, rater["gold"], 0.9, alternative="less").pvalue < 0.05:
        found.append(f"{right} of {rater['gold']} known answers")
    if rater["repeats"] >= 5 and rater["repeat_consistency"] < 0.6:
        found.append(f"{rater['repeat_consistency']:.0%} of repetitions answered alike")
    if decisive >= FEWEST and rater["left_p"] < 0.01:
        found.append(f"{rater['left_share']:.0%} of answers for the left side")
    if rater["quick_share"] is not None and rater["quick_share"] > 0.2:
        found.append(f"{rater['quick_share']:.0%} of answers within {QUICK_MS} ms")
    return found


# --------------------------------------------------------------------------------------------------------------- text
def as_text(summary: Mapping[str, Any]) -> str:
    """A summary for a terminal and for Markdown."""
    lines = [
        f"{summary['judgements']} judgements, {summary['checks']} of them checks of raters; intervals at {summary['level']:.0%}"
    ]
    if summary["dropped_raters"]:
        lines.append(f"left out for their gold answers: {', '.join(summary['dropped_raters'])}")
    for axis, part in summary["axes"].items():
        lines += [
            "",
            f"## {axis}: {part['judgements']} judgements",
            *_pair_lines(part["pairs"]),
            "",
            *_strength_lines(part["strengths"]),
        ]
        lines += ["", _agreement_line(part["agreement"])]
    lines += [
        "",
        "## raters",
        "| rater | judgements | gold | repeats | left | median s | with majority | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in summary["raters"].items():
        seconds = "-" if r["median_ms"] is None else f"{r['median_ms'] / 1000:.1f}"
        shares = [_percent(r[key]) for key in ("gold_accuracy", "repeat_consistency", "left_share")]
        cells = [
            name,
            str(r["judgements"]),
            *shares,
            seconds,
            _percent(r["majority_agreement"]),
            "; ".join(r["warnings"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _pair_lines(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| first | second | wins | ties | both bad | losses | win rate | Wilson | over prompts | p | p (Holm) |",
        "|" + "---|" * 11,
    ]
    for r in pairs:
        spans = ["{:.3f} to {:.3f}".format(*r[key]) for key in ("wilson", "bootstrap")]
        lines.append(
            f"| {r['first']} | {r['second']} | {r['wins']} | {r['ties']} | {r['both_bad']} | {r['losses']} | {r['win_rate']:.3f} | "
            f"{spans[0]} | {spans[1]} | {r['sign_test']:.3g} | {r['sign_test_holm']:.3g} |"
        )
    return lines


def _strength_lines(strengths: Mapping[str, Any]) -> list[str]:
    if "note" in strengths:
        return [f"Bradley-Terry: {strengths['note']}"]
    lines = ["| model | log-odds | interval | Elo points |", "|---|---|---|---|"]
    return lines + [
        f"| {m['model']} | {m['log_odds']:+.3f} | {m['low']:+.3f} to {m['high']:+.3f} | {m['elo']:+.0f} |"
        for m in strengths["models"]
    ]


def _agreement_line(found: Mapping[str, Any]) -> str:
    if "note" in found:
        return f"agreement: {found['note']}"
    text = f"agreement on {found['questions']} questions: {found['equal']:.0%} equal, Krippendorff's alpha {found['krippendorff_alpha']:.3f}"
    text += f" (ordinal {found['krippendorff_alpha_ordinal']:.3f})"
    for entry in found["cohen_kappa"]:
        text += f"; Cohen's kappa of {' and '.join(entry['raters'])} {entry['kappa']:.3f}"
    return text + (f"; Fleiss' kappa {found['fleiss_kappa']['kappa']:.3f}" if "fleiss_kappa" in found else "")
