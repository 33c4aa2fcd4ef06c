"""Where the time of a run goes: parts that add up to the elapsed time, and the phase that a rank is in now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal[
    "start-up", "data wait", "encode", "forward/backward", "imbalance", "optimiser", "saving", "validation", "sampling",
    "other",
]  # fmt: skip

PRODUCTIVE: frozenset[Phase] = frozenset({"encode", "forward/backward", "optimiser"})
"""What counts as goodput."""


class Clock:
    """Attributes every second to exactly one phase; an inner phase interrupts the outer one."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.phase: Phase = "start-up"
        self._since = self.started
        self._seconds: dict[Phase, float] = {}

    def switch(self, phase: Phase) -> None:
        """Enter a phase until the next switch."""
        now = time.monotonic()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Be in a phase for the length of a block. An error leaves the phase as it is: that is where it happened."""
        outer = self.phase
        self.switch(phase)
        yield
        self.switch(outer)

    def seconds(self) -> dict[Phase, float]:
        """Phase → seconds so far; their sum is the elapsed time."""
        self.switch(self.phase)
        return dict(self._seconds)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def goodput(self) -> float:
        """Share of the elapsed time that was spent on training itself."""
        seconds = self.seconds()
        return sum(seconds.get(phase, 0.0) for phase in PRODUCTIVE) / max(sum(seconds.values()), 1e-9)
