"""`osctl tb`: TensorBoard on a run, also while it goes on."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from osctl.completing import complete_target
from osctl.errors import ExitCode, OsctlError
from osctl.event_files import follow
from osctl.output import printable
from osctl.run_directory import open_run_directory
from osctl.session import Session

if TYPE_CHECKING:  # imported late: it takes a while
    from opensora.storage import Storage

_HOST = "127.0.0.1"
_USUAL_PORT = 6006
_START_SECONDS = 120.0
_STOP_SECONDS = 5.0
_PATIENCE_SECONDS = 10.0
"""For a store that is away: the page stays, and the next look tries again."""
_LOOK_SECONDS = 0.2
_LAST_WORDS = 5


def tb(
    session: Session,
    run: Annotated[
        str,
        typer.Argument(metavar="RUN|URI", help="Name of the run, or a run directory.", autocompletion=complete_target),
    ],
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Of the page. [default: 6006, or a free one]")
    ] = None,
    every: Annotated[float, typer.Option("--every", min=1, metavar="SECONDS", help="Between looks for news.")] = 15.0,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Run TensorBoard on the metrics of a run.

    Its files are copied from the run directory, and go on being copied while the run goes on; a run directory on this
    machine is read where it is. Ctrl-C ends it.

    Examples: `osctl tb first`, `osctl tb s3://bucket/runs/first --port 7000`.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise OsctlError("TensorBoard is not installed", hint='pip install tensorboard, or "opensora[train]"')
    from opensora.records import TENSORBOARD_PREFIX
    from opensora.storage import Storage

    storage = open_run_directory(session, run).storage
    config = replace(storage.config, retry_deadline_seconds=_PATIENCE_SECONDS)
    source = Storage(storage.uri, config=config).child(TENSORBOARD_PREFIX)
    with tempfile.TemporaryDirectory(prefix="osctl-tb-") as name:
        folder = Path(source.uri) if source.is_local else Path(name)
        if not source.is_local:
            session.output.note(f"reading {source.uri}")
            follow(source, folder)
        if not any(folder.rglob("*")):
            session.output.note(f"{source.uri} has no files yet")
        try:
            with _tensorboard(folder, _port(port), every=every, log=Path(name) / "log") as (process, url):
                session.output.data(url)
                sys.stdout.flush()
                _open(session, url, wanted=open_page)
                _keep_up(session, None if source.is_local else source, folder, process, every=every)
                raise OsctlError(f"TensorBoard has ended: {_last_words(Path(name) / 'log')}")
        except KeyboardInterrupt:
            session.output.note("TensorBoard ends")


@contextmanager
def _tensorboard(folder: Path, port: int, *, every: float, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A TensorBoard that answers, and its address. Raises OsctlError where it does not start."""
    from opensora.processes import die_with_parent

    url = f"http://{_HOST}:{port}/"
    command = [
        sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", _HOST, "--port", str(port),
        "--reload_interval", str(every),
    ]  # fmt: skip
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, preexec_fn=die_with_parent()
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise OsctlError(f"TensorBoard did not start: {_last_words(log)}", hint="--port chooses another port")
            time.sleep(_LOOK_SECONDS)
        yield process, url
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _keep_up(
    session: Session, source: Storage | None, folder: Path, process: subprocess.Popen[bytes], *, every: float
) -> None:
    """Copy what is new until TensorBoard ends."""
    from opensora.errors import StorageError

    is_away = False
    due = time.monotonic() + every
    while process.poll() is None:
        time.sleep(_LOOK_SECONDS)
        if source is None or time.monotonic() < due:
            continue
        try:
            follow(source, folder)
            if is_away:
                session.output.note("the store answers again")
            is_away = False
        except StorageError as error:
            if not is_away:
                session.output.note(f"{error.message}; what is here is shown, and the store is asked again")
            is_away = True
        due = time.monotonic() + every


def _port(wanted: int | None) -> int:
    """A free port. Raises OsctlError where the one that was asked for is taken."""
    for candidate in [wanted] if wanted is not None else [_USUAL_PORT, 0]:
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OsctlError(f"port {wanted} is taken", hint="leave out --port to have one chosen", exit_code=ExitCode.CONFLICT)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except OSError:
        return False
    return True


def _open(session: Session, url: str, *, wanted: bool) -> None:
    if wanted:
        import webbrowser

        if not webbrowser.open(url):
            session.output.note(f"no browser could be started: open {url} yourself")


def _last_words(log: Path) -> str:
    lines = [printable(line) for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_WORDS:]) or "it said nothing"
