"""Where a rank stands: what its end record tells."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from opensora.errors import ExitCode
from opensora.records import MAX_LAST_WORDS, EndRecord
from opensora.training.clock import Clock


@dataclass
class Position:
    """Kept up to date by the training loop; read wherever a rank may end."""

    rank: int
    clock: Clock = field(default_factory=Clock)
    """Knows the phase."""
    step: int | None = None
    """The step that the rank is at, from 1."""
    bucket: str | None = None
    """Shape of the micro-batch that it is at."""
    samples: list[str] = field(default_factory=list)
    """The clips that it is at."""

    def set_clips(self, bucket: str | None, samples: Sequence[str] = ()) -> None:
        """The micro-batch that is read or computed from now on; None between micro-batches."""
        self.bucket, self.samples = bucket, list(samples)

    def failed(self, error: BaseException) -> EndRecord:
        """The record of a rank that an exception ends."""
        return EndRecord.from_exception(
            error, rank=self.rank, phase=self.clock.phase, step=self.step, bucket=self.bucket, samples=self.samples
        )

    def ended(self, code: ExitCode, *, reason: str, message: str, last_words: Sequence[str] = ()) -> EndRecord:
        """The record of a rank that ends at once, without an exception."""
        return EndRecord(
            rank=self.rank, time=time.time(), code=int(code), reason=reason, message=message, phase=self.clock.phase,
            step=self.step, bucket=self.bucket, samples=self.samples, last_words=list(last_words)[-MAX_LAST_WORDS:],
        )  # fmt: skip
