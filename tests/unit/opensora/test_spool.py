"""Spools: what is stored, in how many objects, and what an outage does to it."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from uuid import uuid4

import pytest

import opensora.spool
from opensora.errors import StorageUnavailableError
from opensora.spool import FolderSpool, PartSpool
from opensora.storage import Data, Storage

NEVER = 1e6  # seconds between uploads in the background: the test says when


@pytest.fixture
def storage() -> Storage:
    return Storage(f"memory://test-{uuid4().hex}")


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While set, no object can be written."""
    event = threading.Event()
    write, upload = Storage.write, Storage.upload

    def check() -> None:
        if event.is_set():
            raise StorageUnavailableError("storage at http://store did not answer", hint="run it again")

    def guarded_write(self: Storage, path: str, data: Data) -> None:
        check()
        write(self, path, data)

    def guarded_upload(self: Storage, local: Path, path: str) -> None:
        check()
        upload(self, local, path)

    monkeypatch.setattr(Storage, "write", guarded_write)
    monkeypatch.setattr(Storage, "upload", guarded_upload)
    return event


def stored(storage: Storage, prefix: str = "log") -> dict[str, bytes]:
    return {info.path: storage.read(info.path) for info in storage.list(prefix)}


def test_lines_arrive_at_every_flush_in_one_growing_part(storage: Storage) -> None:
    with PartSpool(storage, "log", flush_seconds=NEVER) as spool:
        spool.write('{"step": 1}')
        spool.write(b'{"step": 2}\n')
        assert stored(storage) == {}
        assert spool.flush()
        assert stored(storage) == {"log/part-00000.jsonl": b'{"step": 1}\n{"step": 2}\n'}
        spool.write('{"step": 3}')
    assert stored(storage) == {"log/part-00000.jsonl": b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'}


def test_nothing_written_makes_no_object(storage: Storage) -> None:
    with PartSpool(storage, "log", flush_seconds=NEVER) as spool:
        assert spool.flush()
    assert stored(storage) == {}


def test_full_parts_are_closed_and_never_written_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"line {number:04d}\n".encode() for number in range(100)]
    writes: list[str] = []
    write = Storage.write

    def recording_write(self: Storage, path: str, data: Data) -> None:
        writes.append(path)
        write(self, path, data)

    monkeypatch.setattr(Storage, "write", recording_write)
    with PartSpool(storage, "log", suffix=".log", flush_seconds=NEVER, part_bytes=95) as spool:
        for line in lines:
            spool.write(line)
            spool.flush()
    parts = stored(storage)
    assert b"".join(parts[name] for name in sorted(parts)) == b"".join(lines)
    assert len(parts) == 10
    assert all(len(part) == 100 for part in parts.values()), "parts end with whole lines"
    assert writes == sorted(writes)


def test_a_second_spool_continues_behind_the_first(storage: Storage) -> None:
    for text in ("before", "after"):
        with PartSpool(storage, "log", flush_seconds=NEVER) as spool:
            spool.write(text)
    assert stored(storage) == {"log/part-00000.jsonl": b"before\n", "log/part-00001.jsonl": b"after\n"}


def test_the_background_stores_without_being_asked(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    write = Storage.write

    def telling_write(self: Storage, path: str, data: Data) -> None:
        write(self, path, data)
        written.set()

    monkeypatch.setattr(Storage, "write", telling_write)
    with PartSpool(storage, "log", flush_seconds=0.01) as spool:
        spool.write("a")
        assert written.wait(10)
        assert stored(storage) == {"log/part-00000.jsonl": b"a\n"}


def test_no_line_of_many_threads_is_lost_or_torn(storage: Storage) -> None:
    with PartSpool(storage, "log", flush_seconds=0.001, part_bytes=500) as spool:

        def write_lines(name: str) -> None:
            for number in range(200):
                spool.write(f"{name} {number}")

        threads = [threading.Thread(target=write_lines, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    parts = stored(storage)
    lines = b"".join(parts[name] for name in sorted(parts)).decode().splitlines()
    for name in "abcd":
        assert [line for line in lines if line[0] == name] == [f"{name} {number}" for number in range(200)]
    assert len(lines) == 800


def test_an_outage_delays_lines_and_is_reported_once(
    storage: Storage, outage: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="opensora.spool")
    with PartSpool(storage, "log", flush_seconds=NEVER, part_bytes=10) as spool:
        outage.set()
        for number in range(5):
            spool.write(f"line {number:04d}")
            assert not spool.flush()
        outage.clear()
        assert spool.flush()
        assert b"".join(stored(storage).values()) == b"".join(b"line %04d\n" % number for number in range(5))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "run it again" not in caplog.text, "nothing has ended"


def test_an_outage_to_the_end_neither_blocks_nor_raises_and_says_what_is_lost(
    storage: Storage, outage: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    spool = PartSpool(storage, "log", flush_seconds=NEVER)
    spool.write("first")
    spool.flush()
    outage.set()
    spool.write("lost")
    spool.close()
    spool.close()
    assert caplog.messages[-1] == "log: 5 bytes were not stored"
    assert stored(storage) == {"log/part-00000.jsonl": b"first\n"}


def test_memory_is_bounded_in_a_long_outage_and_the_newest_lines_stay(
    storage: Storage, outage: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opensora.spool, "_MAX_WAITING_BYTES", 1000)
    spool = PartSpool(storage, "log", flush_seconds=NEVER, part_bytes=100)
    outage.set()
    for number in range(1000):
        spool.write(f"line {number:04d}")
    outage.clear()
    spool.close()
    parts = stored(storage)
    content = b"".join(parts[name] for name in sorted(parts))
    assert 800 <= len(content) <= 1000
    assert content.endswith(b"line 0999\n")
    assert f"{10_000 - len(content)} bytes were not stored" in caplog.messages[-1]


def test_a_folder_is_copied_with_its_folders_and_only_what_changed_again(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[str] = []
    upload = Storage.upload

    def recording_upload(self: Storage, local: Path, path: str) -> None:
        uploads.append(path)
        upload(self, local, path)

    monkeypatch.setattr(Storage, "upload", recording_upload)
    (tmp_path / "sub").mkdir()
    (tmp_path / "events").write_bytes(b"1")
    (tmp_path / "sub" / "events").write_bytes(b"2")
    with FolderSpool(storage, "tensorboard", tmp_path, flush_seconds=NEVER) as spool:
        spool.flush()
        spool.flush()
        assert uploads == ["tensorboard/events", "tensorboard/sub/events"]
        with open(tmp_path / "events", "ab") as file:
            file.write(b"3")
    assert uploads[2:] == ["tensorboard/events"]
    assert stored(storage, "tensorboard") == {"tensorboard/events": b"13", "tensorboard/sub/events": b"2"}


def test_a_file_rewritten_at_the_same_size_is_copied_again(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"old")
    with FolderSpool(storage, "state", tmp_path, flush_seconds=NEVER) as spool:
        spool.flush()
        (tmp_path / "state").write_bytes(b"new")
        os.utime(tmp_path / "state", ns=(1, 1))
    assert stored(storage, "state") == {"state/state": b"new"}


def test_a_folder_whose_upload_failed_is_named_at_the_end(
    storage: Storage, tmp_path: Path, outage: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "events").write_bytes(b"1")
    outage.set()
    with FolderSpool(storage, "tensorboard", tmp_path, flush_seconds=NEVER) as spool:
        assert not spool.flush()
    assert caplog.messages[-1] == "tensorboard: not stored, or not in its last state: events"
