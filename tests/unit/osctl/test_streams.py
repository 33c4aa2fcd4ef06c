"""Streams to pods: commands with their input and exit code, and connections to ports."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_api import refusal
from fake_kubelet import FakeKubelet
from osctl.client import Client
from osctl.errors import ApiError, OsctlError
from osctl.kubeconfig import Access
from osctl.streams import Container, carry, open_port, run_command

PLACE = Container("team", "first-a1-0", "trainer")


@pytest.fixture
def kubelet() -> Iterator[FakeKubelet]:
    with FakeKubelet() as running:
        yield running


class _Screen:
    def __init__(self) -> None:
        self.text = {1: b"", 2: b""}

    def write(self, channel: int, data: bytes) -> None:
        self.text[channel] += data


def _run(kubelet: FakeKubelet, *command: str, **more: Any) -> tuple[int, bytes, bytes]:
    screen = _Screen()
    code = run_command(_client(kubelet), PLACE, list(command), write=screen.write, **more)
    return code, screen.text[1], screen.text[2]


def _client(kubelet: FakeKubelet) -> Client:
    return Client(Access(server=kubelet.url, namespace="team", source="a file", token="secret"))


def test_a_commands_output_errors_and_code_come_back(kubelet: FakeKubelet) -> None:
    assert _run(kubelet, "echo", "a b", "ü&=;") == (0, b"a b \xc3\xbc&=;\n", b"and a complaint\n")
    path, query, headers = kubelet.asked[0]
    assert path == "/api/v1/namespaces/team/pods/first-a1-0/exec"
    assert query == [
        ("container", "trainer"), ("command", "echo"), ("command", "a b"), ("command", "ü&=;"),
        ("stdout", "true"), ("stderr", "true"),
    ]  # fmt: skip
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Sec-WebSocket-Protocol"] == "v5.channel.k8s.io"


@pytest.mark.parametrize("code", [1, 3, 137])
def test_the_exit_code_is_the_commands(kubelet: FakeKubelet, code: int) -> None:
    assert _run(kubelet, "fail", str(code))[0] == code


def test_input_is_passed_on_to_its_end_in_both_directions_at_once(kubelet: FakeKubelet, tmp_path: Path) -> None:
    """More than any buffer on the way holds: somebody who waits to send before reading would stand still."""
    text = os.urandom(1024) * 8192
    (tmp_path / "input").write_bytes(text)
    with open(tmp_path / "input", "rb") as file:
        code, out, _ = _run(kubelet, "cat", given=file.fileno())
    assert code == 0
    assert out == text


def test_a_terminal_has_a_size_and_no_errors_of_its_own(kubelet: FakeKubelet) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    try:
        assert _run(kubelet, "sizes", given=reader, size=lambda: (100, 30))[0] == 0
    finally:
        os.close(reader)
    assert kubelet.sizes == [{"Width": 100, "Height": 30}]
    query = dict(kubelet.asked[0][1])
    assert query["tty"] == query["stdin"] == "true"
    assert "stderr" not in query


@pytest.mark.parametrize(("program", "words"), [("none", "not found in $PATH"), ("vanish", "was cut off")])
def test_what_could_not_run_is_an_error(kubelet: FakeKubelet, program: str, words: str) -> None:
    with pytest.raises(OsctlError, match="first-a1-0") as caught:
        _run(kubelet, program)
    assert words in caught.value.message


def test_a_refusal_is_the_api_servers_own(kubelet: FakeKubelet) -> None:
    kubelet.refusal = refusal(403, "Forbidden", "alice cannot create pods/exec")
    with pytest.raises(ApiError, match="alice cannot create pods/exec") as caught:
        _run(kubelet, "echo")
    assert caught.value.exit_code == 8


def test_something_that_speaks_no_websocket_is_told(api: Any) -> None:
    api.on("GET", "/api/v1/namespaces/team/pods/first-a1-0/exec", {"kind": "Status"})
    client = Client(Access(server=api.url, namespace="team", source="a file"))
    with pytest.raises(OsctlError):
        run_command(client, PLACE, ["x"], write=_Screen().write)


# ---------------------------------------------------------------------------------------------------------------- ports


def _carry(kubelet: FakeKubelet, port: int) -> tuple[socket.socket, threading.Thread, list[str]]:
    near, far = socket.socketpair()
    near.settimeout(30)
    said: list[str] = []

    def work() -> None:
        channels = open_port(_client(kubelet), "team", "first-a1-0", port)
        with far:
            said.append(carry(channels, far))
        channels.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return near, thread, said


def test_a_port_takes_and_gives(kubelet: FakeKubelet) -> None:
    near, _, _ = _carry(kubelet, 7)
    text = os.urandom(1024) * 2048
    with near:
        threading.Thread(target=near.sendall, args=(text,), daemon=True).start()
        received = b""
        while len(received) < len(text):
            received += near.recv(65_536)
    assert received == text


def test_what_hangs_up_there_hangs_up_here(kubelet: FakeKubelet) -> None:
    near, thread, said = _carry(kubelet, 13)
    with near:
        assert near.recv(100) == b"hello"
        assert near.recv(100) == b""
    thread.join(30)
    assert said == [""]


def test_a_port_where_nothing_listens_says_so(kubelet: FakeKubelet) -> None:
    near, thread, said = _carry(kubelet, 99)
    with near:
        assert near.recv(100) == b""
    thread.join(30)
    assert said == ["dial tcp4 127.0.0.1:99: connection refused"]
