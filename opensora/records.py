"""Facts of a run directory that launcher, ranks and command line share: paths, attempts, end records, the verdict.

An *attempt* is one start of a run. Attempts are numbered from 1; the folder `attempts/N` announces number N, and its
existence is what tells every older attempt to stop (fencing). An *end record* says how one rank ended; the *verdict*
picks the record that explains the end of the attempt. Importing this module imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from opensora.errors import ExitCode, OpenSoraError, SupersededError, UsageError

if TYPE_CHECKING:  # the launcher reads end records without opening a store; fsspec takes longer than the launcher
    from opensora.storage import Storage

logger = logging.getLogger(__name__)

# Environment of a rank. The first six are those of torchrun, so that ranks run under either.
RANK = "RANK"
LOCAL_RANK = "LOCAL_RANK"
WORLD_SIZE = "WORLD_SIZE"
LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
MASTER_ADDR = "MASTER_ADDR"
MASTER_PORT = "MASTER_PORT"
ATTEMPT = "OPENSORA_ATTEMPT"
"""Number of this attempt."""
END_RECORD = "OPENSORA_END_RECORD"
"""Local file that the rank writes its end record to."""
RUN_URI = "OPENSORA_RUN_URI"
"""Run directory."""
TERMINAL_COLUMNS = "OPENSORA_TERMINAL_COLUMNS"
"""Set for rank 0 when the launcher writes to a terminal: its width. Output may then move the cursor."""
PROGRESS_URL = "OPENSORA_PROGRESS_URL"
"""Where rank 0 reports to the operator: HTTPS. Set by the operator for all ranks, with the two that follow."""
PROGRESS_TOKEN_FILE = "OPENSORA_PROGRESS_TOKEN_FILE"
"""File with the token that shows who reports. It is renewed while the run goes on."""
PROGRESS_CA_FILE = "OPENSORA_PROGRESS_CA_FILE"
"""File with the certificates by which the operator is known."""

# Layout of a run directory, relative to its root.
CONFIG_PATH = "config.yaml"
RUN_PATH = "run.json"
PROGRESS_PATH = "progress.json"
BATCH_TABLE_PATH = "batch-table.json"
ATTEMPTS_PREFIX = "attempts"
CHECKPOINTS_PREFIX = "checkpoints"
TENSORBOARD_PREFIX = "tensorboard"
SAMPLES_PREFIX = "samples"
EXPORT_PREFIX = "export"


def started_path(attempt: int) -> str:
    """Announces an attempt: who started it, where and when."""
    return f"{ATTEMPTS_PREFIX}/{attempt}/started.json"


def rank_record_path(attempt: int, rank: int) -> str:
    """End record of one rank."""
    return f"{ATTEMPTS_PREFIX}/{attempt}/rank-{rank}.json"


def verdict_path(attempt: int) -> str:
    """How the attempt ended, and which rank explains it."""
    return f"{ATTEMPTS_PREFIX}/{attempt}/end.json"


def log_prefix(attempt: int, rank: int) -> str:
    """Folder of a rank's standard output and error."""
    return f"logs/attempt-{attempt}/rank-{rank}"


def metrics_prefix(attempt: int) -> str:
    """Folder of the metrics' JSON lines."""
    return f"metrics/attempt-{attempt}"


def skipped_prefix(attempt: int) -> str:
    """Folder of the JSON lines that name the clips left out."""
    return f"skipped/attempt-{attempt}"


def dumps_prefix(attempt: int) -> str:
    """Folder of stack and memory dumps."""
    return f"dumps/attempt-{attempt}"


# ---------------------------------------------------------------------------------------------------- attempts


def newest_attempt(run: Storage) -> int:
    """The highest announced attempt, 0 when there is none."""
    names = (name.rstrip("/") for name in run.list_names(ATTEMPTS_PREFIX))
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


