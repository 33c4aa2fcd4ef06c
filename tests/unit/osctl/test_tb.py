"""`osctl tb`: what it says without TensorBoard, and how files grow on this side as they do on the other."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest
from osctl.event_files import follow

from opensora.storage import Storage


def test_without_tensorboard_it_says_what_to_install(osctl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = osctl("tb", "./run")
    assert code == 1
    assert err == 'error: TensorBoard is not installed\nhint: pip install tensorboard, or "opensora[train]"\n'


def test_a_port_that_is_taken_is_refused(osctl: Any, home: Path) -> None:
    Storage(str(home / "run")).write("tensorboard/events", b"")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        code, _, err = osctl("tb", "./run", "--port", str(port))
    assert code == 4
    assert f"port {port} is taken" in err


def test_files_grow_in_place(tmp_path: Path) -> None:
    source, target = Storage(str(tmp_path / "source")), tmp_path / "target"
    source.write("attempt-1/events.1", b"one")
    assert follow(source, target) == 3
    path = target / "attempt-1" / "events.1"
    inode = path.stat().st_ino
    source.write("attempt-1/events.1", b"one two")
    source.write("events.2", b"new")
    assert follow(source, target) == 7
    assert (path.read_bytes(), path.stat().st_ino) == (b"one two", inode)
    assert (target / "events.2").read_bytes() == b"new"
    assert follow(source, target) == 0


def test_a_file_that_began_anew_is_read_anew(tmp_path: Path) -> None:
    source, target = Storage(str(tmp_path / "source")), tmp_path / "target"
    source.write("events", b"long ago")
    follow(source, target)
    source.write("events", b"now")
    follow(source, target)
    assert (target / "events").read_bytes() == b"now"
