"""First stage of an evaluation: every picture that is not there yet, shared among processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from t2irl import registry
from t2irl.errors import ConfigError
from t2irl.evaluation.settings import Deployment, Evaluated
from t2irl.evaluation.store import Drawn, Store
from t2irl.evaluation.subjects import UNSAFE, Loader, Subject, weights
from t2irl.evaluation.suites.base import Prompt
from t2irl.geometry import Geometry, even_chunks
from t2irl.policy import Policy
from t2irl.rollout import Noise, rollout
from t2irl.types import PromptGroups
from t2irl.utils import distributed
from t2irl.utils.progress import duration

Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """A row of the table and where its pictures come from."""

    row: Drawn
    subject: Subject


def plan(settings: Evaluated, subjects: Sequence[Subject]) -> tuple[list[Work], list[Prompt], int]:
    """Rows of the evaluation, its prompts and the pictures of each. Raises ConfigError where runs would be drawn differently."""
    suite = registry.build("evaluation.suites", settings.suite)
    prompts = suite.prompts()
    if settings.limit is not None and settings.limit > len(prompts):
        raise ConfigError(f"limit = {settings.limit}: {suite.where} has only {len(prompts)} prompts")
    several = len(settings.samplers) > 1
    work = [
        Work(
            Drawn(
                subject.method, subject.checkpoint, name, f"{subject.folder}/{UNSAFE.sub('_', name)}", subject.iteration,
                subject.kind == "base", _drawing(sampler, subject), subject.fingerprint(), several,
            ),
            subject,
        )
        for subject in subjects
        for name, sampler in settings.samplers.items()
    ]  # fmt: skip
    for name, sampler in settings.samplers.items():
        different = {tuple(w.row.drawing.items()): w.subject.label for w in work if w.row.sampler == name}
        if isinstance(sampler, Deployment) and len(different) > 1:
            (one, first), (other, second) = list(different.items())[:2]
            parts = [f"{key} {a} and {b}" for (key, a), (_, b) in zip(one, other, strict=True) if a != b]
            raise ConfigError(
                f"samplers.{name}: {first} and {second} would be drawn differently ({', '.join(parts)}), so their pictures could not be "
                f"compared; set samplers.{name}.{parts[0].split()[0]}"
            )
    return work, prompts[: settings.limit], settings.suite.images


def _drawing(sampler: Any, subject: Subject) -> dict[str, Any]:
    """Steps, guidance and negative prompt of a sampler, those of the run where it leaves them open."""
    run = subject.run
    steps, guidance, negative = run.rollout.steps, run.rollout.guidance_scale, run.rollout.negative_prompt
    if isinstance(sampler, Deployment):
        steps = sampler.steps or run.evaluation.steps or steps
        asked = (sampler.guidance_scale, run.evaluation.guidance_scale)
        guidance = next((g for g in asked if g is not None), guidance)
        negative = negative if sampler.negative_prompt is None else sampler.negative_prompt
        return {"steps": steps, "guidance_scale": guidance, "negative_prompt": negative}
    dynamics = run.rollout.dynamics.type
    return {"steps": steps, "guidance_scale": guidance, "negative_prompt": negative, "dynamics": dynamics}


def generate(settings: Evaluated, work: Sequence[Work], store: Store, device: torch.device, told: str, say: Say) -> int:
    """Draw what is missing; returns the number of pictures that this process drew.

    Pictures are drawn in batches that are cut the same way whatever is there already and however many processes there are, so that a
    picture is the same to the last bit. Batches go round the processes.
    """
    loader, drawn = Loader(device), 0
    chunks = even_chunks(len(store.keys), settings.batch_size)
    mine = chunks[distributed.rank() :: distributed.world_size()]
    for job in work:
        missing = store.missing(job.row)
        todo = [chunk for chunk in mine if missing.intersection(store.keys[chunk])]
        if not todo:
            continue
        began, count = time.monotonic(), 0
        policy = loader.policy(job.subject)
        with bar(f"{job.row.label}: pictures", len(todo)) as advance:
            for chunk in todo:
                images = _draw(settings, policy, job, store, chunk)
                for key, pixels in zip(store.keys[chunk], images, strict=True):
                    if key in missing:
                        store.save(job.row, key, pixels, told)
                        count += 1
                advance()
        drawn += count
        say(f"{job.row.label}: {count} pictures drawn in {duration(time.monotonic() - began)}")
    return drawn


def _draw(settings: Evaluated, policy: Policy, job: Work, store: Store, chunk: slice) -> torch.Tensor:
    """One batch of pictures, (B, 3, H, W) uint8."""
    keys, run, drawing = store.keys[chunk], job.subject.run, job.row.drawing
    groups = PromptGroups.of([p.text for p in store.prompts], [p for p, _ in keys], [k for _, k in keys])
    window = range(0)
    if not isinstance(settings.samplers[job.row.sampler], Deployment) and policy.dynamics.recorded:
        window = Geometry(run, 1).trained_timesteps(job.subject.iteration, run.seed)
    policy.negative_prompt = drawing["negative_prompt"]
    levels = policy.family.levels(drawing["steps"])
    noise = Noise(store.seed, "evaluation")
    with weights(policy, job.subject):
        return rollout(policy, groups, levels, window, noise, len(groups), drawing["guidance_scale"]).images.cpu()


class bar:  # noqa: N801 - reads as a function
    """A progress bar on the first process while something goes on; gone afterwards. `with bar(text, total) as advance`."""

    def __init__(self, text: str, total: int):
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=30))
        self._bars = Progress(*columns, transient=True, disable=distributed.rank() > 0 or not Console().is_terminal)
        self._task = self._bars.add_task(text, total=total)

    def __enter__(self) -> Callable[[], None]:
        self._bars.start()
        return lambda: self._bars.advance(self._task)

    def __exit__(self, *error: object) -> None:
        self._bars.stop()
