"""How a state becomes objects in storage and comes back, behind the interfaces of `torch.distributed.checkpoint`.

Torch plans who writes what and how saved pieces map onto another number of ranks. Staging, packing into objects of
bounded size, digests, the index and the commit are ours. Nothing is unpickled from a checkpoint except values of plain
types (`weights_only`), so that a checkpoint from elsewhere cannot run code.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from opensora.checkpoint.manifest import INDEX_NAME, MANIFEST_NAME, DataObject, Manifest
from opensora.errors import CheckpointError, ObjectNotFoundError, OpenSoraError, StorageError
from opensora.storage import Storage

OBJECT_BYTES = 16 * 2**20
"""Upper bound of an object's size, exceeded only by a tensor whose single row along its first axis is larger."""

NUM_THREADS = 4
"""Objects that a rank writes or reads at a time; with `OBJECT_BYTES` this bounds the memory used beside the state."""

T = TypeVar("T")


# Staging: from the training state to a snapshot in host memory.


@dataclass(frozen=True)
class _Slot:
    """This rank's part of one tensor, copied to the host."""

    signature: tuple[object, ...]
    buffer: torch.Tensor
    chunk: ChunkStorageMetadata
    """Where the buffer lies in the whole tensor."""
    items: list[WriteItem]

    def piece(self, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """The rows of the buffer that belong to one write item."""
        if not chunk.sizes:
            return self.buffer
        return self.buffer.narrow(0, chunk.offsets[0] - self.chunk.offsets[0], chunk.sizes[0])


@dataclass(frozen=True)
class Snapshot:
    """A state as it was when staged; valid until the next staging."""

    slots: dict[str, _Slot]
    values: dict[str, bytes]
    """Everything that is not a tensor, serialised."""

    def write_items(self) -> list[WriteItem]:
        """What this rank could write, in the order of the state."""
        values = [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in self.values]
        return [item for slot in self.slots.values() for item in slot.items] + values


class StagingArea:
    """Host copies of a state. Buffers are allocated at the first staging and reused while shapes stay the same."""

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}

    def stage(self, state: Mapping[str, Any]) -> Snapshot:
        """Copy the state. Returns when the copies are done, so that training may go on to change it.

        Raises:
            CheckpointError: a value is of a type that could not be loaded without running its code.
        """
        slots: dict[str, _Slot] = {}
        values: dict[str, bytes] = {}
        devices: set[torch.device] = set()
        with torch.no_grad():
            for name, value in state.items():
                if not isinstance(value, torch.Tensor):
                    values[name] = _serialise(name, value)
                    continue
                local = value.to_local() if isinstance(value, DTensor) else value
                signature = _signature(value)
                slot = self._slots.get(name)
                if slot is None or slot.signature != signature:
                    slot = _make_slot(name, value, local, signature)
                slot.buffer.copy_(local, non_blocking=True)
                slots[name] = slot
                if local.is_cuda:
                    devices.add(local.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._slots = slots
        return Snapshot(slots, values)


def _signature(tensor: torch.Tensor) -> tuple[object, ...]:
    placement = (tensor.placements, tensor.device_mesh) if isinstance(tensor, DTensor) else ()
    return (tensor.shape, tensor.dtype, tensor.device.type, *placement)


def _make_slot(name: str, tensor: torch.Tensor, local: torch.Tensor, signature: tuple[object, ...]) -> _Slot:
    if isinstance(tensor, DTensor):
        # DTensor's side of torch's checkpointing protocol; a rank has one chunk.
        chunk = tensor.__create_chunk_list__()[0]  # type: ignore[no-untyped-call]
    else:
        chunk = ChunkStorageMetadata(offsets=torch.Size([0] * tensor.dim()), sizes=tensor.shape)
    buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
    items = []
    for piece in _split(chunk, size=tensor.shape, itemsize=tensor.element_size()):
        items.append(
            WriteItem(
                index=MetadataIndex(name, piece.offsets),
                type=WriteItemType.TENSOR if piece.sizes == tensor.shape else WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=piece, properties=TensorProperties(dtype=tensor.dtype), size=tensor.shape
                ),
            )
        )
    return _Slot(signature, buffer, chunk, items)


