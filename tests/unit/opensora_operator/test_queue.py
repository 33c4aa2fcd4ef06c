"""The keyed queue, by a clock of its own."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opensora_operator.plans import Key
from opensora_operator.queue import Queue


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> Queue:
    return Queue(clock=clock, jitter=lambda: 0.5)


def key(name: str) -> Key:
    return Key("TrainingRun", "default", name)


def taken(queue: Queue) -> list[str]:
    """The names of all keys whose turn it is, in order; they stay with their workers."""
    names = []
    while (turn := queue.take()) is not None:
        names.append(turn.key.name)
    return names


def test_many_events_of_one_object_are_one_turn(queue: Queue) -> None:
    for _ in range(5):
        queue.add(key("a"))
    assert taken(queue) == ["a"]


def test_keys_come_in_the_order_in_which_they_were_due(queue: Queue, clock: Clock) -> None:
    queue.add(key("second"), seconds=2)
    queue.add(key("first"), seconds=1)
    assert taken(queue) == []
    clock.now += 2
    assert taken(queue) == ["first", "second"]


def test_an_object_is_with_one_worker_at_a_time(queue: Queue) -> None:
    queue.add(key("a"))
    queue.take()
    queue.add(key("a"))
    assert taken(queue) == []
    queue.done(key("a"))
    assert taken(queue) == ["a"]


def test_what_was_due_later_is_due_now_after_an_event(queue: Queue) -> None:
    queue.add(key("a"), seconds=300)
    queue.add(key("a"))
    assert taken(queue) == ["a"]


def test_an_event_is_not_put_off_by_a_later_due_time(queue: Queue) -> None:
    queue.add(key("a"))
    queue.add(key("a"), seconds=300)
    assert taken(queue) == ["a"]


def test_what_may_wait_goes_after_what_is_urgent(queue: Queue, clock: Clock) -> None:
    queue.add(key("status"), later=True)
    clock.now += 1
    queue.add(key("new"))
    assert queue.has_urgent()
    assert taken(queue) == ["new", "status"]
    assert not queue.has_urgent()


def test_what_may_wait_does_not_wait_for_ever(queue: Queue, clock: Clock) -> None:
    queue.add(key("status"), later=True)
    clock.now += 31
    queue.add(key("new"))
    assert taken(queue) == ["status", "new"]


def test_an_event_makes_urgent_what_could_wait(queue: Queue, clock: Clock) -> None:
    queue.add(key("a"), later=True)
    clock.now += 1
    queue.add(key("a"))
    assert queue.has_urgent()
    turn = queue.take()
    assert turn is not None
    assert not turn.later


def test_a_deadline_in_the_future_makes_nothing_urgent(queue: Queue) -> None:
    queue.add(key("a"), later=True)
    queue.add(key("a"), seconds=5)
    assert not queue.has_urgent()
    assert taken(queue) == ["a"]


def test_failures_wait_longer_each_time_up_to_a_minute(queue: Queue, clock: Clock) -> None:
    waits = []
    for _ in range(12):
        waits.append(queue.retry(key("a")))
        clock.now += 100
        assert taken(queue) == ["a"]
        queue.done(key("a"))
    assert waits[:4] == pytest.approx([0.2, 0.4, 0.8, 1.6])
    assert waits[-1] == 60
    queue.succeeded(key("a"))
    assert queue.retry(key("a")) == pytest.approx(0.2)


def test_a_failure_waits_as_long_as_the_server_asks(queue: Queue, clock: Clock) -> None:
    assert queue.retry(key("a"), at_least_seconds=7) == 7
    clock.now += 6.9
    assert taken(queue) == []
    clock.now += 0.2
    assert taken(queue) == ["a"]


def test_age_counts_keys_that_wait_and_keys_that_a_worker_does_not_give_back(queue: Queue, clock: Clock) -> None:
    assert queue.oldest_seconds() == 0
    queue.add(key("a"))
    queue.add(key("b"), seconds=1000)
    clock.now += 5
    assert (queue.oldest_seconds(), len(queue)) == (5, 1)
    queue.take()
    assert (queue.oldest_seconds(), len(queue)) == (0, 0)
    clock.now += 70
    assert queue.oldest_seconds() == 70
    queue.done(key("a"))
    assert queue.oldest_seconds() == 0


def test_waiting_ends_with_the_next_key_and_draining_with_the_last_worker() -> None:
    async def scenario() -> list[str]:
        queue = Queue()
        waiting = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        queue.add(key("a"))
        said = [(await waiting).key.name]
        queue.add(key("b"))
        draining = asyncio.create_task(queue.drain())
        await asyncio.sleep(0)
        said.append("busy" if not draining.done() else "idle")
        queue.done(key("a"))
        await draining
        said.append("none" if queue.take() is None else "b is given out")
        return said

    assert asyncio.run(scenario()) == ["a", "busy", "none"]


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "take", "done", "tick"]),
        st.integers(0, 3),
        st.sampled_from([0.0, 0.0, 0.5, 3.0]),
        st.booleans(),
    ),
    max_size=60,
)


@given(_STEPS)
def test_no_key_is_lost_doubled_or_given_to_two_workers(steps: list[tuple[str, int, float, bool]]) -> None:
    clock = Clock()
    queue = Queue(clock=clock)
    running: set[str] = set()
    due: dict[str, float] = {}  # a key → when it has to have a turn, at the latest
    for action, number, seconds, later in steps:
        name = str(number)
        if action == "add":
            queue.add(key(name), seconds=seconds, later=later)
            due[name] = min(due.get(name, float("inf")), clock.now + seconds)
        elif action == "tick":
            clock.now += seconds
        elif action == "done" and name in running:
            queue.done(key(name))
            running.remove(name)
        elif action == "take" and (turn := queue.take()) is not None:
            assert turn.key.name not in running
            assert due.pop(turn.key.name) <= clock.now
            running.add(turn.key.name)
    for name in running:
        queue.done(key(name))
    clock.now += 10
    assert sorted(taken(queue)) == sorted(due)
