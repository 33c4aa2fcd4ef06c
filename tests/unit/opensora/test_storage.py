"""Storage: what local folders and memory promise, and when a failing request is tried again."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from opensora.errors import (
    ExitCode,
    ObjectNotFoundError,
    StorageAccessError,
    StorageError,
    StorageUnavailableError,
)
from opensora.s3 import Patience, TransientError
from opensora.storage import Piece, RangeReader, Storage, locate

MIB = 1024 * 1024


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root") if request.param == "local" else f"memory://test-{uuid4().hex}/root")


def test_reads_back_what_was_written(storage: Storage) -> None:
    storage.write("a/b/c.bin", b"first")
    storage.write("a/b/c.bin", memoryview(bytearray(b"second")))
    assert storage.read("a/b/c.bin") == b"second"
    assert storage.child("a/b").read("c.bin") == b"second"
    assert storage.info("a/b/c.bin").size == 6
    assert storage.digest("a/b/c.bin") == hashlib.sha256(b"second").hexdigest()


def test_a_typed_buffer_is_written_as_its_bytes(storage: Storage) -> None:
    content = os.urandom(48)
    storage.write("numbers", memoryview(content).cast("d", (2, 3)))
    assert storage.read("numbers") == content


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 4, b"0123"), (3, 4, b"3456"), (8, 100, b"89"), (10, 1, b""), (99, 1, b""), (2, 0, b"")],
)
def test_a_range_is_cut_at_the_end_of_the_object(storage: Storage, start: int, length: int, expected: bytes) -> None:
    storage.write("digits", b"0123456789")
    assert storage.read_range("digits", start, length) == expected


def test_an_object_is_created_once(storage: Storage) -> None:
    assert storage.create("folder/lock", b"mine")
    assert not storage.create("folder/lock", b"theirs")
    assert storage.read("folder/lock") == b"mine"
    assert [info.path for info in storage.list()] == ["folder/lock"]


def test_exactly_one_of_many_threads_creates(storage: Storage) -> None:
    barrier, results = threading.Barrier(8), []

    def compete(number: int) -> None:
        barrier.wait()
        if storage.create("lock", str(number).encode()):
            results.append(number)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 1
    assert storage.read("lock") == str(results[0]).encode()


def test_lists_all_objects_below_a_folder_and_none_beside_it(storage: Storage) -> None:
    for path in ("runs/2/b", "runs/1/a", "runs-old/x", "top"):
        storage.write(path, path.encode())
    assert [info.path for info in storage.list("runs")] == ["runs/1/a", "runs/2/b"]
    assert [info.size for info in storage.list("runs")] == [8, 8]
    assert [info.path for info in storage.child("runs").list()] == ["1/a", "2/b"]
    assert storage.list_names() == ["runs", "runs-old", "top"]
    assert storage.list_names("runs/") == ["1", "2"]
    assert storage.list("missing") == []
    assert storage.list_names("missing") == []


def test_deleting_what_is_missing_is_fine(storage: Storage) -> None:
    storage.write("folder/object", b"")
    for path in ("missing", "missing/below", "folder", "folder/object/below"):
        storage.delete(path)
    storage.delete_tree("missing")
    assert [info.path for info in storage.list()] == ["folder/object"], "a folder is no object"


def test_delete_tree_takes_the_folder_and_leaves_its_neighbours(storage: Storage) -> None:
    for path in ("step-1/a/b", "step-1/c", "step-10/a"):
        storage.write(path, b"")
    storage.delete_tree("step-1")
    assert [info.path for info in storage.list()] == ["step-10/a"]
    assert storage.list_names() == ["step-10"]


@pytest.mark.parametrize("call", ["read", "info", "digest", "open"])
def test_a_missing_object_is_named(storage: Storage, call: str) -> None:
    storage.write("folder/object", b"")
    for path in ("folder/none", "folder"):
        with pytest.raises(ObjectNotFoundError, match=re.escape(storage.uri_of(path))):
            getattr(storage, call)(path)
        assert not storage.exists(path)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a"])
def test_a_path_cannot_leave_the_root(storage: Storage, path: str) -> None:
    for call in (storage.read, storage.delete, storage.delete_tree, lambda path: storage.write(path, b"")):
        with pytest.raises(StorageError, match="no path below"):
            call(path)


def test_files_are_uploaded_and_downloaded_whole(storage: Storage, tmp_path: Path) -> None:
    content = os.urandom(9 * 1024 * 1024)  # more than one copy buffer
    (tmp_path / "source").write_bytes(content)
    storage.upload(tmp_path / "source", "clip")
    storage.download("clip", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == content


def test_a_failed_download_leaves_the_old_file_and_nothing_else(storage: Storage, tmp_path: Path) -> None:
    target = tmp_path / "downloads" / "file"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(ObjectNotFoundError):
        storage.download("missing", target)
    assert target.read_bytes() == b"old"
    assert os.listdir(target.parent) == ["file"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a", b"old")

    def broken(start: int, length: int) -> bytes:
        assert storage.list() == [storage.info("a")], "a half-written file is no object"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage._backend.put(str(tmp_path / "a"), 3, broken)
    assert storage.read("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_readers_see_whole_contents_while_it_is_replaced(storage: Storage) -> None:
    contents = [bytes([value]) * 300_000 for value in range(2)]
    storage.write("state", contents[0])
    done = threading.Event()

    def replace() -> None:
        for number in range(60):
            storage.write("state", contents[number % 2])
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    while not done.is_set():
        assert storage.read("state") in contents
    writer.join()


def test_an_open_object_is_seekable_like_a_file(storage: Storage) -> None:
    content = os.urandom(100_000)
    storage.write("clip", content)
    with storage.open("clip") as reader:
        assert reader.seekable()
        assert reader.seek(-10, os.SEEK_END) == 99_990
        assert reader.read() == content[-10:]
        reader.seek(500)
        reader.seek(5, os.SEEK_CUR)
        assert reader.read(1000) == content[505:1505]
        assert reader.tell() == 1505


class RecordingBackend:
    """Ranges of one object, with a list of what was asked for."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.requests: list[tuple[int, int]] = []

    def uri(self, key: str) -> str:
        return key

    def piece(self, key: str, start: int, length: int, *, etag: str | None = None) -> Piece:
        self.requests.append((start, length))
        return Piece(self.content[start : start + length], len(self.content), "tag")


