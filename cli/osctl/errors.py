"""Exit codes, and the errors that end a command: one line, and a hint with what to do."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended. The only table."""

    OK = 0
    """It worked; with `wait`, what was waited for is so."""
    ERROR = 1
    """Anything that is not in this table."""
    USAGE = 2
    """The command line, a setting or a file is wrong."""
    NOT_FOUND = 3
    """There is no such object, or the cluster does not know the kind."""
    CONFLICT = 4
    """It exists already, or its state does not allow what was asked for."""
    TIMED_OUT = 5
    """`wait` gave up; the run goes on."""
    RUN_FAILED = 6
    """The run failed."""
    CANCELLED = 7
    """The run was stopped on request."""
    NOT_ALLOWED = 8
    """The API server does not know you, or does not let you."""
    NO_CAPACITY = 9
    """The run failed because there was no place for its pods."""
    NO_PROGRESS = 10
    """The run failed because its attempts did not get any further."""


class OsctlError(Exception):
    """Ends a command with a line and, where there is something to do about it, a hint."""

    exit_code = ExitCode.ERROR

    def __init__(self, message: str, *, hint: str | None = None, exit_code: ExitCode | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(OsctlError):
    """The command line, a setting or a file is wrong."""

    exit_code = ExitCode.USAGE


class UnreachableError(OsctlError):
    """The API server did not answer, or the connection was cut off: that may pass."""


class ApiError(OsctlError):
    """The API server refused a request."""

    def __init__(
        self, message: str, *, status: int, reason: str = "", hint: str | None = None, exit_code: ExitCode | None = None
    ) -> None:
        super().__init__(message, hint=hint, exit_code=exit_code)
        self.status = status
        """HTTP status."""
        self.reason = reason
        """The API's word for it: `NotFound`, `AlreadyExists`, …"""
