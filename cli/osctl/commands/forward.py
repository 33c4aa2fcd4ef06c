"""`osctl forward`."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass
from typing import Annotated

import typer

from osctl.errors import ApiError, OsctlError, UsageError
from osctl.options import Rank, RunName
from osctl.ranks import find_running_pod
from osctl.session import Session
from osctl.streams import Channels, carry, open_port

_ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class _Port:
    local: int
    """0 takes a free one."""
    remote: int


def forward(
    session: Session,
    run: RunName,
    ports: Annotated[
        list[str],
        typer.Argument(metavar="[LOCAL:]PORT...", help="Port of the pod, and the one here where it is another."),
    ],
    rank: Rank = "0",
) -> None:
    """Connect ports of this machine with those of a rank.

    It goes on until Ctrl-C. Only this machine can reach them, at 127.0.0.1. `:PORT` takes a free port here and says
    which. Connections that come after a restart of the run go to its new pod. It needs the right to create
    pods/portforward.

    Examples: `osctl forward first 6006`, `osctl forward first 8080:80`, `osctl forward first :29500 --rank 4`.
    """
    wanted = [_parse(word) for word in ports]
    tunnel = _Tunnel(session, run, rank)
    listeners = [_listen(port) for port in wanted]
    try:
        for listener, port in zip(listeners, wanted, strict=True):
            session.output.note(f"{_ADDRESS}:{listener.getsockname()[1]} leads to port {port.remote} of {tunnel.pod}")
            threading.Thread(target=tunnel.serve, args=(listener, port.remote), daemon=True).start()
        threading.Event().wait()
    finally:
        for listener in listeners:
            listener.close()


class _Tunnel:
    """Connections to the pod that a rank is in at the time."""

    def __init__(self, session: Session, run: str, rank: str) -> None:
        self._session = session
        self._run = run
        self._rank = rank
        self._lock = threading.Lock()
        self.pod = find_running_pod(session, run, rank).name

    def serve(self, listener: socket.socket, port: int) -> None:
        """Take connections for ever, each in a thread of its own."""
        while True:
            try:
                local, _ = listener.accept()
            except OSError:  # closed: the command ends
                return
            threading.Thread(target=self._carry, args=(local, port), daemon=True).start()

    def _carry(self, local: socket.socket, port: int) -> None:
        with local:
            try:
                channels = self._open(port)
                try:
                    problem = carry(channels, local)
                finally:
                    channels.close()
            except OsctlError as error:
                problem = error.message
        if problem:
            self._session.output.note(f"port {port}: {' '.join(problem.split())}")

    def _open(self, port: int) -> Channels:
        session, pod = self._session, self.pod
        try:
            return open_port(session.client, session.namespace, pod, port)
        except ApiError as error:
            if error.status not in (400, 404):
                raise
        with self._lock:  # the pod is gone: the run may have another by now
            if self.pod == pod:
                self.pod = find_running_pod(session, self._run, self._rank).name
        return open_port(session.client, session.namespace, self.pod, port)


def _parse(word: str) -> _Port:
    local, colon, remote = word.rpartition(":")
    numbers = [int(text) if text.isascii() and text.isdigit() and len(text) < 6 else -1 for text in (local, remote)]
    if colon and not local:
        numbers[0] = 0
    elif not colon:
        numbers[0] = numbers[1]
    if not (0 <= numbers[0] <= 65_535 and 1 <= numbers[1] <= 65_535):
        raise UsageError(f"{word!r} is no port", hint="give PORT, LOCAL:PORT or :PORT, with numbers up to 65535")
    return _Port(numbers[0], numbers[1])


def _listen(port: _Port) -> socket.socket:
    try:
        return socket.create_server((_ADDRESS, port.local))
    except OSError as error:
        raise OsctlError(
            f"port {port.local} of this machine cannot be used: {os.strerror(error.errno or 0)}",
            hint=f"`:{port.remote}` takes a free one",
        ) from error
