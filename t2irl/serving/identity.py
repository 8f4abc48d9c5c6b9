"""Which reward is this? A hash of everything that its scores depend on: settings, and the content of files that they name."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

from t2irl import __version__

LEFT_OUT = frozenset({"weight", "feature_cache", "timeout", "tries", "parallel"})
"""Settings that no score depends on."""


def reward_hash(config: Any) -> str:
    """Hash of a reward's config: equal wherever its files lie, another one when a byte of them is another.

    The type's own code counts by the version of this package, or by its file when it comes from elsewhere.
    """
    kind = str(config.type)
    code = f"t2irl {__version__}"
    if ":" in kind:
        source = importlib.import_module(kind.split(":")[0]).__file__
        code = content_hash(Path(source)) if source else kind
    settings = {key: value for key, value in config.model_dump().items() if key not in LEFT_OUT}
    return hashlib.sha256(json.dumps([kind, code, _by_content(settings)], sort_keys=True).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """Hash of a file, or of all files below a folder and their names; of nothing where there is nothing."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size} ".encode())
            with file.open("rb") as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _by_content(value: Any) -> Any:
    if isinstance(value, Path):
        return content_hash(value)
    if isinstance(value, dict):
        return {str(key): _by_content(inner) for key, inner in value.items() if key not in LEFT_OUT}
    return [_by_content(inner) for inner in value] if isinstance(value, list | tuple) else value
