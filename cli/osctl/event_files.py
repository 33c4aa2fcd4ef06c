"""Files that grow, copied as they grow: those of TensorBoard, which keeps them open and reads on at their end."""

from __future__ import annotations

from pathlib import Path

from opensora.errors import ObjectChangedError, ObjectNotFoundError
from opensora.storage import ObjectInfo, Storage
from osctl.downloads import UnsafeNameError, place


def follow(source: Storage, target: Path) -> int:
    """Add to every file what its object has more by now; returns the number of bytes. Raises StorageError."""
    return sum(_grow(source, target, info) for info in source.list())


def _grow(source: Storage, target: Path, info: ObjectInfo) -> int:
    try:
        path = place(target, info.path)
    except UnsafeNameError:  # not of TensorBoard's making
        return 0
    start = path.stat().st_size if path.exists() else 0
    if start > info.size:  # another file of the same name
        path.unlink()
        start = 0
    if start == info.size:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "ab") as file:
            for chunk in source.stream(info, start=start):
                file.write(chunk)
    except (ObjectChangedError, ObjectNotFoundError):  # it has grown since, or is gone: the next look sees it
        return 0
    return info.size - start
