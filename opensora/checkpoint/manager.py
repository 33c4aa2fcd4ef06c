"""When a state is saved, committed and loaded.

The training loop's thread only copies the state into host buffers. A background thread writes it, with a process
group of its own so that its messages never mix with those of training; the coordinator commits and removes what is
no longer kept.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from opensora.checkpoint.manifest import (
    CheckpointInfo,
    checkpoint_folder,
    delete_checkpoint,
    expired_checkpoints,
    scan_checkpoints,
)
from opensora.checkpoint.transfer import (
    CheckpointReader,
    CheckpointWriter,
    Snapshot,
    SnapshotPlanner,
    StagingArea,
    ValueLoadPlanner,
    load_alone,
    save_alone,
)
from opensora.config.train import CheckpointConfig
from opensora.errors import CheckpointError, OpenSoraError, PeerLostError, StorageError, SupersededError
from opensora.records import check_not_superseded
from opensora.storage import Storage

logger = logging.getLogger(__name__)


class SaveTicket:
    """A save that was started."""

    def __init__(self, *, step: int, path: str) -> None:
        self.step = step
        self.path = path
        """Folder of the checkpoint within the run directory."""
        self._finished = threading.Event()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether it has been committed or has failed."""
        return self._finished.is_set()

    @property
    def committed(self) -> bool:
        return self.done and self._error is None

    def wait(self) -> None:
        """Return once it is committed, or raise what made it fail."""
        self._finished.wait()
        if self._error is not None:
            raise self._error

    def _finish(self, error: BaseException | None) -> None:
        self._error = error
        self._finished.set()


