"""What a grid file says: methods x proxies x seeds, each a run of `t2irl train`. Imports no torch.

```yaml
base: ../tiny/demo.yaml            # config file, or a list of them
fixed: {iterations: 60}            # settings of every run; `null` removes a reward of the base
methods: {grpo: {}, kl: {regularizers: {kl: {type: kl}}}}
proxies: {vividness: {rewards: {vividness: {type: vividness}}}}
seeds: [0, 1, 2]
```

An entry of `fixed`, `methods` or `proxies` holds settings as a config file does, and may name config files of its own under
`config`. Layers, each over the one before: base, files of the method, fixed, proxy, method. Files are looked for beside
the grid file, then in the current directory; paths within configs are relative to the current directory, as always.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from t2irl.config import Run, Strict
from t2irl.errors import ConfigError
from t2irl.loading import Layer, Place, load_run, read_file
from t2irl.registry import did_you_mean

NAME = re.compile(r"[A-Za-z0-9_.+-]+")
"""What a method or proxy may be called: it is a folder's name."""


class Grid(Strict):
    """A grid file."""

    title: str = ""
    """Heading of the page."""
    note: str = ""
    """What the grid is for, or what was found; stands under the heading."""
    base: str | tuple[str, ...]
    """Config file, or several that are merged left to right."""
    fixed: dict[str, Any] = {}
    """Settings of every run."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """What is compared: settings by the name of a method."""
    proxies: dict[str, dict[str, Any]] = Field(min_length=1)
    """What is trained on: settings, among them `rewards`, by the name of a proxy. Their weighted sum is the proxy's score."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0,), min_length=1)
    """Each run is repeated with these."""
    skip: tuple[str, ...] = ()
    """Runs to leave out: `proxy/method` or `proxy/method/seed0`, with * and ? as in a shell."""
    gold: str = "gold"
    """Held-out reward that is the truth."""
    also: tuple[str, ...] = ("correct", "cleanliness")
    """Further held-out measures in table and figure, where a run has them."""
    drop: PositiveFloat = 0.15
    """A method whose gold fell by this much from its peak, on the mean of the seeds, counts as hacked."""

    @field_validator("methods", "proxies", mode="after")
    @classmethod
    def _names_are_folders(cls, entries: dict[str, Any]) -> dict[str, Any]:
        for name in entries:
            if not NAME.fullmatch(name) or name.startswith("."):
                raise PydanticCustomError(
                    "entry_name",
                    "{name} should be of letters, digits, _ . + and -: it becomes the name of a folder",
                    {"name": repr(name)},
                )
        return entries


def run_name(proxy: str, method: str, seed: int) -> str:
    """What a run of a grid is called, in words, files and folders."""
    return f"{proxy}/{method}/seed{seed}"


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    proxy: str
    method: str
    seed: int
    run: Run
    """Its whole config; `run_dir` is its folder."""
    trained: Mapping[str, float]
    """The proxy: names of its rewards and the weights that its entry gives them."""

    @property
    def name(self) -> str:
        """proxy/method/seed<k>, which is also its place below the results' folder."""
        return run_name(self.proxy, self.method, self.seed)


@dataclass(frozen=True)
class Chosen:
    """A part of a grid; None takes all."""

    methods: Sequence[str] | None = None
    proxies: Sequence[str] | None = None
    seeds: Sequence[int] | None = None


def load_grid(path: Path) -> tuple[Grid, Layer]:
    """A grid file, and the same as a layer that knows its lines. Raises ConfigError with every problem."""
    layer = read_file(path)
    try:
        return Grid.model_validate(layer.values), layer
    except ValidationError as error:
        problems = []
        for entry in error.errors(include_url=False):
            place = tuple(map(str, entry["loc"]))
            near = did_you_mean(place[-1], list(Grid.model_fields)) if entry["type"] == "extra_forbidden" else ""
            text = "unknown key." + near if near else entry["msg"].replace("Input should be", "must be")
            where = next((at for n in range(len(place), 0, -1) if (at := layer.origins.get(place[:n]))), str(path))
            problems.append(f"{'.'.join(place)} ({where}): {text}")
        raise ConfigError("\n".join([f"{path} is no grid of runs", *problems])) from error


