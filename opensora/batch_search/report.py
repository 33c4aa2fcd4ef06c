"""What a pod that searches one bucket says: its termination message, which outlives it however it ends.

It is written before every measurement, so that even of a pod that was killed as a whole it is known which batch it
tried. The operator reads it; docs/reference/pod-contract.md describes it.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from opensora.datasets.batch_table import Evidence, Facts, Point
from opensora.errors import UsageError

logger = logging.getLogger(__name__)

_MAX_BYTES = 4096
"""What Kubernetes keeps."""


@dataclass(frozen=True, kw_only=True)
class SearchReport:
    """Where the search of a bucket stands, or how it ended."""

    bucket: str
    known: str = ""
    """Measurements, as `known` takes them, separated by blanks."""
    trying: int | None = None
    """The batch size that is being measured; 0 is the empty batch."""
    batch_size: int | None = None
    """The result."""
    peak_bytes: int | None = None
    seconds_per_step: float | None = None
    empty_bytes: int = 0
    facts: Facts | None = None
    """What the measurements hold for."""
    reason: str = ""
    """Why there is no result."""
    code: int = 0
    """Exit code of the search."""

    def to_json(self) -> str:
        """JSON of at most 4096 bytes: the reason is what gives way."""
        report = self
        while (over := len(text := _compact(report).encode()) - _MAX_BYTES) > 0 and report.reason:
            report = replace(report, reason=report.reason.encode()[:-over].decode(errors="ignore"))
        return text.decode()

    def write(self) -> None:
        """Leave it where Kubernetes looks for it; outside of a pod there is no such place."""
        given = os.environ.get("OPENSORA_TERMINATION_LOG")
        path = Path(given or "/dev/termination-log")
        if given is None and not path.exists():
            return
        try:
            path.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            logger.warning("the termination message is not written: %s", error)


def _compact(report: SearchReport) -> str:
    return json.dumps(asdict(report), separators=(",", ":"), ensure_ascii=False)


def format_known(evidence: Evidence) -> str:
    """`1:1073741824:0.51 2:2147483648:0.98 8:oom`"""
    points = [f"{p.batch_size}:{p.peak_bytes}:{p.seconds_per_step:.4g}" for p in evidence.points]
    return " ".join([*points, *(f"{size}:oom" for size in evidence.too_large)])


def parse_known(items: list[str] | tuple[str, ...]) -> Evidence:
    """The inverse of `format_known`.

    Raises:
        UsageError: an item is none.
    """
    points, too_large = [], []
    for item in items:
        parts = item.split(":")
        try:
            if parts[1:] == ["oom"]:
                too_large.append(int(parts[0]))
            else:
                size, peak, seconds = parts
                points.append(Point(int(size), int(peak), float(seconds)))
        except ValueError as error:
            raise UsageError(f"--known {item!r} is no measurement", hint="write 4:3221225472:0.81, or 8:oom") from error
    return Evidence(tuple(points), tuple(too_large))
