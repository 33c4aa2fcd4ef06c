"""Which batch size to measure next, from what is known. Pure arithmetic, so a search can be continued anywhere.

Memory and time of a step grow about linearly with the batch: load = a + b · batch. A line through two measurements
predicts the bound; the bound is measured, and stands only if it fits. Where the line was wrong, the new measurement
bends it. Training meets smaller batches than the chosen one, too, so nothing beyond the first that does not fit counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opensora.datasets.batch_table import BucketResult, Evidence, Fit, Point

MAX_MEASUREMENTS = 10
"""Per bucket. Then the largest batch that was seen to fit is taken, though a larger one may fit as well."""
_GROWTH = 8
"""A batch is at most so many times the largest that fits: a line through tiny batches is often too flat."""
_WORTH = 1.03
"""A batch that is larger by less than this factor is not worth a measurement."""


@dataclass(frozen=True)
class Measure:
    """This batch size is to be measured."""

    batch_size: int


@dataclass(frozen=True)
class NothingFits:
    """Not even one clip fits."""

    reason: str


@dataclass(frozen=True)
class Limits:
    """What a step may take."""

    memory_bytes: float
    """Headroom already taken off."""
    step_seconds: float = math.inf

    @property
    def lines(self) -> list[tuple[Callable[[Point], float], float]]:
        """What is limited, and by how much."""
        return [
            (lambda point: point.peak_bytes, self.memory_bytes),
            (lambda point: point.seconds_per_step, self.step_seconds),
        ]

    def admit(self, point: Point) -> bool:
        """Whether the batch may be used. A single clip may take any time: there is no smaller batch."""
        fits = point.peak_bytes <= self.memory_bytes
        return fits and (point.batch_size == 1 or point.seconds_per_step <= self.step_seconds)

    def reached(self, point: Point) -> bool:
        """Whether nothing larger can be used."""
        return any(load(point) >= largest for load, largest in self.lines)


def choose(evidence: Evidence, limits: Limits, *, max_batch: int) -> Measure | BucketResult | NothingFits:
    """What to do about a bucket: measure another batch size, or take one."""
    points = sorted(evidence.points, key=lambda point: point.batch_size)
    over = [point for point in points if not limits.admit(point)]
    ceiling = min([max_batch + 1, *evidence.too_large, *(point.batch_size for point in over)])
    fitting = [point for point in points if point.batch_size < ceiling]
    if not fitting:
        return Measure(1) if ceiling > 1 else NothingFits(_explain(points, limits.memory_bytes))
    best = fitting[-1]
    if len(points) + len(evidence.too_large) < MAX_MEASUREMENTS and not limits.reached(best):
        beyond = next((point for point in over if point.batch_size == ceiling), None)
        wanted = _next_size(fitting, beyond, ceiling, limits, is_open=ceiling > max_batch)
        if wanted >= max(best.batch_size + 1, best.batch_size * _WORTH):
            return Measure(wanted)
    return BucketResult(
        batch_size=best.batch_size,
        peak_bytes=best.peak_bytes,
        seconds_per_step=best.seconds_per_step,
        fit=fit_memory(fitting),
        evidence=evidence,
    )


def fit_memory(points: Sequence[Point]) -> Fit | None:
    """The line that predicts memory from measurements in the order of their sizes; None for a single one."""
    if len(points) < 2:
        return None
    slope, constant = _line(_lever(points), points[-1], lambda point: point.peak_bytes)
    return Fit(constant_bytes=constant, bytes_per_clip=slope)


def common_step_seconds(results: Mapping[str, BucketResult]) -> float:
    """How long the steps of all buckets can be alike, given the largest batch of each.

    That is the step of the bucket that fills its memory soonest, or one clip of the slowest bucket where that takes
    longer.
    """
    shortest = min(result.seconds_per_step for result in results.values())
    single = [
        point.seconds_per_step
        for result in results.values()
        for point in result.evidence.points
        if point.batch_size == 1
    ]
    return max([shortest, *single])


def _explain(points: Sequence[Point], memory_bytes: float) -> str:
    has_single = bool(points) and points[0].batch_size == 1
    taken = f"takes {points[0].peak_bytes / 2**30:.3g} GiB, which is more than" if has_single else "does not fit into"
    return f"one clip {taken} {memory_bytes / 2**30:.3g} GiB"


def _next_size(fitting: Sequence[Point], beyond: Point | None, ceiling: int, limits: Limits, *, is_open: bool) -> int:
    """The size to measure; not above the largest that fits where no larger one is expected to.

    Args:
        fitting: measurements that fit, in the order of their sizes.
        beyond: the measurement of `ceiling`, where it ended well but took too much.
        ceiling: the smallest size that must not be used.
        limits: what a step may take.
        is_open: the ceiling is the largest size that was asked for, not one that was tried.
    """
    best = fitting[-1]
    middle = (best.batch_size + ceiling) // 2
    ahead = _bound(_lever(fitting), best, limits) if len(fitting) > 1 else None
    if beyond is not None:
        # Between two measurements their chord is the better guide. Where memory grows faster than linearly it says too
        # little, so its word that nothing more fits is taken only if the line from below agrees.
        between = _bound(best, beyond, limits)
        if between > best.batch_size:
            return min(int(between), ceiling - 1)
        return middle if ahead is None or ahead > best.batch_size else best.batch_size
    if ahead is None:
        return min(2 * best.batch_size, ceiling - 1 if is_open else middle)
    if ahead >= ceiling and not is_open:
        return middle
    return int(min(ahead, _GROWTH * best.batch_size, ceiling - 1))


def _lever(points: Sequence[Point]) -> Point:
    """The other end of the line to the last of several points: the nearest of at most half its size.

    Of two close sizes the noise would decide the slope.
    """
    last = points[-1]
    return next((p for p in reversed(points) if 2 * p.batch_size <= last.batch_size), points[0])


def _bound(first: Point, second: Point, limits: Limits) -> float:
    """The largest batch size within the limits on the lines through two measurements."""
    bounds = []
    for load, largest in limits.lines:
        slope, constant = _line(first, second, load)
        # A bound that is a whole number must not fall below it by rounding.
        bounds.append(math.floor((largest - constant) / slope + 1e-9) if slope > 0 and largest < math.inf else math.inf)
    return min(bounds)


def _line(first: Point, second: Point, load: Callable[[Point], float]) -> tuple[float, float]:
    """Slope and constant."""
    slope = (load(second) - load(first)) / (second.batch_size - first.batch_size)
    return slope, load(second) - slope * second.batch_size
