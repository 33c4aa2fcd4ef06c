"""What ranks print: forwarded line by line to the launcher's own output, and kept in the run directory.

Bytes stay bytes: nothing is decoded on the way, so binary output and broken encodings pass.
"""

from __future__ import annotations

import logging
import os
import re
import select
from collections import deque
from typing import Protocol

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 64 * 1024
"""A longer line is broken into pieces of this size."""
READ_BYTES = 64 * 1024

_REDRAW = re.compile(rb"\r|\x1b\[[0-9;]*[ABEFHJf]|\x1b\[[12]K")
"""Moves the cursor to where text stands already, or erases text: what was before it is no longer seen."""
_ESCAPE = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
"""Any other control sequence (ECMA-48): colours, titles, the cursor's visibility."""
_ERASE_LINE = b"\r\x1b[2K"
_SHOW_CURSOR = b"\x1b[?25h"
_HIDE_CURSOR = b"\x1b[?25l"


class Log(Protocol):
    """Where lines are kept."""

    def write(self, line: bytes) -> None: ...


class Screen:
    """One of the launcher's own outputs. Lines of several ranks share it, one of them may draw a progress bar on it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._gone = False
        self._mid_line = False
        self._cursor_hidden = False

    def write_line(self, line: bytes) -> None:
        """A whole line. A half-drawn one is wiped first; its owner draws it again."""
        self._write((_ERASE_LINE if self._mid_line else b"") + line)
        self._mid_line = False

    def write(self, text: str) -> None:
        """A line of the launcher's own log; `logging` writes each in one call."""
        self.write_line(text.encode(errors="backslashreplace"))

    def write_raw(self, data: bytes) -> None:
        """Bytes of the rank that owns the cursor."""
        self._mid_line = not data.endswith(b"\n")
        shown, hidden = data.rfind(_SHOW_CURSOR), data.rfind(_HIDE_CURSOR)
        self._cursor_hidden = hidden > shown or (self._cursor_hidden and shown < 0)
        self._write(data)

    def restore(self) -> None:
        """Leave the terminal as it was found, also after a rank that was killed while drawing."""
        self._write((_SHOW_CURSOR if self._cursor_hidden else b"") + (b"\n" if self._mid_line else b""))
        self._mid_line = self._cursor_hidden = False

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._gone:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # inherited from whoever made it non-blocking
                select.select([], [self._fd], [])
            except OSError:  # the reader of a pipe or the terminal is gone: the run goes on without it
                self._gone = True


class RankStream:
    """One output of one rank on its way to a screen and a log."""

    def __init__(
        self, fd: int, *, screen: Screen, prefix: bytes, raw: bool, log: Log | None, last_words: deque[bytes]
    ) -> None:
        self.fd = fd
        self._screen = screen
        self._prefix = prefix
        self._raw = raw
        self._log = log
        self._last_words = last_words
        self._rest = b""

    def pump(self) -> bool:
        """Forward what has arrived; False at the end of the output. Blocks when nothing has arrived."""
        data = os.read(self.fd, READ_BYTES)
        if data and self._raw:
            self._screen.write_raw(data)
        lines, self._rest = split_lines(self._rest + data)
        if not data and self._rest:
            lines, self._rest = [*lines, self._rest + b"\n"], b""
        for line in lines:
            self._take(line)
        return bool(data)

    def close(self) -> None:
        if self._rest:
            self._take(self._rest + b"\n")
        os.close(self.fd)

    def _take(self, line: bytes) -> None:
        if not self._raw:
            self._screen.write_line(self._prefix + line)
        text = log_text(line)
        if text is not None:
            self._last_words.append(text)
            if self._log is not None:
                self._log.write(text + b"\n")


def split_lines(data: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines, each with its newline, and the rest. A line that is too long is broken.

    Of a long rest that is drawn over and over with carriage returns, as progress bars are, only the last drawing stays.
    """
    *whole, rest = data.split(b"\n")
    if len(rest) > MAX_LINE_BYTES:
        rest = rest[rest.rfind(b"\r") + 1 :]
    lines = []
    for line in whole:
        pieces = [line[start : start + MAX_LINE_BYTES] for start in range(0, len(line), MAX_LINE_BYTES)] or [b""]
        lines += [piece + b"\n" for piece in pieces]
    while len(rest) > MAX_LINE_BYTES:
        lines.append(rest[:MAX_LINE_BYTES] + b"\n")
        rest = rest[MAX_LINE_BYTES:]
    return lines, rest


def log_text(line: bytes) -> bytes | None:
    """What a reader of a terminal sees of a line in the end, without its newline; None when that is nothing.

    A progress bar and the message printed above it share a line of the output; the message stays.
    """
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    if b"\r" not in line and b"\x1b" not in line:
        return line
    text = _ESCAPE.sub(b"", _REDRAW.split(line)[-1])
    return text if text.strip() else None
