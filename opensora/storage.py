"""Files and objects behind URIs: the only module that opens one.

A `Storage` is one root (a local folder, `s3://bucket/prefix`, or `memory://name` in tests), and every path is relative
to it, with `/` between its parts. The same calls give the same promises on each: a written object appears whole or not
at all, a listing is never stale, an outage of a remote store is waited out, and what goes wrong is one of our errors.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar
from uuid import uuid4

from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from opensora.config.train import StorageConfig
from opensora.errors import ObjectChangedError, ObjectNotFoundError, StorageAccessError, StorageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

logger = logging.getLogger(__name__)

Data = bytes | bytearray | memoryview
Entry = tuple[str, int, float, str | None]
"""Key, size in bytes, time of the last change (seconds since the epoch), ETag."""
_T = TypeVar("_T")

_DEFAULT_CONFIG = StorageConfig()
_BLOCK_BYTES = 1024 * 1024
_CACHED_BLOCKS = 8
_COPY_BYTES = 8 * 1024 * 1024
_ACCESS_CHECK_SECONDS = 60.0
"""Longest retry of `check_access`, which exists to fail early."""
_PARTIAL_SUFFIX = ".partial"
"""Ends the name of a local file that is being written; such files are no objects and are not listed."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says about an object."""

    path: str
    """Relative to the root of the storage that was asked."""
    size: int
    """Bytes."""
    modified: float
    """Time of the last change, in seconds since the epoch."""
    etag: str | None
    """Changes when the content does; None where there is no such thing (local files)."""


# `Storage.list` hides the built-in name from the annotations of its class.
ObjectInfos = list[ObjectInfo]
Names = list[str]


@dataclass(frozen=True)
class Piece:
    """A range of an object, and what it is a range of."""

    data: bytes
    total: int
    etag: str | None


class Backend(Protocol):
    """One kind of store. Keys are absolute within it; errors are ours already."""

    def uri(self, key: str) -> str: ...
    def piece(self, key: str, start: int, length: int, *, etag: str | None = None) -> Piece: ...
    def chunks(self, key: str) -> Iterator[bytes]: ...
    def stream(self, known: Entry, *, start: int) -> Iterator[bytes]: ...
    def info(self, key: str) -> Entry: ...
    def put(self, key: str, size: int, read: Callable[[int, int], bytes]) -> None: ...
    def create(self, key: str, data: bytes) -> bool: ...
    def walk(self, folder: str) -> Iterator[Entry]: ...
    def names(self, folder: str) -> list[str]: ...
    def delete(self, key: str) -> None: ...
    def delete_tree(self, folder: str) -> None: ...
    def check(self) -> None: ...


