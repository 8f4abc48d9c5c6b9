"""A recipe as a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence


def command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Run with arguments, those of the command line for None; what is wrong with its files goes to stderr. Returns the exit code."""
    try:
        run(parser.parse_args(argv))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
