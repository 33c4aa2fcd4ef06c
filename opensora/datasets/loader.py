"""From the plan of an epoch to batches of pixels: reads ahead in threads, hands out in order.

What a step consists of, and what is drawn for each clip, depends on the plan and the seed alone; threads and read-ahead
change when something is read and nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from opensora.config.train import DataConfig, StorageConfig
from opensora.datasets.bucket import BucketShape
from opensora.datasets.catalogue import Catalogue
from opensora.datasets.clip_source import ClipSource
from opensora.datasets.plan import Cursor, EpochPlan, MicroBatch, deal
from opensora.datasets.reader import ReadingStoppedError
from opensora.errors import DataError, ObjectNotFoundError

logger = logging.getLogger(__name__)

_ASK_SECONDS = 0.1
"""How often a waiting consumer is asked whether it still wants to wait."""
_CLOSE_SECONDS = 5.0
"""How long `close` waits for a thread that is stuck in a request to a store that does not answer."""


@dataclass(frozen=True)
class SkippedClip:
    """A clip that was left out."""

    uri: str
    reason: str


@dataclass
class ClipBatch:
    """One micro-batch, decoded. B counts the clips that could be read."""

    shape: BucketShape
    rows: list[int]
    """Positions in the catalogue of the clips that were read."""
    ids: list[int]
    """Their ids, which key every random draw."""
    epoch: int
    video: Tensor
    """[B, 3, T, H, W], fp32 in [-1, 1]"""
    text: list[str]
    fps: Tensor
    """[B] fp32: the container's frame rate // the frame interval; 120 for images"""
    height: Tensor
    """[B] fp32: that of the bucket, in pixels"""
    width: Tensor
    """[B] fp32"""
    num_frames: Tensor
    """[B] fp32"""
    ar: Tensor
    """[B] fp32: height / width"""
    skipped: list[SkippedClip]


@dataclass(frozen=True)
class StepWork:
    """One rank's share of a step."""

    epoch: int
    step: int
    """Within the epoch."""
    micro_batches: list[MicroBatch]
    num_slots: int
    """The largest number of micro-batches that any rank has in this step, at least 1."""
    _take: Callable[[Callable[[], bool]], ClipBatch | None] = field(repr=False)

    def batches(self, *, give_up: Callable[[], bool] = lambda: False) -> Iterator[ClipBatch | None]:
        """The micro-batches in turn; None where not a single clip could be read.

        Args:
            give_up: asked while one of them is waited for: whether to wait no longer.

        Raises:
            ReadingStoppedError: `give_up` said yes.
            DataError: a clip cannot be read and `data.bad_clip` is `fail`, or too many cannot.
            StorageError: the store failed for longer than the retry deadline.
        """
        for _ in self.micro_batches:
            yield self._take(give_up)


@dataclass
class _Pending:
    """A micro-batch that is being read."""

    micro_batch: MicroBatch
    epoch: int
    video: Tensor
    clips: list[Future[float]]
    """One for each row; the result is its frame rate."""


class _Share:
    """What one rank has to do in one step."""

    def __init__(self, epoch: int, step: int, micro_batches: list[MicroBatch], num_slots: int) -> None:
        self.epoch = epoch
        self.step = step
        self.micro_batches = micro_batches
        self.num_slots = num_slots
        self.num_taken = 0


