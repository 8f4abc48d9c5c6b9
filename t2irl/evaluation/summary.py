"""Third stage of an evaluation: numbers of every row, their intervals, and what differs from the base model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.distances import cmmd, frechet, kid, kid_subsets, overlap, within_prompts
from t2irl.evaluation.features import Features, reference_files
from t2irl.evaluation.score import group_paths, lpips_lines, scores, set_path
from t2irl.evaluation.settings import Evaluated
from t2irl.evaluation.statistics import Difference, Interval, by_prompt, difference, holm, interval
from t2irl.evaluation.store import Drawn, Lines, Store

LOWER = ("duplicates", "kid", "kid_std", "cmmd", "fd")
"""Measures of which less is better, by the last part of their name."""


@dataclass(frozen=True)
class Measured:
    """One measure of one row."""

    interval: Interval
    prompts: np.ndarray | None = None
    """(P,) values by prompt; None for a measure of the whole set, which has none."""
    versus: Difference | None = None
    """Compared with the baseline."""
    p_holm: float = math.nan
    """The p of `versus`, corrected for all comparisons of the table."""


@dataclass
class Row:
    """A row of the table."""

    drawn: Drawn
    measures: dict[str, Measured] = field(default_factory=dict)
    tags: dict[str, dict[str, float]] = field(default_factory=dict)
    """Measure -> category -> mean."""


@dataclass(frozen=True)
class Summary:
    """The whole table."""

    rows: list[Row]
    baselines: dict[str, Drawn]
    """By sampler, the row that others are compared with: the base model, else the first."""
    names: list[str]
    """Measures in order."""
    images: list[dict[str, Any]]
    """Lines of images.jsonl."""


def refuse_impossible(settings: Evaluated, rows: Sequence[Drawn], pictures: int) -> None:
    """Raise ConfigError for measures that these pictures cannot have, before any is drawn."""
    if not settings.features:
        return
    d, others = settings.distances, [pictures] if any(row.base for row in rows) else []
    if settings.reference_images is not None:
        others.append(len(reference_files(settings.reference_images)))
    fewest = min(pictures, *others) if others else None
    if fewest is not None and d.fd and fewest < d.fd_minimum:
        raise ConfigError(
            f"distances.fd: a Fréchet distance of {fewest} pictures says more of their number than of the pictures; it takes "
            f"{d.fd_minimum} in either set (suite.images, reference_images), or use kid, which is unbiased"
        )
    if fewest is not None and d.prdc and fewest <= d.neighbours:
        raise ConfigError(
            f"distances.neighbours = {d.neighbours}: takes more pictures than that in either set, and there are {fewest}"
        )


def summarise(settings: Evaluated, store: Store, device: torch.device, imported: Mapping[str, Lines]) -> Summary:
    """All measures of all rows. `imported`: scores of official scorers, by name. Main process only."""
    rows = [Row(row) for row in store.drawn]
    tables = {row.drawn.folder: _tables(settings, store, row, imported) for row in rows}
    for row in rows:
        for name, table in tables[row.drawn.folder].items():
            _add(settings, row, f"score/{name}", by_prompt(table))
            if store.images > 1:
                _add(settings, row, f"spread/{name}", _spread(table))
        _tags(store, row)
    for name in settings.features:
        _features(settings, Features(settings, store, name, device), rows)
    if settings.lpips is not None:
        _lpips(settings, store, rows)
    baselines: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: not row.drawn.base):
        baselines.setdefault(row.drawn.sampler, row)
    _compare(settings, rows, baselines)
    names = list(dict.fromkeys(name for row in rows for name in row.measures))
    lines = [line for row in rows for line in _lines(store, row.drawn, tables[row.drawn.folder])]
    return Summary(rows, {sampler: row.drawn for sampler, row in baselines.items()}, names, lines)


def _tables(settings: Evaluated, store: Store, row: Row, imported: Mapping[str, Lines]) -> dict[str, np.ndarray]:
    """(P, n) scores by measure; measures of the whole row are put straight into it."""
    found: dict[str, np.ndarray] = {}
    every = {name: scores(settings, name, store) for name in settings.rewards} | dict(imported)
    for name, lines in every.items():
        known = lines.read()
        whole = known.get(set_path(row.drawn))
        if whole is not None:
            row.measures[f"set/{name}"] = _single(whole)
            continue
        paths = [store.picture(row.drawn, key) for key in store.keys]
        missing = [path for path in paths if path not in known]
        if missing and name in imported:
            continue  # scored for other rows only
        if missing:
            raise DataError(
                f"{store.out}: {len(missing)} pictures of {row.drawn.label} have no score of {name!r} yet; run the stage score"
            )
        found[name] = np.array([known[path] for path in paths]).reshape(len(store.prompts), store.images)
    return found


def _single(value: float, prompts: np.ndarray | None = None) -> Measured:
    return Measured(Interval(value, math.nan, math.nan, 0), prompts)


def _add(settings: Evaluated, row: Row, name: str, prompts: np.ndarray) -> None:
    s = settings.statistics
    if not np.isnan(prompts).all():
        row.measures[name] = Measured(interval(prompts, s.confidence, s.resamples, settings.seed), prompts)


def _spread(table: np.ndarray) -> np.ndarray:
    """Standard deviation over the pictures of each prompt, of a sample; NaN where fewer than two have a score."""
    known = (~np.isnan(table)).sum(1)
    deviations = table - by_prompt(table)[:, None]
    squares = np.where(np.isnan(deviations), 0.0, deviations**2).sum(1)
    return np.sqrt(np.divide(squares, known - 1, out=np.full(len(table), np.nan), where=known > 1))


def _tags(store: Store, row: Row) -> None:
    tags = np.array([prompt.tag for prompt in store.prompts])
    for name, measured in row.measures.items():
        if not name.startswith("score/") or measured.prompts is None:
            continue
        known = ~np.isnan(measured.prompts)
        means = {
            str(tag): float(measured.prompts[known & (tags == tag)].mean())
            for tag in dict.fromkeys(tags.tolist())
            if tag and (known & (tags == tag)).any()
        }
        if means:
            row.tags[name] = means | {"mean of categories": float(np.mean(list(means.values())))}


def _features(settings: Evaluated, features: Features, rows: Sequence[Row]) -> None:
    name = features.name
    arrays = {row.drawn.folder: features.of(row.drawn) for row in rows}
    for row in rows:
        if arrays[row.drawn.folder].shape[1] > 1:
            within = within_prompts(arrays[row.drawn.folder])
            for key in ("pairwise", "vendi", "vendi_inf", "duplicates"):
                _add(settings, row, f"diversity/{name}/{key}", getattr(within, key))
    flat = {key: value.reshape(-1, value.shape[-1]) for key, value in arrays.items()}
    for row in rows:
        base = next((b for b in rows if b.drawn.base and b.drawn.sampler == row.drawn.sampler), None)
        if base is not None and base is not row:
            _distances(settings, row, f"drift/{name}", flat[row.drawn.folder], flat[base.drawn.folder], paired=True)
        if settings.reference_images is not None:
            real = features.references(settings.reference_images)
            _distances(settings, row, f"quality/{name}", flat[row.drawn.folder], real)


def _distances(
    settings: Evaluated, row: Row, name: str, pictures: np.ndarray, others: np.ndarray, paired: bool = False
) -> None:
    """`paired`: both sets come from the same noise, picture by picture."""
    d, found = settings.distances, dict[str, float]()
    if d.kid:
        found["kid"] = kid(pictures, others, paired)
        rng = np.random.default_rng(settings.seed)
        _, found["kid_std"] = kid_subsets(pictures, others, d.subset, d.subsets, rng, paired)
    if d.cmmd:
        found["cmmd"] = cmmd(pictures, others)
    if d.fd:
        found["fd"] = frechet(pictures, others)
    if d.prdc:
        shared = overlap(pictures, others, d.neighbours)
        found |= {key: getattr(shared, key) for key in ("precision", "recall", "density", "coverage")}
    row.measures |= {f"{name}/{key}": _single(value) for key, value in found.items()}


def _lpips(settings: Evaluated, store: Store, rows: Sequence[Row]) -> None:
    known = lpips_lines(settings, store).read()
    for row in rows:
        values = [known[path] for path in group_paths(store, row.drawn)]
        _add(settings, row, "diversity/lpips/pairwise", np.array(values))


def _compare(settings: Evaluated, rows: Sequence[Row], baselines: Mapping[str, Row]) -> None:
    """Paired differences from the baseline, by prompt; p-values corrected for all of the table's comparisons."""
    s = settings.statistics
    places: list[tuple[Row, str, Difference]] = []
    for row in rows:
        baseline = baselines[row.drawn.sampler]
        for name, measured in row.measures.items():
            other = baseline.measures.get(name)
            if row is baseline or measured.prompts is None or other is None or other.prompts is None:
                continue
            found = difference(other.prompts, measured.prompts, s.confidence, s.resamples, settings.seed)
            places.append((row, name, found))
    corrected = holm([found.p for _, _, found in places])
    for (row, name, found), p in zip(places, corrected, strict=True):
        measured = row.measures[name]
        row.measures[name] = Measured(measured.interval, measured.prompts, found, p)


def _lines(store: Store, row: Drawn, tables: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    lines = []
    for prompt_id, image in store.keys:
        found = {name: float(table[prompt_id, image]) for name, table in tables.items()}
        prompt = store.prompts[prompt_id]
        lines.append(
            {
                "prompt": prompt.text, "prompt_id": prompt_id, "image": image,
                "path": store.picture(row, (prompt_id, image)), "method": row.name, "checkpoint": row.checkpoint,
                "sampler": row.sampler, "seed": store.seed, "tag": prompt.tag,
                "scores": {name: value for name, value in found.items() if not math.isnan(value)},
            }
        )  # fmt: skip
    return lines


def imported_scores(out: Path) -> dict[str, Lines]:
    """Scores that official scorers gave, by name."""
    folder = out / "imported"
    return {path.name: Lines(path) for path in sorted(folder.iterdir()) if path.is_dir()} if folder.is_dir() else {}
