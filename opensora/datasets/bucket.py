"""Buckets: which resolution, length and aspect ratio a clip is trained at, and with which batch size.

The rule and its draws are Open-Sora's (`Bucket.get_bucket_id`), so that a table keeps its meaning. `Bucket.assign`
does the same for a whole catalogue at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opensora.datasets.aspect import ASPECT_RATIOS, get_closest_ratio
from opensora.datasets.pcg64 import default_rng_uniforms
from opensora.errors import ConfigError

BucketId = tuple[str, int, str]
"""(resolution, frames, ratio key)."""
Probability = float | tuple[float, float]
"""Share of the fitting clips that is kept, or (that share, share that looks at this length at all)."""

_MIN_AREA = 0.8
"""A clip may have this share of a resolution's nominal pixels and still count as that resolution."""
_BLOCK_ROWS = 1 << 15
"""Rows assigned at a time: the arrays of one block stay in the processor's cache."""


@dataclass(frozen=True)
class BucketShape:
    """What all clips of one micro-batch are brought to."""

    resolution: str
    num_frames: int
    ratio: str
    height: int
    width: int
    batch_size: int
    key_index: int
    """Number of its (resolution, frames) entry, as it enters the seed of the draws."""

    @property
    def name(self) -> str:
        return f"{self.resolution}/{self.num_frames}/{self.ratio}"


@dataclass(frozen=True)
class _Entry:
    """One (resolution, frames) of the table."""

    num_frames: int
    probability: Probability
    batch_size: int | None
    key_index: int
    first_shape: int
    """Index in `Bucket.entries` of its first ratio; -1 for a gate."""

    @property
    def keep(self) -> float:
        return self.probability[0] if isinstance(self.probability, tuple) else self.probability


