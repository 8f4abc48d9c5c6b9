"""One self-contained page on a run: what improved, pictures along the way, curves, alarms, how to use the result."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from pydantic import ValidationError

from t2irl.config import Run
from t2irl.errors import DataError
from t2irl.evaluation.charts import Points, against_distance, collect, grouped, number, overview
from t2irl.evaluation.findings import Alarm, alarms, headline, measures
from t2irl.evaluation.frames import Frame, load_frames
from t2irl.evaluation.glossary import glossary, lookup
from t2irl.evaluation.rules import RULES, Monitors, fired, primary_of
from t2irl.footprint import sentence
from t2irl.utils.progress import duration
from t2irl.utils.tracking import write_atomic

STAGES = ("rollout", "score", "adversary", "update", "evaluate", "grid")
"""Stages whose seconds are shown, in this order; what is left of the total is `other`."""


@dataclass(frozen=True)
class Recorded:
    """What lies in a run folder. `summary` is empty for a run that has not ended."""

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any]
    notes: list[str]
    """What could not be read."""

    @property
    def last(self) -> int:
        """Newest iteration recorded."""
        return max((row["iteration"] for row in self.rows), default=0)


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from what the run has left there so far, and return its path.

    Works for unfinished runs, runs without evaluations and runs without grids. Raises DataError for a folder that holds
    no run, RunError if the page cannot be written.
    """
    run = read_run(folder)
    points = collect(run.rows)
    found = measures(run.summary, points, list(run.config.get("rewards") or {}))
    frames, notes = load_frames(folder / "grids")
    raised = [
        *(Alarm(text) for text in _warnings(run)),
        *_fired(run),
        *alarms(points, found, (run.config.get("evaluation") or {}).get("images")),
    ]
    raised += [Alarm(text) for text in (*run.notes, *notes)]
    page = _render(
        run=run,
        title=folder.resolve().name,
        headline=headline(found, run.summary.get("images_evaluated")),
        measures=found,
        alarms=raised,
        alarmed={alarm.metric for alarm in raised if alarm.metric},
        overview=overview(points, run.last),
        distance=against_distance(run.rows, _watched(run)),
        groups=grouped(points, run.last),
        frames=frames,
        facts=_facts(run, points),
        seconds=_seconds(run, points),
        changed=changed_settings(run.config),
    )
    path = folder / "report.html"
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def read_run(folder: Path) -> Recorded:
    """Read a run folder. Lines of metrics.jsonl that were cut off are noted, lines of one iteration joined."""
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} is no run folder: it has no config.yaml. Give the folder that `t2irl train` made")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        summary, environment = (_json(folder / name) for name in ("summary.json", "environment.json"))
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f"{folder}: a file of the run cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{folder / 'config.yaml'} holds no settings: expected a mapping")
    rows: dict[int, dict[str, Any]] = {}
    broken = 0
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    for line in filter(None, text.split("\n")):
        try:
            row = json.loads(line)
            rows.setdefault(int(row["iteration"]), {}).update(row)
        except (ValueError, KeyError, TypeError):
            broken += 1
    notes = [f"metrics.jsonl: {broken} damaged line(s) left out."] if broken else []
    return Recorded(folder, config, [rows[k] for k in sorted(rows)], summary, environment, notes)


def _monitors(run: Recorded) -> Monitors:
    """The run's monitors, the default ones for an older run."""
    try:
        return Monitors.model_validate(run.config.get("monitors") or {})
    except ValidationError:
        return Monitors()


def _watched(run: Recorded) -> str | None:
    return _monitors(run).watched(run.config.get("heldout_rewards") or {})


def _fired(run: Recorded) -> list[Alarm]:
    """Rules of the monitors that fired."""
    watched, images = _watched(run), (run.config.get("evaluation") or {}).get("images")
    if watched is None or not images:
        return []
    found = fired(run.rows, watched, _monitors(run).patience, images, primary_of(run.config.get("combine")))
    ended = run.summary.get("stopped")
    return [
        Alarm(
            f"{f.rule}{', which ended the run' if f.rule == ended else ''}, at iteration {f.iteration}: {f.text}.",
            f.metric,
        )
        for f in found
    ]


def _warnings(run: Recorded) -> list[str]:
    """Warnings of the log but those of the monitors, which are found again with the metric that they are seen in."""
    return [
        text for text in run.summary.get("warnings", []) if not text.startswith(tuple(f"{rule} at " for rule in RULES))
    ]


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content


