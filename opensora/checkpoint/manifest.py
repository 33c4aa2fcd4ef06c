"""What a checkpoint is in a run directory, which ones are complete, and which ones may go.

```
checkpoints/step-00001000/attempt-2/
    rank-00000-00000.bin …   tensors, several to an object of bounded size
    index.json               where every tensor and value lies
    manifest.json            written last: size and digest of all of the above
```

A folder whose manifest is missing, or names an object that is missing or of another size, is not a checkpoint. The
path carries the attempt, so that a process which outlived its attempt can never overwrite what its successor saved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opensora.errors import CheckpointError, ObjectNotFoundError
from opensora.records import CHECKPOINTS_PREFIX
from opensora.storage import Storage

FORMAT = 1
"""Version of the layout; raised when an older reader would misread it."""

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.json"


@dataclass(frozen=True)
class DataObject:
    """One object of a checkpoint."""

    path: str
    """Name within the checkpoint's folder."""
    size: int
    """Bytes."""
    sha256: str
    """Digest of the content, in hex."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The commit record of a checkpoint."""

    step: int
    attempt: int
    saved_at: str
    """Time of the commit, ISO 8601 in UTC."""
    num_ranks: int
    """Processes that wrote it; any number can load it."""
    metadata: dict[str, Any]
    """What the caller of `CheckpointManager.save` wanted to keep beside the state."""
    objects: tuple[DataObject, ...]

    def object(self, path: str) -> DataObject:
        """The object of that name."""
        return next(item for item in self.objects if item.path == path)

    @property
    def num_bytes(self) -> int:
        """Size of all objects together."""
        return sum(item.size for item in self.objects)

    def to_json(self) -> bytes:
        """The content of `manifest.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, *, uri: str) -> Manifest:
        """Read the content of `manifest.json`.

        Raises:
            ValueError: it is not a manifest.
            CheckpointError: a later version of this program wrote it.
        """
        record = json.loads(data)
        if not isinstance(record, dict) or "format" not in record:
            raise ValueError("it is not a manifest")
        version = record.pop("format")
        if version != FORMAT:
            raise CheckpointError(
                f"{uri} has format {version}, this version of opensora reads format {FORMAT}",
                hint="use the version of opensora that wrote it",
            )
        try:
            record["objects"] = tuple(DataObject(**item) for item in record["objects"])
            return cls(**record)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is not a manifest ({error})") from error


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint of a run."""

    step: int
    attempt: int
    path: str
    """Folder within the run directory."""
    manifest: Manifest


@dataclass(frozen=True)
class IncompleteCheckpoint:
    """A folder that looks like a checkpoint and is none."""

    step: int
    attempt: int
    path: str
    reason: str


@dataclass(frozen=True)
class CheckpointScan:
    """All checkpoint folders of a run, each list ordered by step, then attempt."""

    complete: list[CheckpointInfo]
    incomplete: list[IncompleteCheckpoint]


def checkpoint_folder(step: int, *, attempt: int) -> str:
    """Folder of a checkpoint within the run directory."""
    return f"{CHECKPOINTS_PREFIX}/step-{step:08d}/attempt-{attempt}"


def scan_checkpoints(run: Storage) -> CheckpointScan:
    """Look at every checkpoint folder of a run: a listing of each, and one read per manifest."""
    scan = CheckpointScan([], [])
    for step, step_name in _numbered(run, CHECKPOINTS_PREFIX, "step-"):
        for attempt, attempt_name in _numbered(run, f"{CHECKPOINTS_PREFIX}/{step_name}", "attempt-"):
            path = f"{CHECKPOINTS_PREFIX}/{step_name}/{attempt_name}"
            result = _examine(run, path)
            if isinstance(result, Manifest):
                scan.complete.append(CheckpointInfo(step, attempt, path, result))
            else:
                scan.incomplete.append(IncompleteCheckpoint(step, attempt, path, result))
    return scan


def _numbered(run: Storage, folder: str, prefix: str) -> list[tuple[int, str]]:
    """Number and name of what is called `prefix` and a number in a folder, by number."""
    names = ((name.removeprefix(prefix), name) for name in run.list_names(folder) if name.startswith(prefix))
    return sorted((int(number), name) for number, name in names if number.isascii() and number.isdigit())


def find_checkpoints(run: Storage) -> list[CheckpointInfo]:
    """The complete checkpoints of a run, oldest first."""
    return scan_checkpoints(run).complete


def find_checkpoint(run: Storage, step: int | None = None) -> CheckpointInfo | None:
    """The complete checkpoint of a step, or else the newest; None where there is none. Looks at no more folders than it
    has to."""
    for number, step_name in reversed(_numbered(run, CHECKPOINTS_PREFIX, "step-")):
        if step in (None, number):
            for attempt, attempt_name in reversed(_numbered(run, f"{CHECKPOINTS_PREFIX}/{step_name}", "attempt-")):
                path = f"{CHECKPOINTS_PREFIX}/{step_name}/{attempt_name}"
                result = _examine(run, path)
                if isinstance(result, Manifest):
                    return CheckpointInfo(number, attempt, path, result)
    return None


def expired_checkpoints(
    scan: CheckpointScan, *, committed: CheckpointInfo, keep_last: int, keep_every_steps: int
) -> list[str]:
    """Folders that may go now that `committed` is complete.

    Kept are the `keep_last` newest complete steps, those whose step is a multiple of `keep_every_steps` (0: none), of
    each step the latest attempt's, and `committed` itself. Of the incomplete ones only leftovers go: those of earlier
    attempts, and those of this attempt that are older than `committed`.
    """
    latest = {info.step: info for info in scan.complete}
    newest_steps = sorted(latest)[-keep_last:]
    kept = {committed.path} | {
        info.path
        for step, info in latest.items()
        if step in newest_steps or (keep_every_steps and step % keep_every_steps == 0)
    }
    return [info.path for info in scan.complete if info.path not in kept] + [
        left.path
        for left in scan.incomplete
        if left.attempt < committed.attempt or (left.attempt == committed.attempt and left.step < committed.step)
    ]


def delete_checkpoint(run: Storage, path: str) -> None:
    """Remove a checkpoint: its manifest first, so that no half-deleted folder ever passes for a checkpoint."""
    run.delete(f"{path}/{MANIFEST_NAME}")
    run.delete_tree(path)
    parent = path.rpartition("/")[0]
    if not run.list_names(parent):
        run.delete_tree(parent)  # an empty folder, where the store has folders


def _examine(run: Storage, path: str) -> Manifest | str:
    """The manifest of a complete checkpoint, or why it is not complete."""
    sizes = {info.path.removeprefix(f"{path}/"): info.size for info in run.list(path)}
    if MANIFEST_NAME not in sizes:
        return "it has no manifest, so its save was not finished"
    try:
        manifest = Manifest.from_json(run.read(f"{path}/{MANIFEST_NAME}"), uri=run.uri_of(f"{path}/{MANIFEST_NAME}"))
    except ObjectNotFoundError:
        return "it is being deleted"
    except ValueError as error:
        return f"its manifest is not readable ({error})"
    return _describe_difference(manifest.objects, sizes) or manifest


def _describe_difference(objects: Sequence[DataObject], sizes: dict[str, int]) -> str | None:
    """What is wrong with objects of these sizes, or None."""
    missing = [item.path for item in objects if item.path not in sizes]
    if missing:
        return f"{len(missing)} of its {len(objects)} objects are missing, the first is {missing[0]}"
    for item in objects:
        if sizes[item.path] != item.size:
            return f"its object {item.path} has {sizes[item.path]} bytes instead of {item.size}"
    return None
