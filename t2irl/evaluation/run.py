"""An evaluation from its settings to its report, on one or several processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import yaml

from t2irl import sharding
from t2irl.config import Processes
from t2irl.data import load_prompts
from t2irl.errors import ConfigError
from t2irl.evaluation.eval_page import write_page
from t2irl.evaluation.features import Features
from t2irl.evaluation.generate import generate, plan
from t2irl.evaluation.score import score, score_groups
from t2irl.evaluation.settings import Evaluated
from t2irl.evaluation.store import Store
from t2irl.evaluation.subjects import Subject, resolve
from t2irl.evaluation.suites.base import Prompt
from t2irl.evaluation.summary import imported_scores, refuse_impossible, summarise
from t2irl.evaluation.tables import write_tables
from t2irl.launch import start_processes
from t2irl.utils import distributed
from t2irl.utils.memory import keep_heap
from t2irl.utils.tracking import write_atomic


def evaluate(settings: Evaluated, words: Sequence[str], stage: str, command: str) -> None:
    """Run a stage, or all of them. Everything that can be refused is refused before the first picture is drawn."""
    sharding.refuse("t2irl eval")
    subjects = resolve(words, settings)
    work, prompts, images = plan(settings, subjects)
    rows = [job.row for job in work]
    store = Store(settings.out, settings.seed, prompts, images, rows)
    refuse_impossible(settings, rows, len(store.keys))
    if not torch.cuda.is_available():
        keep_heap()
    state = start_processes(Processes())
    found: torch.device = state.device  # type: ignore[assignment] - set by then
    # With several processes on the CPU accelerate numbers it, and cpu:1 is a device that nothing can be loaded to.
    device = torch.device("cpu") if found.type == "cpu" else found
    told = store.begin(settings, write=False)
    distributed.barrier()  # nobody writes before all have looked
    if state.is_main_process:
        store.begin(settings, write=True)
        _note(settings, words, command)
    distributed.barrier()  # nobody draws before remains of an interrupted write are cleared away

    def say(text: str) -> None:
        if state.is_main_process:
            print(text, flush=True)

    for warning in trained_on(subjects, prompts):
        say(f"warning: {warning}")
    say(f"{len(rows)} rows x {len(prompts)} prompts x {images} pictures in {settings.out}")
    with torch.no_grad():
        if stage in ("all", "generate"):
            generate(settings, work, store, device, told, say)
            distributed.barrier()
        if stage in ("all", "score"):
            _refuse_missing(store, stage)
            score(settings, work, store, device, say)
            score_groups(settings, rows, store, device)
            for name in settings.features:
                Features(settings, store, name, device).compute(rows)
            distributed.barrier()
    if stage in ("all", "report") and state.is_main_process:
        _refuse_missing(store, stage)
        say(str(report(settings, store, device, command)))
    distributed.barrier()


def trained_on(subjects: Sequence[Subject], prompts: Sequence[Prompt]) -> list[str]:
    """A sentence on every run that was trained on prompts of the suite: what is measured on them is not held out."""
    found = []
    texts = {prompt.text for prompt in prompts}
    runs = {s.run.data.prompts: s for s in subjects if s.kind in ("average", "trained")}
    for path, subject in runs.items():
        if not path.is_file():  # trained elsewhere: nothing to look at
            continue
        both = [text for text in dict.fromkeys(load_prompts(path, "data.prompts").texts) if text in texts]
        if both:
            found.append(
                f"{subject.method} was trained on {len(both)} of the suite's {len(texts)} different prompts, so they are not held out, for "
                f"example {both[0]!r}"
            )
    return found


def report(settings: Evaluated, store: Store, device: torch.device, command: str) -> object:
    """Write tables and page from what is there; returns the page's path."""
    summary = summarise(settings, store, device, imported_scores(store.out))
    about = {
        "suite": settings.suite.type, "prompts": len(store.prompts), "images": store.images, "seed": store.seed,
        "confidence": settings.statistics.confidence, "resamples": settings.statistics.resamples, "command": command,
    }  # fmt: skip
    write_tables(summary, about, store.out)
    return write_page(summary, settings, about, store.out)


def _refuse_missing(store: Store, stage: str) -> None:
    for row in store.drawn:
        if missing := store.missing(row):
            raise ConfigError(
                f"--stage {stage}: {len(missing)} of {len(store.keys)} pictures of {row.label} are not drawn yet; run the stage generate"
            )


def _note(settings: Evaluated, words: Sequence[str], command: str) -> None:
    """What this evaluation is, so that it can be reported on and added to without saying it again."""
    tree = settings.model_dump(mode="json") | {"subjects": list(words)}
    write_atomic(settings.out / "config.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode())
    with (settings.out / "command.txt").open("a", encoding="utf-8") as file:
        file.write(command + "\n")
