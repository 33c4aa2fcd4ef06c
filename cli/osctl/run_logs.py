"""Logs of ranks in a run directory, where the launcher puts them: what is left when the pods are gone.

Objects there cannot be appended to, so a log is a row of parts, of which the newest still grows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from opensora import records
from opensora.errors import ObjectNotFoundError
from opensora.records import Verdict
from opensora.storage import ObjectInfo, Storage
from osctl.log_lines import NANOSECONDS, Choice, Line, own_stamp

_BLOCK_BYTES = 256 * 1024
_POLL_SECONDS = 3.0
_STORE_SECONDS = 30.0
"""Longest outage of a store that a reader of logs waits for."""
_PART = re.compile(r"logs/attempt-([0-9]+)/rank-([0-9]+)/part-([0-9]+)\.log")
_ATTEMPT = re.compile(r"attempt-([0-9]+)/?")


class RunLogs:
    """The logs in one run directory."""

    def __init__(self, run: Storage) -> None:
        self._run = Storage(run.uri, config=replace(run.config, retry_deadline_seconds=_STORE_SECONDS))
        self.uri = run.uri

    @property
    def is_missing_folder(self) -> bool:
        """It is a local path that this machine does not have."""
        return self._run.is_local and not Path(self.uri).is_dir()

    def attempts(self) -> list[int]:
        """Attempts that have logs."""
        names = [_ATTEMPT.fullmatch(name) for name in self._run.list_names("logs")]
        return sorted(int(found[1]) for found in names if found is not None)

    def verdict(self, attempt: int) -> Verdict | None:
        """How an attempt ended; None while it goes on, or where it left nothing."""
        try:
            return Verdict.from_json(self._run.read(records.verdict_path(attempt)))
        except (ObjectNotFoundError, ValueError):
            return None

    def ranks(self, attempt: int) -> list[int]:
        """Ranks that have a log."""
        return sorted(self._parts(attempt))

    def lines(
        self, attempt: int, choice: Choice, *, ranks: Container[int], pool: ThreadPoolExecutor, tail: int | None = None
    ) -> list[Iterator[Line]]:
        """What there is of some ranks, a stream for each, read ahead by the pool a little; at most the last `tail`."""
        parts = {rank: infos for rank, infos in self._parts(attempt).items() if rank in ranks}
        return [RankLog(self._run, rank, choice).lines(infos, pool, tail=tail) for rank, infos in parts.items()]

    def follow(self, attempt: int, choice: Choice, *, is_over: Callable[[], bool]) -> Iterator[list[Line]]:
        """Lines of all ranks as they are stored, until the attempt is over."""
        logs: dict[int, RankLog] = {}
        while True:
            was_over = is_over() or self._is_complete(attempt)
            for rank, parts in self._parts(attempt).items():
                if choice.rank in (None, rank):
                    log = logs.setdefault(rank, RankLog(self._run, rank, choice))
                    yield from log.batches(parts)
            if was_over:
                return
            time.sleep(_POLL_SECONDS)

    def _is_complete(self, attempt: int) -> bool:
        """Whether all ranks that have a log have ended: launchers store the logs before they tell the end."""
        verdict = self.verdict(attempt)
        return verdict is not None and {*map(int, verdict.codes)} >= self._parts(attempt).keys()

    def _parts(self, attempt: int) -> dict[int, list[ObjectInfo]]:
        """The parts of each rank, in their order."""
        found: dict[int, list[tuple[int, ObjectInfo]]] = {}
        for info in self._run.list(f"logs/attempt-{attempt}"):
            match = _PART.fullmatch(info.path)
            if match is not None:
                found.setdefault(int(match[2]), []).append((int(match[3]), info))
        return {rank: [info for _, info in sorted(parts, key=lambda part: part[0])] for rank, parts in found.items()}


class RankLog:
    """The log of one rank, and how far it has been read."""

    def __init__(self, run: Storage, rank: int, choice: Choice) -> None:
        self._run = run
        self._rank = rank
        self._choice = choice
        self._done: dict[str, int] = {}
        self._rest = b""
        self._time: int | None = None

    def lines(
        self, parts: Sequence[ObjectInfo], pool: ThreadPoolExecutor, *, tail: int | None = None
    ) -> Iterator[Line]:
        """What there is, with the next block on its way while one is looked at. The first is asked for at once."""
        blocks = [(info, start) for info in parts for start in range(0, info.size, _BLOCK_BYTES)]
        if tail is not None:
            last = pool.submit(self._last_blocks, blocks, tail)
            return self._lines_of(block for future in (last,) for block in future.result())
        waiting = iter(blocks)

        def fetch() -> tuple[ObjectInfo, Future[bytes]] | None:
            block = next(waiting, None)
            return None if block is None else (block[0], pool.submit(self._read, *block))

        def read(pending: tuple[ObjectInfo, Future[bytes]] | None) -> Iterator[tuple[ObjectInfo, bytes]]:
            while pending is not None:
                info, data = pending[0], pending[1].result()
                pending = fetch()
                yield info, data

        return self._lines_of(read(fetch()))

    def _lines_of(self, blocks: Iterable[tuple[ObjectInfo, bytes]]) -> Iterator[Line]:
        for info, data in blocks:
            yield from self._take(data, info)
        if self._rest:
            line = self._choice.take(self._time or 0, self._rank, self._rest)
            if line is not None:
                yield line

    def _last_blocks(self, blocks: Sequence[tuple[ObjectInfo, int]], num_lines: int) -> list[tuple[ObjectInfo, bytes]]:
        """Enough from the end to have so many whole lines."""
        found: list[tuple[ObjectInfo, bytes]] = []
        count = 0
        for block in reversed(blocks):
            data = self._read(*block)
            found.insert(0, (block[0], data))
            count += data.count(b"\n")
            if count > num_lines:
                break
        return found

    def _read(self, info: ObjectInfo, start: int) -> bytes:
        return self._run.read_range(info.path, start, min(_BLOCK_BYTES, info.size - start))

    def batches(self, parts: Sequence[ObjectInfo]) -> Iterator[list[Line]]:
        """What is new since the last time, without a line that is not whole yet."""
        for info in parts:
            start = self._done.get(info.path, 0)
            while start < info.size:
                data = self._read(info, start)
                if not data:
                    break
                start += len(data)
                self._done[info.path] = start
                batch = self._take(data, info)
                if batch:
                    yield batch

    def _take(self, data: bytes, info: ObjectInfo) -> list[Line]:
        *whole, self._rest = (self._rest + data).split(b"\n")
        if self._time is None:
            # What comes before the first time of a rank belongs to it; a rank that tells none wrote when it was stored.
            known = (stamp for text in whole if (stamp := own_stamp(text)) is not None)
            self._time = next(known, int(info.modified * NANOSECONDS))
        earliest = -1 if self._choice.since is None else int(self._choice.since * NANOSECONDS)
        found = []
        for text in whole:
            self._time = max(self._time, own_stamp(text) or 0)
            if self._time >= earliest:
                line = self._choice.take(self._time, self._rank, text)
                if line is not None:
                    found.append(line)
        return found