class StepLoader:
    """Reads one rank's clips, step by step.

    Args:
        catalogue: the rows.
        plans: epoch → plan. Called in the consumer's thread, a few steps before an epoch begins.
        data: what to read and how.
        seed: of the draws.
        rank, num_ranks: which share of each step is read.
        storage: how object stores are reached.

    A clip is bad when its file is missing or cannot be decoded, never because the store did not answer. With
    `data.bad_clip = "skip"`, bad clips are left out, recorded in `ClipBatch.skipped` and counted; when more *different*
    clips than `data.max_skips` are bad, the run ends with a DataError.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        plans: Callable[[int], EpochPlan],
        *,
        data: DataConfig,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        storage: StorageConfig,
    ) -> None:
        self.data_wait_seconds = 0.0
        """Time that the consumer has waited for clips."""
        self.num_skipped = 0
        """Clips left out so far, each time counted."""
        self._catalogue = catalogue
        self._plans = plans
        self._data = data
        self._rank = rank
        self._num_ranks = num_ranks
        self._bad_uris: set[str] = set()
        self._untold: list[SkippedClip] = []
        self._source = ClipSource(catalogue, data=data, seed=seed, storage=storage)
        self._threads: _Threads | None = None

    def steps(self, start: Cursor) -> Iterator[StepWork]:
        """The steps from `start` on, over all epochs to come.

        The batches of a step must be taken before the next step is asked for; what is not taken is dropped. Only one
        iteration at a time: beginning another one ends this one.
        """
        self.close()
        threads = self._threads = _Threads(self._data.num_threads)
        shares = self._shares(start)
        ahead: deque[_Share | Exception] = deque()
        unread: deque[tuple[int, MicroBatch]] = deque()
        pending: deque[_Pending] = deque()

        def read_ahead() -> None:
            # Steps of which this rank has no part do not count as batches, so their number is bounded as well.
            while len(pending) < self._data.prefetch_batches:
                if unread:
                    epoch, micro_batch = unread.popleft()
                    pending.append(self._begin(threads, epoch, micro_batch))
                    continue
                if len(ahead) > self._data.prefetch_batches or (ahead and isinstance(ahead[-1], Exception)):
                    return
                try:
                    share = next(shares)
                except Exception as error:  # raised again when the consumer gets there
                    ahead.append(error)
                    return
                ahead.append(share)
                unread.extend((share.epoch, micro_batch) for micro_batch in share.micro_batches)

        def take(share: _Share, give_up: Callable[[], bool]) -> ClipBatch | None:
            if not ahead or ahead[0] is not share or share.num_taken == len(share.micro_batches):
                raise RuntimeError(f"step {share.step} of epoch {share.epoch} has no more batches")
            share.num_taken += 1
            if not pending:
                read_ahead()
            first = pending.popleft()
            read_ahead()
            return self._finish(first, give_up)

        try:
            while True:
                read_ahead()
                share = ahead[0]
                if isinstance(share, Exception):
                    raise share
                yield StepWork(
                    epoch=share.epoch,
                    step=share.step,
                    micro_batches=share.micro_batches,
                    num_slots=share.num_slots,
                    _take=partial(take, share),
                )
                while share.num_taken < len(share.micro_batches):
                    share.num_taken += 1
                    read_ahead()
                    for clip in pending.popleft().clips:
                        clip.cancel()
                ahead.popleft()
        finally:
            threads.close()

    def close(self) -> None:
        """End reading: what is under way is stopped, and the threads are gone when this returns.

        A thread in the middle of a request to a store that does not answer is left to end by itself; it holds up
        neither this call for long nor the end of the process.
        """
        if self._threads is not None:
            self._threads.close()
            self._threads = None

    def _shares(self, start: Cursor) -> Iterator[_Share]:
        epoch, first = start.epoch, start.step
        while True:
            plan = self._plans(epoch)
            for step in range(first, plan.num_steps):
                micro_batches = plan.step(step)
                dealt = deal([micro_batch.cost for micro_batch in micro_batches], self._num_ranks)
                mine = [micro_batches[index] for index in dealt[self._rank]]
                yield _Share(epoch, step, mine, max(1, *map(len, dealt)))
            epoch, first = epoch + 1, 0

    def _begin(self, threads: _Threads, epoch: int, micro_batch: MicroBatch) -> _Pending:
        shape = micro_batch.shape
        # Memory that nobody has written to yet takes no room: it is used when the clips are read.
        video = torch.empty(len(micro_batch.rows), 3, shape.num_frames, shape.height, shape.width)
        pixels = video.numpy()
        clips = [
            threads.submit(partial(self._source.read, int(row), epoch, pixels[at], threads.stopping.is_set))
            for at, row in enumerate(micro_batch.rows)
        ]
        return _Pending(micro_batch, epoch, video, clips)

    def _finish(self, pending: _Pending, give_up: Callable[[], bool]) -> ClipBatch | None:
        rows: list[int] = []
        kept: list[int] = []
        rates: list[float] = []
        skipped: list[SkippedClip] = []
        begin = time.perf_counter()
        try:
            for at, (row, clip) in enumerate(zip(pending.micro_batch.rows, pending.clips, strict=True)):
                try:
                    rates.append(_await(clip, give_up))
                except (DataError, ObjectNotFoundError) as error:
                    skipped.append(self._skip(self._catalogue.row_path(int(row)), error))
                else:
                    rows.append(int(row))
                    kept.append(at)
        finally:
            self.data_wait_seconds += time.perf_counter() - begin
        if not rows:
            return None
        shape, count = pending.micro_batch.shape, len(rows)
        return ClipBatch(
            shape=shape,
            rows=rows,
            ids=[int(self._catalogue.ids[row]) for row in rows],
            epoch=pending.epoch,
            video=pending.video[kept] if skipped else pending.video,
            text=[self._catalogue.row_text(row) for row in rows],
            fps=torch.tensor(rates, dtype=torch.float32),
            height=torch.full((count,), float(shape.height)),
            width=torch.full((count,), float(shape.width)),
            num_frames=torch.full((count,), float(shape.num_frames)),
            ar=torch.full((count,), shape.height / shape.width),
            skipped=skipped,
        )

    def _skip(self, uri: str, error: DataError | ObjectNotFoundError) -> SkippedClip:
        if self._data.bad_clip == "fail":
            raise error
        self.num_skipped += 1
        logger.warning("left out %s: %s", uri, error.message)
        clip = SkippedClip(uri, error.message)
        self._untold.append(clip)
        self.count_bad([clip])
        return clip

    def take_skipped(self) -> list[SkippedClip]:
        """The clips left out since the last call."""
        told, self._untold = self._untold, []
        return told

    def count_bad(self, clips: list[SkippedClip]) -> None:
        """Count clips towards `data.max_skips`, here or on other ranks; one that is known counts once.

        Raises:
            DataError: there are too many.
        """
        for clip in clips:
            self._bad_uris.add(clip.uri)
            if len(self._bad_uris) > self._data.max_skips:
                raise DataError(
                    f"{len(self._bad_uris)} clips cannot be read, more than data.max_skips={self._data.max_skips}; "
                    f"the last one: {clip.reason}",
                    hint="remove them from the catalogue (the log names each), or raise data.max_skips",
                )


def _await(clip: Future[float], give_up: Callable[[], bool]) -> float:
    while True:
        try:
            return clip.result(timeout=_ASK_SECONDS)
        except TimeoutError:
            if clip.done():
                raise
            if give_up():
                raise ReadingStoppedError("a batch that nobody waits for any more") from None


class _Threads:
    """Threads that work through a queue. Daemons, unlike those of an executor: see `StepLoader.close`."""

    def __init__(self, count: int) -> None:
        self.stopping = threading.Event()
        self._tasks: queue.SimpleQueue[tuple[Future[float], Callable[[], float]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"clip-reader-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], float]) -> Future[float]:
        future: Future[float] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        if self.stopping.is_set():
            return
        self.stopping.set()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            logger.warning("a thread that reads clips still waits for the store; it is left behind")

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, read = task
            if self.stopping.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                future.set_result(read())
            except BaseException as error:  # handed to the consumer, who raises it in its turn
                future.set_exception(error)
