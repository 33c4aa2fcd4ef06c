"""Requests from outside to stop: signals, and how long they may take."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType

from opensora import records
from opensora.errors import ExitCode
from opensora.training.position import Position

logger = logging.getLogger(__name__)


class StopControl:
    """SIGTERM or SIGINT: finish the step, save, exit. A second one, or the deadline, exits at once.

    Whatever the moment, nothing is corrupted: a checkpoint exists only once its manifest does.
    """

    def __init__(self, position: Position) -> None:
        self._position = position
        self._requested: signal.Signals | None = None
        self._deadline_seconds: float | None = None
        self._running = False

    def install(self) -> None:
        """Take over the signals; call it first thing in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def start_loop(self, *, deadline_seconds: float) -> None:
        """From now on there is something to save."""
        self._running = True
        self._deadline_seconds = deadline_seconds

    @property
    def requested(self) -> bool:
        return self._requested is not None

    @property
    def exit_code(self) -> ExitCode:
        """Ctrl-C and a request from a scheduler both save; only the code differs."""
        return ExitCode.INTERRUPTED if self._requested == signal.SIGINT else ExitCode.STOPPED

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.requested
        self._requested = self._requested or signal.Signals(number)
        if again:
            self._exit("a second signal came")
        if not self._running:
            self._exit("nothing to save yet")
        if self._deadline_seconds is not None:
            timer = threading.Timer(
                self._deadline_seconds, self._exit, [f"not saved within {self._deadline_seconds:g} s"]
            )
            timer.daemon = True
            timer.start()

    def _exit(self, why: str) -> None:
        name = self._requested.name if self._requested else "stop"
        message = f"{name} in {self._position.clock.phase}: {why}; the last complete checkpoint is untouched"
        records.write_end_record(self._position.ended(self.exit_code, reason=name, message=message))
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        # Threads and process groups cannot be ended in order from here, and must not delay the exit.
        os._exit(int(self.exit_code))
