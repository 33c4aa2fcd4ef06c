"""Stacks of all ranks on request: also of ranks whose main thread stands still, which is when they are wanted.

The ranks agree on everything else at the start of a step. A rank that hangs never gets there, so a thread of each rank
looks now and then into the store by which the ranks have met.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public, not listed in __all__

from opensora import records
from opensora.errors import StorageError
from opensora.storage import Storage
from opensora.training.position import Position
from opensora.training.watchdog import format_stacks

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0
_LOOK_SECONDS = 0.2
_WAIT_SECONDS = 20.0
"""How long rank 0 waits for the others to have written theirs."""


class StackDumps:
    """Writes this rank's stacks under `dumps/attempt-N/ID/` whenever rank 0 asks for those of all.

    Args:
        store: where the ranks have met; used through a connection of its own.
        size: number of ranks.
        position: of this rank.
    """

    def __init__(
        self,
        store: Store,
        *,
        run: Storage,
        attempt: int,
        size: int,
        position: Position,
    ) -> None:
        self._store = PrefixStore("opensora/dumps", store.clone())  # type: ignore[attr-defined]  # missing in the stubs
        self._run = run
        self._attempt = attempt
        self._size = size
        self._position = position
        self._wanted: queue.SimpleQueue[tuple[str, Callable[[], None]]] = queue.SimpleQueue()
        self._finished = threading.Event()
        threading.Thread(target=self._watch, name="stack-dumps", daemon=True).start()

    def request(self, name: str, on_written: Callable[[], None]) -> None:
        """Ask all ranks; on rank 0. It is called back when all have written, or as many as still move."""
        self._wanted.put((name, on_written))

    def stop(self) -> None:
        """Rank 0, which holds the store, is about to leave."""
        self._finished.set()

    def _watch(self) -> None:
        number = 1
        while not self._finished.wait(_POLL_SECONDS):
            try:
                if self._position.rank == 0:
                    if not self._wanted.empty():
                        self._lead(number, *self._wanted.get())
                        number += 1
                elif self._store.check([str(number)]):
                    self._write(number, self._store.get(str(number)).decode())
                    number += 1
            except (dist.DistError, RuntimeError) as error:
                logger.info("stacks can no longer be asked for: %s", str(error).partition("\n")[0])
                return

    def _lead(self, number: int, name: str, on_written: Callable[[], None]) -> None:
        """Tell the others, write, and wait for them."""
        self._store.set(str(number), name)
        written = self._write(number, name)
        end = time.monotonic() + _WAIT_SECONDS
        while written < self._size and time.monotonic() < end and not self._finished.wait(_LOOK_SECONDS):
            written = self._store.add(f"{number}/written", 0)
        logger.info("stacks of %d of %d ranks are in %s", written, self._size, self._run.uri_of(self._folder(name)))
        on_written()

    def _write(self, number: int, name: str) -> int:
        """Write this rank's stacks; returns how many ranks have written."""
        rank, step = self._position.rank, self._position.step
        where = f"{name}: in {self._position.clock.phase}" + ("" if step is None else f" at step {step}")
        stacks = f"{where}\n\n{format_stacks()}"
        try:
            self._run.write(f"{self._folder(name)}/rank-{rank}.txt", stacks.encode())
        except StorageError as error:
            logger.warning("stacks of rank %d are in this log alone: %s\n%s", rank, error.message, stacks)
            return self._store.add(f"{number}/written", 0)
        return self._store.add(f"{number}/written", 1)

    def _folder(self, name: str) -> str:
        return f"{records.dumps_prefix(self._attempt)}/{name}"
