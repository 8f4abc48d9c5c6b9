"""What an arm's work is, as digests: equal ones may be compared, others not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from t2irl.config import Run
from t2irl.hacklab.grid import settings

SWITCHES = {
    "model": ("precision", "vae_precision", "gradient_checkpointing", "offload", "text_cache"),
    "rollout": ("batch_size", "overlap_scoring"), "update": ("batch_size",),
}  # fmt: skip
"""Settings that say how the work is done and not what it is, besides `speed` and `processes`."""


def card(run: Run, folder: Path, reference: bool = False) -> dict[str, str]:
    """Of an arm: `hash` of all its settings and of its networks' configs, `work` of the same without switches."""
    plain = run.model_copy(update={"model": run.model.model_copy(update={"path": Path("model")})})
    parts = {name: _at_default(getattr(plain, name), fields) for name, fields in SWITCHES.items()}
    work = _at_default(plain.model_copy(update=parts), ("speed", "processes"))
    networks = {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.json"))}
    return {"hash": _digest(settings(plain, {}), networks, reference), "work": _digest(settings(work, {}), networks)}


def _at_default(config: Any, fields: tuple[str, ...]) -> Any:
    known = type(config).model_fields
    return config.model_copy(update={name: known[name].get_default(call_default_factory=True) for name in fields})


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
