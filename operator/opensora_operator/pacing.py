"""How fast the operator may speak to the API server: a limit for all requests, and a slow lane for progress."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable


class RateLimit:
    """So many requests a second and so many at once; those that may wait go last.

    A server that says "too many requests" pauses all.
    """

    def __init__(self, *, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._clock = clock
        self._tokens = float(burst)
        self._counted_at = clock()
        self._paused_until = 0.0
        self._waiting: dict[bool, deque[asyncio.Future[None]]] = {False: deque(), True: deque()}
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, *, later: bool = False) -> None:
        """Wait until one request may be sent. `later`: all others that wait go first."""
        if not any(self._waiting.values()) and self._wait_seconds() <= 0:
            self._tokens -= 1
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[later].append(future)
        self._schedule()
        await future

    def pause(self, seconds: float) -> None:
        """Send nothing for this time."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    def _wait_seconds(self) -> float:
        """Until there is a token."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._counted_at) * self._per_second)
        self._counted_at = now
        return max((1 - self._tokens) / self._per_second, self._paused_until - now)

    def _schedule(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, self._wait_seconds()), self._release)

    def _release(self) -> None:
        self._timer = None
        for waiting in (self._waiting[False], self._waiting[True]):
            while waiting and (waiting[0].done() or self._wait_seconds() <= 0):
                future = waiting.popleft()
                if not future.done():  # it is when whoever waited was cancelled
                    self._tokens -= 1
                    future.set_result(None)
        if any(self._waiting.values()):
            self._schedule()


class ProgressPace:
    """When the progress of an object may be written: so many writes a second for all, each object not too often.

    An object that wants to write gets a slot, comes back at that time, and writes.
    """

    def __init__(
        self, *, per_second: float = 5.0, interval_seconds: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._gap = 1 / per_second
        self._interval = interval_seconds
        self._clock = clock
        self._next_slot = 0.0
        self._slots: dict[str, float] = {}
        self._written: dict[str, float] = {}

    def wait_seconds(self, uid: str) -> float:
        """How long this object has to wait before its progress may be written; 0 is now."""
        now = self._clock()
        slot = self._slots.get(uid)
        if slot is None:
            slot = max(now, self._next_slot, self._written.get(uid, -self._interval) + self._interval)
            self._slots[uid] = slot
            self._next_slot = max(now, self._next_slot) + self._gap
        return max(0.0, slot - now)

    def written(self, uid: str) -> None:
        """The object's status was written, with the progress in it."""
        self._slots.pop(uid, None)
        self._written[uid] = self._clock()

    def forget(self, uid: str) -> None:
        """The object is gone."""
        self._slots.pop(uid, None)
        self._written.pop(uid, None)