class CheckpointManager:
    """Saves and loads the state of one run.

    All ranks make one each and call `save` and `load` in the same order. Nothing is written before the
    first save, so a manager also serves to read another run.

    Args:
        run: the run directory.
        attempt: number of this attempt; a higher one that has announced itself prevents every further commit.
        config: what is kept.
        is_main: true on rank 0 of the process group, which reports for all.
        process_group: a gloo group used for nothing else, or None for one process. Its timeout must exceed the longest
            time by which one rank may finish its part of a save after another: a slow upload, or
            `StorageConfig.retry_deadline_seconds` of outage.
    """

    def __init__(
        self,
        run: Storage,
        *,
        attempt: int,
        config: CheckpointConfig,
        is_main: bool,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._config = config
        self._is_main = is_main
        self._group = process_group
        self._staging = StagingArea()
        self._in_flight: SaveTicket | None = None
        self._committed_step: int | None = None

    def save(self, state: dict[str, Any], *, step: int, metadata: dict[str, Any], wait: bool = False) -> SaveTicket:
        """Start to save a state; with `wait`, return after the commit.

        A save still in flight is waited for first. The state may be changed as soon as this returns. A step that this
        manager has already committed is not saved again.

        Args:
            state: flat; names to tensors, DTensors, or plain values (numbers, strings, dicts and lists of them). Plain
                tensors and values must be equal on all ranks.
            step: optimiser steps that led to this state.
            metadata: kept in the manifest; must be JSON.

        Raises:
            OpenSoraError: the previous save failed, on this rank or another.
            CheckpointError: the state or the metadata cannot be kept in a checkpoint.
        """
        self.wait()
        ticket = SaveTicket(step=step, path=checkpoint_folder(step, attempt=self._attempt))
        if step == self._committed_step:
            ticket._finish(None)
            return ticket
        started = time.perf_counter()
        metadata = _json_copy(metadata)
        snapshot = self._staging.stage(state)
        staged = time.perf_counter()
        self._in_flight = ticket
        threading.Thread(
            target=self._save_in_background,
            args=(ticket, snapshot, metadata, started, staged),
            name=f"save-step-{step}",
            daemon=True,  # a run that ends early must not wait for an upload that is being retried
        ).start()
        if wait:
            self.wait()
        return ticket

    def wait(self) -> None:
        """Wait for the save in flight, if any, and raise what made it fail, once."""
        ticket, self._in_flight = self._in_flight, None
        if ticket is not None:
            ticket.wait()

    def newest(self) -> CheckpointInfo | None:
        """The complete checkpoint with the highest step; incomplete ones are skipped, with a log line that says why.

        Not a collective call: one rank looks and tells the others, so that all load the same.
        """
        scan = scan_checkpoints(self._run)
        for left in scan.incomplete:
            logger.warning("%s is skipped: %s", self._run.uri_of(left.path), left.reason)
        return scan.complete[-1] if scan.complete else None

    def load(self, info: CheckpointInfo, state: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
        """Load a checkpoint into the tensors of a state, in place; other values are replaced in the dictionary.

        The number of ranks and the sharding may differ from those that saved. Called by all ranks.

        Args:
            info: of this run.
            state: the same names, shapes and dtypes as saved.
            partial: `state` may lack names that the checkpoint has, for example to take the weights alone.

        Returns:
            The metadata given to `save`.

        Raises:
            CheckpointError: the checkpoint is damaged, or does not belong to this state. Raised on all ranks.
        """
        reader = CheckpointReader(self._run.child(info.path), info.manifest)
        _check_same_state(reader.metadata, state, uri=self._run.uri_of(info.path), partial=partial)
        with self._translated(f"loading {self._run.uri_of(info.path)}"):
            if self._group is None:
                load_alone(state, reader, ValueLoadPlanner())
            else:
                load_distributed(state, storage_reader=reader, planner=ValueLoadPlanner(), process_group=self._group)
        return _json_copy(info.manifest.metadata)

    def _save_in_background(
        self, ticket: SaveTicket, snapshot: Snapshot, metadata: dict[str, Any], started: float, staged: float
    ) -> None:
        try:
            with self._translated(f"saving step {ticket.step}"):
                info = self._write(ticket, snapshot, metadata)
        except BaseException as error:
            if self._is_main:
                logger.warning("step %d could not be saved: %s", ticket.step, error)
            ticket._finish(error)
            return
        self._committed_step = ticket.step
        if info is not None:
            logger.info(
                "saved step %d: %.1f MiB in %.2f s, of which training waited %.3f s: %s",
                ticket.step,
                info.manifest.num_bytes / 2**20,
                time.perf_counter() - started,
                staged - started,
                self._run.uri_of(ticket.path),
            )
            self._remove_expired(info)
        ticket._finish(None)

    def _write(self, ticket: SaveTicket, snapshot: Snapshot, metadata: dict[str, Any]) -> CheckpointInfo | None:
        """Write and commit; the checkpoint on rank 0, None on the others."""
        writer = CheckpointWriter(
            self._run.child(ticket.path),
            step=ticket.step,
            attempt=self._attempt,
            rank=0 if self._group is None else dist.get_rank(self._group),
            num_ranks=1 if self._group is None else dist.get_world_size(self._group),
            metadata=metadata,
            before_commit=lambda: check_not_superseded(self._run, self._attempt),
        )
        planner = SnapshotPlanner(snapshot)
        if self._group is None:
            save_alone(writer, planner)
        else:
            save_distributed({}, storage_writer=writer, planner=planner, process_group=self._group)
        if writer.manifest is None:
            return None
        return CheckpointInfo(ticket.step, self._attempt, ticket.path, writer.manifest)

    def _remove_expired(self, committed: CheckpointInfo) -> None:
        """Apply the retention policy. What cannot be removed now is tried again after the next save."""
        try:
            check_not_superseded(self._run, self._attempt)
            paths = expired_checkpoints(
                scan_checkpoints(self._run),
                committed=committed,
                keep_last=self._config.keep_last,
                keep_every_steps=self._config.keep_every_steps,
            )
            for path in paths:
                delete_checkpoint(self._run, path)
                logger.info("removed %s", self._run.uri_of(path))
        except OpenSoraError as error:
            logger.warning("old checkpoints are left where they are: %s", error.message)

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Turn what torch raises for failures on any rank into errors of ours."""
        try:
            yield
        except CheckpointException as error:
            raise _cause(error, doing=doing) from error
        except RuntimeError as error:
            if self._group is None:
                raise
            raise PeerLostError(f"{doing}: another rank is gone ({error})") from error


def _cause(error: CheckpointException, *, doing: str) -> OpenSoraError:
    """The failure that made the others fail: being superseded if any rank was, else that of the lowest rank."""
    failures = sorted((rank, wrapped[0]) for rank, wrapped in error.failures.items())
    rank, failure = next((item for item in failures if isinstance(item[1], SupersededError)), failures[0])
    if not isinstance(failure, OpenSoraError):
        return StorageError(f"{doing} failed on rank {rank}: {type(failure).__name__}: {failure}")
    failure.add_note(f"while {doing}, on rank {rank}")
    return failure


def _json_copy(metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        copy: dict[str, Any] = json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata of a checkpoint must be JSON: {error}") from error
    return copy


def _check_same_state(metadata: Metadata, state: dict[str, Any], *, uri: str, partial: bool) -> None:
    """Raise one error that lists all differences between a checkpoint and the state it is to be loaded into."""
    saved = metadata.state_dict_metadata
    differences = {
        "missing from the checkpoint": [name for name in state if name not in saved],
        "unexpected in the checkpoint": [] if partial else [name for name in saved if name not in state],
        "different": [
            f"{name} ({_describe_entry(saved[name])} saved, {_describe_value(value)} here)"
            for name, value in state.items()
            if name in saved and _describe_entry(saved[name]) != _describe_value(value)
        ],
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in differences.items()
        if names
    ]
    if found:
        raise CheckpointError(
            f"{uri} does not fit: {'; '.join(found)}",
            hint="the model, the optimiser and the EMA must be configured as when it was saved",
        )


def _describe_entry(entry: TensorStorageMetadata | BytesStorageMetadata) -> str:
    if isinstance(entry, TensorStorageMetadata):
        return _describe_tensor(entry.size, entry.properties.dtype)
    return "no tensor"


def _describe_value(value: object) -> str:
    return _describe_tensor(value.shape, value.dtype) if isinstance(value, torch.Tensor) else "no tensor"


def _describe_tensor(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