def test_a_small_object_costs_one_request() -> None:
    backend = RecordingBackend(b"x" * 1000)
    reader = RangeReader(backend, "clip")  # type: ignore[arg-type]
    reader.seek(-8, os.SEEK_END)
    assert reader.read(8) == b"x" * 8
    reader.seek(0)
    assert len(reader.readall()) == 1000
    assert len(backend.requests) == 1


def test_reading_on_asks_for_more_at_a_time_and_a_jump_for_one_block() -> None:
    content = os.urandom(20 * MIB)
    backend = RecordingBackend(content)
    reader = RangeReader(backend, "clip")  # type: ignore[arg-type]
    buffered = io.BufferedReader(reader, 32_768)
    assert buffered.read() == content
    assert backend.requests[:4] == [(0, MIB), (MIB, 2 * MIB), (3 * MIB, 4 * MIB), (7 * MIB, 4 * MIB)]
    reader.seek(5 * MIB + 17)
    before = len(backend.requests)
    assert reader.read(100) == content[5 * MIB + 17 : 5 * MIB + 117]
    assert backend.requests[before:] == [(5 * MIB, MIB)]


def test_an_object_that_shrinks_while_it_is_open_is_an_error() -> None:
    backend = RecordingBackend(b"x" * 3 * MIB)
    reader = RangeReader(backend, "clip")  # type: ignore[arg-type]
    backend.content = b""
    reader.seek(2 * MIB)
    with pytest.raises(StorageError, match="became shorter"):
        reader.read(1)


def test_relative_and_home_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Storage("runs/").uri == str(tmp_path / "runs")
    assert Storage("~/runs").uri == str(tmp_path / "home" / "runs")
    assert Storage(f"file://{tmp_path}/x").uri == str(tmp_path / "x")
    assert Storage("runs").is_local
    assert not Storage("memory://bucket").is_local


@pytest.mark.parametrize(
    ("uri", "root", "name"),
    [
        ("s3://bucket/a/b.csv", "s3://bucket/a", "b.csv"),
        ("s3://bucket/b.csv", "s3://bucket", "b.csv"),
        ("memory://bucket/b.csv", "memory://bucket", "b.csv"),
        ("/data/b.csv", "/data", "b.csv"),
        ("/b.csv", "/", "b.csv"),
    ],
)
def test_locate_splits_folder_and_name(uri: str, root: str, name: str) -> None:
    storage, found = locate(uri)
    assert (storage.uri, found) == (root, name)
    assert storage.uri_of(found) == uri


