"""Starts programs with their output in a file, and ends them by their id."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from opensora.processes import die_with_parent


class StartError(Exception):
    """A program did not come up. The message ends with what it said."""


class Process:
    """One program. It also ends with the thread that started it, on Linux: start it from one that lives on."""

    def __init__(
        self, name: str, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        """What it said, over all its starts."""
        self._command = [str(part) for part in command]
        self._environment = environment
        self._popen: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Its process id while it has been started and not ended by us."""
        assert self._popen is not None, f"{self.name} has not been started"
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended, by itself or by us."""
        return self._popen is not None and self._popen.poll() is None

    def start(self) -> None:
        """Start it; a second start before its end is a mistake."""
        assert not self.is_running, f"{self.name} runs already"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._popen = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(os.environ if self._environment is None else self._environment),
                start_new_session=True,  # Ctrl-C at a terminal must not end it before those who need it
                preexec_fn=die_with_parent(),
            )

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait for a sign of life. Raises StartError when it ends, or when time is up."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.is_running:
                raise StartError(f"{self.name} ended at its start:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise StartError(f"{self.name} was not ready after {seconds:.0f} s:\n{self.log_tail()}")
            time.sleep(0.05)

    def wait(self) -> None:
        """Wait until it has ended by itself."""
        if self._popen is not None:
            self._popen.wait()

    def terminate(self, seconds: float = 10.0) -> None:
        """Ask it to end, and kill it when that takes longer."""
        if self._popen is None:
            return
        self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """End it at once. That it has ended is fine."""
        if self._popen is None:
            return
        self._popen.kill()
        self._popen.wait()
        self._popen = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def log_tail(self, num_lines: int = 25) -> str:
        """The last lines of what it said."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-num_lines:])


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nothing listens on, below those that the system hands out to clients."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
        return port
