"""Copies of clips on a local disk, for clips that are read again and again from a store further away."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from pathlib import Path, PurePosixPath

from opensora.storage import Storage

logger = logging.getLogger(__name__)


class ClipCache:
    """A folder of copies, of which the least recently used make room for new ones.

    Threads and processes may share the folder. A copy appears whole or not at all, and belongs to one version of an
    object: one that was replaced is copied anew.

    Args:
        folder: made when missing.
        limit_bytes: size of all copies together; a clip larger than this is not copied.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._making_room = threading.Lock()
        self._storage = Storage(str(folder))

    def find(self, storage: Storage, path: str) -> tuple[Storage, str]:
        """Where to read an object: a local copy, made if needed, or the object itself where there can be none.

        A copy may make room for another one at any time, so a reader that does not find it takes the object.

        Raises:
            StorageError: the object cannot be fetched.
        """
        if storage.is_local:
            return storage, path
        info = storage.info(path)
        version = f"{storage.uri_of(path)}\n{info.size}\n{info.modified}\n{info.etag}"
        name = hashlib.sha256(version.encode()).hexdigest()[:32] + PurePosixPath(path).suffix
        copy = self._folder / name
        try:
            os.utime(copy)
            return self._storage, name
        except FileNotFoundError:
            pass
        if info.size > self._limit_bytes:
            return storage, path
        try:
            with self._making_room:
                self._make_room(info.size)
            storage.download(path, copy)
        except OSError as error:
            logger.warning("no local copy of %s: %s", storage.uri_of(path), error)
            return storage, path
        return self._storage, name

    def _make_room(self, size: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        files: list[tuple[float, int, str]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another process made room
                    continue
                files.append((stat.st_mtime, stat.st_size, entry.path))
        total = sum(file_size for _, file_size, _ in files)
        for _, file_size, path in sorted(files):
            if total + size <= self._limit_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= file_size
