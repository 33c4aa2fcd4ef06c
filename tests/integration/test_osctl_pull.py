"""`osctl pull` from a real S3 server: killed on its way, and with a store that goes away."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folder import add_checkpoint, content_of, make_run

from opensora.quickstart.object_store import ObjectStore
from opensora.storage import Storage

pytestmark = pytest.mark.integration
MIB = 2**20


@pytest.fixture
def run(bucket: str) -> Storage:
    """Large enough to be in the middle of for a while."""
    run = make_run(f"s3://{bucket}/runs/first")
    add_checkpoint(run, 500, num_objects=12, size=16 * MIB)
    return run


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "osctl", "pull", *words]


def _start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(*words), cwd=folder, env={**os.environ, "HOME": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _bytes_in(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # has got its own name meanwhile
            continue
    return found


def _until(folder: Path, num_bytes: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while _bytes_in(folder) < num_bytes:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _checkpoint(run: Storage) -> dict[str, bytes]:
    return {path: data for path, data in content_of(run).items() if "step-00000500" in path and "checkpoints" in path}


def test_killed_it_leaves_no_half_file_and_goes_on(run: Storage, tmp_path: Path) -> None:
    words = (run.uri, "--what", "checkpoints", "--to", "here", "--jobs", "2")
    process = _start(tmp_path, *words)
    _until(tmp_path, 40 * MIB, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    expected = _checkpoint(run)
    left = {path: data for path, data in content_of(Storage(str(tmp_path / "here"))).items() if ".osctl" not in path}
    assert left.items() <= expected.items(), "what has its name is whole"
    assert not any(path.endswith("manifest.json") for path in left)
    parts = sum(path.stat().st_size for path in (tmp_path / "here" / ".osctl-pull").glob("*.part"))
    assert sum(map(len, left.values())) + parts > 30 * MIB
    done = subprocess.run(_command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert f"{len(left)} were here already" in done.stderr
    assert content_of(Storage(str(tmp_path / "here"))) == expected


def test_a_store_that_comes_back_costs_nothing_but_time(
    run: Storage, object_store: ObjectStore, tmp_path: Path
) -> None:
    process = _start(tmp_path, run.uri, "--what", "checkpoints", "--to", "here", "--jobs", "2")
    _until(tmp_path, 20 * MIB, process)
    object_store.kill()
    object_store.start()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert content_of(Storage(str(tmp_path / "here"))) == _checkpoint(run)


def test_a_store_that_stays_away_ends_it_with_what_to_do(
    run: Storage, object_store: ObjectStore, tmp_path: Path
) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "OSCTL_STORE_PATIENCE_SECONDS": "2"}
    words = _command(run.uri, "--what", "checkpoints", "--to", "here", "--jobs", "2")
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _until(tmp_path, 20 * MIB, process)
    object_store.kill()
    try:
        _, err = process.communicate(timeout=120)
    finally:
        object_store.start()
    assert process.returncode == 1
    assert "did not answer for 2 s" in err
    assert f"the same command goes on where it was: osctl pull {run.uri} --what checkpoints" in err
    assert "Traceback" not in err
    subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=120, check=True)
    assert content_of(Storage(str(tmp_path / "here"))) == _checkpoint(run)


def test_control_c_ends_it_at_once_also_while_the_store_is_away(
    run: Storage, object_store: ObjectStore, tmp_path: Path
) -> None:
    process = _start(tmp_path, run.uri, "--what", "checkpoints", "--to", "here", "--jobs", "2")
    _until(tmp_path, 20 * MIB, process)
    object_store.kill()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "does not answer" in line:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        object_store.start()
    assert process.returncode == 130
    assert "interrupted; the same command goes on where it was" in err


@pytest.fixture
def terminal() -> Iterator[tuple[int, list[bytes]]]:
    """The end of a terminal that a process writes to, and what it wrote."""
    leader, follower = pty.openpty()
    written: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(leader, 65536):
                written.append(data)
        except OSError:  # closed at the other end
            return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield follower, written
    thread.join(10)
    os.close(leader)


def test_a_terminal_shows_a_bar(run: Storage, tmp_path: Path, terminal: tuple[int, list[bytes]]) -> None:
    follower, written = terminal
    environment = {**os.environ, "HOME": str(tmp_path), "TERM": "xterm-256color", "COLUMNS": "100"}
    words = _command(run.uri, "--what", "checkpoints", "--to", "here")
    done = subprocess.run(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=follower, timeout=120)
    os.close(follower)
    assert done.returncode == 0
    deadline = time.monotonic() + 10
    while b"copied" not in b"".join(written):
        assert time.monotonic() < deadline, written
        time.sleep(0.01)
    shown = b"".join(written).decode()
    assert "/192.0 MiB" in shown
    assert done.stdout.decode().startswith("WHAT ")
    assert "\x1b" not in done.stdout.decode()
