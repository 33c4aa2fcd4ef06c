"""Clock, watchdog and translated failures."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from opensora.config.train import WatchdogConfig
from opensora.errors import DataError, OutOfMemoryError, PeerLostError
from opensora.training.clock import Clock, Phase
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


def test_goodput_is_the_share_of_encoding_computing_and_updating(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("opensora.training.clock.time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = Clock()
    durations: dict[Phase, float] = {
        "data wait": 1, "encode": 2, "forward/backward": 3, "imbalance": 4, "optimiser": 5, "saving": 6,
        "validation": 7, "sampling": 8,
    }  # fmt: skip
    now[0] += 9
    clock.switch("other")
    for phase, seconds in durations.items():
        with clock(phase):
            now[0] += seconds
    assert clock.seconds() == {"start-up": 9, "other": 0, **durations}
    assert clock.elapsed() == 45
    assert clock.goodput() == pytest.approx((2 + 3 + 5) / 45)


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


def test_a_translated_failure_says_where_and_what_helps_and_keeps_its_cause() -> None:
    cause = RuntimeError("Connection closed by peer [127.0.0.1]:1234\nC++ frames")
    with pytest.raises(PeerLostError) as lost, translated(" at step 3"):
        raise cause
    assert lost.value.message == "another rank is gone at step 3: Connection closed by peer [127.0.0.1]:1234"
    assert lost.value.__cause__ is cause
    with pytest.raises(OutOfMemoryError, match="out of memory at step 3, bucket 144p") as memory:  # noqa: SIM117
        with translated(" at step 3, bucket 144p"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert "Tried to allocate 2 GiB" in memory.value.message
    assert "activation_checkpointing=full" in str(memory.value.hint)


def test_a_lost_peer_without_a_word_is_still_a_lost_peer() -> None:
    with pytest.raises(PeerLostError, match="another rank is gone: DistNetworkError"), translated():
        raise dist.DistNetworkError
