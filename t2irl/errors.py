"""The errors that a user can cause, each with the exit code of the command line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what would be right."""

    exit_code = 2


class ConfigError(UserError):
    """A config file, an override or a combination of settings is wrong."""


class DataError(UserError):
    """A prompt file, an image or a model folder is missing or unusable."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, written or continued with this config."""

    exit_code = 3


class RunError(UserError):
    """A run had to stop: a reward gave NaN, the policy's loss is not finite."""

    exit_code = 4


class Interrupted(UserError):
    """SIGINT or SIGTERM arrived; the state was saved. The exit code is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
