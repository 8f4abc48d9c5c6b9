"""What a run reads from disk, by content: a result holds for the files that it was made with, and for no others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from t2irl.config import Run

WHOLE = 64 * 2**20
"""Files above so many bytes are told by their size, first and last MiB: weights have their names and shapes at the front."""
PART = 2**20
LEFT_OUT = frozenset({"README.md"})
"""Files of a folder that change nothing."""


def input_digests(run: Run) -> dict[str, str]:
    """Digest of each file and folder that a run's settings name and that is there, by its path as it is written there.

    Folders count with all files in them, but for cards and hidden files; files above 64 MiB with their size and both ends.
    A file that lists others, such as the index of reference images, stands for itself alone.
    """
    settings = run.model_dump(exclude={"run_dir"})
    return {str(path): digest(path.resolve()) for path in sorted(set(_paths(settings))) if path.exists()}


def _paths(value: Any) -> list[Path]:
    if isinstance(value, Path):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [path for each in inner for path in _paths(each)]


def recorded_inputs(folder: Path) -> dict[str, str]:
    """What the run in a folder read, as its environment.json says; empty where it says nothing."""
    try:
        return json.loads((folder / "environment.json").read_text(encoding="utf-8")).get("inputs", {})
    except (OSError, ValueError):
        return {}


def digest(path: Path) -> str:
    """Twelve hex digits of a file or folder, see `input_digests`."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    counted = [f for f in files if f.name not in LEFT_OUT and not f.name.startswith(".")]
    return _digest(path, tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in counted))


@lru_cache(maxsize=256)
def _digest(path: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    found = hashlib.sha256()
    for file, size, _ in files:
        found.update(f"{file.relative_to(path).as_posix()} {size} ".encode())
        with file.open("rb") as content:
            if size > WHOLE:
                found.update(content.read(PART))
                content.seek(-PART, 2)
            while block := content.read(PART):
                found.update(block)
    return found.hexdigest()[:12]
