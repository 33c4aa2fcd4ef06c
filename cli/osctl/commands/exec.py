"""`osctl exec`."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from opensora_operator.constants import TRAINER

from osctl.errors import UsageError
from osctl.options import Rank, RunName
from osctl.ranks import find_running_pod
from osctl.session import Session
from osctl.streams import Container, run_command

_SHELL = ["sh", "-c", "command -v bash >/dev/null && exec bash || exec sh"]


def exec(
    session: Session,
    run: RunName,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND...]", help="Program and arguments. [default: a shell]"),
    ] = None,
    rank: Rank = "0",
    stdin: Annotated[bool, typer.Option("--stdin", "-i", help="Pass standard input on.")] = False,
) -> int:
    """Run a command in the pod of a rank.

    From a terminal to a terminal it is interactive; with redirections it is not, and `-i` passes input on. It needs
    the right to create pods/exec, and ends with the command's own exit code.

    Examples: `osctl exec first`, `osctl exec first --rank 3 -- nvidia-smi`, `osctl exec first --rank first-failed --
    env`, `osctl exec first -i -- sh -s < script.sh`.
    """
    is_interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if not command and not is_interactive and not stdin:
        raise UsageError("a shell needs a terminal", hint=f"osctl exec {run} -- COMMAND")
    wants_input = stdin or is_interactive
    if wants_input and os.name == "nt":
        raise UsageError("input is not passed on from Windows", hint=f"kubectl exec -it PODS -c {TRAINER} does it")
    pod = find_running_pod(session, run, rank)
    session.output.detail(f"pod {pod.name} on {pod.node}")
    sys.stdout.flush()
    with _raw_terminal() if is_interactive else contextlib.nullcontext():
        return run_command(
            session.client,
            Container(session.namespace, pod.name, TRAINER),
            command or _SHELL,
            write=_write,
            given=sys.stdin.fileno() if wants_input else None,
            size=shutil.get_terminal_size if is_interactive else None,
        )


def _write(channel: int, data: bytes) -> None:
    """As it comes: a program at work in a terminal of its own moves the cursor."""
    stream: Any = (sys.stdout if channel == 1 else sys.stderr).buffer
    stream.write(data)
    stream.flush()


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the program, Ctrl-C too."""
    import termios  # not on Windows
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
