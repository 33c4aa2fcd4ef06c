"""What a probe and Prometheus get, and when the operator says that it is ill."""

from __future__ import annotations

import asyncio
import re

import aiohttp
import pytest
from opensora_operator import runtime
from opensora_operator.__main__ import main
from opensora_operator.health import HealthServer
from opensora_operator.metrics import Metrics
from opensora_operator.plans import Key
from opensora_operator.queue import Queue
from opensora_operator.runtime import Runtime
from opensora_operator.settings import Settings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def test_probe_and_metrics_are_answered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    problem = ""

    async def scenario() -> list[tuple[int, str]]:
        nonlocal problem
        server = HealthServer(Metrics(), lambda: problem)
        await server.start("127.0.0.1", 0)
        found = re.findall(r"127\.0\.0\.1:\d+", caplog.text)[0]
        answers = []
        async with aiohttp.ClientSession(f"http://{found}") as session:
            for path, said in (("/healthz", ""), ("/healthz", "an object has waited for 70 s"), ("/metrics", "")):
                problem = said
                async with session.get(path) as response:
                    answers.append((response.status, await response.text()))
        await server.stop()
        return answers

    well, ill, metrics = asyncio.run(scenario())
    assert well == (200, "ok")
    assert ill == (503, "an object has waited for 70 s")
    assert metrics[0] == 200
    assert "# TYPE opensora_queue_depth gauge" in metrics[1]


def test_a_port_that_is_taken_is_an_error() -> None:
    async def scenario() -> None:
        first, second = HealthServer(Metrics(), str), HealthServer(Metrics(), str)
        await first.start("127.0.0.1", 0)
        assert first._runner is not None
        with pytest.raises(OSError, match="in use"):
            await second.start("127.0.0.1", first._runner.addresses[0][1])
        await second.stop()
        await first.stop()

    asyncio.run(scenario())


def _problem(clock: Clock, monkeypatch: pytest.MonkeyPatch, *, waits: float, silent: float, works: bool) -> str:
    """What a runtime complains of whose oldest key has waited and whose API server has been silent for so long."""
    monkeypatch.setattr(runtime, "time", clock)

    async def scenario() -> str:
        made = Runtime(Settings(), None, Metrics(), kinds={})  # type: ignore[arg-type]  # nothing is asked of it
        made._queue = Queue(clock=clock)
        if works:
            made._workers.append(asyncio.create_task(asyncio.sleep(0)))
        made._watching.heard_at = clock.now - silent
        made._queue.add(Key("TrainingRun", "team", "demo"), seconds=-waits)
        return made.problem()

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("waits", "silent", "works", "problem"),
    [
        (59, 10, True, ""),
        (61, 10, True, "an object has waited for 61 s"),
        (0, 899, True, ""),
        (0, 901, True, "the API server has said nothing for 901 s"),
        (1000, 1000, False, ""),
    ],
    ids=["busy", "starved", "quiet", "deaf", "standby"],
)
def test_an_operator_that_works_and_does_not_get_on_is_ill(
    monkeypatch: pytest.MonkeyPatch, waits: float, silent: float, works: bool, problem: str
) -> None:
    assert _problem(Clock(), monkeypatch, waits=waits, silent=silent, works=works) == problem


def test_a_wrong_setting_ends_the_command_with_the_usage_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--concurrency", "0"]) == 64
    assert capsys.readouterr().err == "opensora-operator: concurrency is 0; it has to be at least 1\n"
