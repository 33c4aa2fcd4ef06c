"""The parts that work while this replica leads, put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from opensora_operator.channel import ProgressChannel
from opensora_operator.cluster import ApiError, Cluster
from opensora_operator.constants import API_VERSION
from opensora_operator.controller import Controller
from opensora_operator.events import Recorder
from opensora_operator.kinds import PROFILES, Kind
from opensora_operator.metrics import Metrics
from opensora_operator.pacing import ProgressPace
from opensora_operator.plans import Key, Object
from opensora_operator.progress import ProgressBook
from opensora_operator.queue import Queue
from opensora_operator.settings import Settings
from opensora_operator.store import Store
from opensora_operator.watching import Watching

logger = logging.getLogger(__name__)

_STARVED_SECONDS = 60.0
_DEAF_RESYNCS = 3
_RETRY_SECONDS = 2.0
_STOP_SECONDS = 5.0
"""What is being written when the operator has to stop may be finished within this time."""


class Runtime:
    """Store, queue, workers and watches of a leader."""

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        metrics: Metrics,
        *,
        kinds: Mapping[str, Kind],
    ) -> None:
        self._settings = settings
        self._cluster = cluster
        self._kinds = kinds
        self._store = Store()
        self._queue = Queue()
        self._recorder = Recorder(cluster, identity=settings.identity)
        book = ProgressBook()
        self._channel = ProgressChannel(settings, cluster, self._store, book, on_report=self._reported)
        self._controller = Controller(
            cluster=cluster,
            store=self._store,
            queue=self._queue,
            recorder=self._recorder,
            metrics=metrics,
            kinds=kinds,
            pace=ProgressPace(per_second=settings.progress_writes_per_second),
            resync_seconds=settings.resync_seconds,
            book=book,
            platform=lambda: self._channel.platform,
        )
        self._watching = Watching(
            cluster, self._store, concern=self._controller.concern, namespaces=settings.namespaces
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._workers: list[asyncio.Task[None]] = []
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception of a part that ended, which none does by itself."""
        metrics.watch_queue(depth=self._queue.__len__, oldest_seconds=self._queue.oldest_seconds)
        metrics.watch_objects(lambda: (body for kind in kinds for body in self._store.objects(kind)))

    async def prepare(self) -> None:
        """Before this replica leads: nobody is to take it for the leader."""
        await self._channel.retire()

    async def start(self) -> None:
        """Start to work, once the cluster knows our kinds and we know its Jobs and pods."""
        await self._wait_for_kinds()
        self._watching.heard()
        synced = []
        for kind, namespace in self._watching.streams():
            synced.append(asyncio.Event())
            self._start(self._watching.watch(kind, namespace, synced=synced[-1]))
        for event in synced:
            await event.wait()
        await self._know((*self._kinds, *PROFILES))
        await self._channel.start()
        self._start(self._channel.keep())
        self._start(self._recorder.send())
        self._start(self._resync())
        for _ in range(self._settings.concurrency):
            self._workers.append(self._start(self._controller.work()))
        logger.info("at work in %s", ", ".join(self._settings.namespaces) or "all namespaces")

    async def stop(self) -> None:
        """Finish what is being written, and end. A second call does nothing."""
        tasks, self._tasks, self._workers = self._tasks, [], []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS if tasks else 0):
                await self._queue.drain()
                await self._recorder.flush()
        await self._channel.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def observe(self, kind: str, body: Object, *, is_gone: bool) -> None:
        """One of our objects has changed. kopf lists what `start` has listed: of that, nothing is new."""
        self._watching.heard()
        key = self._store.remove(kind, body) if is_gone else self._store.put(kind, body)
        if key is not None:
            self._controller.concern(key)

    def _reported(self, key: Key) -> None:
        self._queue.add(key, later=True)

    def problem(self) -> str:
        """Why a leader that says it works does not; empty when it does."""
        if not self._workers:
            return ""
        starved = self._queue.oldest_seconds()
        if starved > _STARVED_SECONDS:
            return f"an object has waited for {starved:.0f} s"
        silent = time.monotonic() - self._watching.heard_at
        if silent > _DEAF_RESYNCS * self._settings.resync_seconds:
            return f"the API server has said nothing for {silent:.0f} s"
        return ""

    async def _wait_for_kinds(self) -> None:
        """The CRDs may be installed at the same time as we are."""
        wanted = {*self._kinds, *PROFILES}
        said = set[str]()
        while True:
            try:
                missing = wanted - await self._cluster.serves(API_VERSION)
                if not missing:
                    return
                if missing != said:
                    logger.warning("waiting for the CRDs of %s", ", ".join(sorted(missing)))
                    said = missing
            except ApiError as error:
                logger.warning("waiting for the API server: %s", error)
            await asyncio.sleep(_RETRY_SECONDS)

    async def _resync(self) -> None:
        """Compare our kinds with the API server now and then; each object's own resync is in the queue."""
        while True:
            await asyncio.sleep(self._settings.resync_seconds)
            await self._know((*self._kinds, *PROFILES))

    async def _know(self, kinds: Sequence[str]) -> None:
        """Take all objects of these kinds from the API server, however long it takes."""
        while True:
            try:
                return await self._watching.compare(kinds)
            except ApiError as error:
                logger.warning("comparing with the API server: %s", error)
                await asyncio.sleep(max(_RETRY_SECONDS, error.retry_seconds))

    def _start(self, part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(part)
        task.add_done_callback(self._ended)
        self._tasks.append(task)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.failure.done():
            self.failure.set_exception(task.exception() or RuntimeError("a part of the operator has ended"))
