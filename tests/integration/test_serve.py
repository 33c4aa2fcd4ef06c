"""`python -m opensora.quickstart.serve`: a store with clips, for others."""

from __future__ import annotations

import csv
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from opensora.errors import ExitCode
from opensora.quickstart.object_store import ObjectStore
from opensora.storage import Storage

pytestmark = pytest.mark.integration

KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1]) % 20_000 + 20_000  # the server takes the port 10000 above as well


def start(folder: Path, *arguments: str, keys: dict[str, str]) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "opensora.quickstart.serve", "--folder", str(folder), *arguments]
    return subprocess.Popen(command, env=environment | keys, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    process = start(folder, "--address", "0.0.0.0", "--port", str(port), keys=KEYS)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "ready").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "not ready in time"
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_clips_and_their_catalogue_are_there_once_it_is_ready(
    server: subprocess.Popen[str], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "x"}.items():
        monkeypatch.setenv(name, value)
    clips = Storage("s3://opensora/clips")
    rows = list(csv.DictReader(io.StringIO(clips.read("clips.csv").decode())))
    assert len(rows) == 7
    assert all(b"ftyp" in clips.read(row["path"])[:16] for row in rows)


def test_others_reach_s3_and_nothing_else(server: subprocess.Popen[str], port: int) -> None:
    (weed,) = psutil.Process(server.pid).children()
    listening = {found.laddr for found in weed.net_connections("tcp") if found.status == psutil.CONN_LISTEN}
    # gRPC of S3 is beside its port.
    assert {place.port for place in listening if not place.ip.startswith("127.")} <= {port, port + 10_000}


def test_strangers_are_refused(server: subprocess.Popen[str], port: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/opensora/clips/clips.csv", timeout=10)
    assert refusal.value.code == 403
    refusal.value.close()


def test_sigterm_ends_it_with_its_server(server: subprocess.Popen[str], folder: Path) -> None:
    (weed,) = psutil.Process(server.pid).children()
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=30) == ExitCode.DONE
    assert not (folder / "ready").exists()
    assert not weed.is_running()


def test_without_keys_it_does_not_start(tmp_path: Path) -> None:
    process = start(tmp_path, keys={"AWS_ACCESS_KEY_ID": "someone"})
    assert "AWS_SECRET_ACCESS_KEY is not set" in process.communicate(timeout=60)[1]
    assert process.returncode == ExitCode.USAGE
    assert list(tmp_path.iterdir()) == []


def test_a_store_takes_the_port_that_it_is_given(tmp_path: Path) -> None:
    port = free_port()
    with ObjectStore(tmp_path, port=port, access_key="me", secret_key="mine") as store:
        assert store.endpoint_url == f"http://127.0.0.1:{port}"
        store.create_bucket("videos")
        assert store.is_running
    assert not store.is_running
