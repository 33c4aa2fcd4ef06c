"""Storage against a real S3 server: what it promises when all is well, and when the server or the network is not."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from opensora.config.train import StorageConfig
from opensora.errors import (
    ExitCode,
    ObjectChangedError,
    ObjectNotFoundError,
    StorageAccessError,
    StorageError,
    StorageUnavailableError,
)
from opensora.quickstart.object_store import ObjectStore
from opensora.spool import FolderSpool, PartSpool
from opensora.storage import Storage, locate

pytestmark = pytest.mark.integration

MIB = 1024 * 1024
CONFIG = StorageConfig(connect_timeout_seconds=2, read_timeout_seconds=5, retry_deadline_seconds=60)


@pytest.fixture
def storage(bucket: str) -> Storage:
    return Storage(f"s3://{bucket}/run", config=CONFIG)


@pytest.fixture(scope="module")
def large() -> bytes:
    """More than two parts, so that it is moved in several, and not a whole number of them."""
    return os.urandom(21 * MIB + 12_345)


def test_reads_back_what_was_written(storage: Storage) -> None:
    for path, content in (("a/b c+ü%20?.txt", b"odd name"), ("empty", b""), ("one", b"1")):
        storage.write(path, content)
        assert storage.read(path) == content
        assert storage.info(path).size == len(content)
        assert storage.open(path).read() == content
    assert [info.path for info in storage.list()] == ["a/b c+ü%20?.txt", "empty", "one"]
    assert locate(storage.uri_of("one"))[0].read("one") == b"1"


def test_large_objects_keep_their_content_both_ways(storage: Storage, large: bytes, tmp_path: Path) -> None:
    storage.write("bytes", large)
    (tmp_path / "file").write_bytes(large)
    storage.upload(tmp_path / "file", "file")
    storage.download("bytes", tmp_path / "copy")
    expected = hashlib.sha256(large).hexdigest()
    assert hashlib.sha256(storage.read("file")).hexdigest() == expected
    assert hashlib.sha256((tmp_path / "copy").read_bytes()).hexdigest() == expected
    assert storage.digest("bytes") == expected
    assert [info.size for info in storage.list()] == [len(large)] * 2


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 4, b"0123"), (3, 4, b"3456"), (8, 100, b"89"), (10, 1, b""), (99, 1, b""), (2, 0, b"")],
)
def test_a_range_is_cut_at_the_end_of_the_object(storage: Storage, start: int, length: int, expected: bytes) -> None:
    storage.write("digits", b"0123456789")
    assert storage.read_range("digits", start, length) == expected


def test_an_open_object_reads_like_a_file(storage: Storage, large: bytes) -> None:
    storage.write("clip", large)
    with storage.open("clip") as reader:
        assert reader.seek(-1000, os.SEEK_END) == len(large) - 1000
        assert reader.read() == large[-1000:]
        reader.seek(3 * MIB - 10)
        assert reader.read(2 * MIB) == large[3 * MIB - 10 : 5 * MIB - 10]


def test_an_object_that_is_replaced_while_it_is_open_is_not_mixed_with_the_new_one(storage: Storage) -> None:
    storage.write("clip", b"a" * 3 * MIB)
    reader = storage.open("clip")
    storage.write("clip", b"b" * 3 * MIB)
    reader.seek(2 * MIB)
    with pytest.raises(StorageError, match="was replaced while it was read"):
        reader.read(10)


def test_a_stream_is_of_the_object_that_was_listed(storage: Storage, large: bytes) -> None:
    for content in (b"", b"x", large):
        storage.write("object", content)
        (info,) = storage.list()
        assert b"".join(storage.stream(info)) == content
        assert b"".join(storage.stream(info, start=len(content) // 2)) == content[len(content) // 2 :]
    for other in (large[::-1], large[:100], large + b"x"):
        storage.write("object", other)
        with pytest.raises(ObjectChangedError):
            list(storage.stream(info))
    storage.delete("object")
    with pytest.raises(ObjectNotFoundError):
        list(storage.stream(info))


def test_an_object_is_created_once_by_one_of_many(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: storage.create("attempts/1", b"%d" % number), range(8)))
    assert created.count(True) == 1
    assert storage.read("attempts/1") == b"%d" % created.index(True)


def test_listings_are_complete_fresh_and_sorted(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.list() == []
    assert storage.list_names("missing") == []
    paths = sorted(f"many/{number % 7}/{number:04d}" for number in range(1100))  # more than one page of 1000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: storage.write(path, b""), paths))
    storage.write("many-not/x", b"")
    assert [info.path for info in storage.list("many")] == paths
    assert storage.list_names("many") == [str(number) for number in range(7)]
    assert storage.list_names() == ["many", "many-not"]
    storage.delete_tree("many")
    assert storage.list("many") == []
    assert storage.list_names() == ["many-not"], "no empty folders are left"
    storage.write("new", b"")
    assert storage.list_names() == ["many-not", "new"]
    assert storage.exists("new")
    storage.delete("new")
    storage.delete("new")
    storage.delete("many-not")  # a folder, so no object
    assert storage.list_names() == ["many-not"]
    assert not storage.exists("new")


def test_readers_never_see_half_of_a_replaced_object(storage: Storage) -> None:
    contents = [bytes([value]) * 200_000 for value in range(2)]
    storage.write("progress.json", contents[0])
    done = threading.Event()

    def replace() -> None:
        for number in range(40):
            storage.write("progress.json", contents[number % 2])
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(replace)
        while not done.is_set():
            assert storage.read("progress.json") in contents
        writing.result()


def test_many_threads_share_a_storage(storage: Storage) -> None:
    def work(number: int) -> None:
        content = os.urandom(100_000)
        for turn in range(5):
            storage.write(f"{number}/{turn}", content)
            assert storage.read(f"{number}/{turn}") == content
            assert storage.open(f"{number}/{turn}").read() == content
        assert len(storage.list(str(number))) == 5

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))


@pytest.mark.parametrize("call", ["read", "info", "digest", "open"])
def test_a_missing_object_is_named(storage: Storage, call: str) -> None:
    storage.write("folder/object", b"")
    for path in ("none", "folder"):
        with pytest.raises(ObjectNotFoundError, match=f"{storage.uri}/{path} does not exist"):
            getattr(storage, call)(path)
        assert not storage.exists(path)


CALLS: dict[str, Callable[[Storage], object]] = {
    "read": lambda storage: storage.read("x"),
    "exists": lambda storage: storage.exists("x"),
    "write": lambda storage: storage.write("x", b""),
    "write-large": lambda storage: storage.write("x", bytes(17 * MIB)),
    "create": lambda storage: storage.create("x", b""),
    "list": lambda storage: storage.list(),
    "check": lambda storage: storage.check_access(write=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_wrong_bucket_is_named_at_once(bucket: str, call: Callable[[Storage], object]) -> None:
    storage = Storage(f"s3://{bucket}x/run", config=CONFIG)
    with finishes_within(3), pytest.raises(StorageAccessError, match=f"no bucket '{bucket}x'") as caught:
        call(storage)
    assert caught.value.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_wrong_credentials_are_refused_at_once(
    bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str, call: Callable[[Storage], object]
) -> None:
    monkeypatch.setenv(variable, "wrong")
    storage = Storage(f"s3://{bucket}/run", config=CONFIG)
    with finishes_within(3), pytest.raises(StorageAccessError, match="access refused") as caught:
        call(storage)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)


def test_missing_credentials_are_said_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # where Amazon's machines answer, others may only hang
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("AWS_METADATA_SERVICE_TIMEOUT", "10")
        with finishes_within(3), pytest.raises(StorageAccessError, match="no usable credentials") as caught:
            Storage(f"s3://{bucket}/run", config=CONFIG).check_access(write=False)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)


def test_the_access_check_passes_and_leaves_nothing(storage: Storage) -> None:
    storage.check_access(write=True)
    assert storage.list() == []


def test_an_endpoint_where_nothing_listens_is_called_unreachable(bucket: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        endpoint_url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        config = StorageConfig(endpoint_url=endpoint_url, retry_deadline_seconds=1)
        with finishes_within(6), pytest.raises(StorageAccessError, match="was never reached in 1 s") as caught:
            Storage(f"s3://{bucket}", config=config).check_access(write=False)
    assert endpoint_url in str(caught.value)


def test_a_host_that_does_not_exist_is_called_unreachable(bucket: str) -> None:
    config = StorageConfig(endpoint_url="http://no-such-host.invalid:1", retry_deadline_seconds=1)
    with finishes_within(20), pytest.raises(StorageAccessError, match="was never reached"):
        Storage(f"s3://{bucket}", config=config).read("x")


def test_a_malformed_endpoint_is_refused(bucket: str) -> None:
    config = StorageConfig(endpoint_url="localhost:9000", retry_deadline_seconds=60)
    with finishes_within(5), pytest.raises(StorageAccessError, match="localhost:9000"):
        Storage(f"s3://{bucket}", config=config).read("x")


@pytest.mark.parametrize("call", ["read", "write", "write-large"])
def test_a_silent_endpoint_is_given_up_after_the_deadline(
    bucket: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr("opensora.s3._SLOWEST_BYTES_PER_SECOND", 64 * MIB)  # else a part may take a minute
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and neither reads nor answers
        config = StorageConfig(
            endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}",
            connect_timeout_seconds=1,
            read_timeout_seconds=0.5,
            retry_deadline_seconds=1,
        )
        with finishes_within(10), pytest.raises(StorageError, match="never reached in 1 s"):
            CALLS[call](Storage(f"s3://{bucket}", config=config))


def test_a_crash_of_the_server_during_reads_and_writes_is_waited_out(
    storage: Storage, object_store: ObjectStore, large: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Six seconds without a server, while eight threads read, write, list and move large objects."""
    caplog.set_level(logging.INFO, logger="opensora.s3")
    storage.write("fixed", large)
    (tmp_path / "file").write_bytes(large)
    is_back = threading.Event()
    written: list[tuple[str, bytes]] = []

    def again_and_again(work: Callable[[int], object]) -> int:
        number = 0
        while not is_back.is_set():
            work(number)
            number += 1
        work(number)  # at least one after the outage
        return number

    def write(number: int) -> None:
        content = os.urandom(10_000)
        storage.write(f"small/{number}", content)
        written.append((f"small/{number}", content))

    def read(number: int) -> None:
        assert storage.read("fixed") == large

    def seek(number: int) -> None:
        start = number * 7919 % len(large)
        assert storage.read_range("fixed", start, 1000) == large[start : start + 1000]

    jobs: list[Callable[[int], object]] = [
        write,
        read,
        seek,
        lambda number: storage.upload(tmp_path / "file", f"large/{number}"),
        lambda number: storage.download("fixed", tmp_path / "copy"),
        lambda number: storage.list(),
        lambda number: storage.create(f"created/{number}", b"%d" % number),
        lambda number: storage.delete(f"large/{number - 2}"),
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(again_and_again, job) for job in jobs]
        time.sleep(1)
        object_store.kill()
        time.sleep(6)
        object_store.start()
        is_back.set()
        for job in running:
            job.result(60)
    for path, content in written:
        assert storage.read(path) == content
    last = max(int(name) for name in storage.list_names("large"))
    assert storage.digest(f"large/{last}") == hashlib.sha256(large).hexdigest()
    assert (tmp_path / "copy").read_bytes() == large
    warnings = [message for message in caplog.messages if "does not answer" in message]
    assert 1 <= len(warnings) <= 2, "one line per outage, however many threads are in it"
    assert any("answers again" in message for message in caplog.messages)


