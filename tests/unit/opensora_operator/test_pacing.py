"""How fast the operator may speak."""

from __future__ import annotations

import asyncio

from opensora_operator.pacing import ProgressPace, RateLimit


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def _let_run() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_burst_passes_and_the_rest_waits() -> None:
    async def scenario() -> int:
        limit = RateLimit(per_second=0.001, burst=3, clock=Clock())
        waiting = [asyncio.create_task(limit.acquire()) for _ in range(5)]
        await _let_run()
        passed = sum(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        return passed

    assert asyncio.run(scenario()) == 3


def test_what_is_urgent_passes_before_what_waits_longer() -> None:
    async def scenario() -> list[str]:
        limit = RateLimit(per_second=200, burst=1)
        order: list[str] = []

        async def pass_through(name: str, *, later: bool) -> None:
            await limit.acquire(later=later)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for name, later in (("first", False), ("event", True), ("event", True), ("job", False)):
                group.create_task(pass_through(name, later=later))
        return order

    assert asyncio.run(scenario()) == ["first", "job", "event", "event"]


def test_a_server_that_has_too_many_requests_is_left_alone() -> None:
    async def scenario() -> tuple[bool, bool]:
        clock = Clock()
        limit = RateLimit(per_second=1000, burst=10, clock=clock)
        limit.pause(0.02)
        waiting = asyncio.create_task(limit.acquire())
        await _let_run()
        before = waiting.done()
        clock.now += 0.02
        await waiting
        return before, waiting.done()

    assert asyncio.run(scenario()) == (False, True)


def test_one_who_gave_up_takes_nobodys_place() -> None:
    async def scenario() -> None:
        limit = RateLimit(per_second=100, burst=1)
        await limit.acquire()
        gone = asyncio.create_task(limit.acquire())
        waiting = asyncio.create_task(limit.acquire())
        await _let_run()
        gone.cancel()
        async with asyncio.timeout(1):
            await waiting

    asyncio.run(scenario())


def test_a_thousand_runs_write_five_times_a_second_together_and_each_in_turn() -> None:
    clock = Clock()
    pace = ProgressPace(per_second=5, interval_seconds=10, clock=clock)
    uids = [str(number) for number in range(1000)]
    written: dict[str, list[float]] = {uid: [] for uid in uids}
    times = []
    for tick in range(4000):  # 400 s, every run asks all the time
        clock.now = 1000 + tick / 10
        for uid in uids:
            if pace.wait_seconds(uid) == 0:
                pace.written(uid)
                written[uid].append(clock.now)
                times.append(clock.now)
    assert max(sum(second <= time < second + 1 for time in times) for second in range(1000, 1400)) <= 6
    assert len(times) >= 5 * 399
    assert {len(found) for found in written.values()} <= {1, 2, 3}


def test_one_run_writes_at_once_and_then_every_ten_seconds() -> None:
    clock = Clock()
    pace = ProgressPace(per_second=5, interval_seconds=10, clock=clock)
    assert pace.wait_seconds("a") == 0
    pace.written("a")
    assert pace.wait_seconds("a") == 10
    clock.now += 4
    assert pace.wait_seconds("a") == 6
    pace.written("a")  # for another reason: with it went the progress
    assert pace.wait_seconds("a") == 10


def test_what_is_gone_is_forgotten() -> None:
    pace = ProgressPace(per_second=5, interval_seconds=10, clock=Clock())
    pace.written("a")
    pace.forget("a")
    assert pace.wait_seconds("a") == 0
