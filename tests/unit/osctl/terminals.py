"""A terminal for tests: a program in a pseudo-terminal, what is typed, and the screen that a person would see."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

_SECONDS = 30.0
_SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Screen:
    """Understands what a live view needs of a terminal: lines, the cursor, erasing. Anything else is a mistake."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns = columns
        self.lines = lines
        self.rows: list[str] = [""]
        """All rows, also those that have scrolled away."""
        self.row = 0
        self.column = 0
        self.is_cursor_shown = True

    def feed(self, text: str) -> None:
        """What the program writes."""
        position = 0
        while position < len(text):
            found = _SEQUENCE.match(text, position)
            if found is not None:
                self._obey(found[1], found[2])
                position = found.end()
                continue
            self._put(text[position])
            position += 1

    @property
    def shown(self) -> list[str]:
        """The rows that are on the screen."""
        return [row.rstrip() for row in self.rows[-self.lines :]]

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self.row += 1
            if self.row == len(self.rows):
                self.rows.append("")
        else:
            assert char >= " ", f"{char!r} on a terminal"
            row = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = row[: self.column] + char + row[self.column + 1 :]
            self.column += 1

    def _obey(self, arguments: str, command: str) -> None:
        if command == "A":
            top = max(0, len(self.rows) - self.lines)
            self.row = max(top, self.row - int(arguments or 1))
        elif command == "K" and arguments == "2":
            self.rows[self.row] = ""
        elif command in "hl" and arguments == "?25":
            self.is_cursor_shown = command == "h"
        else:
            assert command == "m", f"ESC [ {arguments} {command}"


class Terminal:
    """A program on a terminal of its own. A context manager; it ends with the block."""

    def __init__(
        self,
        *words: str,
        env: Mapping[str, str],
        folder: Path,
        columns: int = 80,
        lines: int = 40,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.settings = termios.tcgetattr(slave)
        self._slave = slave
        self.written: list[str] = []
        """What came in one piece."""
        self.screen = Screen(columns, lines)
        clean = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self._process = subprocess.Popen(
            words,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env={**clean, "TERM": env.get("TERM") or "xterm-256color"},
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._master)
        os.close(self._slave)

    @property
    def text(self) -> str:
        """Everything that was written."""
        return "".join(self.written)

    def type(self, keys: str) -> None:
        """Press keys; `\\x03` is Ctrl-C."""
        os.write(self._master, keys.encode())

    def until(self, check: Callable[[], object], what: str = "") -> None:
        """Read what is written until it is so."""
        deadline = time.monotonic() + _SECONDS
        while not check():
            if not self._read(0.05) and self._process.poll() is not None and not self._read(0.0) and not check():
                raise AssertionError(f"it has ended with {self._process.returncode} before {what}:\n{self.text}")
            assert time.monotonic() < deadline, f"no {what}:\n" + "\n".join(self.screen.shown)

    def until_shown(self, pattern: str) -> None:
        """Read until the screen has this."""
        self.until(lambda: re.search(pattern, "\n".join(self.screen.shown)), f"{pattern!r}")

    def ended(self) -> int:
        """Read to the end; returns the exit code."""
        self.until(lambda: self._process.poll() is not None, "end")
        while self._read(0.0):
            pass
        return self._process.returncode

    def has_its_settings(self) -> bool:
        """Whether the terminal is as it was before the program."""
        return termios.tcgetattr(self._slave) == self.settings

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], seconds)
        if not ready:
            return False
        piece = os.read(self._master, 1 << 16).decode(errors="replace")
        self.written.append(piece)
        self.screen.feed(piece)
        return True


def _take_terminal() -> None:
    """In the child: its terminal sends it Ctrl-C."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def osctl_words(*words: str) -> list[str]:
    """The command line of `osctl` as a program."""
    return [sys.executable, "-m", "osctl", *words]
