"""Notices a rank that no longer moves, writes down where it stands, and ends it.

The culprit and its peers stop moving together, since the peers wait for it in a collective. A rank whose main thread
stands in a collective therefore waits somewhat longer than one that stands anywhere else, so that the culprit ends
first and is named first.
"""

from __future__ import annotations

import logging
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

from opensora.config.train import WatchdogConfig
from opensora.training.clock import Clock

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_COLLECTIVE_PATIENCE = 1.5
_COLLECTIVE_EXTRA_SECONDS = 5.0
_COLLECTIVE_CODE = ("torch/distributed/distributed_c10d", "torch/distributed/fsdp", "torch/distributed/checkpoint")


class Watchdog:
    """A thread that calls `on_stall(reason, stacks)` when no step ends in time. The call must end the process."""

    def __init__(self, config: WatchdogConfig, *, clock: Clock, on_stall: Callable[[str, str], None]) -> None:
        self._config = config
        self._clock = clock
        self._on_stall = on_stall
        self._main_thread = threading.get_ident()
        self._durations: deque[float] = deque(maxlen=50)
        self._last_beat = time.monotonic()
        self._last_step_end: float | None = None
        self._first_step_done = False
        self._finished = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """Something has moved: a batch was validated, a clip sampled, a checkpoint written."""
        self._last_beat = time.monotonic()
        self._last_step_end = None

    def step_done(self) -> None:
        """A step has ended; its duration teaches the limit for the next ones."""
        now = time.monotonic()
        if self._last_step_end is not None:
            self._durations.append(now - self._last_step_end)
        self._last_step_end = self._last_beat = now
        self._first_step_done = True

    def limit_seconds(self) -> float:
        """How long nothing may move now."""
        if not self._first_step_done:
            return self._config.startup_seconds
        usual = statistics.median(self._durations) if self._durations else 0.0
        return max(self._config.floor_seconds, self._config.factor * usual)

    def stop(self) -> None:
        self._finished.set()

    def _watch(self) -> None:
        while not self._finished.wait(_POLL_SECONDS):
            silent = time.monotonic() - self._last_beat
            limit = self.limit_seconds()
            if silent <= limit:
                continue
            waits_for_peers = self._stands_in_collective()
            if waits_for_peers and silent <= limit * _COLLECTIVE_PATIENCE + _COLLECTIVE_EXTRA_SECONDS:
                continue
            place = "waiting for other ranks in a collective" if waits_for_peers else f"in {self._clock.phase}"
            self._on_stall(f"nothing moved for {silent:.0f} s (limit {limit:.0f} s), {place}", format_stacks())

    def _stands_in_collective(self) -> bool:
        frame = sys._current_frames().get(self._main_thread)
        for _ in range(12):  # the innermost frames tell
            if frame is None:
                return False
            if any(place in frame.f_code.co_filename.replace("\\", "/") for place in _COLLECTIVE_CODE):
                return True
            frame = frame.f_back
        return False


def format_stacks() -> str:
    """The Python stacks of all threads."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame)))
    return "\n".join(parts)