def announce_attempt(run: Storage, attempt: int) -> bool:
    """Announce an attempt whose number was given from outside; older attempts stop at their next check.

    Every node of an attempt may call this. Returns whether this call was the first.
    """
    started = {"attempt": attempt, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    created: bool = run.create(started_path(attempt), json.dumps(started).encode())
    return created


def next_attempt(run: Storage) -> int:
    """Claim the next free number and announce it. Two callers at the same time never get the same one."""
    while True:
        attempt = newest_attempt(run) + 1
        if announce_attempt(run, attempt):
            return attempt


def check_not_superseded(run: Storage, attempt: int) -> None:
    """Call before anything is committed to the run directory.

    Raises:
        SupersededError: a newer attempt has announced itself.
    """
    newest = newest_attempt(run)
    if newest > attempt:
        raise SupersededError(
            f"attempt {attempt} of {run.uri} is superseded by attempt {newest}",
            hint="nothing to do: the newer attempt continues the run; stop it first if this one should",
        )


def enter_attempt(run: Storage, attempt: int | None) -> int:
    """Announce the attempt of the given number, or claim the next one where none is given.

    Raises:
        SupersededError: the given number is no longer the newest.
    """
    if attempt is None:
        return next_attempt(run)
    announce_attempt(run, attempt)
    check_not_superseded(run, attempt)
    return attempt


def own_attempt(run: Storage) -> int:
    """The attempt that this process belongs to: the number its launcher gave it, else a newly claimed one.

    Without a launcher's number only one process of a run may call this; it tells the others.

    Raises:
        UsageError: `OPENSORA_ATTEMPT` is not a number from 1.
        SupersededError: the given number is no longer the newest.
    """
    given = os.environ.get(ATTEMPT)
    if given is not None and not (given.isascii() and given.isdigit() and int(given) > 0):
        raise UsageError(f"{ATTEMPT}={given!r} is not a whole number from 1", hint="unset it to take the next number")
    return enter_attempt(run, int(given) if given else None)


# ------------------------------------------------------------------------------------------------- end records

MEANINGS: dict[int, str] = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "failed",
    ExitCode.USAGE: "wrong usage",
    ExitCode.DATA: "bad data",
    ExitCode.STOPPED: "stopped on request",
    ExitCode.CONFIG: "wrong configuration",
    ExitCode.PEER_LOST: "peer lost",
    ExitCode.STALLED: "stalled",
    ExitCode.OUT_OF_MEMORY: "out of memory",
    ExitCode.DIVERGED: "diverged",
    ExitCode.NODE_UNHEALTHY: "node unhealthy",
    ExitCode.SUPERSEDED: "superseded by a newer attempt",
    ExitCode.INTERRUPTED: "interrupted",
}
"""Exit code → what a person is told."""