def test_a_frozen_server_is_waited_out(bucket: str, object_store: ObjectStore) -> None:
    config = StorageConfig(connect_timeout_seconds=1, read_timeout_seconds=1, retry_deadline_seconds=30)
    storage = Storage(f"s3://{bucket}", config=config)
    storage.write("x", b"content")
    assert object_store.pid is not None
    os.kill(object_store.pid, signal.SIGSTOP)
    resume = threading.Timer(3, os.kill, (object_store.pid, signal.SIGCONT))
    resume.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            reading, writing = pool.submit(storage.read, "x"), pool.submit(storage.write, "y", b"y")
            assert reading.result(30) == b"content"
            writing.result(30)
        assert storage.read("y") == b"y"
    finally:
        resume.join()


def test_an_outage_beyond_the_deadline_is_an_error_and_the_next_call_works_again(
    bucket: str, object_store: ObjectStore
) -> None:
    storage = Storage(f"s3://{bucket}", config=StorageConfig(retry_deadline_seconds=1))
    storage.write("x", b"content")
    object_store.kill()
    try:
        with finishes_within(6), pytest.raises(StorageUnavailableError, match="did not answer for 1 s") as caught:
            storage.read("x")
    finally:
        object_store.start()
    assert caught.value.exit_code == ExitCode.FAILED
    patient = Storage(f"s3://{bucket}", config=CONFIG)
    assert patient.read("x") == b"content"


