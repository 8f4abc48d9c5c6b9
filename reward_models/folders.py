"""Folders of models that were trained here: a JSON file of settings beside a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Design = TypeVar("Design")


def read_folder(
    folder: Path, what: str, weights: str, settings: str, design: Callable[..., Design], device: torch.device
) -> tuple[Design, dict[str, Tensor]]:
    """The `design` that the file `settings` gives the arguments of, its `layers` as a tuple, and the tensors of `weights`.

    `what` names the model in messages. Raises OSError or ValueError saying what is missing or wrong.
    """
    missing = [name for name in (weights, settings) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"not the folder of {what}: it lacks {' and '.join(missing)}")
    try:
        content: dict[str, Any] = json.loads((folder / settings).read_text(encoding="utf-8"))
        found = design(**{**content, "layers": tuple(content["layers"])})
        return found, load_file(folder / weights, device=str(device))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"cannot be read: {error}") from error
