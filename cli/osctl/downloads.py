"""Copies objects of a store to this machine: in parallel, verified, and continued where an earlier try ended.

An object is written to a part file, whose name says which content it is of, and gets its own name once it is whole and
on the disk. So what has its final name is complete, and a part is continued only with the content that it began with.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

from opensora.errors import ObjectChangedError, ObjectNotFoundError
from opensora.storage import ObjectInfo, Storage
from osctl.errors import ExitCode, OsctlError

PARTS_FOLDER = ".osctl-pull"
"""Of what is not whole yet, in the target folder; gone when all is."""
_TRIES = 3
_READ_BYTES = 1024 * 1024
_WINDOWS_CHARACTERS = frozenset('<>:"|?*\\')
_WINDOWS_NAMES = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"{name}{number}" for name in ("COM", "LPT") for number in range(1, 10))]
)
State = Literal["copied", "here", "gone"]


@dataclass(frozen=True)
class Item:
    """An object to copy."""

    kind: str
    """What it is a part of."""
    info: ObjectInfo
    sha256: str | None = None
    """Digest of its content, where one is known."""
    is_last: bool = False
    """It says that others are complete, so it comes after all of them."""


@dataclass(frozen=True)
class Copy:
    """What became of an object."""

    item: Item
    path: Path
    state: State
    """Copied now, here already, or gone from the store before it could be copied."""


class UnsafeNameError(OsctlError):
    """An object whose name cannot be that of a file in the target folder."""


class Downloads:
    """Copies objects of one storage into one folder. A context manager: one at a time works in a folder.

    Args:
        source: where they are.
        target: where they go, under their own paths.
        jobs: objects copied at a time.
        on_bytes: told how many bytes more are here, by any thread.
    """

    def __init__(
        self, source: Storage, target: Path, *, jobs: int, on_bytes: Callable[[int], None] = lambda count: None
    ) -> None:
        self._source = source
        self._target = target
        self._parts = target / PARTS_FOLDER
        self._jobs = jobs
        self._on_bytes = on_bytes
        self._errors: list[BaseException] = []

    def run(self, items: Sequence[Item]) -> list[Copy]:
        """Copy all; what is here already is looked at, and left.

        Raises:
            OsctlError: an object's content is not what it should be, or it cannot be written here.
            StorageError: the store does not give it.
        """
        with _writing(self._target), _alone_in(self._parts):
            copies = self._copy_all([item for item in items if not item.is_last])
            copies += self._copy_all([item for item in items if item.is_last])
        with _writing(self._target):
            shutil.rmtree(self._parts)
        return copies

    def _copy_all(self, items: Sequence[Item]) -> list[Copy]:
        """On threads that hold up nobody: one that waits for a store which is away must not keep the process."""
        waiting = deque(enumerate(items))
        copies: dict[int, Copy] = {}

        def work() -> None:
            while not self._errors:
                try:
                    number, item = waiting.popleft()
                except IndexError:
                    return
                try:
                    copies[number] = self._fetch(item)
                except BaseException as error:
                    self._errors.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self._jobs, len(items)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return [copies[number] for number in range(len(items))]

    def _fetch(self, item: Item) -> Copy:
        path = place(self._target, item.info.path)
        with _writing(path):
            if _is_here(item, path):
                self._on_bytes(item.info.size)
                return Copy(item, path, "here")
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return Copy(self._insist(item, path), path, "copied")
        except ObjectNotFoundError as error:
            if item.sha256 is None and not item.is_last:  # what a run that goes on has replaced
                self._on_bytes(item.info.size)
                return Copy(item, path, "gone")
            raise OsctlError(
                f"{self._source.uri_of(item.info.path)} was removed meanwhile: a run keeps only its newest checkpoints",
                hint="run the same command again to take the newest",
            ) from error

    def _insist(self, item: Item, path: Path) -> Item:
        """Copy an object, again where it has been replaced or was damaged on its way; what was copied in the end."""
        error: Exception | None = None
        for _ in range(_TRIES):
            try:
                self._copy(item, path)
            except ObjectChangedError as changed:
                error = changed
                item = replace(item, info=self._source.info(item.info.path))
            except _DamagedError as damaged:
                error = damaged
            else:
                return item
        assert error is not None
        if isinstance(error, _DamagedError):
            raise OsctlError(
                f"{self._source.uri_of(item.info.path)} is damaged: its content has another digest than its manifest "
                "says",
                hint="take another checkpoint with --step",
            ) from error
        raise error

    def _copy(self, item: Item, path: Path) -> None:
        part = self._parts / _part_name(self._source, item)
        with _writing(path):
            start = part.stat().st_size if part.exists() else 0
            if start > item.info.size:
                part.unlink()
                start = 0
            digest = _Digest(item, part if start else None)
        self._on_bytes(start)
        count = start
        try:
            with _writing(path), open(part, "ab") as file:
                for chunk in self._source.stream(item.info, start=start):
                    if self._errors:
                        raise self._errors[0]
                    file.write(chunk)
                    digest.update(chunk)
                    count += len(chunk)
                    self._on_bytes(len(chunk))
                file.flush()
                os.fsync(file.fileno())
            if count != item.info.size:
                raise ObjectChangedError(f"{item.info.path}: got {count} of {item.info.size} bytes")
            digest.check()
        except (ObjectChangedError, _DamagedError):
            self._on_bytes(-count)
            with _writing(path):
                part.unlink(missing_ok=True)
            raise
        with _writing(path):
            os.utime(part, (item.info.modified, item.info.modified))
            os.replace(part, path)


def place(target: Path, path: str, *, windows: bool = os.name == "nt") -> Path:
    """An object's file in a folder. Raises UnsafeNameError for names that lead elsewhere or that no file takes."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or any(ord(char) < 32 or ord(char) == 127 for char in part) for part in parts):
        raise UnsafeNameError(f"{path!r} is no name for a file below {target}")
    if parts[0] == PARTS_FOLDER:
        raise UnsafeNameError(f"{path!r} is a name that osctl needs itself")
    found = target.joinpath(*(_for_windows(part) if windows else part for part in parts))
    # A link in the target folder may lead out of it.
    if not found.parent.resolve().is_relative_to(target.resolve()):
        raise UnsafeNameError(f"{path!r} lies behind a link that leads out of {target}")
    return found


