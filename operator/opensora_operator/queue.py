"""The keyed queue: which object is looked at next, each by one worker at a time, events of one object coalesced."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from opensora_operator.plans import Key

_FIRST_RETRY_SECONDS = 0.2
_MAX_RETRY_SECONDS = 60.0
_PATIENCE_SECONDS = 30.0
"""What may wait does not wait longer than this for what is urgent."""


@dataclass(slots=True, eq=False)
class _Entry:
    due: float
    later: bool


@dataclass(frozen=True)
class Turn:
    """A key whose turn it is."""

    key: Key
    later: bool
    """It was added as something that may wait."""


class Queue:
    """Keys with due times. Of the keys that are due, the urgent ones go first, then the oldest.

    Added again while it waits, a key keeps the earlier time. Added while a worker has it, it waits for the worker.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._waiting: dict[Key, _Entry] = {}
        self._heaps: dict[bool, list[tuple[float, int, Key, _Entry]]] = {False: [], True: []}
        self._order = 0
        self._running: dict[Key, float] = {}
        self._added_while_running: dict[Key, _Entry] = {}
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    def __len__(self) -> int:
        """Keys that are due and not being worked on."""
        now = self._clock()
        return sum(entry.due <= now for entry in self._waiting.values())

    def add(self, key: Key, *, seconds: float = 0.0, later: bool = False) -> None:
        """Have a key worked on after this time, or earlier if it is so already. `later`: what is urgent goes first."""
        waiting = self._added_while_running if key in self._running else self._waiting
        new = _Entry(self._clock() + seconds, later)
        old = waiting.get(key)
        if old is not None and old.due <= new.due:
            if old.later <= new.later or new.due > self._clock():
                return
            new.due = old.due
        waiting[key] = new
        if waiting is self._waiting:
            self._push(key, new)

    def retry(self, key: Key, *, at_least_seconds: float = 0.0) -> float:
        """Have a key that failed worked on again, each time after a longer wait. Returns the wait."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        wait = min(_FIRST_RETRY_SECONDS * 2.0 ** min(failures, 16), _MAX_RETRY_SECONDS)
        wait = max(wait * (0.75 + 0.5 * self._jitter()), at_least_seconds)
        self.add(key, seconds=wait)
        return wait

    def succeeded(self, key: Key) -> None:
        """Forget the failures of a key."""
        self._failures.pop(key, None)

    def take(self) -> Turn | None:
        """The key whose turn it is now, if any; `done` has to follow."""
        if self._closed:
            return None
        now = self._clock()
        urgent, later = self._first(later=False), self._first(later=True)
        takes_later = later is not None and later.due <= now
        if urgent is not None and urgent.due <= now and not (later and later.due + _PATIENCE_SECONDS <= now):
            takes_later = False
        elif not takes_later:
            return None
        _, _, key, entry = heapq.heappop(self._heaps[takes_later])
        del self._waiting[key]
        self._running[key] = now
        self._idle.clear()
        return Turn(key, entry.later)

    def done(self, key: Key) -> None:
        """A worker is finished with a key."""
        del self._running[key]
        if not self._running:
            self._idle.set()
        entry = self._added_while_running.pop(key, None)
        if entry is not None:
            self._waiting[key] = entry
            self._push(key, entry)

    async def get(self) -> Turn:
        """Wait for a key whose turn it is; `done` has to follow."""
        while (turn := self.take()) is None:
            self._changed.clear()
            next_due = None if self._closed else self._next_due()
            try:
                async with asyncio.timeout(None if next_due is None else max(0.0, next_due - self._clock())):
                    await self._changed.wait()
            except TimeoutError:
                continue
        return turn

    async def drain(self) -> None:
        """Give out no more keys, and wait for those that workers have."""
        self._closed = True
        await self._idle.wait()

    def has_urgent(self) -> bool:
        """Whether a key is due that is not one of those that may wait."""
        first = self._first(later=False)
        return first is not None and first.due <= self._clock()

    def oldest_seconds(self) -> float:
        """For how long the oldest key has been due, or been with a worker."""
        now = self._clock()
        firsts = [entry.due for entry in (self._first(later=False), self._first(later=True)) if entry is not None]
        return max(0.0, *(now - since for since in (*firsts, *self._running.values())), 0.0)

    def _push(self, key: Key, entry: _Entry) -> None:
        self._order += 1
        heapq.heappush(self._heaps[entry.later], (entry.due, self._order, key, entry))
        self._changed.set()

    def _first(self, *, later: bool) -> _Entry | None:
        """The earliest entry that still holds; those that were replaced are dropped on the way."""
        heap = self._heaps[later]
        while heap and self._waiting.get(heap[0][2]) is not heap[0][3]:
            heapq.heappop(heap)
        return heap[0][3] if heap else None

    def _next_due(self) -> float | None:
        entries = (self._first(later=False), self._first(later=True))
        return min((entry.due for entry in entries if entry is not None), default=None)
