"""`progress.json` and the bar: what they show, how often, and that a store in trouble costs the loop nothing."""

from __future__ import annotations

import http.server
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar
from uuid import uuid4

import pytest

from opensora import records
from opensora.errors import StorageUnavailableError
from opensora.storage import Data, Storage
from opensora.training.progress import ProgressReporter, ProgressState

PATIENCE = 10.0


def state(step: int, **changes: Any) -> ProgressState:
    values: dict[str, Any] = {
        "phase": "training", "state": "Training", "step": step, "total_steps": 10, "epoch": 1, "loss": 0.5,
        "seconds_per_step": 2.0, "samples_per_second": 4.0, "eta_seconds": 2.0 * (10 - step), "goodput": 0.9,
        "attempt": 3, "checkpoint_step": None, "samples_step": None, "updated": 1e9,
    }  # fmt: skip
    return ProgressState(**{**values, **changes})


class Watched(Storage):
    """Keeps what was written; `outage` says what a write does first."""

    def __init__(self) -> None:
        super().__init__(f"memory://test-{uuid4().hex}")
        self.writes: list[dict[str, Any]] = []
        self.written = threading.Semaphore(0)
        self.outage: Callable[[], None] = lambda: None

    def write(self, path: str, data: Data) -> None:
        try:
            self.outage()
            super().write(path, data)
            assert path == records.PROGRESS_PATH
            self.writes.append(json.loads(bytes(data)))
        finally:
            self.written.release()

    def wait_for_write(self) -> None:
        assert self.written.acquire(timeout=PATIENCE)

    def steps(self) -> list[int]:
        return [content["step"] for content in self.writes]


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(records.TERMINAL_COLUMNS, raising=False)


def set_interval(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr("opensora.training.progress._WRITE_INTERVAL_SECONDS", seconds)


def test_progress_json_is_written_at_most_once_a_second() -> None:
    run = Watched()
    reporter = ProgressReporter(run, total_steps=10, first_step=0)
    reporter.update(state(1))
    run.wait_for_write()
    begin = time.monotonic()
    while not run.written.acquire(timeout=0.01):
        reporter.update(state(2))
    assert time.monotonic() - begin > 0.95
    reporter.close(state(3, phase="done"))
    assert run.steps() == [1, 2, 3]


def test_close_writes_the_last_state_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    set_interval(monkeypatch, 1000)
    run = Watched()
    reporter = ProgressReporter(run, total_steps=10, first_step=0)
    reporter.update(state(1))
    run.wait_for_write()
    for step in range(2, 8):
        reporter.update(state(step))
        assert not run.written.acquire(timeout=0.01)
    last = state(8, phase="stopped", loss=None, checkpoint_step=8)
    reporter.close(last)
    assert run.steps() == [1, 8]
    assert json.loads(run.read("progress.json")) == asdict(last)


def test_nothing_new_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    set_interval(monkeypatch, 0.0)
    run = Watched()
    reporter = ProgressReporter(run, total_steps=10, first_step=0)
    reporter.update(state(1))
    run.wait_for_write()
    assert not run.written.acquire(timeout=0.05)
    reporter.close(state(1))


def test_a_store_that_hangs_delays_neither_the_loop_nor_its_end() -> None:
    run = Watched()
    released = threading.Event()

    def hang() -> None:
        released.wait(PATIENCE)

    run.outage = hang
    reporter = ProgressReporter(run, total_steps=10, first_step=0)
    begin = time.monotonic()
    for step in range(1, 1000):
        reporter.update(state(step))
    reporter.close(state(1000, phase="done"), timeout_seconds=0.05)
    assert time.monotonic() - begin < 2
    assert run.writes == []
    released.set()


def test_an_outage_is_told_once_and_survived(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    set_interval(monkeypatch, 0.0)
    run = Watched()

    def fail() -> None:
        raise StorageUnavailableError("storage at http://store did not answer")

    def next_write(step: int) -> None:
        reporter.update(state(step))
        run.wait_for_write()

    with caplog.at_level(logging.WARNING):
        reporter = ProgressReporter(run, total_steps=10, first_step=0)
        run.outage = fail
        next_write(1)
        next_write(2)
        run.outage = lambda: None
        next_write(3)
        assert len(caplog.records) == 1
        assert "http://store did not answer" in caplog.text
        run.outage = fail
        next_write(4)
        run.outage = lambda: None
        reporter.close(state(5, phase="done"))
    assert run.steps() == [3, 5]
    assert len(caplog.records) == 2, "a second outage is told as well"


class Receiver(http.server.BaseHTTPRequestHandler):
    """Keeps what it is sent."""

    received: ClassVar[list[tuple[str | None, Any]]] = []

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.headers["Content-Type"], json.loads(content)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


def test_progress_is_sent_to_a_url_as_well(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = Watched()
        url = f"http://127.0.0.1:{server.server_port}/progress"
        reporter = ProgressReporter(run, total_steps=10, first_step=0, url=url)
        reporter.close(state(7))
        server.shutdown()
    assert Receiver.received == [("application/json", run.writes[-1])]
    assert run.writes[-1]["step"] == 7
    # Nobody is there any more: that is told once, and progress.json is written all the same.
    reporter = ProgressReporter(run, total_steps=10, first_step=0, url=url)
    reporter.update(state(8))
    run.wait_for_write()
    reporter.close(state(9))
    assert run.steps()[-1] == 9
    assert [f"progress does not reach {url}" in record.message for record in caplog.records] == [True]


def test_without_a_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ProgressReporter(Watched(), total_steps=10, first_step=0)
    assert not reporter.has_bar
    reporter.close(state(1, phase="done"))
    assert capsys.readouterr() == ("", "")


def test_the_launchers_terminal_gets_a_bar_of_its_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(records.TERMINAL_COLUMNS, "100")
    reporter = ProgressReporter(Watched(), total_steps=10, first_step=3)
    assert reporter.has_bar
    reporter.update(state(4, loss=0.12345, seconds_per_step=1.5))
    reporter.close(state(5, phase="stopped", loss=None, seconds_per_step=None))
    output = capsys.readouterr()
    assert output.out == ""
    assert "3/10" in output.err, "a run that continues begins where it was"
    assert "5/10" in output.err
    assert "\x1b[" in output.err, "the cursor is moved"
    assert max(len(line) for line in output.err.replace("\r", "\n").split("\n")) > 40
