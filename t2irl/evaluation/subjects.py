"""What is evaluated: checkpoints of runs, exported adapters and models, the base model; by words of a command line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from t2irl import checkpoint, config, registry
from t2irl.config import Run
from t2irl.errors import ConfigError, DataError, UserError
from t2irl.evaluation.settings import Evaluated
from t2irl.loading import load_run
from t2irl.policy import Policy

LORA = "pytorch_lora_weights.safetensors"
WEIGHTS = "diffusion_pytorch_model"
EXAMPLES = (
    "base, a run folder, RUN@all, RUN@best, RUN@20,40, a checkpoint folder, an export folder or a .safetensors file"
)
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Subject:
    """One set of weights."""

    method: str
    checkpoint: str
    kind: Literal["base", "average", "trained", "exported"]
    source: Path
    """The checkpoint's folder, the exported file or folder, or the base model's folder."""
    run: Run
    """The run it comes from; of a base model or a file that no run made only `model` and `rollout` mean anything."""
    iteration: int = 0

    @property
    def label(self) -> str:
        """For people."""
        return self.method if self.method == self.checkpoint else f"{self.method}, {self.checkpoint}"

    @property
    def folder(self) -> str:
        """For paths."""
        return "/".join(UNSAFE.sub("_", part) for part in (self.method, self.checkpoint))

    def fingerprint(self) -> str:
        """Tells other weights under the same name apart."""
        digest = hashlib.sha256()
        if self.kind in ("average", "trained"):
            manifest = json.loads((self.source / "manifest.json").read_text())
            digest.update(f"{self.kind} {manifest['sha256']['weights.safetensors']}".encode())
        else:
            files = [self.source] if self.source.is_file() else sorted(self.source.rglob("*.safetensors"))
            for file in files:
                # Base models are large: their names and sizes must do.
                content = hashlib.sha256(file.read_bytes()).digest() if self.kind == "exported" else b""
                digest.update(f"{file.name} {file.stat().st_size}".encode() + content)
        return digest.hexdigest()[:16]


def resolve(words: Sequence[str], settings: Evaluated) -> list[Subject]:
    """The subjects that words name, in order. Raises ConfigError or DataError for one that is nothing of the kind."""
    if not words:
        raise ConfigError(f"nothing to evaluate: give one or more of {EXAMPLES}")
    found: list[Subject | None] = []
    bases: list[tuple[int, str]] = []
    for word in words:
        name, path = _split(word)
        if path == "base":
            bases.append((len(found), name or "base"))
            found.append(None)
        else:
            found += list(_of_path(path, name, settings))
    first = next((subject.run for subject in found if subject), None)
    for place, name in bases:
        found[place] = _base(name, first, settings)
    subjects = [subject for subject in found if subject]
    seen: dict[tuple[str, str], Subject] = {}
    for subject in subjects:
        other = seen.setdefault((subject.method, subject.checkpoint), subject)
        if other is not subject:
            raise ConfigError(
                f"{other.source} and {subject.source} would both be called {subject.label}; name them: a={other.source}"
            )
    return subjects


def _split(word: str) -> tuple[str, str]:
    """NAME=PATH -> (name, path); a path that is there may hold a `=` of its own."""
    name, equals, path = word.partition("=")
    if not equals or Path(word).exists():
        return "", word
    if not name.strip():
        raise ConfigError(f"{word}: the name before `=` is empty")
    return name.strip(), path


def _of_path(word: str, name: str, settings: Evaluated) -> Iterator[Subject]:
    path, which = Path(word), ""
    if not path.exists() and "@" in word:
        head, _, which = word.rpartition("@")
        path = Path(head)
    if not path.exists():
        raise ConfigError(f"{word}: there is no such file or folder; give {EXAMPLES}")
    if (path / "manifest.json").is_file() and not which:
        yield from _checkpoints([path], path.resolve().parent.parent, name, settings)
    elif (path / "config.yaml").is_file():
        yield from _checkpoints(_chosen(path, which, word), path, name, settings)
    elif which:
        raise ConfigError(f"{word}: {path} is no run folder, so @{which} means nothing there")
    else:
        yield _exported(path, name, settings)


def _chosen(run: Path, which: str, word: str) -> list[Path]:
    kept = checkpoint.available(run / "checkpoints")
    if not kept:
        raise ConfigError(f"{word}: the run has no finished checkpoint yet")
    if which in ("", "all"):
        return kept if which else kept[-1:]
    if which == "best":
        best = checkpoint.available(run / "best")
        if not best:
            raise ConfigError(f"{word}: the run kept no best checkpoint (see `monitors.best`)")
        return best[-1:]
    by_iteration = {str(checkpoint.iteration_of(path)): path for path in kept}
    for number in which.split(","):
        if number not in by_iteration:
            raise ConfigError(f"{word}: no checkpoint of iteration {number}; there are {', '.join(by_iteration)}")
    return [by_iteration[number] for number in which.split(",")]


def _checkpoints(paths: Sequence[Path], folder: Path, name: str, settings: Evaluated) -> Iterator[Subject]:
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{paths[0]}: the run that it belongs to should be {folder}, which has no config.yaml")
    run = _moved(load_run([folder / "config.yaml"]), settings)
    for path in paths:
        iteration = checkpoint.iteration_of(path)
        best = "best, " if path.resolve().parent.name == "best" else ""
        label = f"{best}iteration {iteration}"
        subject = Subject(name or folder.resolve().name, label, "trained", path, run, iteration)
        if settings.weights != "trained" and run.policy.ema is not None:
            yield replace(subject, kind="average")
        if settings.weights != "average" or run.policy.ema is None:
            both = settings.weights == "both" and run.policy.ema is not None
            yield replace(subject, checkpoint=f"{label}, raw weights") if both else subject


def _moved(run: Run, settings: Evaluated) -> Run:
    return run if settings.model is None else run.model_copy(update={"model": settings.model})


def _exported(path: Path, name: str, settings: Evaluated) -> Subject:
    lora = path / LORA if (path / LORA).is_file() else path
    if lora.is_file():
        if lora.suffix != ".safetensors":
            raise ConfigError(f"{path}: is no .safetensors file; give {EXAMPLES}")
        told = _metadata(lora).get("t2irl_config")
        run = None if told is None else Run.model_validate(json.loads(told))
        source = lora
    else:
        source = path / "transformer" if (path / "transformer").is_dir() else path
        if not any(source.glob(f"{WEIGHTS}*.safetensors")):
            raise ConfigError(f"{path}: holds no run, checkpoint or export; give {EXAMPLES}")
        saved = path.resolve().parent / "config.yaml"  # the export of a run lies in its folder
        run = load_run([saved]) if saved.is_file() else None
    if run is None:
        run = _untrained(settings, f"{path} does not say which model it was made for")
    folder = path.resolve()
    if folder.name in ("export", "export_best"):
        return Subject(name or folder.parent.name, folder.name, "exported", source, _moved(run, settings))
    return Subject(name or folder.stem, "export", "exported", source, _moved(run, settings))


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as handle:
            return dict(handle.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be read as safetensors: {error}") from error


def _base(name: str, first: Run | None, settings: Evaluated) -> Subject:
    run = first or _untrained(settings, "base: no run is given that says which model")
    return Subject(name, name, "base", run.model.path, run)


def _untrained(settings: Evaluated, why: str) -> Run:
    """A run that trains nothing: a model and how pictures are drawn."""
    if settings.model is None:
        raise ConfigError(f"{why}; set model, for example --model.type sd3 --model.path FOLDER")
    return Run.model_construct(model=settings.model, rollout=config.Rollout())


class Fixed(Policy):
    """A policy that is not trained: the base model, or an export."""

    def __init__(self, subject: Subject, family: Any, dynamics: Any, reduction: Any):
        self._exported = subject.source if subject.kind == "exported" else None
        plain = config.Policy(tune=config.Lora(), ema=None)
        super().__init__(subject.run.model_copy(update={"policy": plain}), family, dynamics, reduction)

    def _add_adapters(self, tune: config.Lora, seed: int) -> None:
        file, denoiser = self._exported, self.family.denoiser
        if file is None:
            return
        # diffusers, peft and safetensors each report a bad file in their own way.
        try:
            if file.is_dir():
                denoiser.load_state_dict(type(denoiser).from_pretrained(file, local_files_only=True).state_dict())
            else:
                denoiser.load_lora_adapter(file.parent, weight_name=file.name, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise DataError(f"{file}: does not load into {self.family.config.path}: {error}") from error
        if file.is_file() and not any("lora_" in name for name, _ in denoiser.named_parameters()):
            raise DataError(f"{file}: holds no adapter for the denoiser of {self.family.config.path}")


class Loader:
    """Policies of subjects. Checkpoints of one run share a model in memory; only the newest model is kept."""

    def __init__(self, device: torch.device):
        self.device, self._key, self._policy = device, "", None

    def policy(self, subject: Subject) -> Policy:
        """The subject's policy with its weights in place; for averaged ones within `weights`."""
        run, mine = subject.run, subject.kind in ("average", "trained")
        kept = {part: getattr(run, part).model_dump(mode="json") for part in ("model", "rollout")}
        if mine:
            kept |= {"policy": run.policy.model_dump(mode="json"), "seed": run.seed}
        key = json.dumps([kept, "" if mine else f"{subject.kind} {subject.source}"])
        if key != self._key or self._policy is None:
            self._policy = None  # before another is loaded: two may not fit
            self._policy, self._key = self._load(subject), key
        if mine:
            _, weights, _ = checkpoint.load(subject.source, self.device)
            try:
                self._policy.load_state_dict(weights)
            except (KeyError, ValueError) as error:
                raise DataError(f"{subject.source} does not fit the config of its run: {error}") from error
        return self._policy

    def _load(self, subject: Subject) -> Policy:
        run, mine = subject.run, subject.kind in ("average", "trained")
        try:
            family = registry.build("models", run.model, self.device)
            dynamics = registry.build("dynamics", run.rollout.dynamics)
            reduction = registry.build("algorithms", run.algorithm).reduction if mine else "mean"
        except UserError as error:
            raise type(error)(f"{subject.label}: {error}") from error
        return Policy(run, family, dynamics, reduction) if mine else Fixed(subject, family, dynamics, reduction)


def weights(policy: Policy, subject: Subject) -> AbstractContextManager[None]:
    """Inside, the policy has the weights that the subject means."""
    return policy.averaged() if subject.kind == "average" else nullcontext()