@dataclass(frozen=True, kw_only=True)
class EndRecord:
    """How one rank ended."""

    rank: int
    """Global rank."""
    time: float
    """When it happened: seconds since 1970."""
    code: int
    """Exit code, see `ExitCode`."""
    reason: str
    """What ended it, in a word or two: the class of the error, `killed by SIGKILL`."""
    message: str
    """The error's own text."""
    phase: str | None = None
    """What the rank was doing: `start-up`, `data wait`, `forward/backward`, …"""
    step: int | None = None
    """The step it was at."""
    bucket: str | None = None
    """Shape of the micro-batch it was at, as `resolution/frames/ratio`."""
    samples: list[str] = field(default_factory=list)
    """The clips it was at."""
    last_words: list[str] = field(default_factory=list)
    """End of its traceback, or of its output."""

    @classmethod
    def from_exception(
        cls,
        error: BaseException,
        *,
        rank: int,
        phase: str | None = None,
        step: int | None = None,
        bucket: str | None = None,
        samples: Sequence[str] = (),
    ) -> Self:
        """The record of a rank that an exception ends, as of now."""
        if isinstance(error, OpenSoraError):
            code, message = error.exit_code, error.message
        elif isinstance(error, MemoryError):
            code, message = ExitCode.OUT_OF_MEMORY, str(error) or "host memory is used up"
        elif isinstance(error, KeyboardInterrupt):
            code, message = ExitCode.INTERRUPTED, "interrupted"
        else:
            code, message = ExitCode.FAILED, str(error)
        lines = "".join(traceback.format_exception(error)).splitlines()
        return cls(
            rank=rank,
            time=time.time(),
            code=int(code),
            reason=type(error).__name__,
            message=message,
            phase=phase,
            step=step,
            bucket=bucket,
            samples=list(samples),
            last_words=lines[-MAX_LAST_WORDS:],
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`; keys of a newer version are ignored.

        Raises:
            ValueError: the text is not a record.
        """
        return cls(**_known_keys(cls, text))

    def __str__(self) -> str:
        """`out of memory (86) in forward/backward at step 12, bucket 144p/51/0.56: <message>`"""
        where = f" in {self.phase}" if self.phase else ""
        where += f" at step {self.step}" if self.step is not None else ""
        where += f", bucket {self.bucket}" if self.bucket else ""
        lines = [line for line in (*self.message.splitlines(), self.reason) if line.strip()]
        said = lines[0].strip() if lines else ""
        return f"{MEANINGS.get(self.code, 'failed')} ({self.code}){where}" + (f": {said}" if said else "")


MAX_LAST_WORDS = 30
"""Lines of `EndRecord.last_words`."""


def write_end_record(record: EndRecord) -> bool:
    """Hand a rank's end record to its launcher; without a launcher this does nothing.

    The first record of a process stays: what follows a failure is its consequence. Returns whether it was written.
    """
    target = os.environ.get(END_RECORD)
    if not target:
        return False
    temporary = f"{target}.{os.getpid()}.{time.monotonic_ns()}"
    Path(temporary).write_text(record.to_json())
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True


def read_end_records(run: Storage, attempt: int) -> dict[int, EndRecord]:
    """Rank → end record of an attempt, as far as they are written; damaged ones are left out."""
    found = {}
    for name in run.list_names(f"{ATTEMPTS_PREFIX}/{attempt}"):
        if name.startswith("rank-"):
            try:
                record = EndRecord.from_json(run.read(f"{ATTEMPTS_PREFIX}/{attempt}/{name}"))
            except ValueError as error:
                logger.warning("%s of attempt %d is damaged: %s", name, attempt, error)
            else:
                found[record.rank] = record
    return found


# ----------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an attempt ended, and which rank explains it."""

    code: int
    """Exit code of the launcher, see `ExitCode`."""
    message: str
    """One line for a person; names the rank that failed first."""
    time: float
    """Seconds since 1970."""
    attempt: int | None = None
    """Its number, where one is known."""
    first: EndRecord | None = None
    """The record that explains the end; none when all is well."""
    codes: dict[str, int] = field(default_factory=dict)
    """Rank → exit code."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`; keys of a newer version are ignored.

        Raises:
            ValueError: the text is not a verdict.
        """
        values = _known_keys(cls, text)
        if values.get("first") is not None:
            values["first"] = EndRecord.from_json(json.dumps(values["first"]))
        return cls(**values)


_KINDS: dict[int, int] = {ExitCode.STOPPED: 1, ExitCode.PEER_LOST: 2}
"""Codes that explain less than a failure does."""


def first_failure(records: Iterable[EndRecord]) -> EndRecord | None:
    """The record that explains why the ranks ended: the earliest of the most telling kind.

    A failure tells more than a stop on request, and that more than a lost peer, which is never a cause.
    """

    def order(record: EndRecord) -> tuple[int, float, int]:
        kind = _KINDS.get(record.code, 0)
        return kind, record.time, record.rank

    return min((record for record in records if record.code != ExitCode.DONE), key=order, default=None)


def judge(records: Iterable[EndRecord], *, attempt: int | None = None, now: float) -> Verdict:
    """The verdict over the ranks' end records."""
    records = sorted(records, key=lambda record: record.rank)
    first = first_failure(records)
    if first is None:
        code, message = int(ExitCode.DONE), "all ranks are done"
    elif first.code == ExitCode.STOPPED:
        code, message = first.code, f"rank {first.rank}: {first}"
    else:
        code, message = first.code, f"rank {first.rank} failed first: {first}"
    codes = {str(record.rank): record.code for record in records}
    return Verdict(code=code, message=message, time=now, attempt=attempt, first=first, codes=codes)


def _known_keys(cls: type[Any], text: str | bytes) -> dict[str, Any]:
    """Values of the fields of `cls` in a JSON object. Checked as far as ordering and counting records needs it."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"a record is a JSON object, not {type(values).__name__}")
    for name in ("rank", "code", "time"):
        if name in {f.name for f in fields(cls)} and not isinstance(values.get(name), int | float):
            raise ValueError(f"a record's {name} is a number, not {values.get(name)!r}")
    known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
    missing = [
        f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING and f.name not in known
    ]
    if missing:
        raise ValueError(f"a record without {', '.join(missing)}")
    return known