def _split(chunk: ChunkStorageMetadata, *, size: torch.Size, itemsize: int) -> list[ChunkStorageMetadata]:
    """Cut a chunk along its first axis into pieces that fit into an object. Empty chunks of sharded tensors vanish."""
    if not chunk.sizes or 0 in size:
        return [chunk]
    if 0 in chunk.sizes:
        return []
    rows = max(1, OBJECT_BYTES // (math.prod(chunk.sizes[1:]) * itemsize))
    first, total = chunk.offsets[0], chunk.sizes[0]
    return [
        ChunkStorageMetadata(
            offsets=torch.Size([first + start, *chunk.offsets[1:]]),
            sizes=torch.Size([min(rows, total - start), *chunk.sizes[1:]]),
        )
        for start in range(0, total, rows)
    ]


def _serialise(name: str, value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    try:
        torch.load(stream, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"state {name!r} of type {type(value).__qualname__} cannot be kept in a checkpoint",
            hint="give it as tensors, numbers, strings, or dicts and lists of them",
        ) from error
    return stream.getvalue()


# Writing.


@dataclass(frozen=True)
class _Location:
    """Where the bytes of a write item lie."""

    data_object: DataObject
    start: int
    length: int


class SnapshotPlanner(DefaultSavePlanner):
    """Plans the save of a snapshot. What several ranks hold alike is written by one of them, balanced by size."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._snapshot = snapshot

    def create_local_plan(self) -> SavePlan:
        """All that this rank holds."""
        return SavePlan(self._snapshot.write_items())

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The staged tensor piece or serialised value of an item; no copy of a tensor is made."""
        name = write_item.index.fqn
        if write_item.tensor_data is None:
            return io.BytesIO(self._snapshot.values[name])
        return self._snapshot.slots[name].piece(write_item.tensor_data.chunk)


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint into its folder; the coordinator commits it.

    Args:
        folder: where the checkpoint goes.
        rank: this process's number among the `num_ranks` that save.
        before_commit: called by the coordinator when everything but the manifest is written; raises to prevent it.
    """

    def __init__(
        self,
        folder: Storage,
        *,
        step: int,
        attempt: int,
        rank: int,
        num_ranks: int,
        metadata: dict[str, Any],
        before_commit: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._step = step
        self._attempt = attempt
        self._rank = rank
        self._num_ranks = num_ranks
        self._metadata = metadata
        self._before_commit = before_commit
        self.manifest: Manifest | None = None
        """On the coordinator, after the commit."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Nothing to prepare."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """The folder is given when the writer is made, never by an id."""
        return False

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Before any rank writes: an earlier checkpoint under the same path, if any, stops being one."""
        self._folder.delete(MANIFEST_NAME)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items.

        Items that every rank will read when loading and shards go to different objects, so that a rank which loads
        its own shards need not read those of others.
        """
        whole = [item for item in plan.items if item.type != WriteItemType.SHARD]
        shards = [item for item in plan.items if item.type == WriteItemType.SHARD]
        packs = [*_pack(whole, planner), *_pack(shards, planner)]
        tasks = [
            partial(self._write_object, f"rank-{self._rank:05d}-{number:05d}.bin", pack, planner)
            for number, pack in enumerate(packs)
        ]
        future: Future[list[WriteResult]] = Future()
        try:
            future.set_result([result for results in run_parallel(tasks) for result in results])
        except OpenSoraError:
            raise
        except Exception as error:  # it travels to the other ranks by pickle, and not every exception can
            raise StorageError(f"writing {self._folder.uri} failed: {type(error).__name__}: {error}") from error
        return future

    def _write_object(self, path: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        parts = [_as_bytes(planner.resolve_data(item)) for item in items]
        # A lone piece of a large tensor goes out of its staging buffer as it is.
        content = memoryview((parts[0] if len(parts) == 1 else torch.cat(parts)).numpy().data)
        data_object = DataObject(path, len(content), hashlib.sha256(content).hexdigest())
        self._folder.write(path, content)
        results = []
        start = 0
        for item, part in zip(items, parts, strict=True):
            length = part.numel()
            results.append(WriteResult(item.index, length, _Location(data_object, start, length)))
            start += length
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, then the manifest."""
        locations = {
            (result.index.fqn, result.index.offset): result.storage_data for rank in results for result in rank
        }
        objects = sorted({location.data_object for location in locations.values()}, key=lambda item: item.path)
        index = _encode_index(metadata, locations, objects)
        self._folder.write(INDEX_NAME, index)
        manifest = Manifest(
            step=self._step,
            attempt=self._attempt,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            num_ranks=self._num_ranks,
            metadata=self._metadata,
            objects=(DataObject(INDEX_NAME, len(index), hashlib.sha256(index).hexdigest()), *objects),
        )
        self._before_commit()
        self._folder.write(MANIFEST_NAME, manifest.to_json())
        self.manifest = manifest


def _pack(items: Iterable[WriteItem], planner: SavePlanner) -> list[list[WriteItem]]:
    """Group items, in their order, into objects of at most `OBJECT_BYTES`."""
    packs: list[list[WriteItem]] = []
    free = 0
    for item in items:
        size = _as_bytes(planner.resolve_data(item)).numel()
        if not packs or size > free:
            packs.append([])
            free = OBJECT_BYTES
        packs[-1].append(item)
        free -= size
    return packs


def _as_bytes(data: torch.Tensor | io.BytesIO) -> torch.Tensor:
    """The bytes of a contiguous host tensor or a stream as a uint8 tensor, without a copy of the tensor."""
    if isinstance(data, io.BytesIO):
        return torch.frombuffer(bytearray(data.getbuffer()), dtype=torch.uint8)
    return data.reshape(-1).view(torch.uint8)


# The index: JSON, so that reading it cannot run code.


def _encode_index(
    metadata: Metadata,
    locations: Mapping[tuple[str, torch.Size | None], _Location],
    objects: Sequence[DataObject],
) -> bytes:
    numbers = {item: number for number, item in enumerate(objects)}

    def place(name: str, offset: torch.Size | None) -> list[int]:
        location = locations[name, offset]
        return [numbers[location.data_object], location.start, location.length]

    tensors = {}
    values = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            tensors[name] = {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "shape": list(entry.size),
                "chunks": [
                    [list(chunk.offsets), list(chunk.sizes), place(name, chunk.offsets)] for chunk in entry.chunks
                ],
            }
        else:
            values[name] = place(name, None)
    return json.dumps({"objects": [item.path for item in objects], "tensors": tensors, "values": values}).encode()


def _decode_index(data: bytes, manifest: Manifest) -> Metadata:
    record = json.loads(data)
    by_path = {item.path: item for item in manifest.objects}
    objects = [by_path[path] for path in record["objects"]]
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    locations: dict[MetadataIndex, _Location] = {}

    def remember(name: str, offset: torch.Size | None, place: list[int]) -> None:
        locations[MetadataIndex(name, offset)] = _Location(objects[place[0]], place[1], place[2])

    for name, tensor in record["tensors"].items():
        chunks = []
        for offsets, sizes, place in tensor["chunks"]:
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            remember(name, chunk.offsets, place)
            chunks.append(chunk)
        dtype = getattr(torch, tensor["dtype"])
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(tensor["shape"]), chunks)
    for name, place in record["values"].items():
        remember(name, None, place)
        entries[name] = BytesStorageMetadata()
    return Metadata(entries, storage_data=locations)


# Reading.


class ValueLoadPlanner(DefaultLoadPlanner):
    """Loads into a flat state; values that are not tensors replace those in the state."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value into the state."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class CheckpointReader(StorageReader):
    """Reads from one checkpoint. Every object is read whole, at most once, and compared with its digest before use.

    Raises:
        CheckpointError: the index, or later an object, is missing or damaged.
    """

    def __init__(self, folder: Storage, manifest: Manifest) -> None:
        self._folder = folder
        self.metadata = _decode_index(self._read_verified(manifest.object(INDEX_NAME)), manifest)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader belongs to one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """The folder is given when the reader is made, never by an id."""
        return False

    def read_metadata(self) -> Metadata:
        """The index, as torch wants it."""
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs, straight into the tensors of its state."""
        by_object: dict[DataObject, list[ReadItem]] = {}
        for item in plan.items:
            by_object.setdefault(self._location(item).data_object, []).append(item)
        try:
            run_parallel([partial(self._read_object, obj, items, planner) for obj, items in by_object.items()])
        except OpenSoraError:
            raise
        except Exception as error:  # it travels to the other ranks by pickle, and not every exception can
            raise StorageError(f"reading {self._folder.uri} failed: {type(error).__name__}: {error}") from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_object(self, data_object: DataObject, items: list[ReadItem], planner: LoadPlanner) -> None:
        content = memoryview(self._read_verified(data_object))
        for item in items:
            location = self._location(item)
            data = bytearray(content[location.start : location.start + location.length])
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(data))
                continue
            entry = self.metadata.state_dict_metadata[item.storage_index.fqn]
            assert isinstance(entry, TensorStorageMetadata)
            chunk = next(chunk for chunk in entry.chunks if chunk.offsets == item.storage_index.offset)
            saved = torch.frombuffer(data, dtype=entry.properties.dtype).reshape(chunk.sizes)
            for axis, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                saved = saved.narrow(axis, offset, length)
            target = planner.resolve_tensor(item)
            target.detach().copy_(saved)
            planner.commit_tensor(item, target)

    def _location(self, item: ReadItem) -> _Location:
        location: _Location = self.metadata.storage_data[item.storage_index]
        return location

    def _read_verified(self, data_object: DataObject) -> bytes:
        uri = self._folder.uri_of(data_object.path)
        hint = "delete this checkpoint's folder to go on from the one before"
        try:
            content = self._folder.read(data_object.path)
        except ObjectNotFoundError as error:
            raise CheckpointError(f"{uri} is missing from its checkpoint", hint=hint) from error
        digest = hashlib.sha256(content).hexdigest()
        if len(content) != data_object.size or digest != data_object.sha256:
            raise CheckpointError(
                f"{uri} is damaged: {len(content)} bytes with sha256 {digest[:12]}… instead of "
                f"{data_object.size} bytes with {data_object.sha256[:12]}…",
                hint=hint,
            )
        return content


# Without a process group torch's `save` and `load` warn on every call; these are their steps for one process.


def save_alone(writer: StorageWriter, planner: SavePlanner) -> None:
    """Save from a single process."""
    planner.set_up_planner({}, None, True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])


def load_alone(state: dict[str, Any], reader: StorageReader, planner: LoadPlanner) -> None:
    """Load into a single process."""
    planner.set_up_planner(state, reader.read_metadata(), True)
    plan = planner.finish_plan(planner.create_global_plan([planner.create_local_plan()])[0])
    reader.read_data(plan, planner).wait()


def run_parallel(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks on a few threads; results in order. After an error no further task starts, and the first is raised.

    The threads are daemons (a pool's are not): an upload that is retried must not hold up a process that ends.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    waiting = deque(enumerate(tasks))

    def work() -> None:
        while not errors:
            try:
                number, task = waiting.popleft()
            except IndexError:
                return
            try:
                results[number] = task()
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(NUM_THREADS, len(tasks)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(tasks))]
