"""Settings of the batch-size search, beside the training config that it searches for.

The string below each field is its documentation: `--help` and the reference page are made from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from opensora.errors import ConfigError

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is searched, how a batch size is chosen, and where the table goes. Every setting is a flag."""

    bucket: tuple[str, ...] | None = None
    """Buckets to search, as `240p/51`; all of `data.bucket_config` unless given."""
    output: str = "batch-table.json"
    """The table: a local file, or an object in a bucket. Written after every measurement; the same command continues,
    and measures nothing again."""
    objective: Literal["MaxFit", "EqualStepTime"] = "MaxFit"
    """`MaxFit` takes the largest batch that fits. `EqualStepTime` takes the largest one that fits and whose step is no
    longer than `step_seconds`, so that ranks with different buckets wait little for each other; one clip always may."""
    step_seconds: float | None = None
    """With `EqualStepTime`, how long a step may take. Unless given: as long as at the largest batch of the bucket where
    that is shortest, or as one clip of the slowest bucket where that is longer."""
    headroom_percent: float = 8.0
    """Share of the memory that stays free: for fragmentation, the CUDA context, and whatever else comes."""
    max_batch: int = 1024
    """Largest batch size that is tried."""
    memory_budget: str | None = None
    """Memory that a rank may take, as `2GiB`; all of a GPU's unless given. It is needed on a CPU, where it stands for
    what clips add to a rank: the peak of its process less that of one with an empty batch."""
    nproc_per_node: int = 1
    """Ranks that a measurement is made with, on this machine."""
    untimed_steps: int = 1
    """Steps before those that are timed."""
    timed_steps: int = 3
    """Steps that are timed; the median counts."""
    probe_timeout_seconds: float = 1800.0
    """How long one measurement may take."""
    known: tuple[str, ...] | None = None
    """What is known of the one bucket that is searched: `4:3221225472:0.81` for a batch of 4 that took so many bytes
    and seconds a step, `8:oom` for one that did not fit."""

    def __post_init__(self) -> None:
        if not 0 <= self.headroom_percent < 100:
            raise ConfigError(f"headroom_percent={self.headroom_percent:g} is no share", hint="use 0 to 99; 8 is usual")
        for name in ("max_batch", "nproc_per_node", "timed_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is below 1", hint="use a whole number from 1")
        if self.untimed_steps < 0:
            raise ConfigError(f"untimed_steps={self.untimed_steps} is negative", hint="use 0 or more")
        for name in ("step_seconds", "probe_timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value:g} is not positive", hint="give a time in seconds")
        if self.step_seconds is not None and self.objective != "EqualStepTime":
            raise ConfigError(
                f"step_seconds={self.step_seconds:g} with objective={self.objective}: it would have no effect",
                hint="add --objective EqualStepTime",
            )
        if self.known is not None and len(self.bucket or ()) != 1:
            raise ConfigError("known without exactly one bucket", hint="name the bucket: --bucket 240p/51")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, name="memory_budget")

    @property
    def budget_bytes(self) -> int | None:
        return None if self.memory_budget is None else parse_bytes(self.memory_budget, name="memory_budget")


def parse_bytes(text: str, *, name: str) -> int:
    """A number of bytes: `2GiB`, `2Gi`, `500MB`, `500M`, `1073741824`; units with an `i` are powers of 1024.

    Raises:
        ConfigError: it is none, or not positive; the message names the setting.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGTkmgt]?)(i?)(B?)", text.strip())
    if found is None or (found[3] and not found[2]) or float(found[1]) <= 0:
        raise ConfigError(f"{name}={text!r} is no number of bytes", hint="for example 2GiB")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** _UNITS[found[2].upper()])