def expand(
    grid: Grid, layer: Layer, path: Path, out: Path, chosen: Chosen = Chosen(), overrides: Sequence[str] = ()
) -> list[Cell]:
    """Every run of the grid in the order they are run in: a whole round of one seed before the next.

    `overrides` are settings of the command line, for every run. Raises ConfigError with the problems of all runs.
    """
    picked = _picked(grid, chosen)
    patterns = dict.fromkeys(grid.skip, False)
    cells: list[Cell] = []
    problems: dict[str, list[str]] = {}
    for proxy, method in ((p, m) for p in grid.proxies for m in grid.methods):
        for seed in grid.seeds:
            name = run_name(proxy, method, seed)
            matching = [p for p in patterns if fnmatch.fnmatch(name, p) or fnmatch.fnmatch(f"{proxy}/{method}", p)]
            patterns.update(dict.fromkeys(matching, True))
            if matching or (proxy, method, seed) not in picked:
                continue
            try:
                cells.append(_cell(grid, layer, path, out, (proxy, method, seed), overrides))
            except ConfigError as error:
                problems.setdefault(str(error), []).append(name)
    if problems:
        lines = [f"{_some(names)}: {text}" for text, names in problems.items()]
        raise ConfigError("\n".join([f"{path}: {sum(map(len, problems.values()))} runs cannot start", *lines]))
    for pattern, used in patterns.items():
        if not used:
            raise ConfigError(f"{path}: skip: {pattern!r} fits no run; runs are called proxy/method/seed<k>")
    if not cells:
        raise ConfigError(f"{path}: no run is left; see `skip` and the options --methods, --proxies and --seeds")
    return sorted(cells, key=lambda cell: grid.seeds.index(cell.seed))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _picked(grid: Grid, chosen: Chosen) -> set[tuple[str, str, int]]:
    """(proxy, method, seed) of all that was asked for."""
    for kind, asked, known in (
        ("methods", chosen.methods, list(grid.methods)),
        ("proxies", chosen.proxies, list(grid.proxies)),
        ("seeds", chosen.seeds, list(grid.seeds)),
    ):
        for name in asked or ():
            if name not in known:
                hint = did_you_mean(str(name), list(map(str, known)))
                raise ConfigError(f"--{kind}: the grid has no {name}.{hint} It has {', '.join(map(str, known))}")
    return {
        (proxy, method, seed)
        for proxy in chosen.proxies or grid.proxies
        for method in chosen.methods or grid.methods
        for seed in chosen.seeds or grid.seeds
    }


def _cell(grid: Grid, layer: Layer, path: Path, out: Path, key: tuple[str, str, int], overrides: Sequence[str]) -> Cell:
    proxy, method, seed = key
    entries = [_entry(layer, path, place) for place in (("fixed",), ("proxies", proxy), ("methods", method))]
    (fixed_files, fixed), (proxy_files, proxied), (method_files, methodical) = entries
    base = (grid.base,) if isinstance(grid.base, str) else grid.base
    files = [_file(path, name, "base") for name in base] + method_files
    run = load_run([*files, *fixed_files, fixed, *proxy_files, proxied, methodical], [*overrides, "--seed", str(seed)])
    run = run.model_copy(update={"run_dir": out / proxy / method / f"seed{seed}"})
    if grid.gold not in run.heldout_rewards:
        known = ", ".join(run.heldout_rewards) or "none"
        raise ConfigError(f"gold: {grid.gold!r} is not among heldout_rewards, which are: {known}")
    named = {name: value for name, value in (proxied.values.get("rewards") or {}).items() if value is not None}
    # The proxy's own weights: a method may give them others, and its scores should be comparable all the same.
    weights = {name: float(value.get("weight", 1)) for name, value in named.items() if name in run.rewards}
    trained = {name: weight for name, weight in weights.items() if weight and run.rewards[name].weight}
    if not trained:
        raise ConfigError(f"proxies.{proxy}: no reward of it is trained on; name one under `rewards`, with a weight")
    return Cell(proxy, method, seed, run, trained)


def _entry(layer: Layer, path: Path, place: Place) -> tuple[list[Path], Layer]:
    """The config files that an entry names, and its settings as a layer whose keys know their lines in the grid file."""
    values: Any = layer.values
    for key in place:
        values = values.get(key) or {}
    size = len(place)
    origins = {at[size:]: line for at, line in layer.origins.items() if at[:size] == place and len(at) > size}
    named = values.get("config") or []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{'.'.join(place)}.config = {named}: expected a config file or a list of them")
    files = [_file(path, name, ".".join((*place, "config"))) for name in names]
    return files, Layer({key: value for key, value in values.items() if key != "config"}, origins)


def _file(path: Path, name: str, key: str) -> Path:
    """A config file, beside the grid file or below the current directory."""
    found = next((file for file in (path.parent / name, Path(name)) if file.is_file()), None)
    if found is None:
        raise ConfigError(f"{key}: no file {name}, neither beside {path} nor in {Path.cwd()}")
    return found


def changed(cell: Cell) -> list[str]:
    """Settings in which a run that was started before differs from what the grid says now: `key: old -> new`.

    Raises ConfigError for a config that this version cannot read.
    """
    saved = cell.run.run_dir / "config.yaml"
    if not saved.is_file():
        return []
    old = load_run([saved]).model_copy(update={"run_dir": cell.run.run_dir})
    if old == cell.run:
        return []
    before, after = (dict(_flat(run.model_dump(mode="json"))) for run in (old, cell.run))
    return [
        f"{k}: {before.get(k)} -> {after.get(k)}"
        for k in sorted(before.keys() | after.keys())
        if before.get(k) != after.get(k)
    ]


def settings(run: Run, trained: Mapping[str, float]) -> str:
    """A short digest of what a run is and of how its proxy is counted, the same on every machine.

    What is at its default does not count, so that a later version with more options gives the same; nor does `run_dir`.
    """
    whole, own = run.model_dump(mode="json"), run.model_dump(mode="json", exclude_defaults=True, exclude={"run_dir"})
    text = json.dumps([_typed(own, whole), dict(trained)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _typed(own: Any, whole: Any) -> Any:
    """What differs from defaults, with every `type` beside it: the default type of an entry says what the rest means."""
    if isinstance(own, dict):
        kind = {"type": whole["type"]} if "type" in whole else {}
        return kind | {key: _typed(value, whole[key]) for key, value in own.items()}
    return [_typed(a, b) for a, b in zip(own, whole, strict=True)] if isinstance(own, list) else own


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in tree.items():
        inner = isinstance(value, dict) and value
        pairs += _flat(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return pairs
