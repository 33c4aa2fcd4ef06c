"""The plan of an epoch: which clips are trained on together, step by step, as plain arrays.

A plan is a pure function of the catalogue, the bucket table, seed, epoch, micro-batches per step and the costs. The
number of ranks is no input: it decides who computes a micro-batch (`deal`), not what a step consists of. So a run that
continues on another number of ranks goes on with the same steps.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opensora import randomness
from opensora.datasets.bucket import Bucket, BucketShape
from opensora.datasets.catalogue import Catalogue
from opensora.errors import ConfigError, DataError

_MAX_NAMED = 8
"""Buckets that an error message lists."""


@dataclass(frozen=True)
class Cursor:
    """The next step of a run: `step` counts from the start of `epoch`."""

    epoch: int
    step: int


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Clips of one shape that go through the model together."""

    index: int
    """Number in the epoch."""
    shape: BucketShape
    rows: NDArray[np.int64]
    """[k] positions in the catalogue; k is the bucket's batch size, or less where a bucket's last batch is kept."""
    cost: float
    """Of the whole micro-batch, in the unit of the costs that the plan was built with."""


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The steps of one epoch. Micro-batch j belongs to step j // micro_batches_per_step."""

    epoch: int
    digest: str
    """SHA-256 of everything in the plan, and of what it was made from."""
    micro_batches_per_step: int
    shapes: tuple[BucketShape, ...]
    rows: NDArray[np.int64]
    """[clips] positions in the catalogue."""
    starts: NDArray[np.int64]
    """[micro-batches] where the clips of each begin in `rows`."""
    sizes: NDArray[np.int64]
    """[micro-batches] clips of each."""
    shape_indices: NDArray[np.int32]
    """[micro-batches] into `shapes`."""
    costs: NDArray[np.float64]
    """[micro-batches] cost of each."""
    num_unassigned: int
    """Rows that no bucket takes in this epoch."""
    num_left_over: int
    """Rows that did not fill a batch and were dropped."""

    @property
    def num_micro_batches(self) -> int:
        return len(self.starts)

    @property
    def num_steps(self) -> int:
        return -(-self.num_micro_batches // self.micro_batches_per_step)

    @property
    def num_clips(self) -> int:
        """Clips that the epoch trains on."""
        return int(self.sizes.sum())

    def step(self, index: int) -> list[MicroBatch]:
        """The micro-batches of one step; the last step of an epoch may have fewer than the others.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of an epoch with {self.num_steps} steps")
        first = index * self.micro_batches_per_step
        last = min(first + self.micro_batches_per_step, self.num_micro_batches)
        return [self._micro_batch(number) for number in range(first, last)]

    def _micro_batch(self, index: int) -> MicroBatch:
        start = self.starts[index]
        return MicroBatch(
            index=index,
            shape=self.shapes[self.shape_indices[index]],
            rows=self.rows[start : start + self.sizes[index]],
            cost=float(self.costs[index]),
        )

    def counts(self) -> dict[str, tuple[int, int]]:
        """Bucket name → (clips, micro-batches), for the buckets in use."""
        clips = np.bincount(self.shape_indices, self.sizes, len(self.shapes)).astype(int)
        batches = np.bincount(self.shape_indices, minlength=len(self.shapes))
        return {self.shapes[i].name: (int(clips[i]), int(batches[i])) for i in np.flatnonzero(batches)}


def build_plan(
    catalogue: Catalogue,
    bucket: Bucket,
    *,
    seed: int,
    epoch: int,
    micro_batches_per_step: int,
    costs: NDArray[np.float64],
    balance_window: int,
    drop_last: bool,
    shuffle: bool,
    frame_interval: int,
) -> EpochPlan:
    """Assign the rows to buckets, cut these into micro-batches, and put micro-batches of similar cost into a step.

    Args:
        catalogue: the rows.
        bucket: the table; its draws decide anew in each epoch where a row goes.
        seed: of the draws and the order.
        epoch: from 0.
        micro_batches_per_step: in each step but the last one.
        costs: cost per clip of each of `bucket.entries`, see `cost.shape_costs`.
        balance_window: steps (at least) within which micro-batches are grouped by cost; 1 does no grouping. Windows are
            random samples of the epoch, and their steps come in random order.
        drop_last: drop the clips of a bucket that do not fill a batch, others each epoch; else the batch is smaller.
        shuffle: draw clips and steps in random order; else in the order of the catalogue, by bucket.
        frame_interval: every n-th frame is used, so a clip must be n times as long.

    Raises:
        ConfigError: a number is out of range, or the costs do not belong to the table.
        DataError: no micro-batch comes out; the message says why for each bucket.
    """
    for name, value in (("micro_batches_per_step", micro_batches_per_step), ("balance_window", balance_window)):
        if value < 1:
            raise ConfigError(f"{name}={value} is below 1", hint="use a whole number from 1")
    shapes = tuple(bucket.entries)
    if len(costs) != len(shapes) or not (np.isfinite(costs) & (costs >= 0)).all():
        raise ConfigError(
            f"{len(costs)} costs for {len(shapes)} bucket shapes, or one is negative or not a number",
            hint="compute them from the same table with shape_costs(bucket.entries, model)",
        )
    order = _Order(seed, epoch, shuffle=shuffle)
    assigned = bucket.assign(
        catalogue.num_frames,
        catalogue.height,
        catalogue.width,
        catalogue.ids,
        seed=seed,
        epoch=epoch,
        frame_interval=frame_interval,
    )
    rows, per_shape = _by_shape(assigned, order, len(shapes))
    batch_sizes = np.array([shape.batch_size for shape in shapes])
    starts, sizes, shape_indices = _cut(per_shape, batch_sizes, drop_last=drop_last)
    if not len(starts):
        raise _nothing_to_train_on(catalogue, shapes, per_shape)
    batch_costs = costs[shape_indices] * sizes
    arrangement = _arrange(batch_costs, order, micro_batches_per_step, balance_window)
    starts, sizes, shape_indices = starts[arrangement], sizes[arrangement], shape_indices[arrangement]
    digest = hashlib.sha256(f"{catalogue.digest} {seed} {epoch} {micro_batches_per_step} {shapes}".encode())
    for array in (rows, starts, sizes, shape_indices):
        digest.update(array.tobytes())
    return EpochPlan(
        epoch=epoch,
        digest=digest.hexdigest(),
        micro_batches_per_step=micro_batches_per_step,
        shapes=shapes,
        rows=rows,
        starts=starts,
        sizes=sizes,
        shape_indices=shape_indices,
        costs=batch_costs[arrangement],
        num_unassigned=len(assigned) - len(rows),
        num_left_over=len(rows) - int(sizes.sum()),
    )


def deal(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Spread the micro-batches of a step over ranks: the costliest first, each to the rank with the least so far.

    (Longest processing time first; Graham, "Bounds on multiprocessing timing anomalies", 1969.) Equal loads go to the
    rank with fewer micro-batches, then to the lower rank, so the result depends on the arguments alone.

    Returns:
        For each rank the indices into `costs`, costliest first. Some ranks get none when there are not enough.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, 0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, count, rank = loads[0]
        shares[rank].append(index)
        heapq.heapreplace(loads, (load + costs[index], count + 1, rank))
    return shares


class _Order:
    """Random orders of one (seed, epoch), each drawn after the one before; or the identity."""

    def __init__(self, seed: int, epoch: int, *, shuffle: bool) -> None:
        self._generator = randomness.rng(seed, epoch=epoch, row=0, purpose="order").bit_generator
        self._shuffle = shuffle

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A random order of 0 … count - 1.

        It is that of random 64-bit keys whose low bits are replaced by the position: no ties, one sort of integers, and
        only the raw stream of Philox, which numpy keeps the same in all versions (`Generator.shuffle` may change).
        """
        if not self._shuffle:
            return np.arange(count)
        bits = np.uint64(count.bit_length())
        keys: NDArray[np.uint64] = self._generator.random_raw(count)
        keys >>= bits
        keys <<= bits
        keys |= np.arange(count, dtype=np.uint64)
        keys.sort()
        keys &= (np.uint64(1) << bits) - np.uint64(1)
        return keys.astype(np.int64)


def _by_shape(
    assigned: NDArray[np.int32], order: _Order, num_shapes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The assigned rows, sorted by shape and in random order within one; and how many each shape has."""
    rows = np.flatnonzero(assigned >= 0)
    rows = rows[order.permutation(len(rows))]
    # numpy sorts 16-bit integers by radix, in linear time.
    keys = assigned[rows].astype(np.int16 if num_shapes <= np.iinfo(np.int16).max else np.int32)
    rows = rows[np.argsort(keys, kind="stable")]
    return rows, np.bincount(keys, minlength=num_shapes)


def _cut(
    per_shape: NDArray[np.int64], batch_sizes: NDArray[np.int64], *, drop_last: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """(start, size, shape) of each micro-batch in the rows that are sorted by shape."""
    num_batches = per_shape // batch_sizes if drop_last else -(-per_shape // batch_sizes)
    shape_indices = np.repeat(np.arange(len(per_shape), dtype=np.int32), num_batches)
    first_batch = np.cumsum(num_batches) - num_batches
    first_row = np.cumsum(per_shape) - per_shape
    within = (np.arange(len(shape_indices)) - first_batch[shape_indices]) * batch_sizes[shape_indices]
    sizes = np.minimum(batch_sizes[shape_indices], per_shape[shape_indices] - within)
    return first_row[shape_indices] + within, sizes, shape_indices


def _arrange(
    costs: NDArray[np.float64], order: _Order, micro_batches_per_step: int, balance_window: int
) -> NDArray[np.int64]:
    """The order of the micro-batches in the epoch, so that the ones of a step cost about the same.

    A random order is cut into windows; sorting a window by cost and cutting it into steps gives the smallest possible
    sum of each step's largest cost. Windows have equal numbers of steps (a short one at the end would be badly
    balanced), and the incomplete last step, where ranks idle in any case, gets the cheapest micro-batches of its
    window.
    """
    arrangement = order.permutation(len(costs))
    num_full, rest = divmod(len(costs), micro_batches_per_step)
    num_steps = num_full + bool(rest)
    num_windows = max(1, num_steps // balance_window)
    window_of_step = np.arange(num_steps) * num_windows // num_steps
    if balance_window > 1:
        window = np.repeat(window_of_step, micro_batches_per_step)[: len(costs)]
        arrangement = arrangement[np.lexsort((-costs[arrangement], window))]
    step_order = np.arange(num_full)
    shuffled = order.permutation(num_full)
    step_order = shuffled[np.argsort(window_of_step[shuffled], kind="stable")]
    full = arrangement[: num_full * micro_batches_per_step].reshape(num_full, micro_batches_per_step)
    return np.concatenate([full[step_order].ravel(), arrangement[num_full * micro_batches_per_step :]])


def _nothing_to_train_on(
    catalogue: Catalogue, shapes: tuple[BucketShape, ...], per_shape: NDArray[np.int64]
) -> DataError:
    used = [index for index in np.argsort(-per_shape, kind="stable") if per_shape[index]]
    found = ", ".join(
        f"{shapes[index].name}: {per_shape[index]} rows, batch size {shapes[index].batch_size}"
        for index in used[:_MAX_NAMED]
    )
    if not used:
        return DataError(
            f"no bucket takes any of the {len(catalogue)} rows of {catalogue.uri} "
            f"({_ranges(catalogue)}; the buckets have {_table_ranges(shapes)})",
            hint="a clip needs more frames than its bucket (times frame_interval) and 0.8 of its pixels: "
            "choose smaller buckets, or raise their probabilities",
        )
    more = f", and {len(used) - _MAX_NAMED} more buckets" if len(used) > _MAX_NAMED else ""
    return DataError(
        f"no bucket gets a full batch from the {len(catalogue)} rows of {catalogue.uri} ({found}{more})",
        hint="set data.drop_last=false, use smaller batch sizes or fewer buckets, or raise data.repeats",
    )


def _ranges(catalogue: Catalogue) -> str:
    frames, height, width = catalogue.num_frames, catalogue.height, catalogue.width
    return (
        f"{frames.min()} to {frames.max()} frames, {height.min()} to {height.max()} high, "
        f"{width.min()} to {width.max()} wide"
    )


def _table_ranges(shapes: tuple[BucketShape, ...]) -> str:
    entries = {f"{shape.resolution}/{shape.num_frames}": None for shape in shapes}
    return ", ".join(entries)
