"""Requests from outside to stop: signals, the operator's word, and how long they may take."""

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
_OPERATOR = "the operator's request"


class StopControl:
    """SIGTERM or SIGINT: finish the step, save, exit. A second one, or the deadline, exits at once.

    The operator can ask for the same through the progress channel. That is no signal: a first SIGTERM after it, with
    which Kubernetes ends a pod, does not cut the save short.

    Whatever the moment, nothing is corrupted: a checkpoint exists only once its manifest does.
    """

    def __init__(self, position: Position) -> None:
        self._position = position
        self._requested: signal.Signals | None = None
        self._asked = False
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
        """From now on there is something to save, within this time after a request."""
        self._deadline_seconds = deadline_seconds
        if self._asked:
            self._start_timer(ExitCode.STOPPED, _OPERATOR)

    @property
    def requested(self) -> bool:
        return self._asked or self._requested is not None

    def ask(self) -> None:
        """The operator asks to stop. Rank 0 alone hears it: before the loop, where the ranks agree, it waits for it."""
        if not self._asked:
            self._asked = True
            if self._deadline_seconds is not None:
                self._start_timer(ExitCode.STOPPED, _OPERATOR)

    def _listen(self, read_end: int) -> None:
        while True:
            for number in os.read(read_end, 64):
                if number in _SIGNALS:
                    self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        second, self._requested = self._requested is not None, self._requested or number
        code = ExitCode.INTERRUPTED if self._requested == signal.SIGINT else ExitCode.STOPPED
        if second:
            self._exit(code, self._requested.name, "a second signal came")
        if self._deadline_seconds is None:
            self._exit(code, number.name, "nothing to save yet")
        self._start_timer(code, number.name)

    def _start_timer(self, code: ExitCode, reason: str) -> None:
        assert self._deadline_seconds is not None, "started with the loop"
        why = f"not saved within {self._deadline_seconds:g} s"
        timer = threading.Timer(self._deadline_seconds, self._exit, [code, reason, why])
        timer.daemon = True
        timer.start()

    def _exit(self, code: ExitCode, reason: str, why: str) -> NoReturn:
        message = f"{reason} in {self._position.clock.phase}: {why}; the last complete checkpoint is untouched"
        records.write_end_record(self._position.ended(code, reason=reason, message=message))
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        # Threads and process groups cannot be ended in order from here, and must not delay the exit.
        os._exit(code)