@pytest.mark.parametrize("uri", ["s3://", "gopher://x/y", "s3://bucket-only"])
def test_a_uri_that_cannot_be_located_is_refused_with_a_remedy(uri: str) -> None:
    with pytest.raises(StorageAccessError, match=r"hint:") as caught:
        locate(uri)
    assert caught.value.exit_code == ExitCode.CONFIG


def test_access_to_a_folder_that_does_not_exist_yet_is_fine(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "new" / "run"))
    storage.check_access(write=False)
    storage.check_access(write=True)
    assert storage.list() == []


def test_a_file_in_the_place_of_the_root_fails_the_access_check(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError):
        Storage(str(tmp_path / "run")).check_access(write=False)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


def patience(clock: Clock) -> Patience:
    return Patience("http://store", clock=clock.time, sleep=clock.sleep)


def failing_until(clock: Clock, back: float, *, answered: bool = False) -> Callable[[], str]:
    def request() -> str:
        if clock.now < back:
            raise TransientError("ConnectionRefusedError", answered=answered)
        return "content"

    return request


def test_an_outage_shorter_than_the_deadline_is_waited_out_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="opensora.s3")
    clock = Clock()
    assert patience(clock).run(failing_until(clock, 250.0), deadline_seconds=300) == "content"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "http://store does not answer (ConnectionRefusedError); retrying for up to 300 s" in caplog.messages[0]
    assert "answers again after 25" in caplog.messages[1]
    assert clock.now < 256, "the last wait is short even after a long outage"


def test_an_outage_that_outlasts_some_requests_is_one_outage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="opensora.s3")
    clock = Clock()
    store = patience(clock)
    for _ in range(3):
        with pytest.raises(StorageError):
            store.run(failing_until(clock, 100.0), deadline_seconds=10)
        clock.sleep(15)
    clock.sleep(25)
    assert store.run(failing_until(clock, 100.0), deadline_seconds=10) == "content"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "answers again after 100 s" in caplog.messages[1]


def test_waits_grow_and_stay_bounded() -> None:
    clock = Clock()
    patience(clock).run(failing_until(clock, 100.0), deadline_seconds=300)
    assert clock.sleeps[0] <= 0.2
    assert clock.sleeps[3] > clock.sleeps[0]
    assert max(clock.sleeps) <= 5.0
    assert len(set(clock.sleeps)) == len(clock.sleeps), "many ranks must not come back in step"


def test_a_single_hiccup_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    patience(clock).run(failing_until(clock, 0.05), deadline_seconds=300)
    assert not caplog.records


def test_the_deadline_ends_it_at_the_deadline() -> None:
    clock = Clock()
    store = patience(clock)
    store.run(lambda: "it works", deadline_seconds=300)
    with pytest.raises(StorageUnavailableError, match=r"did not answer for 300 s \(ConnectionRefusedError\)") as caught:
        store.run(failing_until(clock, 1e9), deadline_seconds=300)
    assert clock.now == pytest.approx(300)
    assert caught.value.exit_code == ExitCode.FAILED


def test_an_endpoint_that_never_answered_is_said_to_be_unreachable() -> None:
    clock = Clock()
    with pytest.raises(StorageAccessError, match="never reached in 20 s") as caught:
        patience(clock).run(failing_until(clock, 1e9), deadline_seconds=20)
    assert "AWS_ENDPOINT_URL" in str(caught.value.hint)


def test_a_store_that_answers_503_has_been_reached() -> None:
    clock = Clock()
    with pytest.raises(StorageUnavailableError):
        patience(clock).run(failing_until(clock, 1e9, answered=True), deadline_seconds=20)


def test_other_errors_are_not_retried() -> None:
    clock = Clock()

    def request() -> None:
        raise ObjectNotFoundError("s3://bucket/x does not exist")

    with pytest.raises(ObjectNotFoundError):
        patience(clock).run(request, deadline_seconds=300)
    assert clock.sleeps == []


def test_threads_in_the_same_outage_report_it_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="opensora.s3")
    barrier = threading.Barrier(4)
    store = Patience("http://store", sleep=lambda seconds: None)

    def work() -> None:
        num_calls = 0

        def request() -> None:
            nonlocal num_calls
            num_calls += 1
            if num_calls <= 4:
                barrier.wait(10)  # all fail together, again and again
                raise TransientError("SlowDown", answered=True)

        store.run(request, deadline_seconds=300)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
