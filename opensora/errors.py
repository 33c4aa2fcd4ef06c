"""Errors a user can meet, and the exit-code contract between a rank, the launcher and the operator.

Every error carries the exit code of the process that it ends, so that an entry point needs one handler.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the end of a rank, and of the launcher above it, means."""

    DONE = 0
    FAILED = 1
    """Anything that is not in this table: a bug, or an outage that outlasted its deadline."""
    USAGE = 64
    DATA = 65
    STOPPED = 75
    """Stopped on request after a checkpoint; the same command continues."""
    CONFIG = 78
    PEER_LOST = 84
    """A collective failed because another rank died. Never the cause."""
    STALLED = 85
    OUT_OF_MEMORY = 86
    DIVERGED = 87
    NODE_UNHEALTHY = 88
    SUPERSEDED = 89
    """A newer attempt of the same run has started."""
    INTERRUPTED = 130


class OpenSoraError(Exception):
    """Base of all errors of ours: one line that says what and where, and a hint with the remedy."""

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(OpenSoraError):
    """The command line is wrong."""

    exit_code = ExitCode.USAGE


class ConfigError(OpenSoraError):
    """A setting is unknown, of the wrong type, or impossible together with another."""

    exit_code = ExitCode.CONFIG


class DataError(OpenSoraError):
    """A clip, caption or catalogue cannot be used."""

    exit_code = ExitCode.DATA


class StorageError(OpenSoraError):
    """An object cannot be read or written."""


class StorageAccessError(StorageError):
    """Wrong bucket, missing or refused credentials, an endpoint that was never reachable: retrying does not help."""

    exit_code = ExitCode.CONFIG


class ObjectNotFoundError(StorageError):
    """There is no object at this URI."""

    exit_code = ExitCode.DATA


class ObjectChangedError(StorageError):
    """The object is no longer the one that was asked for: somebody replaced it meanwhile."""


class StorageUnavailableError(StorageError):
    """The store did not answer within the retry deadline."""


class CheckpointError(OpenSoraError):
    """A checkpoint is incomplete, damaged, or belongs to something else."""

    exit_code = ExitCode.CONFIG


class MissingExtraError(OpenSoraError):
    """An optional dependency is not installed."""

    exit_code = ExitCode.CONFIG

    def __init__(self, feature: str, *, extra: str) -> None:
        super().__init__(f"{feature} needs the extra `{extra}`", hint=f'pip install "opensora[{extra}]"')


class StopRequestedError(OpenSoraError):
    """The run was asked to stop and has saved its state."""

    exit_code = ExitCode.STOPPED


class PeerLostError(OpenSoraError):
    """Another rank is gone."""

    exit_code = ExitCode.PEER_LOST


class StalledError(OpenSoraError):
    """No progress for longer than the watchdog allows."""

    exit_code = ExitCode.STALLED


class OutOfMemoryError(OpenSoraError):
    """Host or device memory is used up."""

    exit_code = ExitCode.OUT_OF_MEMORY


class DivergedError(OpenSoraError):
    """The loss or the gradient is not finite."""

    exit_code = ExitCode.DIVERGED


class NodeUnhealthyError(OpenSoraError):
    """The machine, not the run, is at fault."""

    exit_code = ExitCode.NODE_UNHEALTHY


class SupersededError(OpenSoraError):
    """A newer attempt of this run has announced itself; this one may write nothing more."""

    exit_code = ExitCode.SUPERSEDED
