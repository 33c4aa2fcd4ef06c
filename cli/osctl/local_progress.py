"""What the run directory of a local run tells: its earlier attempts, and how far the one that runs is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opensora_operator.progress import BadReportError, ProgressReport, parse_report

from opensora.config.train import StorageConfig
from opensora.errors import ExitCode, ObjectNotFoundError, StorageError
from opensora.records import PROGRESS_PATH, Verdict, newest_attempt, verdict_path
from opensora.storage import Storage

_READ_SECONDS = 1.0
"""How often `progress.json` is read; it is written as often."""
_FIRST_LOOK_SECONDS = 30.0
"""How long a store that does not answer is tried before anything is started."""


@dataclass(frozen=True)
class Past:
    """What a run directory has already."""

    attempt: int
    """Number of the newest attempt; 0 where there is none."""
    saved_step: int | None
    """Newest step that is known to be saved."""


def past_of(run_uri: str) -> Past:
    """The attempts that a run directory knows of. Raises StorageError."""
    run = Storage(run_uri, config=StorageConfig(retry_deadline_seconds=_FIRST_LOOK_SECONDS))
    attempt = newest_attempt(run)
    if not attempt:
        return Past(0, None)
    steps = [_progress_of(run).get("checkpoint_step")]
    try:
        verdict = Verdict.from_json(run.read(verdict_path(attempt)))
    except (ObjectNotFoundError, ValueError):
        pass  # it was killed, or goes on elsewhere and is superseded now
    else:
        if verdict.first is not None and verdict.first.code == ExitCode.STOPPED:
            steps.append(verdict.first.step)
    return Past(attempt, max((step for step in steps if isinstance(step, int)), default=None))


class ProgressFile:
    """Reads `progress.json` in a thread of its own: a store that does not answer holds nothing up.

    Args:
        run_uri: the run directory.
        complain: is told when it cannot be read, once until it can again.
    """

    def __init__(self, run_uri: str, complain: Callable[[str], None]) -> None:
        self._run = Storage(run_uri)
        self._complain = complain
        self._changed = threading.Condition()
        self._num_asked = 0
        self._num_read = 0
        self._num_reports = 0
        self._newest: ProgressReport | None = None
        threading.Thread(target=self._read_for_ever, name="progress", daemon=True).start()

    def take(self) -> ProgressReport | None:
        """The newest report, unless it was taken before."""
        with self._changed:
            newest, self._newest = self._newest, None
        return newest

    def read_again(self, *, seconds: float) -> None:
        """Wait until it has been read once more, but not for longer than this."""
        with self._changed:
            self._num_asked += 1
            asked = self._num_asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_read >= asked, seconds)

    def _read_for_ever(self) -> None:
        works, asked = True, 0
        while True:
            report = None
            try:
                report = self._read()
                works = True
            except StorageError as error:
                if works:
                    self._complain(f"progress cannot be read: {error.message}")
                works = False
            with self._changed:
                self._newest = report or self._newest
                self._num_read = asked
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._num_asked > self._num_read, _READ_SECONDS)
                asked = self._num_asked

    def _read(self) -> ProgressReport | None:
        """The report as rank 0 would send it: the content is the same. A look at it counts as a sign of life."""
        content = _progress_of(self._run)
        self._num_reports += 1
        message = json.dumps({**content, "sequence": self._num_reports}).encode()
        try:
            return parse_report(message, pod_uid="", received=time.time())
        except BadReportError:  # there is none yet, or it is of another version
            return None


def _progress_of(run: Storage) -> Mapping[str, Any]:
    try:
        value = json.loads(run.read(PROGRESS_PATH))
    except (ObjectNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