def changed_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings that differ from their defaults; None if this version cannot read the config (a foreign plugin)."""
    try:
        run = Run.model_validate(config)
    except ValidationError:
        return None
    return _with_types(run.model_dump(mode="json", exclude_defaults=True), run.model_dump(mode="json"))


def _with_types(changed: dict[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """Put back each plugin's `type`, without which its settings say little."""
    if "type" in full:
        changed = {"type": full["type"], **changed}
    return {
        k: _with_types(v, full[k]) if isinstance(v, dict) and isinstance(full[k], dict) else v
        for k, v in changed.items()
    }


def _facts(run: Recorded, points: Mapping[str, Points]) -> list[tuple[str, str]]:
    """Names and values of what the run did, for people; what is not known is left out."""
    config, summary, machine = run.config, run.summary, run.environment
    images = summary.get("images_sampled") or (
        points["data/images_total"][-1][1] if "data/images_total" in points else None
    )
    total = summary.get("seconds", {}).get("total")
    git = machine.get("git") or {}
    rollout = config.get("rollout") or {}
    revision = f"{git.get('revision', '')[:12]}{' with local changes' if git.get('dirty') else ''}" if git else None
    size = (rollout.get("prompts"), rollout.get("group_size"))
    facts = [
        ("iterations", f"{run.last} of {config.get('iterations', '?')}"),
        ("updates", _count(summary.get("updates"))),
        ("images sampled", _count(images)),
        ("images per iteration", f"{size[0]} prompts x {size[1]}" if all(size) else None),
        ("pictures per evaluation", _count(summary.get("images_evaluated"))),
        ("time", duration(total) if total else None),
        ("model", _kind(config.get("model"), "path")),
        ("policy", _kind((config.get("policy") or {}).get("tune"), "rank")),
        ("algorithm", _kind(config.get("algorithm"))),
        ("dynamics", _kind(rollout.get("dynamics"))),
        ("memory", sentence(summary["memory"]) if "memory" in summary else None),
        ("seed", _count(config.get("seed"))),
        ("device", ", ".join(machine.get("gpus") or []) or machine.get("cpu")),
        ("revision", revision),
        ("started", machine.get("started")),
    ]
    return [(name, value) for name, value in facts if value]


def _kind(part: Any, *also: str) -> str | None:
    """`type` of a part of the config, and some of its settings."""
    if not isinstance(part, dict) or "type" not in part:
        return None
    return ", ".join([str(part["type"]), *(f"{key} {part[key]}" for key in also if part.get(key) is not None)])


def _count(value: float | None) -> str | None:
    return None if value is None else f"{int(value):,}".replace(",", "\N{THIN SPACE}")  # fmt: skip


def _seconds(run: Recorded, points: Mapping[str, Points]) -> list[tuple[str, float]]:
    """Seconds by stage, those of the summary or summed from the metrics."""
    known = run.summary.get("seconds", {})
    summed = {stage: sum(y for _, y in points.get(f"time/{stage}_s", [])) for stage in STAGES}
    stages = {stage: float(known.get(stage, summed[stage])) for stage in STAGES}
    other = float(known.get("total", 0.0)) - sum(stages.values())
    return [(stage, seconds) for stage, seconds in {**stages, "other": other}.items() if seconds >= 0.05]


def _render(run: Recorded, frames: list[Frame], **values: Any) -> str:
    """The page. All text is escaped; its only script is the package's own, allowed by hash, and nothing is fetched."""
    files = resources.files("t2irl.evaluation")
    template, style, script = (
        files.joinpath(f"report.{ending}").read_text(encoding="utf-8") for ending in ("html.j2", "css", "js")
    )
    shown = [{"iteration": f.iteration, "sheet": f.sheet, "scores": f.scores} for f in frames]
    together: dict[str, list[int]] = {}
    for k, prompt in enumerate(frames[-1].prompts if frames else []):
        together.setdefault(prompt, []).append(k)
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"yaml": lambda v: yaml.safe_dump(v, sort_keys=False, allow_unicode=True), "number": number}
    env.filters |= {"duration": duration, "signed": _signed, "score": _score, "marked": _marked}
    return env.from_string(template).render(
        run=run,
        frames=frames,
        cards=list(together.items()),
        shown=shown,
        glossary=list(glossary().values()),
        lookup=lookup,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def _signed(value: float) -> str:
    """+0.123 or, with a true minus sign, \N{MINUS SIGN}0.123."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _marked(text: str) -> Markup:
    """Text of the glossary, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _score(value: float | None) -> str:
    """A score under a picture."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.2f}"