class Bucket:
    """A bucket table: `{resolution: {frames: (p, batch size)}}`.

    `p` is a number or a pair (p_resolution, p_frames); a probability of 0 with batch size `None` is a gate: it catches
    the clips that are long enough and passes them on to the next smaller resolution. Lists are taken as tuples.

    Raises:
        ConfigError: the table makes no sense; the message names the entry.
    """

    def __init__(self, bucket_config: Mapping[str, Mapping[int, Any]]) -> None:
        self._levels: dict[str, dict[int, _Entry]] = {}
        self.entries: list[BucketShape] = []
        """Every shape that a clip can get: largest resolution first, then longest, then in the order of the ratios."""
        self.num_bucket = 0
        """Number of (resolution, frames, ratio), gates included: the stride of the draws' seeds between rows."""
        key_index = 0
        for resolution in bucket_config:
            if resolution not in ASPECT_RATIOS:
                raise ConfigError(
                    f"bucket_config: unknown resolution {resolution!r}", hint=f"known: {', '.join(ASPECT_RATIOS)}"
                )
        for resolution in sorted(bucket_config, key=lambda name: ASPECT_RATIOS[name][0], reverse=True):
            parsed = _parse_level(resolution, bucket_config[resolution])
            ratios = ASPECT_RATIOS[resolution][1]
            level = self._levels[resolution] = {}
            for num_frames in sorted(parsed, reverse=True):
                probability, batch_size = parsed[num_frames]
                first_shape = -1 if batch_size is None else len(self.entries)
                level[num_frames] = _Entry(num_frames, probability, batch_size, key_index, first_shape)
                if batch_size is not None:
                    self.entries += [
                        BucketShape(resolution, num_frames, ratio, height, width, batch_size, key_index)
                        for ratio, (height, width) in ratios.items()
                    ]
                self.num_bucket += len(ratios)
                key_index += 1
        if not self.entries:
            raise ConfigError(
                "bucket_config has no entry that takes clips", hint='for example {"240p": {1: (1.0, 16), 51: (1.0, 2)}}'
            )

    def __len__(self) -> int:
        return self.num_bucket

    def get_thw(self, bucket_id: BucketId) -> tuple[int, int, int]:
        """(frames, height, width) of a bucket."""
        resolution, _, ratio = bucket_id
        height, width = ASPECT_RATIOS[resolution][1][ratio]
        return self._entry(bucket_id).num_frames, height, width

    def get_prob(self, bucket_id: BucketId | tuple[str, int]) -> Probability:
        """Keep probability of a bucket, as the table has it."""
        return self._entry(bucket_id).probability

    def get_batch_size(self, bucket_id: BucketId | tuple[str, int]) -> int | None:
        """Clips per micro-batch of a bucket; `None` for a gate."""
        return self._entry(bucket_id).batch_size

    def _entry(self, bucket_id: tuple[Any, ...]) -> _Entry:
        return self._levels[bucket_id[0]][bucket_id[1]]

    def get_bucket_id(
        self, T: int, H: int, W: int, frame_interval: int = 1, seed: int | None = None
    ) -> BucketId | None:
        """The bucket of one clip, or `None` when no bucket takes it.

        From the largest resolution down: the clip must have 0.8 of its nominal pixels. A video takes the longest
        length that it *exceeds* (a 51-frame clip does not fit 51) and is kept with the probability of that entry;
        otherwise it goes to the next smaller resolution, not to a shorter length.

        Args:
            T: frames of the file; 1 is an image.
            H: height in pixels.
            W: width in pixels.
            frame_interval: every n-th frame is used.
            seed: seed of the row and epoch, `seed + epoch + id * len(bucket)`; each entry adds its own number.

        Raises:
            ConfigError: there is no seed.
        """
        if seed is None:
            raise ConfigError("Bucket.get_bucket_id needs a seed", hint="pass seed=seed + epoch + id * len(bucket)")
        area = H * W
        for resolution, level in self._levels.items():
            pixels, ratios = ASPECT_RATIOS[resolution]
            if area < pixels * _MIN_AREA:
                continue
            num_frames = self._choose_frames(level, T, frame_interval, seed)
            if num_frames is not None:
                return resolution, num_frames, get_closest_ratio(H, W, ratios)
        return None

    def _choose_frames(self, level: dict[int, _Entry], num_frames: int, frame_interval: int, seed: int) -> int | None:
        """The length at which one resolution keeps a clip."""
        if num_frames == 1:
            image = level.get(1)
            kept = image is not None and np.random.default_rng(seed + image.key_index).random() < image.keep
            return 1 if kept else None
        for entry in level.values():
            if entry.num_frames == 1 or num_frames <= entry.num_frames * frame_interval:
                continue
            rng = np.random.default_rng(seed + entry.key_index)
            if isinstance(entry.probability, tuple) and rng.random() > entry.probability[1]:
                continue
            return entry.num_frames if entry.keep >= 1 or rng.random() < entry.keep else None
        return None

    def assign(
        self,
        num_frames: NDArray[np.integer[Any]],
        height: NDArray[np.integer[Any]],
        width: NDArray[np.integer[Any]],
        ids: NDArray[np.int64],
        *,
        seed: int,
        epoch: int,
        frame_interval: int = 1,
    ) -> NDArray[np.int32]:
        """The bucket of every row, equal to `get_bucket_id` with `seed + epoch + id * len(self)` bit for bit.

        Args:
            num_frames: [n], 1 is an image.
            height: [n] in pixels.
            width: [n] in pixels.
            ids: [n], what makes the draws of a row its own.

        Returns:
            [n] index into `entries`; -1 where no bucket takes the row.

        Raises:
            ConfigError: the seeds leave the range of 64 bits.
        """
        largest = seed + epoch + (int(ids.max()) if len(ids) else 0) * self.num_bucket
        if seed + epoch < 0 or largest >= 2**62:
            raise ConfigError(
                f"seed={seed} with epoch {epoch} gives draws' seeds up to {largest}", hint="use a seed from 0 to 2^32"
            )
        seeds = ids.astype(np.uint64) * np.uint64(self.num_bucket) + np.uint64(seed + epoch)
        assigned = np.full(len(ids), -1, np.int32)
        for start in range(0, len(ids), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            frames, high, wide = (array[block].astype(np.int64) for array in (num_frames, height, width))
            self._assign_block(frames, high, wide, seeds[block], frame_interval, out=assigned[block])
        return assigned

    def _assign_block(
        self,
        frames: NDArray[np.int64],
        height: NDArray[np.int64],
        width: NDArray[np.int64],
        seeds: NDArray[np.uint64],
        frame_interval: int,
        *,
        out: NDArray[np.int32],
    ) -> None:
        area = height * width
        pending = np.arange(len(seeds))
        for resolution, level in self._levels.items():
            pixels, ratios = ASPECT_RATIOS[resolution]
            undecided = pending[area[pending] >= pixels * _MIN_AREA]
            for entry in level.values():
                if not len(undecided):
                    break
                fits = frames[undecided] > entry.num_frames * frame_interval
                if entry.num_frames == 1:
                    fits = frames[undecided] == 1
                chosen, kept = _draw(entry, undecided[fits], seeds)
                if len(kept):
                    out[kept] = entry.first_shape + _closest_ratios(height[kept] / width[kept], list(ratios))
                fits[fits] = chosen
                undecided = undecided[~fits]
            pending = pending[out[pending] < 0]


def _draw(
    entry: _Entry, rows: NDArray[np.intp], seeds: NDArray[np.uint64]
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Which of the rows choose the length of `entry` (mask), and those of them that it keeps (rows)."""
    two_level = isinstance(entry.probability, tuple)
    chosen = np.ones(len(rows), np.bool_)
    if not len(rows) or (not two_level and (entry.keep >= 1 or entry.keep <= 0)):
        return chosen, rows if entry.keep >= 1 else rows[:0]
    uniforms = default_rng_uniforms(seeds[rows] + np.uint64(entry.key_index), 1 + two_level)
    if isinstance(entry.probability, tuple):
        chosen = uniforms[0] <= entry.probability[1]
    kept = chosen if entry.keep >= 1 else chosen & (uniforms[-1] < entry.keep)
    return chosen, rows[kept]


def _closest_ratios(values: NDArray[np.float64], ratios: list[str]) -> NDArray[np.int32]:
    """`get_closest_ratio` for many values of height / width, as positions in the table."""
    best = np.full(len(values), np.inf)
    positions = np.zeros(len(values), np.int32)
    for position, ratio in enumerate(ratios):
        distance = np.abs(float(ratio) - values)
        nearer = distance < best
        positions[nearer] = position
        np.minimum(best, distance, out=best)
    return positions


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_level(resolution: str, level: Any) -> dict[int, tuple[Probability, int | None]]:
    """The checked entries of one resolution."""
    if not isinstance(level, Mapping) or not level:
        raise ConfigError(
            f"bucket_config[{resolution!r}] = {level!r} is not a table of lengths",
            hint="for example {51: (1.0, 2)}; remove the resolution if it is not used",
        )
    return {
        _parse_frames(resolution, frames): _parse_entry(resolution, frames, entry) for frames, entry in level.items()
    }


def _parse_frames(resolution: str, num_frames: Any) -> int:
    if not isinstance(num_frames, int) or isinstance(num_frames, bool) or num_frames < 1:
        raise ConfigError(
            f"bucket_config[{resolution!r}]: {num_frames!r} is not a number of frames", hint="1 for images, 51, 102 …"
        )
    return num_frames


def _parse_entry(resolution: str, num_frames: int, entry: Any) -> tuple[Probability, int | None]:
    where = f"bucket_config[{resolution!r}][{num_frames}] = {entry!r}"
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        raise ConfigError(f"{where} is not a pair", hint="write (probability, batch size), for example (1.0, 2)")
    probability, batch_size = entry
    parts = probability if isinstance(probability, tuple | list) else (probability,)
    if len(parts) not in (1, 2) or not all(_is_number(part) and 0 <= part <= 1 for part in parts):
        raise ConfigError(
            f"{where}: {probability!r} is not a probability",
            hint="a number from 0 to 1, or a pair (p_resolution, p_frames) of such numbers",
        )
    if num_frames == 1 and len(parts) == 2:
        raise ConfigError(f"{where}: images have one probability only", hint=f"use {parts[0]!r}")
    if batch_size is None and parts[0] > 0:
        raise ConfigError(
            f"{where} keeps clips but has no batch size", hint="give a batch size, or probability 0 for a gate"
        )
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise ConfigError(f"{where}: {batch_size!r} is not a batch size", hint="a whole number from 1")
    if len(parts) == 2:
        return (float(parts[0]), float(parts[1])), batch_size
    return float(parts[0]), batch_size
