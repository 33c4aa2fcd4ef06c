"""Stacks of all ranks on request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from uuid import uuid4

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]  # public, not listed in __all__

from opensora.errors import StorageUnavailableError
from opensora.storage import Data, Storage
from opensora.training.position import Position
from opensora.training.stack_dumps import StackDumps

PATIENCE = 10.0


class Ranks:
    """Ranks that share a store and a run directory."""

    def __init__(self) -> None:
        self.store: Store = HashStore()
        self.run = Storage(f"memory://test-{uuid4().hex}")
        self.started: list[StackDumps] = []

    def start(self, rank: int, *, size: int, run: Storage | None = None) -> StackDumps:
        position = Position(rank)
        position.step = 7
        dumps = StackDumps(self.store, run=run or self.run, attempt=2, size=size, position=position)
        self.started.append(dumps)
        return dumps


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr("opensora.training.stack_dumps._POLL_SECONDS", 0.01)
    monkeypatch.setattr("opensora.training.stack_dumps._LOOK_SECONDS", 0.01)
    ranks = Ranks()
    yield ranks
    for dumps in ranks.started:
        dumps.stop()


def test_every_rank_writes_where_its_threads_stand(ranks: Ranks) -> None:
    first = ranks.start(0, size=2)
    ranks.start(1, size=2)
    for name in ("first", "second"):
        written = threading.Event()
        first.request(name, written.set)
        assert written.wait(PATIENCE)
        for rank in range(2):
            stacks = ranks.run.read(f"dumps/attempt-2/{name}/rank-{rank}.txt").decode()
            assert stacks.startswith(f"{name}: in start-up at step 7\n")
            assert "thread MainThread" in stacks
            assert "test_every_rank_writes_where_its_threads_stand" in stacks


def test_nothing_is_written_unasked(ranks: Ranks) -> None:
    ranks.start(0, size=2)
    ranks.start(1, size=2)
    assert not threading.Event().wait(0.1)
    assert ranks.run.list() == []


def test_a_rank_that_does_not_even_do_that_is_not_waited_for_for_ever(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("opensora.training.stack_dumps._WAIT_SECONDS", 0.1)
    first = ranks.start(0, size=3)
    ranks.start(1, size=3)
    written = threading.Event()
    with caplog.at_level(logging.INFO):
        first.request("now", written.set)
        assert written.wait(PATIENCE)
    assert "stacks of 2 of 3 ranks are in" in caplog.text
    assert "dumps/attempt-2/now" in caplog.text


def test_without_the_store_the_stacks_are_in_the_log(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("opensora.training.stack_dumps._WAIT_SECONDS", 0.1)

    class Out(Storage):
        def write(self, path: str, data: Data) -> None:
            raise StorageUnavailableError("storage at http://store did not answer")

    written = threading.Event()
    ranks.start(0, size=1, run=Out(ranks.run.uri)).request("now", written.set)
    assert written.wait(PATIENCE)
    assert "stacks of rank 0 are in this log alone: storage at http://store did not answer" in caplog.text
    assert "test_without_the_store_the_stacks_are_in_the_log" in caplog.text
