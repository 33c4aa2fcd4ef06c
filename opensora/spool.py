"""Files that grow, kept in a store whose objects cannot be appended to: metrics, logs, TensorBoard events.

What is written is uploaded in the background, every few seconds and at the end, so that a kill loses the last interval
at most. The writer is never held up: while the store is out, data waits in memory (or in its local folder).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from opensora.errors import StorageError
from opensora.storage import Storage

logger = logging.getLogger(__name__)

_TRY_SECONDS = 10.0
"""Longest retry of one upload in the background; the next interval tries again anyway."""
_CLOSE_SECONDS = 30.0
"""Longest retry of the last upload."""
_MAX_WAITING_BYTES = 64 * 1024 * 1024
"""Lines that wait for the store in memory; beyond that the oldest are given up."""


class PartSpool:
    """Lines that become `prefix/part-00000.jsonl`, `part-00001.jsonl` and so on. Safe to use from many threads.

    The newest part is uploaded again, as a whole, until it has `part_bytes`; then the next number begins. Numbers that
    exist already are left alone, so a second spool on the same prefix continues behind the first.
    """

    def __init__(
        self,
        storage: Storage,
        prefix: str,
        *,
        suffix: str = ".jsonl",
        flush_seconds: float,
        part_bytes: int = 4 * 1024**2,
    ) -> None:
        self._prefix, self._suffix, self._part_bytes = prefix, suffix, part_bytes
        self._lock = threading.Lock()
        self._parts: deque[_Part] = deque()
        self._first_number: int | None = None
        self._num_parts = 0
        self._num_lost_bytes = 0
        self._uploader = _Uploader(storage, prefix, self._upload, flush_seconds=flush_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, line: bytes | str) -> None:
        """Add a line; its end is added unless it is there. Returns at once and never fails for the store's sake."""
        data = line.encode() if isinstance(line, str) else line
        with self._lock:
            if not self._parts or len(self._parts[-1].data) >= self._part_bytes:
                self._parts.append(_Part(self._num_parts))
                self._num_parts += 1
            self._parts[-1].data += data if data.endswith(b"\n") else data + b"\n"
            while len(self._parts) > 1 and sum(len(part.data) for part in self._parts) > _MAX_WAITING_BYTES:
                self._num_lost_bytes += self._parts.popleft().num_unsaved

    def flush(self) -> bool:
        """Upload now; False (and a line in the log) when the store is out."""
        return self._uploader.flush()

    def close(self) -> None:
        """Upload the rest, for a bounded time, and log what could not be stored. A second call does nothing."""
        if not self._uploader.close():
            return
        with self._lock:
            num_lost = self._num_lost_bytes + sum(part.num_unsaved for part in self._parts)
        if num_lost:
            logger.warning("%s: %d bytes were not stored", self._prefix, num_lost)

    def _upload(self, storage: Storage) -> None:
        """Store what is new, oldest part first. One thread at a time is here."""
        if self._first_number is None:
            self._first_number = self._count_existing(storage)
        while True:
            with self._lock:
                part = next((part for part in self._parts if part.num_unsaved), None)
                if part is None:
                    break
                data = bytes(part.data)
            storage.write(f"{self._prefix}/part-{self._first_number + part.number:05d}{self._suffix}", data)
            with self._lock:
                part.num_saved = len(data)
                # The last part still grows; the others are done with.
                while len(self._parts) > 1 and not self._parts[0].num_unsaved:
                    self._parts.popleft()
                if part is self._parts[-1]:
                    break

    def _count_existing(self, storage: Storage) -> int:
        numbers = [
            int(name[len("part-") : len(name) - len(self._suffix)])
            for name in storage.list_names(self._prefix)
            if name.startswith("part-") and name.endswith(self._suffix)
        ]
        return max(numbers, default=-1) + 1


class FolderSpool:
    """Copies the files of a local folder that changed since they were copied last to `prefix`, under the same names."""

    def __init__(self, storage: Storage, prefix: str, local: Path, *, flush_seconds: float) -> None:
        self._prefix, self._local = prefix, local
        self._stored: dict[str, tuple[int, int]] = {}
        self._uploader = _Uploader(storage, prefix, self._upload, flush_seconds=flush_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def flush(self) -> bool:
        """Upload now; False (and a line in the log) when the store is out."""
        return self._uploader.flush()

    def close(self) -> None:
        """Upload the rest, for a bounded time, and log what could not be stored. A second call does nothing."""
        if not self._uploader.close():
            return
        if missing := sorted(name for name, _ in self._changed()):
            logger.warning("%s: not stored, or not in its last state: %s", self._prefix, ", ".join(missing))

    def _upload(self, storage: Storage) -> None:
        for name, state in self._changed():
            try:
                storage.upload(self._local / name, f"{self._prefix}/{name}")
            except FileNotFoundError:
                continue  # deleted since it was listed
            self._stored[name] = state

    def _changed(self) -> list[tuple[str, tuple[int, int]]]:
        """Names and states (size, time) of the files that differ from what is stored."""
        found = []
        for path in sorted(self._local.rglob("*")):
            try:
                if not path.is_file():
                    continue
                status = path.stat()
            except FileNotFoundError:
                continue
            name, state = path.relative_to(self._local).as_posix(), (status.st_size, status.st_mtime_ns)
            if self._stored.get(name) != state:
                found.append((name, state))
        return found


@dataclass
class _Part:
    number: int
    data: bytearray = field(default_factory=bytearray)
    num_saved: int = 0

    @property
    def num_unsaved(self) -> int:
        return len(self.data) - self.num_saved


class _Uploader:
    """Calls `upload` every `flush_seconds` from a thread of its own, and survives what the store does meanwhile."""

    def __init__(self, storage: Storage, what: str, upload: Callable[[Storage], None], *, flush_seconds: float) -> None:
        self._storage = _with_patience(storage, _TRY_SECONDS)
        self._last_storage = _with_patience(storage, _CLOSE_SECONDS)
        self._what, self._upload, self._flush_seconds = what, upload, flush_seconds
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._failed = False
        # A daemon: an entry point that fails before it can close its spools must still end.
        self._thread = threading.Thread(target=self._run, name=f"spool {what}", daemon=True)
        self._thread.start()

    def flush(self) -> bool:
        return self._try(self._storage)

    def close(self) -> bool:
        """Whether this call was the one that closed."""
        if self._stopped.is_set():
            return False
        self._stopped.set()
        self._thread.join()
        self._try(self._last_storage)
        return True

    def _run(self) -> None:
        while not self._stopped.wait(self._flush_seconds):
            self._try(self._storage)

    def _try(self, storage: Storage) -> bool:
        with self._lock:
            try:
                self._upload(storage)
            except (StorageError, OSError) as error:  # OSError: a local file that cannot be read
                if not self._failed:
                    # Without the error's hint, which is for those whom it stops.
                    said = error.message if isinstance(error, StorageError) else error
                    logger.warning(
                        "%s is not stored for now, trying again every %.0f s: %s",
                        self._what,
                        self._flush_seconds,
                        said,
                    )
                self._failed = True
                return False
            if self._failed:
                logger.info("%s is stored again", self._what)
            self._failed = False
            return True


def _with_patience(storage: Storage, seconds: float) -> Storage:
    deadline = min(storage.config.retry_deadline_seconds, seconds)
    return Storage(storage.uri, config=replace(storage.config, retry_deadline_seconds=deadline))
