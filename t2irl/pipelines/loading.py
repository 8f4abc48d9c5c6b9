"""Loading a diffusers pipeline folder, with everything that can be wrong with one said by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from t2irl.errors import DataError


def read_index(path: Path, family: str, pipelines: Sequence[str]) -> dict[str, Any]:
    """model_index.json. Refuses a folder that holds none of `pipelines`, or lacks a part that its index promises.

    `family`: `model.type` of the config, for messages.
    """
    file = path / "model_index.json"
    if not file.is_file():
        raise DataError(
            f"model.path = {path}: no diffusers pipeline here (model_index.json is missing). Expected a folder such as assets/tiny-sd3"
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"model.path = {path}: model_index.json is not readable JSON ({error})") from error
    if not isinstance(index, dict) or index.get("_class_name") not in pipelines:
        name = index.get("_class_name") if isinstance(index, dict) else index
        raise DataError(
            f"model.path = {path}: holds a {name}, but model.type: {family} needs a {' or '.join(pipelines)}"
        )
    for name, entry in index.items():
        # Without its folder a tokenizer would load all the same, with an empty vocabulary.
        if isinstance(entry, list) and entry and entry[0] is not None and not (path / name).is_dir():
            raise DataError(f"model.path = {path}: the folder {name}, which model_index.json names, is missing")
    return index


def load(path: Path, index: Mapping[str, Any], **arguments: Any) -> Any:
    """The pipeline of a folder, of the class that its index names. Raises DataError naming what is missing or wrong."""
    import diffusers

    try:
        with quiet():
            return getattr(diffusers, index["_class_name"]).from_pretrained(path, local_files_only=True, **arguments)
    # diffusers, transformers, tokenizers and safetensors each report a bad file in their own way.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"model.path = {path}: the pipeline does not load: {error}") from error


def check_encoders(path: Path, pipe: Any, encoders: Mapping[str, str]) -> None:
    """Refuse a pipeline that has a text encoder without its tokenizer or the reverse, or a tokenizer without vocabulary."""
    for encoder, tokenizer in encoders.items():
        parts = (getattr(pipe, encoder), getattr(pipe, tokenizer))
        if (parts[0] is None) != (parts[1] is None):
            raise DataError(
                f"model.path = {path}: {encoder} and {tokenizer} belong together, but model_index.json has only one"
            )
        if parts[1] is not None and parts[1]("a").input_ids == parts[1]("b").input_ids:
            raise DataError(f"model.path = {path}: {tokenizer} has no vocabulary; its files are missing or empty")


def check_scheduler(path: Path, scheduler: Any, known: Sequence[str], off: Sequence[str]) -> None:
    """Refuse a scheduler that is none of the classes `known`, or has an option of `off` on."""
    name = type(scheduler).__name__
    if name not in known:
        raise DataError(f"model.path = {path}: scheduler is a {name}; use {' or '.join(known)}")
    for option in off:
        if scheduler.config.get(option):
            raise DataError(
                f"model.path = {path}: scheduler/scheduler_config.json sets {option}, which is not supported; set it to false"
            )


@contextmanager
def quiet(hints: bool = True) -> Iterator[None]:
    """No loading bars of diffusers and transformers, which would break into the run's own progress display.

    Without `hints` they do not say either that a LoRA holds nothing for the text encoders, or that a prompt is long.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown, both = transformers_logging.is_progress_bar_enabled(), (diffusers_logging, transformers_logging)
    verbosity = [logging.get_verbosity() for logging in both]
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    for logging in both if not hints else ():
        logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions say dtype, older ones know torch_dtype only
            yield
    finally:
        for logging, level in zip(both, verbosity, strict=True):
            logging.set_verbosity(level)
        if shown:
            diffusers_logging.enable_progress_bar()
            transformers_logging.enable_progress_bar()


def vae_scale(networks: Mapping[str, Mapping[str, Any]]) -> int:
    """Pixels by latent along a side, from the config.json of an AutoencoderKL."""
    return 2 ** (len(networks["vae"]["block_out_channels"]) - 1)
