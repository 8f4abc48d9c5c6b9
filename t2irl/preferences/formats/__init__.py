"""Formats of preference data, one a file: each is written and read back."""

from __future__ import annotations

import importlib
import pkgutil

from t2irl.errors import ConfigError
from t2irl.preferences.formats.base import Format
from t2irl.registry import did_you_mean


def names() -> list[str]:
    """Every format, by file name."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("base", "tasks"))


def find(name: str) -> Format:
    """A format. Raises ConfigError with the known ones."""
    if name not in names():
        raise ConfigError(f"no format {name!r}.{did_you_mean(name, names())} Known: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        c
        for c in vars(module).values()
        if isinstance(c, type) and c.__module__ == module.__name__ and issubclass(c, Format)
    )
    return found()
