"""How far a transfer is: a bar on a terminal, a line now and then elsewhere, nothing with `-q`."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from osctl.output import Output, size_text

_LINE_SECONDS = 15.0
"""Between lines where there is no terminal."""
OnBytes = Callable[[int], None]


@contextmanager
def transfer_progress(output: Output, total: int) -> Iterator[OnBytes]:
    """Shows bytes as they come; what the core has to say meanwhile, of a store that is away, stands above."""
    if output.quiet:
        yield lambda count: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(output, total) as on_bytes:
            yield on_bytes
    else:
        with _core_messages(output.note):
            yield _Lines(output, total)


class _Lines:
    """A line when enough time is over."""

    def __init__(self, output: Output, total: int) -> None:
        self._output = output
        self._total = total
        self._done = 0
        self._next = time.monotonic() + _LINE_SECONDS
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _LINE_SECONDS
            percent = 100 * self._done // self._total if self._total else 100
            self._output.note(f"{size_text(self._done)} of {size_text(self._total)} ({percent} %)")


@contextmanager
def _bar(output: Output, total: int) -> Iterator[OnBytes]:
    from rich.console import Console  # slow to import, and only a terminal needs it
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, no_color=not output.has_color(sys.stderr))
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def note(text: str) -> None:
            progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        with _core_messages(note):
            yield lambda count: progress.advance(task, count)


class _Forward(logging.Handler):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(self.format(record))


@contextmanager
def _core_messages(note: Callable[[str], None]) -> Iterator[None]:
    logger = logging.getLogger("opensora")
    handler, level = _Forward(note), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
