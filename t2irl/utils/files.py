"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2irl.errors import RunError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all. Raises RunError (disk full, no permission)."""
    part = path.with_name(f".{path.name}.part")
    try:
        with writing(path), part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with writing(path):
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the file system into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Free space or permissions are needed there"
        ) from error
