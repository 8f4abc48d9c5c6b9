"""Two or more runs beside each other: what differs in their settings, over-optimisation curves, held-out scores pair by pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2irl.config import Run
from t2irl.errors import ConfigError
from t2irl.evaluation.charts import Chart, Series, draw
from t2irl.evaluation.overoptimization import Fit, fit
from t2irl.evaluation.panels import Pictures
from t2irl.evaluation.report import Recorded, read_run
from t2irl.evaluation.statistics import Difference, by_prompt, difference, holm
from t2irl.loading import load_run
from t2irl.utils.tracking import flatten

KL = "policy/kl_reference"
UNINTERESTING = ("run_dir", "tracking", "checkpoints", "grids")
"""Settings that do not make runs different."""


@dataclass(frozen=True)
class Compared:
    """One of the runs."""

    name: str
    run: Run
    recorded: Recorded

    @property
    def trained(self) -> dict[str, float]:
        """Rewards that it was trained on, with their weights."""
        return {name: config.weight for name, config in self.run.rewards.items() if config.weight}

    def points(self, metric: str) -> list[tuple[float, float, float]]:
        """(iteration, divergence from the reference policy, value) wherever both were measured."""
        rows = [r for r in self.recorded.rows if r.get(metric) is not None and r.get(KL) is not None]
        return [(float(r["iteration"]), float(r[KL]), float(r[metric])) for r in rows]

    def standardised(self, measure: str) -> list[tuple[float, float]]:
        """(root of the divergence, measure in standard deviations of the base model's scores), in order of distance."""
        base = next((r for r in self.recorded.rows if r.get(f"monitor/{measure}/std")), None)
        if base is None:
            return []
        mean, std = float(base[f"monitor/{measure}/mean"]), float(base[f"monitor/{measure}/std"])
        found = self.points(f"monitor/{measure}/mean")
        return sorted((math.sqrt(max(kl, 0.0)), (value - mean) / std) for _, kl, value in found)


def read_runs(words: Sequence[str]) -> list[Compared]:
    """Runs by their folders, NAME=FOLDER to call one otherwise. Raises ConfigError for fewer than two, or two of one name."""
    found: dict[str, Compared] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists():
            name, path = Path(word).resolve().name, word
        recorded = read_run(Path(path))
        if name in found:
            raise ConfigError(
                f"two runs would be called {name}: {found[name].recorded.folder} and {path}; write other={path}"
            )
        found[name] = Compared(name, load_run([Path(path) / "config.yaml"]), recorded)
    if len(found) < 2:
        raise ConfigError("give two or more run folders to compare, for example: t2irl compare runs/a runs/b")
    return list(found.values())


def settings_that_differ(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) of settings that are not the same in all; a dash where a run has no such setting."""
    trees = [{k.replace("/", "."): v for k, v in flatten(c.run.model_dump(mode="json")).items()} for c in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    table = [(key, [str(tree.get(key, "-")) for tree in trees]) for key in keys if not key.startswith(UNINTERESTING)]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def watched(runs: Sequence[Compared]) -> list[str]:
    """Held-out rewards that every run has, in the order of the first; the one that its monitors watch comes first."""
    shared = [name for name in runs[0].run.heldout_rewards if all(name in c.run.heldout_rewards for c in runs)]
    first = runs[0].run.monitors.watched(runs[0].run.heldout_rewards)
    return sorted(shared, key=lambda name: name != first)


def curves(runs: Sequence[Compared], heldout: Sequence[str]) -> list[Chart]:
    """Trained sum and held-out rewards against the root of the divergence, one colour a run; only what was measured twice."""
    charts = []
    for measure in ("total", *heldout):
        series = [Series(c.name, points) for c in runs if len(points := c.standardised(measure)) > 1]
        if series:
            title = "trained reward (proxy)" if measure == "total" else f"{measure} (held out)"
            last = max(x for s in series for x, _ in s.points)
            charts.append(draw(f"{title} against the root of the divergence", series, last, width=540, height=240))
    return charts


def fits(runs: Sequence[Compared], measure: str) -> dict[str, Fit]:
    """R(d) = d (a - b log d) of the held-out gain of each run, where there are enough distances to fit it."""
    found = {}
    for compared in runs:
        points = [(d, gain) for d, gain in compared.standardised(measure) if d > 0]
        if len({d for d, _ in points}) > 1:
            d, gain = torch.tensor(points, dtype=torch.float64).T
            found[compared.name] = fit(d, gain, "rl")
    return found


@dataclass(frozen=True)
class Pair:
    """Two columns of an evaluation on the same prompts."""

    first: str
    second: str
    measure: str
    versus: Difference
    """Second minus first."""
    p_holm: float


def pairs(pictures: Pictures, columns: Sequence[str], confidence: float = 0.95, resamples: int = 9999) -> list[Pair]:
    """Every two columns on every score, p-values corrected for all of them together."""
    found = []
    for first, second in itertools.combinations(columns, 2):
        for measure in pictures.scores:
            one, other = (_by_prompt(pictures, column, (first, second), measure) for column in (first, second))
            if len(one):
                found.append((first, second, measure, difference(one, other, confidence, resamples, seed=0)))
    corrected = holm([versus.p for *_, versus in found])
    return [Pair(a, b, measure, versus, p) for (a, b, measure, versus), p in zip(found, corrected, strict=True)]


def _by_prompt(pictures: Pictures, column: str, both: Sequence[str], measure: str) -> np.ndarray:
    """Means over the pictures of each prompt that both columns have."""
    keys = pictures.shared(both)
    places = {prompt: k for k, prompt in enumerate(dict.fromkeys(p for p, _ in keys))}
    images = {image: k for k, image in enumerate(sorted({i for _, i in keys}))}
    table = np.full((len(places), len(images)), np.nan)
    for key in keys:
        table[places[key[0]], images[key[1]]] = pictures.cells[column][key].scores.get(measure, np.nan)
    return by_prompt(table)


def as_dict(
    runs: Sequence[Compared],
    heldout: Sequence[str],
    compared: Sequence[Pair],
    fitted: Mapping[str, Fit],
    table: Mapping[str, Any],
) -> dict[str, Any]:
    """All of it as JSON has it."""
    return {
        "runs": [
            {
                "name": c.name, "folder": str(c.recorded.folder), "iteration": c.recorded.last,
                "stopped": c.recorded.summary.get("stopped"), "trained": c.trained,
                "curves": {
                    measure: [{"sqrt_kl": d, "value": v} for d, v in c.standardised(measure)] for measure in ("total", *heldout)
                },
                "fit": (
                    {"a": fitted[c.name].a, "b": fitted[c.name].b, "peak": fitted[c.name].peak} if c.name in fitted else None
                ),
            }
            for c in runs
        ],
        "differing": {key: dict(zip((c.name for c in runs), values, strict=True)) for key, values in settings_that_differ(runs)},
        "pairs": [
            {
                "first": p.first, "second": p.second, "measure": p.measure, "difference": p.versus.mean.mean,
                "low": _known(p.versus.mean.low), "high": _known(p.versus.mean.high), "prompts": p.versus.mean.prompts,
                "p": _known(p.versus.p), "p_holm": _known(p.p_holm),
            }
            for p in compared
        ],
        "table": dict(table),
    }  # fmt: skip


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
