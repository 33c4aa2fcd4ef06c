"""Lines of logs: which rank wrote them and when, and how those of many ranks become one stream. Pure."""

from __future__ import annotations

import heapq
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

from opensora.rank_output import log_text
from osctl.output import printable

NANOSECONDS = 1_000_000_000
_RANK = re.compile(rb"\[rank ([0-9]{1,6})\] ")
"""What the launcher puts before the lines of every rank but rank 0."""
_LAUNCHER = b"[launcher] "
_STAMP = re.compile(rb"\[([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2})\] ")
"""What ranks put before what they log."""


class Line(NamedTuple):
    """A line, in the order of time. A named tuple, since there may be a million of them."""

    time: int
    """Nanoseconds since 1970."""
    source: int
    """The rank that wrote it; below 0 what a pod said that no rank did: -1 is pod 0."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which lines are wanted."""

    rank: int | None = None
    """Those of one rank alone."""
    pattern: re.Pattern[str] | None = None
    """Those in which it is found."""
    since: float | None = None
    """Those from this time on: seconds since 1970."""
    has_ranks: bool = True
    """Pods belong together, and their lines are told apart by rank; otherwise by pod."""

    def take(self, time: int, source: int, text: bytes) -> Line | None:
        """The line, if it is wanted."""
        if self.rank is not None and source != self.rank:
            return None
        shown = log_text(text)
        if shown is None:
            return None
        decoded = shown.decode("utf-8", "replace")
        if self.pattern is not None and self.pattern.search(decoded) is None:
            return None
        return Line(time, source, decoded if decoded.isprintable() else printable(decoded.expandtabs()))

    @property
    def is_all(self) -> bool:
        """Every line is wanted, so that the last ones are the last ones of their pod."""
        return self.rank is None and self.pattern is None


def split_rank(text: bytes, *, pod: int) -> tuple[int, bytes]:
    """Who wrote a line of a pod's log, and the line without the launcher's prefix."""
    found = _RANK.match(text)
    if found is not None:
        return int(found[1]), text[found.end() :]
    if pod == 0 and not text.startswith(_LAUNCHER):
        return 0, text
    return -1 - pod, text


def label(source: int, *, noun: str, width: int = 1) -> str:
    """What is put before a line: `[rank 3] `, and `[pod 0] ` for what no rank wrote."""
    return f"[{noun} {source:>{width}}] " if source >= 0 else f"[pod {-1 - source}] "


def parse_stamp(stamp: bytes) -> int:
    """Nanoseconds since 1970 of an RFC 3339 time. Raises ValueError."""
    zone = b"Z" if stamp.endswith(b"Z") else stamp[-6:]
    fraction = stamp[20 : -len(zone)]
    return _seconds(stamp[:19], zone) * NANOSECONDS + (int(fraction.ljust(9, b"0")[:9]) if fraction else 0)


def own_stamp(text: bytes) -> int | None:
    """The time that a rank put before a line, by the pod's clock, which is UTC unless the image says otherwise."""
    found = _STAMP.match(text)
    try:
        return None if found is None else _seconds(found[1].replace(b" ", b"T"), b"Z") * NANOSECONDS
    except ValueError:
        return None


@lru_cache(maxsize=4096)
def _seconds(second: bytes, zone: bytes) -> int:
    """A second has many lines."""
    offset = "+00:00" if zone == b"Z" else zone.decode()
    parsed = datetime.fromisoformat(second.decode() + offset)
    if parsed.tzinfo is None:
        raise ValueError(f"{zone!r} is no time zone")
    return int(parsed.astimezone(UTC).timestamp())


def merge(sources: Sequence[Iterator[Line]]) -> Iterator[Line]:
    """Streams of lines as one, in the order of time. Of each stream one line is waited for, and kept."""
    return heapq.merge(*sources)


class Window:
    """Brings lines of many streams into the order of time while they are written: each is held back for a moment, in
    which an earlier one may still arrive."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._held: list[tuple[int, int, Line]] = []
        self._arrivals: deque[tuple[float, int]] = deque()
        self._count = 0

    def add(self, lines: Sequence[Line], *, now: float) -> None:
        """Lines that have arrived; `now` is monotonic."""
        for line in lines:
            self._count += 1
            heapq.heappush(self._held, (line.time, self._count, line))
        if lines:
            self._arrivals.append((now, max(line.time for line in lines)))

    def due(self, *, now: float) -> list[Line]:
        """Lines that have waited long enough, with all that come before them."""
        newest = -1
        while self._arrivals and self._arrivals[0][0] + self._seconds <= now:
            newest = max(newest, self._arrivals.popleft()[1])
        found = []
        while self._held and self._held[0][0] <= newest:
            found.append(heapq.heappop(self._held)[2])
        return found

    def wait(self, *, now: float) -> float | None:
        """Seconds until something is due; None where nothing is held."""
        return max(0.0, self._arrivals[0][0] + self._seconds - now) if self._arrivals else None

    def rest(self) -> list[Line]:
        """All that is held."""
        found = [line for _, _, line in sorted(self._held)]
        self._held, self._arrivals = [], deque()
        return found