def _for_windows(name: str) -> str:
    """A name that Windows takes; what it does not take becomes `%` and its number, as in URIs."""
    escaped = "".join(f"%{ord(char):02X}" if char in _WINDOWS_CHARACTERS else char for char in name)
    if escaped[-1] in ". ":
        escaped = f"{escaped[:-1]}%{ord(escaped[-1]):02X}"
    if escaped.partition(".")[0].rstrip().upper() in _WINDOWS_NAMES:
        escaped = f"%{ord(escaped[0]):02X}{escaped[1:]}"
    return escaped


def _part_name(source: Storage, item: Item) -> str:
    """Names the content: a part of another one is never continued."""
    info = item.info
    content = (source.uri_of(info.path), info.size, item.sha256 or (info.etag, info.modified))
    return hashlib.sha256(repr(content).encode()).hexdigest()[:32] + ".part"


def _is_here(item: Item, path: Path) -> bool:
    """By digest where there is one; else by size and time, which a copy has from its object."""
    if path.is_symlink() or not path.is_file():
        return False
    status = path.stat()
    if status.st_size != item.info.size:
        return False
    if item.sha256 is None:
        return abs(status.st_mtime - item.info.modified) < 0.001
    digest = _Digest(item, path)
    return digest.is_right


class _DamagedError(Exception):
    """The content has another digest than it should have."""


class _Digest:
    """Of the content so far; of nothing where none is known."""

    def __init__(self, item: Item, begun: Path | None) -> None:
        self._wanted = item.sha256
        self._sha = hashlib.sha256()
        if begun is not None and self._wanted is not None:
            with open(begun, "rb") as file:
                while chunk := file.read(_READ_BYTES):
                    self._sha.update(chunk)

    def update(self, chunk: bytes) -> None:
        if self._wanted is not None:
            self._sha.update(chunk)

    @property
    def is_right(self) -> bool:
        return self._wanted is None or self._sha.hexdigest() == self._wanted

    def check(self) -> None:
        if not self.is_right:
            raise _DamagedError


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep others out of a folder, which is made. The lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as file:
        try:
            _lock(file)
        except OSError as error:
            raise OsctlError(
                f"another osctl copies into {folder.parent} now",
                hint="wait for it, or choose another folder with --to",
                exit_code=ExitCode.CONFLICT,
            ) from error
        yield


def _lock(file: IO[bytes]) -> None:
    if os.name == "nt":
        import msvcrt  # of Windows alone, as the other is of all others

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Translate what the operating system says about files of ours."""
    try:
        yield
    except OSError as error:
        raise OsctlError(
            f"{error.filename or path} cannot be written: {error.strerror or error}",
            hint="make room or choose another folder with --to; the same command goes on where it was",
        ) from error
