"""From our records to other formats and back."""

from __future__ import annotations

from pathlib import Path

from t2irl.errors import ConfigError, DataError
from t2irl.preferences import formats
from t2irl.preferences.record import AXES, new_folder, write_records
from t2irl.preferences.study import axes_of, open_preferences


def export(source: Path, name: str, out: Path, axis: str | None, checks: bool, waiting: bool) -> str:
    """Write a source in a format; returns what was written in words. Raises ConfigError or DataError."""
    kind = formats.find(name)
    if axis is not None and axis not in AXES:
        raise ConfigError(f"--axis = {axis!r}: expected one of {', '.join(AXES)}")
    if waiting and not kind.shows_waiting:
        able = [n for n in formats.names() if formats.find(n).shows_waiting]
        raise ConfigError(
            f"--waiting: the format {name} holds judgements alone; {', '.join(able)} hold pairs without one"
        )
    found = open_preferences(source, waiting)
    chosen = [
        r
        for r in found.records
        if (checks or not r.is_check) and axis in (None, r.axis) and (waiting or r.label is not None)
    ]
    several = axes_of(chosen)
    if kind.one_axis and len(several) > 1:
        raise ConfigError(
            f"the format {name} says nothing of axes, and there are {', '.join(several)}; choose one with --axis"
        )
    records = kind.prepared(chosen)
    if not records:
        raise DataError(
            f"{source}: nothing to write as {name}: {len(found.records)} judgements, of which {len(chosen)} were asked for"
        )
    with new_folder(out) as part:
        kind.write(found.with_records(records), part)
    left = f" of {len(chosen)}" if len(records) != len(chosen) else ""
    return f"{out}: {len(records)}{left} records as {name}. {kind.loses}"


def bring_in(source: Path, name: str, out: Path, licence: str = "") -> str:
    """Read a source into records.jsonl and images/ in a new folder; returns what was read in words."""
    kind = formats.find(name)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    with new_folder(out) as part:
        records = list(kind.read(source, part))
        if not records:
            raise DataError(f"{source}: no judgement in it")
        if licence:
            records = [r if r.licence else r.model_copy(update={"licence": licence}) for r in records]
        write_records(records, part / "records.jsonl")
    return f"{out / 'records.jsonl'}: {len(records)} records"


def describe_formats() -> str:
    """Each format with what it loses."""
    width = max(map(len, formats.names()))
    return "\n".join(f"{name:<{width}}  {formats.find(name).loses}" for name in formats.names())
