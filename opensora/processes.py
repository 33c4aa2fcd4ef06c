"""Programs that this process starts and never leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_START = """
import ctypes, os, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG, SIGKILL = 1, 9
    ctypes.CDLL(None).prctl(ctypes.c_int(PR_SET_PDEATHSIG), ctypes.c_ulong(SIGKILL))
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
_STOP_SECONDS = 60.0
"""How long a program may take to stop in order; ranks save first."""


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program; it never outlasts the block, nor this process.

    Ctrl-C reaches this process alone, which then asks the program to stop and waits for it.

    Args:
        command: program and arguments.
        options: of `subprocess.Popen`.
    """
    process = subprocess.Popen(
        command, process_group=0, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent(), **options
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            process.kill()
            process.wait()


def die_with_parent() -> Callable[[], None] | None:
    """What a child does before it becomes its program: ask Linux to kill it when this process (its thread) ends."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes  # the launcher does without it, and starts sooner

    libc = ctypes.CDLL(None)  # loaded here: between fork and exec little is safe
    set_death_signal = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>

    def ask() -> None:
        libc.prctl(set_death_signal, signal.SIGKILL)

    return ask


def dying_with_this_process(command: Sequence[str]) -> list[str]:
    """The command as a program of its own, which becomes that command after asking Linux to kill it when this process
    (its thread) ends; the request survives the exec. For processes with threads: code between fork and exec is not
    safe there. The command begins with the whole path of its program.
    """
    return [sys.executable, "-I", "-S", "-c", _START, str(os.getpid()), *command]
