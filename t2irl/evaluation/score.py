"""Second stage of an evaluation: every score that is not there yet, shared among processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch

from t2irl import registry
from t2irl.evaluation.features import lpips_pairs
from t2irl.evaluation.generate import Say, Work, bar
from t2irl.evaluation.settings import Evaluated
from t2irl.evaluation.store import Drawn, Lines, Store, settings_key
from t2irl.geometry import even_chunks
from t2irl.models.base import ModelFamily
from t2irl.rewards.combine import RewardSet
from t2irl.types import PromptGroups
from t2irl.utils import distributed

BATCH = 64
"""Pictures scored at a time."""


class _LateFamily:
    """The model that drew the pictures, loaded only if a reward asks for something of it: most do not."""

    def __init__(self, config: Any, device: torch.device):
        self._config, self._device, self._family = config, device, None

    def __getattr__(self, name: str) -> Any:
        if self._family is None:
            self._family = registry.build("models", self._config, self._device)
        return getattr(self._family, name)


def score(settings: Evaluated, work: Sequence[Work], store: Store, device: torch.device, say: Say) -> int:
    """Score what has no score yet; returns how many scores this process gave."""
    if not settings.rewards:
        return 0
    rows = [job.row for job in work]
    todo = {name: _unscored(settings, name, rows, store) for name in settings.rewards}
    names = [name for name, open_ in todo.items() if any(open_.values())]
    if not distributed.any_process(bool(names), device):
        return 0
    # Every process builds all rewards that any of them needs: those that measure sets work together.
    wanted = dict.fromkeys(name for found in distributed.gather_objects(names) for name in found)
    configs = {name: settings.rewards[name] for name in settings.rewards if name in wanted}
    rewards = RewardSet(configs, device, BATCH, Counter(), settings.seed)
    texts = [prompt.text for prompt in store.prompts]
    family = cast(ModelFamily, _LateFamily(work[0].subject.run.model, device))
    rewards.prepare((), texts, family, trained=False)
    given = 0
    for row in rows:
        singles = {name: todo[name][row.folder] for name in configs if rewards.rewards[name].per_image}
        given += _score_pictures(settings, rewards, singles, row, store)
        sets = [name for name in configs if not rewards.rewards[name].per_image]
        open_ = [name for name in sets if set_path(row) not in scores(settings, name, store).read()]
        if open_:
            _measure(settings, rewards.only(open_), row, store)
    say(f"{len(configs)} measures: {given} scores given by this process")
    return given


def _unscored(settings: Evaluated, name: str, rows: Sequence[Drawn], store: Store) -> dict[str, dict[int, set[str]]]:
    """For each row the pictures without a score in this process's batches, by the first picture of the batch."""
    known = scores(settings, name, store).read()
    whole = {row.folder for row in rows if set_path(row) in known}  # measured as a set
    mine = even_chunks(len(store.keys), BATCH)[distributed.rank() :: distributed.world_size()]
    found: dict[str, dict[int, set[str]]] = {}
    for row in rows:
        if row.folder in whole:
            found[row.folder] = {}
            continue
        open_ = {c.start: {p for key in store.keys[c] if (p := store.picture(row, key)) not in known} for c in mine}
        found[row.folder] = {start: paths for start, paths in open_.items() if paths}
    return found


def scores(settings: Evaluated, name: str, store: Store, process: int = 0) -> Lines:
    """The scores of a reward with its present settings."""
    return Lines(store.out / "scores" / settings_key(name, settings.rewards[name]), process)


def score_groups(settings: Evaluated, rows: Sequence[Drawn], store: Store, device: torch.device) -> None:
    """LPIPS of the pictures of each prompt that has none yet, shared among processes."""
    if settings.lpips is None:
        return
    lines = lpips_lines(settings, store, distributed.rank())
    known, measure = lines.read(), None
    for row in rows:
        paths = group_paths(store, row)
        mine = range(distributed.rank(), len(paths), distributed.world_size())
        todo = [p for p in mine if paths[p] not in known]
        with bar(f"{row.label}: lpips", len(todo)) as advance:
            for p in todo:
                measure = measure or lpips_pairs(settings.lpips, device)
                lines.add({paths[p]: measure(store.load(row, [(p, k) for k in range(store.images)]))})
                advance()


def lpips_lines(settings: Evaluated, store: Store, process: int = 0) -> Lines:
    """Pairwise LPIPS by prompt, with its present settings."""
    return Lines(store.out / "scores" / settings_key("lpips", settings.lpips), process)


def group_paths(store: Store, row: Drawn) -> list[str]:
    """What a measure of the pictures of a prompt is filed under, prompt by prompt."""
    return [f"images/{row.folder}/{p:05d}" for p in range(len(store.prompts))]


def set_path(row: Drawn) -> str:
    """What a measure of a whole row is filed under."""
    return f"images/{row.folder}"


def groups_of(store: Store, keys: Sequence[tuple[int, int]]) -> PromptGroups:
    """The prompts of some pictures."""
    return PromptGroups.of([p.text for p in store.prompts], [p for p, _ in keys], [k for _, k in keys])


def _score_pictures(
    settings: Evaluated, rewards: RewardSet, todo: dict[str, dict[int, set[str]]], row: Drawn, store: Store
) -> int:
    """Batches are cut the same way whatever is there already, and scored whole: a score may depend on its batch by rounding."""
    batches = {chunk.start: chunk for chunk in even_chunks(len(store.keys), BATCH)}
    starts = sorted({start for batch in todo.values() for start in batch})
    given = 0
    with bar(f"{row.label}: scores", len(starts)) as advance:
        for start in starts:
            keys = store.keys[batches[start]]
            names = [name for name, open_ in todo.items() if start in open_]
            found = rewards.only(names).score(store.load(row, keys), groups_of(store, keys))
            for name, values in found.items():
                paths = [store.picture(row, key) for key in keys]
                fresh = {p: v for p, v in zip(paths, values.tolist(), strict=True) if p in todo[name][start]}
                scores(settings, name, store, distributed.rank()).add(fresh)
                given += len(fresh)
            advance()
    return given


def _measure(settings: Evaluated, rewards: RewardSet, row: Drawn, store: Store) -> None:
    """Measures of the whole row, of which each process holds a part."""
    chunks = even_chunks(len(store.keys), -(-len(store.keys) // distributed.world_size()))
    part = chunks[distributed.rank()] if distributed.rank() < len(chunks) else slice(0, 0)
    keys = store.keys[part]
    images = store.load(row, keys) if keys else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    found = rewards.measure(images, groups_of(store, keys))
    if distributed.rank() == 0:
        for name, value in found.items():
            scores(settings, name, store).add({set_path(row): float(value)})
    distributed.barrier()
