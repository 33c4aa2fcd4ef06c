"""Clock, watchdog and translated failures."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from opensora.config.train import WatchdogConfig
from opensora.errors import DataError, OutOfMemoryError, PeerLostError
from opensora.training.clock import Clock
from opensora.training.failures import translated
from opensora.training.watchdog import Watchdog


def test_parts_of_the_clock_add_up_to_the_elapsed_time() -> None:
    clock = Clock()
    with clock("encode"):
        time.sleep(0.02)
        with clock("data wait"):
            time.sleep(0.01)
        assert clock.phase == "encode"
    seconds = clock.seconds()
    assert sum(seconds.values()) == pytest.approx(clock.elapsed(), abs=0.005)
    assert seconds["encode"] >= 0.02
    assert seconds["data wait"] >= 0.01


def test_an_error_leaves_the_phase_that_it_happened_in() -> None:
    clock = Clock()
    clock.switch("other")
    with pytest.raises(DataError), clock("validation"), clock("data wait"):
        raise DataError("a clip")
    assert clock.phase == "data wait"


def test_a_rank_that_stands_still_is_reported_with_its_phase_and_stacks() -> None:
    told: list[tuple[str, str]] = []
    reported = threading.Event()

    def on_stall(reason: str, stacks: str) -> None:
        told.append((reason, stacks))
        reported.set()

    clock = Clock()
    clock.switch("data wait")
    watchdog = Watchdog(WatchdogConfig(startup_seconds=0.1), clock=clock, on_stall=on_stall)
    try:
        assert reported.wait(5)
    finally:
        watchdog.stop()
    reason, stacks = told[0]
    assert "in data wait" in reason
    assert "test_a_rank_that_stands_still" in stacks


def test_the_limit_is_learnt_from_the_usual_step_and_never_below_the_floor() -> None:
    config = WatchdogConfig(factor=3.0, floor_seconds=0.001, startup_seconds=100.0)
    watchdog = Watchdog(config, clock=Clock(), on_stall=lambda reason, stacks: None)
    try:
        assert watchdog.limit_seconds() == 100.0
        watchdog.step_done()
        assert watchdog.limit_seconds() == 0.001
        time.sleep(0.05)
        watchdog.step_done()
        assert 0.15 <= watchdog.limit_seconds() < 1.0
    finally:
        watchdog.stop()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"), PeerLostError),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), OutOfMemoryError),
        (DataError("a clip"), DataError),
        (ValueError("a bug"), ValueError),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:30]),
)
def test_only_known_failures_change_their_name(raised: Exception, expected: type[Exception]) -> None:
    with pytest.raises(Exception) as caught, translated(" at step 3"):  # noqa: PT011  # the type is what is tested
        raise raised
    assert type(caught.value) is expected
