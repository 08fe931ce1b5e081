"""Errors that are for people: one clear message, a hint, and an exit code; never a traceback.

`ToolkitError` and its children are for users. `assert` is for our own mistakes only.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_PEOPLE_NEEDED = 3
EXIT_NOT_VALID = 4
EXIT_LOCKED = 73
EXIT_RESUMABLE = 75
EXIT_INTERRUPTED = 130


class ToolkitError(Exception):
    """Base of every error shown to a user.

    Args:
        message: what is wrong and where (file, line or key).
        hint: what to do about it, one line.
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n       {self.hint}"


class StageError(ToolkitError):
    """A stage could not do its work (NaN loss, too few rankings, ...). Exit 1."""


class ConfigError(ToolkitError):
    """The settings are wrong. Exit 2."""

    exit_code = EXIT_BAD_INPUT


class DataError(ToolkitError):
    """A file given by the user cannot be used; the message names file and line. Exit 2."""

    exit_code = EXIT_BAD_INPUT


class PeopleNeeded(ToolkitError):
    """The line stops here until people have ranked more responses. Exit 3."""

    exit_code = EXIT_PEOPLE_NEEDED


class ArtifactError(ToolkitError):
    """An artifact is stale, damaged or does not fit another one. Exit 4."""

    exit_code = EXIT_NOT_VALID


class LockedError(ToolkitError):
    """Another living process writes to this run directory. Exit 73."""

    exit_code = EXIT_LOCKED


class Stopped(ToolkitError):
    """A signal asked the stage to stop; everything is saved, `prefline resume` goes on. Exit 75."""

    exit_code = EXIT_RESUMABLE
