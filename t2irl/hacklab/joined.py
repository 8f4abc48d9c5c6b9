"""Runs of a grid that were made elsewhere: what the results.json of another machine, or of an earlier time, says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from t2irl.errors import ConfigError
from t2irl.hacklab.grid import Cell, Grid, run_name, settings
from t2irl.hacklab.results import Record
from t2irl.hacklab.runner import finished
from t2irl.preferences.record import first_fault
from t2irl.utils.inputs import input_digests

Points = Annotated[tuple[tuple[float, float], ...], Field(min_length=1)]


class _Read(BaseModel):
    """What is needed of a file that holds more."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class _Run(_Read):
    proxy: str
    method: str
    seed: int
    complete: bool
    settings: str | None = None
    seconds: float
    curves: dict[str, Points]
    inputs: dict[str, str] = {}

    @field_validator("curves", mode="after")
    @classmethod
    def _compared(cls, curves: dict[str, Points]) -> dict[str, Points]:
        if missing := {"gold", "proxy"} - curves.keys():
            raise PydanticCustomError("curve", "no curve of {name}", {"name": " and ".join(sorted(missing))})
        return curves

    @property
    def name(self) -> str:
        """As `Cell.name`."""
        return run_name(self.proxy, self.method, self.seed)


class _Results(_Read):
    gold: str
    runs: tuple[_Run, ...]


def join(files: Sequence[Path], grid: Grid, cells: Sequence[Cell], say: Callable[[str], None]) -> dict[str, Record]:
    """Finished runs of results.json files by name, for those of `cells` that are not finished here; the first file that has
    a run gives it. `say` prints a line on every file.

    Raises ConfigError for a file that cannot be read or is none, for another gold, and for runs with other settings.
    """
    names = {cell.name for cell in cells}
    wanted = {cell.name: cell for cell in cells if not finished(cell)} if files else {}
    found: dict[str, Record] = {}
    for file in files:
        results = _read(file)
        if results.gold != grid.gold:
            raise ConfigError(
                f"--join {file}: its gold is {results.gold!r}, that of the grid {grid.gold!r}; leave it out"
            )
        done = {run.name: run for run in results.runs if run.complete}
        taken = {name: run for name, run in done.items() if name in wanted and name not in found}
        _refuse_others(file, taken, wanted)
        found |= {
            n: Record(wanted[n], True, run.curves, run.seconds, run.settings, run.inputs) for n, run in taken.items()
        }
        counts = {
            "unfinished": len(results.runs) - len(done),
            "not in the grid": len(done.keys() - names),
            "there already": len((done.keys() & names) - taken.keys()),
        }
        left = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
        say(f"{len(taken)} runs joined from {file}" + (f"; left out: {left}" if left else ""))
    return found


def _read(file: Path) -> _Results:
    try:
        return _Results.model_validate_json(file.read_bytes())
    except OSError as error:
        hint = f"; did you mean {file / 'results.json'}?" if file.is_dir() else ""
        raise ConfigError(f"--join {file}: cannot be read: {error.strerror or error}{hint}") from error
    except ValidationError as error:
        raise ConfigError(f"--join {file}: is no results.json of t2irl hacklab: {first_fault(error)}") from error


def _refuse_others(file: Path, taken: Mapping[str, _Run], wanted: Mapping[str, Cell]) -> None:
    """Raise ConfigError unless all runs were made with what the grid says now, and with files as they are now."""
    odd: dict[str, list[str]] = {}
    for name, run in taken.items():
        now, lines = settings(wanted[name].run, wanted[name].trained), list[str]()
        here = input_digests(wanted[name].run) if run.inputs else {}
        if run.settings != now:
            lines.append(f"{name}: settings {run.settings or 'not recorded'}, the grid says {now}")
        for path, known in run.inputs.items():
            if here.get(path, known) != known:
                lines.append(f"{name}: read {path} with the content {known}, here it is {here[path]}")
        if lines:
            odd[name] = lines
    if odd:
        raise ConfigError(
            "\n".join(
                [
                    f"--join {file}: {len(odd)} of its runs were not made with what the grid says now, or with the files that are here. "
                    "Give the grid, overrides and files that they were made with, or leave the file out. Where the settings are not "
                    "recorded, write the file anew where the runs are, with --report-only",
                    *(line for lines in odd.values() for line in lines),
                ]
            )
        )
