"""Streams to a pod through the API server: commands in a container, and connections to its ports.

Both are WebSockets whose messages begin with the number of a channel. Nothing here waits to send: what a program writes
and what it is given go on at the same time, whatever the other side does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from osctl.client import PODS, Client
from osctl.errors import OsctlError

if TYPE_CHECKING:  # imported late, by the client that makes it
    from websocket import WebSocket

_EXEC = "v5.channel.k8s.io"
"""Of Kubernetes 1.30 and newer: the first that can tell a program the end of its input."""
_FORWARD = "v4.channel.k8s.io"
_INPUT, _OUTPUT, _ERRORS, _STATUS, _SIZE, _CLOSE = 0, 1, 2, 3, 4, 255
_DATA, _FAULT = 0, 1
_CONTINUED, _TEXT, _BINARY, _CLOSED, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_PING_SECONDS = 10.0
"""Load balancers cut connections off on which nothing is said; 60 s is their habit."""
_SIZE_SECONDS = 0.5
"""How soon a program sees that its terminal has another size."""
_SILENT_SECONDS = 60.0
"""An API server that does not answer pings for so long is gone."""
_LINGER_SECONDS = 10.0
"""How long an answer may pause after a local program has said all it has to say."""
_PIECE = 32 * 1024
_FULL = 256 * 1024
"""No more is read to be sent while so much waits."""
_READY_ERRORS = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Channels:
    """A WebSocket with numbered channels, which never waits."""

    def __init__(self, web_socket: WebSocket) -> None:
        assert web_socket.sock is not None
        self._web_socket = web_socket
        self._socket = web_socket.sock
        self._socket.setblocking(False)
        self._outgoing = bytearray()
        self._channel = -1
        self._heard = self._pinged = time.monotonic()
        self.is_closed = False
        """Whether the API server has said its last word."""

    def close(self) -> None:
        """Give up the connection."""
        self._web_socket.shutdown()

    @property
    def is_full(self) -> bool:
        """Whether the other side is slower than what it is sent."""
        return len(self._outgoing) > _FULL

    def send(self, channel: int, data: bytes) -> None:
        """Send this on a channel, soon."""
        self._queue(bytes([channel]) + data, _BINARY)

    def wait(self, reader: Any = None, *, seconds: float = _PING_SECONDS) -> bool:
        """Wait until there is something to do, or so long; returns whether there is something to read from `reader`.

        Raises:
            OsctlError: the API server has fallen silent.
        """
        now = time.monotonic()
        if now - self._heard > _SILENT_SECONDS:
            raise OsctlError(f"the API server has said nothing for {_SILENT_SECONDS:g} s", hint="check the network")
        if now - self._pinged >= _PING_SECONDS:
            self._pinged = now
            self._queue(b"", _PING)
        readers = [self._socket] + ([] if reader is None else [reader])
        writers = [self._socket] if self._outgoing else []
        ready, _, _ = select.select(readers, writers, [], seconds)
        self._flush()
        return reader in ready

    def received(self) -> Iterator[tuple[int, bytes]]:
        """What has arrived: (channel, data)."""
        from websocket import WebSocketException

        while not self.is_closed:
            try:
                frame = self._web_socket.recv_frame()
            except _READY_ERRORS:
                return
            except (OSError, WebSocketException):
                self.is_closed = True
                return
            self._heard = time.monotonic()
            data = frame.data if isinstance(frame.data, bytes) else str(frame.data).encode()
            if frame.opcode == _CLOSED:
                self.is_closed = True
            elif frame.opcode == _PING:
                self._queue(data, _PONG)
            elif frame.opcode in (_TEXT, _BINARY) and data:
                self._channel = data[0]
                yield self._channel, data[1:]
            elif frame.opcode == _CONTINUED:
                yield self._channel, data

    def _queue(self, data: bytes, opcode: int) -> None:
        from websocket import ABNF

        self._outgoing += ABNF.create_frame(data, opcode).format()

    def _flush(self) -> None:
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing[:_PIECE])
            except _READY_ERRORS:
                return
            except OSError:
                self.is_closed = True
                return
            del self._outgoing[:sent]


# ------------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Container:
    """Where a command runs."""

    namespace: str
    pod: str
    name: str


def run_command(
    client: Client,
    container: Container,
    command: list[str],
    *,
    write: Callable[[int, bytes], None],
    given: int | None = None,
    size: Callable[[], tuple[int, int]] | None = None,
) -> int:
    """Run a command in a container and return its exit code.

    Args:
        client: the API server.
        container: where.
        command: the program and its arguments.
        write: takes what it writes: 1 for its output and 2 for its errors, and the bytes.
        given: descriptor that its input is read from; none unless given.
        size: columns and rows of the terminal that it is to have; no terminal unless given.

    Raises:
        ApiError: it is refused.
        OsctlError: it could not be started, or was cut off.
    """
    flags = {"stdin": given is not None, "stdout": True, "stderr": size is None, "tty": size is not None}
    query = [("container", container.name), *(("command", word) for word in command)]
    query += [(name, "true") for name, is_set in flags.items() if is_set]
    path = f"{PODS.path(container.namespace, container.pod)}/exec"
    channels = Channels(client.upgrade(path, query, _EXEC))
    try:
        status = _converse(channels, write=write, given=given, size=size)
    finally:
        channels.close()
    return _exit_code(status, container)


def _converse(
    channels: Channels,
    *,
    write: Callable[[int, bytes], None],
    given: int | None,
    size: Callable[[], tuple[int, int]] | None,
) -> bytes:
    """Pass everything on until the API server tells how the command ended, which it returns."""
    shown: tuple[int, int] | None = None
    status = b""
    pause = _PING_SECONDS if size is None else _SIZE_SECONDS
    while not channels.is_closed:
        if size is not None and (now := size()) != shown:
            shown = now
            channels.send(_SIZE, json.dumps({"Width": now[0], "Height": now[1]}).encode())
        if channels.wait(None if channels.is_full else given, seconds=pause) and given is not None:
            data = os.read(given, _PIECE)
            channels.send(_INPUT, data) if data else channels.send(_CLOSE, bytes([_INPUT]))
            given = given if data else None
        for channel, data in channels.received():
            if channel in (_OUTPUT, _ERRORS):
                write(channel, data)
            elif channel == _STATUS:
                status += data
    return status


def _exit_code(status: bytes, container: Container) -> int:
    try:
        told = json.loads(status)
    except ValueError:
        raise OsctlError(
            f"the connection to {container.pod} was cut off", hint="the pod may have ended: `osctl status RUN` tells"
        ) from None
    if told.get("status") == "Success":
        return 0
    causes = (told.get("details") or {}).get("causes") or ()
    codes = [str(cause.get("message")) for cause in causes if cause.get("reason") == "ExitCode"]
    if codes and codes[0].isdigit():
        return int(codes[0])
    raise OsctlError(
        f"{container.pod}: {told.get('message') or 'the command could not be started'}",
        hint="is the program in the image, and does the container run?",
    )


# ---------------------------------------------------------------------------------------------------------------- ports


def open_port(client: Client, namespace: str, pod: str, port: int) -> Channels:
    """One connection to a port of a pod. Raises ApiError."""
    path = f"{PODS.path(namespace, pod)}/portforward"
    return Channels(client.upgrade(path, [("ports", str(port))], _FORWARD))


def carry(channels: Channels, local: socket.socket) -> str:
    """Pass everything on between a local connection and one of `open_port`, until either ends.

    Returns what the pod's side complained of; empty where nothing was wrong.
    """
    greeted: set[int] = set()
    problem, deadline = "", None
    reader: socket.socket | None = local
    while not channels.is_closed and (deadline is None or time.monotonic() < deadline):
        if channels.wait(None if channels.is_full else reader) and reader is not None:
            data = _read(local)
            if data:
                channels.send(_DATA, data)
            else:  # it may still listen; the other side cannot be told that nothing more will come
                reader, deadline = None, time.monotonic() + _LINGER_SECONDS
        for channel, data in channels.received():
            if channel not in greeted:  # the first message of each is the port's number
                greeted.add(channel)
                data = data[2:]
            if channel == _FAULT and data:
                problem += data.decode(errors="replace")
            elif channel == _DATA and data:
                deadline = None if deadline is None else time.monotonic() + _LINGER_SECONDS
                try:
                    local.sendall(data)
                except OSError:  # nobody listens any more
                    return problem
        if problem:
            return problem
    return problem


def _read(local: socket.socket) -> bytes:
    with contextlib.suppress(OSError):
        return local.recv(_PIECE)
    return b""