def test_spools_survive_an_outage_without_holding_up_the_writer(
    bucket: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    storage = Storage(f"s3://{bucket}", config=CONFIG)
    (tmp_path / "events").write_bytes(b"before")
    with (
        PartSpool(storage, "metrics", flush_seconds=0.2) as lines,
        FolderSpool(storage, "tensorboard", tmp_path, flush_seconds=0.2) as files,
    ):
        lines.write("before")
        assert lines.flush()
        assert files.flush()
        object_store.kill()
        try:
            slowest = 0.0
            for number in range(200):
                start = time.monotonic()
                lines.write(f"during {number}")
                slowest = max(slowest, time.monotonic() - start)
                time.sleep(0.01)
            (tmp_path / "events").write_bytes(b"before and during")
            assert slowest < 0.5
        finally:
            object_store.start()
    expected = ["before", *(f"during {number}" for number in range(200))]
    assert storage.read("metrics/part-00000.jsonl").decode().splitlines() == expected
    assert storage.read("tensorboard/events") == b"before and during"


REFUSALS = {
    "slow down": (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    "too many": (429, b"<html>a load balancer says: too many requests</html>"),
    "timeout": (400, b"<Error><Code>RequestTimeout</Code><Message>Your connection was idle.</Message></Error>"),
    "no such upload": (404, b"<Error><Code>NoSuchUpload</Code><Message>Unknown upload.</Message></Error>"),
}


class Proxy:
    """Stands between a client and the store; `interfere` decides what happens to a request, by number and method."""

    def __init__(self, target: str) -> None:
        self.interfere: Callable[[int, str, str], str] = lambda number, method, path: "forward"
        self.num_requests = 0
        host = target.removeprefix("http://")
        proxy, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                with lock:
                    number = proxy.num_requests
                    proxy.num_requests += 1
                verdict = proxy.interfere(number, self.command, self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if verdict in REFUSALS:
                    status, content = REFUSALS[verdict]
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content if self.command != "HEAD" else b"")
                    return
                connection = http.client.HTTPConnection(host)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
                connection.close()
                if verdict == "lose the answer":
                    self.close_connection = True
                    return
                self.send_response(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                if "Content-Length" not in response.headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if verdict == "cut the answer":
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815 - the names http.server calls

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def proxy(object_store: ObjectStore) -> Iterator[Proxy]:
    proxy = Proxy(object_store.endpoint_url)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield proxy
    proxy.server.shutdown()
    thread.join()
    proxy.server.server_close()


@pytest.fixture
def behind_proxy(bucket: str, proxy: Proxy) -> Storage:
    config = StorageConfig(endpoint_url=proxy.url, retry_deadline_seconds=60)
    return Storage(f"s3://{bucket}/run", config=config)


@pytest.mark.parametrize("refusal", ["slow down", "too many", "timeout"])
def test_throttling_is_waited_out_part_by_part(behind_proxy: Storage, proxy: Proxy, large: bytes, refusal: str) -> None:

    def refuse_every_other(number: int, method: str, path: str) -> str:
        explains_itself = refusal != "timeout" or method != "HEAD"  # 400 without a body could be anything
        return refusal if number % 2 == 0 and explains_itself else "forward"

    proxy.interfere = refuse_every_other
    behind_proxy.write("large", large)
    assert behind_proxy.read("large") == large
    assert [info.path for info in behind_proxy.list()] == ["large"]
    assert behind_proxy.exists("large")
    behind_proxy.delete_tree("large")


def test_an_answer_that_breaks_off_is_fetched_again(behind_proxy: Storage, proxy: Proxy, large: bytes) -> None:
    behind_proxy.write("large", large)
    proxy.interfere = lambda number, method, path: (
        "cut the answer" if method == "GET" and number % 3 == 0 else "forward"
    )
    assert behind_proxy.read("large") == large


@pytest.mark.parametrize("size", [3 * MIB, 40 * MIB])
def test_a_stream_goes_on_where_it_broke_off(behind_proxy: Storage, proxy: Proxy, large: bytes, size: int) -> None:
    content = (large * 2)[:size]
    behind_proxy.write("object", content)
    info = behind_proxy.info("object")
    begin = proxy.num_requests
    proxy.interfere = lambda number, method, path: "cut the answer" if number < begin + 2 else "forward"
    assert b"".join(behind_proxy.stream(info)) == content
    assert proxy.num_requests > begin + 2
    proxy.interfere = lambda number, method, path: "slow down" if number % 2 else "forward"
    assert b"".join(behind_proxy.stream(info, start=1000)) == content[1000:]


def test_who_created_is_known_although_the_first_answer_was_lost(behind_proxy: Storage, proxy: Proxy) -> None:
    lost: list[str] = []

    def lose_first_put(number: int, method: str, path: str) -> str:
        if method == "PUT" and not lost:
            lost.append(path)
            return "lose the answer"
        return "forward"

    proxy.interfere = lose_first_put
    assert behind_proxy.create("attempts/1", b"mine")
    assert lost
    lost.clear()
    assert not behind_proxy.create("attempts/1", b"mine"), "the same content from somebody else is not ours"
    assert lost


def test_a_large_write_is_done_although_its_last_answer_was_lost(
    behind_proxy: Storage, proxy: Proxy, large: bytes
) -> None:
    completions: list[str] = []

    def lose_completion(number: int, method: str, path: str) -> str:
        if method != "POST" or "uploadId=" not in path:
            return "forward"
        completions.append(path)
        # A completed upload exists no more, so stores may answer the second try like this.
        return "lose the answer" if len(completions) == 1 else "no such upload"

    proxy.interfere = lose_completion
    behind_proxy.write("large", large)
    assert len(completions) == 2
    assert behind_proxy.digest("large") == hashlib.sha256(large).hexdigest()


def test_a_large_write_begins_anew_when_the_store_forgot_it(behind_proxy: Storage, proxy: Proxy, large: bytes) -> None:
    behind_proxy.write("large", b"old")
    refused: list[str] = []

    def forget(number: int, method: str, path: str) -> str:
        if "partNumber=2" in path and not refused:
            refused.append(path)
            return "no such upload"
        return "forward"

    proxy.interfere = forget
    behind_proxy.write("large", large)
    assert refused
    assert behind_proxy.read("large") == large


def test_a_failed_large_write_leaves_no_parts_behind(
    behind_proxy: Storage, proxy: Proxy, bucket: str, object_store: ObjectStore, large: bytes
) -> None:
    behind_proxy.write("large", b"old")
    proxy.interfere = lambda number, method, path: "no such upload" if "partNumber=2" in path else "forward"
    with pytest.raises(StorageUnavailableError, match="lost the upload three times"):
        behind_proxy.write("large", large)
    assert behind_proxy.read("large") == b"old"
    client = botocore.session.Session().create_client("s3", endpoint_url=object_store.endpoint_url)
    with closing(client):
        assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_a_process_that_used_the_store_ends_quietly(storage: Storage) -> None:
    """No unclosed sessions, no complaint of the event loop's thread, with all warnings shown."""
    storage.write("x", b"content")
    program = f"from opensora.storage import Storage; print(Storage({storage.uri!r}).read('x'))"
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "b'content'\n"
    assert "unclosed" not in result.stderr.lower()
    assert "error" not in result.stderr.lower()


def test_a_forked_child_has_connections_of_its_own(storage: Storage) -> None:
    storage.write("x", b"content")
    program = f"""
import os
from opensora.storage import Storage
assert Storage({storage.uri!r}).read("x") == b"content"
child = os.fork()
if child == 0:
    os._exit(0 if Storage({storage.uri!r}).read("x") == b"content" else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert Storage({storage.uri!r}).read("x") == b"content"
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_server_dies_with_its_parent(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("a Linux promise")
    program = (
        "import sys; from pathlib import Path; from opensora.quickstart.object_store import ObjectStore\n"
        f"store = ObjectStore(Path({str(tmp_path)!r})); store.start(); print(store.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.05)


@contextmanager
def finishes_within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    elapsed = time.monotonic() - start
    assert elapsed < seconds, f"took {elapsed:.1f} s"


def test_a_store_in_a_relative_folder_keeps_its_data_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ObjectStore(Path("store")) as store:
        store.create_bucket("videos")
    assert any((tmp_path / "store/data").iterdir())
