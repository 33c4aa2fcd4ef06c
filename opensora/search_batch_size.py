"""Entry point of the batch-size search: `python -m opensora.search_batch_size CONFIG [--bucket 240p/51 …]`.

The table goes to `--output` as JSON, for `data.batch_table` of a training config, and to stdout for people. The outcome
is the exit code (`opensora.errors.ExitCode`); in a pod, the termination message tells it as well. Importing this module
imports no torch: measurements are made in processes of their own.
"""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from opensora.batch_search.fresh_process import FreshProcesses
from opensora.batch_search.report import SearchReport, format_known
from opensora.batch_search.search import BatchSearch
from opensora.config.flags import parse_search_command
from opensora.config.load import load_search_config, load_train_config
from opensora.datasets.batch_table import BatchTable, Fit
from opensora.errors import ExitCode, OpenSoraError, StopRequestedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Search as the command line asks; returns the exit code."""
    messages = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("opensora").setLevel(logging.INFO)
    progress = _Progress()
    try:
        command = parse_search_command(sys.argv[1:] if arguments is None else arguments)
        settings = load_search_config(command.search)
        progress.begin((settings.bucket or ("",))[0])
        config = load_train_config(command.train.config, command.train.overrides, flags=command.train.flags)
        with (
            _stop_on_sigterm(),
            tempfile.TemporaryDirectory(prefix="opensora-search-", ignore_cleanup_errors=True) as folder,
        ):
            measure = FreshProcesses(config, settings, folder=Path(folder))
            search = BatchSearch(config, settings, measure=measure, tell=progress.tell)
            table = search.run()
    except OpenSoraError as error:
        messages.print(f"error: {error.message}", style="red", markup=False, highlight=False, soft_wrap=True)
        if error.hint:
            messages.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)
        progress.end(error.exit_code, error.message)
        return error.exit_code
    except KeyboardInterrupt:
        messages.print("interrupted; the same command continues", markup=False)
        return ExitCode.INTERRUPTED
    Console().print(rich_table(table, search.buckets))
    messages.print(f"table {table.key[:16]}: {settings.output}", markup=False, highlight=False, soft_wrap=True)
    return progress.finish(table, search.buckets)


def rich_table(table: BatchTable, buckets: Sequence[str]) -> Table:
    """The results for people."""
    shown = Table("bucket", "batch", "memory", "s/step", "fit", "measured")
    for name in buckets:
        evidence = table.evidence(name)
        sizes = [str(point.batch_size) for point in evidence.points] + [f"{size}✗" for size in evidence.too_large]
        if name in table.buckets:
            found = table.buckets[name]
            memory, seconds = _size(found.peak_bytes), f"{found.seconds_per_step:.3g}"
            shown.add_row(name, str(found.batch_size), memory, seconds, _line(found.fit), " ".join(sizes))
        else:
            shown.add_row(name, "–", "", "", table.failed[name].reason, " ".join(sizes))
    return shown


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.3g} GiB" if abs(num_bytes) >= 2**30 else f"{num_bytes / 2**20:.3g} MiB"


def _line(fit: Fit | None) -> str:
    return "" if fit is None else f"{_size(fit.constant_bytes)} + {_size(fit.bytes_per_clip)}/clip"


class _Progress:
    """Keeps the termination message up to date."""

    def __init__(self) -> None:
        self._report = SearchReport(bucket="")

    def begin(self, bucket: str) -> None:
        self._report = SearchReport(bucket=bucket)

    def tell(self, bucket: str, batch_size: int, table: BatchTable | None) -> None:
        """A measurement begins."""
        self._report = _describe(bucket, table)
        replace(self._report, trying=batch_size).write()

    def end(self, code: int, reason: str) -> None:
        """The search ends without a result."""
        self._report = replace(self._report, code=code, reason=reason)
        self._report.write()

    def finish(self, table: BatchTable, buckets: Sequence[str]) -> int:
        """The search has ended; returns the exit code: that of the first bucket that failed."""
        report = _describe(buckets[-1], table)
        code = next((table.failed[name].code for name in buckets if name in table.failed), int(ExitCode.DONE))
        replace(report, code=code).write()
        return code


def _describe(bucket: str, table: BatchTable | None) -> SearchReport:
    if table is None:
        return SearchReport(bucket=bucket)
    report = SearchReport(
        bucket=bucket,
        known=format_known(table.evidence(bucket)),
        empty_bytes=table.empty_bytes,
        facts=table.facts,
    )
    if bucket in table.failed:
        return replace(report, reason=table.failed[bucket].reason)
    if bucket in table.buckets:
        found = table.buckets[bucket]
        return replace(
            report,
            batch_size=found.batch_size,
            peak_bytes=found.peak_bytes,
            seconds_per_step=found.seconds_per_step,
        )
    return report


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise StopRequestedError("stopped by SIGTERM; what was measured is kept", hint="the same command continues")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