class Storage:
    """The objects under one root URI. Safe to use from many threads.

    Every call raises `StorageAccessError` (wrong bucket, credentials refused or missing, no permission: at once),
    `StorageUnavailableError` (an outage longer than `StorageConfig.retry_deadline_seconds`) or another `StorageError`.
    """

    def __init__(self, uri: str, *, config: StorageConfig = _DEFAULT_CONFIG) -> None:
        scheme, path = _split(uri)
        self.config = config
        self.is_local = scheme == ""
        self._root = path
        self.uri = f"{scheme}://{path}" if scheme else path
        self._backend = _backend(scheme, path, config)

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def uri_of(self, path: str) -> str:
        """The full URI of an object; a plain absolute path for a local one."""
        return self._backend.uri(self._key(path))

    def child(self, path: str) -> Storage:
        """The storage of a folder below this one; it need not exist."""
        return Storage(self.uri_of(path), config=self.config)

    def read(self, path: str) -> bytes:
        """The whole content of an object. Raises ObjectNotFoundError."""
        return b"".join(self._backend.chunks(self._key(path)))

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`; less at the end of the object. Raises ObjectNotFoundError."""
        if start < 0 or length < 0:
            raise ValueError(f"start={start} and length={length} must not be negative")
        return self._backend.piece(self._key(path), start, length).data

    def info(self, path: str) -> ObjectInfo:
        """Size and time of an object. Raises ObjectNotFoundError, also for a folder."""
        return self._describe(self._backend.info(self._key(path)))

    def exists(self, path: str) -> bool:
        """Whether there is an object (not a folder) of this name."""
        try:
            self._backend.info(self._key(path))
        except ObjectNotFoundError:
            return False
        return True

    def write(self, path: str, data: Data) -> None:
        """Write or replace an object; readers see the old content or the new, never a part. Folders are made."""
        view = memoryview(data).cast("B")
        self._backend.put(self._key(path), view.nbytes, lambda start, length: bytes(view[start : start + length]))

    def create(self, path: str, data: bytes) -> bool:
        """Write an object unless there is one already; False when there is. Of several callers one gets True."""
        return self._backend.create(self._key(path), data)

    def upload(self, local: Path, path: str) -> None:
        """Write the content of a local file, with the promise of `write`. Only parts of it are in memory."""
        with open(local, "rb") as file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            # A file that grows meanwhile (a log) is uploaded as long as it was.
            self._backend.put(self._key(path), size, lambda start, length: os.pread(descriptor, length, start))

    def download(self, path: str, local: Path) -> None:
        """Copy an object to a local file, which appears whole or not at all. Raises ObjectNotFoundError."""
        with _replacing(local) as file:
            for chunk in self._backend.chunks(self._key(path)):
                file.write(chunk)

    def stream(self, info: ObjectInfo, *, start: int = 0) -> Iterator[bytes]:
        """The content of an object that a listing told of, from `start` to its end, in pieces.

        Raises ObjectNotFoundError, and ObjectChangedError where the object has another content by now.
        """
        return self._backend.stream((self._key(info.path), info.size, info.modified, info.etag), start=start)

    def list(self, prefix: str = "") -> ObjectInfos:
        """All objects in a folder and its folders, sorted by path; empty when there is no such folder."""
        entries = self._backend.walk(self._key(prefix, is_folder=True))
        return sorted((self._describe(entry) for entry in entries), key=lambda info: info.path)

    def list_names(self, prefix: str = "") -> Names:
        """Names of the objects and folders directly in a folder, sorted; empty when there is no such folder."""
        return sorted(self._backend.names(self._key(prefix, is_folder=True)))

    def delete(self, path: str) -> None:
        """Delete an object; that it is missing is fine."""
        self._backend.delete(self._key(path))

    def delete_tree(self, prefix: str) -> None:
        """Delete all objects of a folder; that it is missing is fine."""
        self._backend.delete_tree(self._key(prefix))

    def digest(self, path: str) -> str:
        """SHA-256 of an object's content, in hexadecimal; read as a stream. Raises ObjectNotFoundError."""
        sha = hashlib.sha256()
        for chunk in self._backend.chunks(self._key(path)):
            sha.update(chunk)
        return sha.hexdigest()

    def open(self, path: str) -> io.RawIOBase:
        """A seekable reader that fetches only the ranges that are read. For one thread. Raises ObjectNotFoundError.

        The first block is fetched at once, so a small object costs one request. An object that is replaced while it is
        open raises StorageError at the next fetch instead of mixing two contents.
        """
        key = self._key(path)
        if self.is_local:
            with _local_errors(key):
                return open(key, "rb", buffering=0)
        return RangeReader(self._backend, key)

    def check_access(self, *, write: bool) -> None:
        """Fail early and clearly on a wrong bucket, endpoint or credentials, with `write` also on a read-only root."""
        seconds = min(self.config.retry_deadline_seconds, _ACCESS_CHECK_SECONDS)
        storage = Storage(self.uri, config=replace(self.config, retry_deadline_seconds=seconds))
        storage._backend.check()
        if write:
            name = f".access-check-{uuid4().hex}"
            storage.write(name, b"")
            storage.delete(name)

    def _key(self, path: str, *, is_folder: bool = False) -> str:
        """Absolute key of a relative path. The root itself only where a folder is meant."""
        parts = path.rstrip("/").split("/") if path else []
        if (not parts and not is_folder) or any(part in ("", ".", "..") for part in parts):
            raise StorageError(
                f"{path!r} is no path below {self.uri}",
                hint="give a relative path without `.`, `..` and empty parts",
            )
        return "/".join([self._root.rstrip("/"), *parts]) if parts else self._root

    def _describe(self, entry: Entry) -> ObjectInfo:
        key, size, modified, etag = entry
        return ObjectInfo(key[len(self._root.rstrip("/")) + 1 :], size, modified, etag)


def locate(uri: str, *, config: StorageConfig = _DEFAULT_CONFIG) -> tuple[Storage, str]:
    """The storage of the folder that an object lies in, and the object's name in it."""
    scheme, path = _split(uri)
    folder, separator, name = path.rpartition("/")
    if not separator or not name:
        raise StorageAccessError(
            f"{uri!r} names no object", hint="give the URI of a file, like s3://bucket/folder/file"
        )
    if scheme:
        return Storage(f"{scheme}://{folder}", config=config), name
    return Storage(folder or "/", config=config), name


def _split(uri: str) -> tuple[str, str]:
    """Scheme (empty for local) and absolute path, without a slash at the end."""
    scheme, separator, path = uri.partition("://")
    if not separator or scheme == "file":
        return "", os.path.abspath(os.path.expanduser(path if separator else uri))
    if scheme not in ("s3", "memory"):
        raise StorageAccessError(f"{uri!r}: unknown kind of storage {scheme!r}", hint="use a local path or s3://bucket")
    path = path.strip("/")
    if not path:
        raise StorageAccessError(f"{uri!r} names no bucket", hint=f"for example {scheme}://bucket/folder")
    return scheme, path


def _backend(scheme: str, path: str, config: StorageConfig) -> Backend:
    if scheme == "s3":
        # Imported when needed: s3fs and botocore take half a second, and local runs do without.
        from opensora.s3 import S3Objects

        return S3Objects(path.partition("/")[0], config=config)
    return MemoryObjects() if scheme == "memory" else LocalFiles(path)


class RangeReader(io.RawIOBase):
    """Reads an object block by block and keeps the last few blocks; reading on fetches more blocks at a time."""

    def __init__(self, backend: Backend, key: str) -> None:
        super().__init__()
        self._backend, self._key = backend, key
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._position = 0
        self._next_block = 1
        self._run = 1
        first = backend.piece(key, 0, _BLOCK_BYTES)
        self._size, self._etag = first.total, first.etag
        self._blocks[0] = first.data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill the buffer up to the end of the object: short reads confuse demuxers."""
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view) and self._position < self._size:
            index, offset = divmod(self._position, _BLOCK_BYTES)
            part = self._block(index)[offset : offset + len(view) - filled]
            view[filled : filled + len(part)] = part
            filled += len(part)
            self._position += len(part)
        return filled

    def _block(self, index: int) -> bytes:
        if index in self._blocks:
            self._blocks.move_to_end(index)
            return self._blocks[index]
        self._run = min(self._run * 2, _CACHED_BLOCKS // 2) if index == self._next_block else 1
        piece = self._backend.piece(self._key, index * _BLOCK_BYTES, self._run * _BLOCK_BYTES, etag=self._etag)
        if not piece.data:
            raise StorageError(f"{self._backend.uri(self._key)} became shorter while it was read", hint="read it again")
        for number, start in enumerate(range(0, len(piece.data), _BLOCK_BYTES), start=index):
            self._blocks[number] = piece.data[start : start + _BLOCK_BYTES]
            self._next_block = number + 1
        while len(self._blocks) > _CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return self._blocks[index]


class LocalFiles:
    """Files of this machine. Keys are absolute paths."""

    def __init__(self, root: str) -> None:
        self._root = root

    def uri(self, key: str) -> str:
        return key

    def piece(self, key: str, start: int, length: int, *, etag: str | None = None) -> Piece:
        with _local_errors(key), open(key, "rb") as file:
            file.seek(start)
            return Piece(file.read(length), os.fstat(file.fileno()).st_size, etag)

    def chunks(self, key: str) -> Iterator[bytes]:
        with _local_errors(key), open(key, "rb") as file:
            while chunk := file.read(_COPY_BYTES):
                yield chunk

    def stream(self, known: Entry, *, start: int) -> Iterator[bytes]:
        key = known[0]
        with _local_errors(key), open(key, "rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime) != known[1:3]:
                raise changed_error(key)
            file.seek(start)
            while chunk := file.read(_COPY_BYTES):
                yield chunk

    def info(self, key: str) -> Entry:
        with _local_errors(key):
            if os.path.isdir(key):
                raise IsADirectoryError(key)
            status = os.stat(key)
        return key, status.st_size, status.st_mtime, None

    def put(self, key: str, size: int, read: Callable[[int, int], bytes]) -> None:
        with _local_errors(key), _replacing(Path(key)) as file:
            _fill(file, size, read)

    def create(self, key: str, data: bytes) -> bool:
        with _local_errors(key):
            temporary = _partial_name(Path(key))
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                # A hard link, unlike a rename, fails when the name is taken.
                os.link(temporary, key)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def walk(self, folder: str) -> Iterator[Entry]:
        with _local_errors(folder):
            for parent, _, names in os.walk(folder):
                for name in names:
                    if _is_partial(name):
                        continue
                    path = os.path.join(parent, name)
                    try:
                        status = os.stat(path)
                    except FileNotFoundError:
                        continue  # deleted since it was listed, or a link to nothing
                    yield path, status.st_size, status.st_mtime, None

    def names(self, folder: str) -> list[str]:
        try:
            with _local_errors(folder):
                return [name for name in os.listdir(folder) if not _is_partial(name)]
        except ObjectNotFoundError:
            return []

    def delete(self, key: str) -> None:
        if not os.path.isdir(key):  # a folder is no object
            with _local_errors(key), suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(key)

    def delete_tree(self, folder: str) -> None:
        with _local_errors(folder):
            # A second try covers files that another process added meanwhile.
            for _ in range(2):
                shutil.rmtree(folder, ignore_errors=True)
            if os.path.isdir(folder):
                shutil.rmtree(folder)

    def check(self) -> None:
        """A missing root is fine, since writing makes it; a file in its place is not."""
        with _local_errors(self._root):
            if os.path.exists(self._root):
                os.listdir(self._root)


class MemoryObjects:
    """Objects in this process, for tests and demonstrations."""

    _lock = threading.Lock()  # fsspec's memory store is one per process, and so is this

    def __init__(self) -> None:
        self._fs = MemoryFileSystem()

    def uri(self, key: str) -> str:
        return f"memory://{key}"

    def piece(self, key: str, start: int, length: int, *, etag: str | None = None) -> Piece:
        data = self._content(key)
        return Piece(data[start : start + length], len(data), etag)

    def chunks(self, key: str) -> Iterator[bytes]:
        yield self._content(key)

    def stream(self, known: Entry, *, start: int) -> Iterator[bytes]:
        if self.info(known[0])[1:3] != known[1:3]:
            raise changed_error(self.uri(known[0]))
        yield self._content(known[0])[start:]

    def info(self, key: str) -> Entry:
        file = self._find(key)
        return key, len(file.getbuffer()), file.modified.timestamp(), None

    def put(self, key: str, size: int, read: Callable[[int, int], bytes]) -> None:
        self._fs.pipe_file(f"/{key}", read(0, size))

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            if f"/{key}" in self._fs.store:
                return False
            self._fs.pipe_file(f"/{key}", data)
        return True

    def walk(self, folder: str) -> Iterator[Entry]:
        for name in list(self._fs.store):
            if name.startswith(f"/{folder}/"):
                yield self.info(name[1:])

    def names(self, folder: str) -> list[str]:
        return list({entry[0][len(folder) + 1 :].partition("/")[0] for entry in self.walk(folder)})

    def delete(self, key: str) -> None:
        self._fs.store.pop(f"/{key}", None)

    def delete_tree(self, folder: str) -> None:
        for entry in self.walk(folder):
            self.delete(entry[0])

    def check(self) -> None:
        """Always there."""

    def _find(self, key: str) -> MemoryFile:
        try:
            return self._fs.store[f"/{key}"]
        except KeyError as error:
            raise _not_found(self.uri(key)) from error

    def _content(self, key: str) -> bytes:
        content: bytes = self._find(key).getvalue()
        return content


def _not_found(uri: str) -> ObjectNotFoundError:
    return ObjectNotFoundError(f"{uri} does not exist", hint="check the path for a typing error")


def changed_error(uri: str) -> ObjectChangedError:
    """The error of a reader whose object was replaced."""
    return ObjectChangedError(f"{uri} was replaced while it was read", hint="read it again")


def _fill(file: io.BufferedWriter, size: int, read: Callable[[int, int], bytes]) -> None:
    for start in range(0, size, _COPY_BYTES):
        file.write(read(start, min(_COPY_BYTES, size - start)))


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(_PARTIAL_SUFFIX)


def _partial_name(target: Path) -> Path:
    """A name beside the target that nobody else uses; makes the folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{uuid4().hex}{_PARTIAL_SUFFIX}")


@contextmanager
def _replacing(target: Path) -> Iterator[io.BufferedWriter]:
    """A file that takes the target's place when the block ends well, and is removed when it does not."""
    temporary = _partial_name(target)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            # Else a machine that loses power can keep the new name with no content.
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _local_errors(path: str) -> Iterator[None]:
    """Translate what the operating system says about a file of ours."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _not_found(path) from error
    except PermissionError as error:
        raise StorageAccessError(
            f"{path}: permission denied", hint="check the owner and mode of the file and its folder"
        ) from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error
