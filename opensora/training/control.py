"""Requests from outside to stop: signals, and how long they may take."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NoReturn

from opensora import records
from opensora.errors import ExitCode
from opensora.training.position import Position

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopControl:
    """SIGTERM or SIGINT: finish the step, save, exit. A second one, or the deadline, exits at once.

    Whatever the moment, nothing is corrupted: a checkpoint exists only once its manifest does.
    """

    def __init__(self, position: Position) -> None:
        self._position = position
        self._requested: signal.Signals | None = None
        self._deadline_seconds: float | None = None

    def install(self) -> None:
        """Take over the signals; call it first thing in the main thread.

        A thread takes the decisions: Python runs handlers in the main thread alone, which may stand in a collective or
        in the rendezvous and not come back to Python for half an hour.
        """
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True).start()

    def start_loop(self, *, deadline_seconds: float) -> None:
        """From now on there is something to save, within this time after a signal."""
        self._deadline_seconds = deadline_seconds

    @property
    def requested(self) -> bool:
        return self._requested is not None

    def _listen(self, read_end: int) -> None:
        while True:
            for number in os.read(read_end, 64):
                if number in _SIGNALS:
                    self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        if self._requested is not None:
            self._exit(self._requested, "a second signal came")
        self._requested = number
        if self._deadline_seconds is None:
            self._exit(number, "nothing to save yet")
        why = f"not saved within {self._deadline_seconds:g} s"
        timer = threading.Timer(self._deadline_seconds, self._exit, [number, why])
        timer.daemon = True
        timer.start()

    def _exit(self, requested: signal.Signals, why: str) -> NoReturn:
        code = ExitCode.INTERRUPTED if requested == signal.SIGINT else ExitCode.STOPPED
        message = f"{requested.name} in {self._position.clock.phase}: {why}; the last complete checkpoint is untouched"
        records.write_end_record(self._position.ended(code, reason=requested.name, message=message))
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        # Threads and process groups cannot be ended in order from here, and must not delay the exit.
        os._exit(code)
