"""An adversary as a file that a later run can score with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from t2irl.adversary.learning import Critic, set_parameters
from t2irl.errors import ConfigError, DataError

WEIGHTS, SETTINGS = "adversary.safetensors", "adversary.json"


def save_exported(folder: Path, kind: str, critic: Critic) -> None:
    """Write trained parameters and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in critic.trained.items()}
    save_file(weights, folder / WEIGHTS)
    content = {"type": kind, "settings": critic.settings()}
    (folder / SETTINGS).write_text(json.dumps(content, indent=1), encoding="utf-8")


def load_exported(folder: Path, kind: str, critic: Critic, device: torch.device) -> None:
    """Set a critic's parameters to exported ones. Raises DataError for a bad folder, ConfigError where settings differ."""
    where = f"reward {kind}: frozen = {folder}"
    missing = [name for name in (WEIGHTS, SETTINGS) if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{where}: {' and '.join(missing)} missing; expected a folder that a run wrote, such as runs/NAME/export/rewards/REWARD"
        )
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        other, settings = content["type"], content["settings"]
        weights = load_file(folder / WEIGHTS, device=str(device))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{where}: cannot be read: {error}") from error
    if other != kind:
        raise ConfigError(f"{where}: this is a reward of type {other}; set type: {other}")
    mine = json.loads(json.dumps(critic.settings()))
    if different := [k for k in mine.keys() | settings.keys() if mine.get(k) != settings.get(k)]:
        listed = "; ".join(f"{k}: {mine.get(k)} here, {settings.get(k)} there" for k in sorted(different))
        raise ConfigError(f"{where}: it was trained with other settings ({listed}); use the same")
    try:
        set_parameters(critic, weights)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
