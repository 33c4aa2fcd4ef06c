"""`osctl top`: what runs take."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from fake_api import RUNS, FakeApi
from opensora_operator.wire import format_time
from operator_world import World
from osctl.commands.top import usage_of

NOW = 1_000_000.0


def _run(name: str, *, phase: str = "Running", **status: Any) -> dict[str, Any]:
    base = {"phase": phase, "nodes": {"desired": 2}, "resolved": {"procsPerNode": 4}}
    return {
        "metadata": {"name": name, "namespace": "team", "creationTimestamp": format_time(NOW - 7200)},
        "status": {**base, **status},
    }


def _attempt(number: int, *, nodes: int, ran: float, ended: float | None) -> dict[str, Any]:
    times = {"ranAt": format_time(NOW + ran)} | ({} if ended is None else {"endedAt": format_time(NOW + ended)})
    return {"number": number, "nodes": nodes, **times}


RUNNING = _run(
    "first",
    attempts=[_attempt(1, nodes=1, ran=-7200, ended=-3600), _attempt(2, nodes=2, ran=-1800, ended=None)],
    progress={
        "step": 40,
        "secondsPerStep": "1.25",
        "samplesPerSecond": "3.2",
        "goodputPercent": 91,
        "lastUpdate": format_time(NOW - 5),
    },
)
DONE = _run(
    "second",
    phase="Succeeded",
    endedAt=format_time(NOW - 60),
    attempts=[_attempt(1, nodes=2, ran=-3600, ended=-60)],
    progress={"lastUpdate": format_time(NOW - 60), "goodputPercent": 60},
)
NEW: dict[str, Any] = {"metadata": {"name": "third", "namespace": "team", "creationTimestamp": format_time(NOW)}}


@pytest.fixture
def runs(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    monkeypatch.setattr("osctl.commands.top.time.time", lambda: NOW)
    api.on("GET", RUNS, {"items": [NEW, DONE, RUNNING], "metadata": {}})
    return api


def test_hours_are_those_of_every_rank_in_every_attempt() -> None:
    assert usage_of(RUNNING, now=NOW).rank_hours == pytest.approx(1 * 4 * 1.0 + 2 * 4 * 0.5)
    assert usage_of(NEW, now=NOW).rank_hours == 0


def test_attempts_that_status_has_forgotten_count_by_the_active_time() -> None:
    run = _run("x", activeSeconds=7200, attempts=[_attempt(12, nodes=2, ran=-3600, ended=0)])
    assert usage_of(run, now=NOW).rank_hours == pytest.approx(2 * 4 * 2.0)


def test_a_run_of_the_operator_is_understood() -> None:
    world = World().running()
    world.run["metadata"]["creationTimestamp"] = format_time(world.now)
    usage = usage_of(world.run, now=world.now + 3600)
    assert (usage.nodes, usage.ranks, round(usage.rank_hours, 1)) == (2, 4, 4.0)


def test_the_table(runs: FakeApi, osctl: Any) -> None:
    result = osctl("top")
    assert result.code == 0
    assert (
        result.out
        == """\
NAME     PHASE       NODES   RANKS   RANK-HOURS   S/STEP   CLIPS/S   GOODPUT   REPORT
first    Running     2       8       8.0          1.25     3.2       91 %      5s ago
second   Succeeded   -       -       7.9          -        -         60 %      -
third    New         -       -       0.0          -        -         -         -
"""
    )
    assert len(runs.requests) == 1
    assert osctl("top", "-o", "wide").out.splitlines()[1].split()[-2:] == ["40", "2h"]


def test_the_data(runs: FakeApi, osctl: Any) -> None:
    first = json.loads(osctl("top", "-o", "json").out)[0]
    assert first == yaml.safe_load(osctl("top", "-o", "yaml").out)[0]
    assert first == {
        "namespace": "team",
        "name": "first",
        "phase": "Running",
        "nodes": 2,
        "ranks": 8,
        "rankHours": 8.0,
        "step": 40,
        "secondsPerStep": 1.25,
        "samplesPerSecond": 3.2,
        "goodputPercent": 91,
        "reportedSecondsAgo": 5,
        "ageSeconds": 7200,
    }


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("hours", ["first", "second", "third"]),
        ("name", ["first", "second", "third"]),
        ("goodput", ["second", "first", "third"]),
        ("step-time", ["first", "third", "second"]),
        ("ranks", ["first", "third", "second"]),
    ],
)
def test_what_is_looked_for_comes_first(runs: FakeApi, osctl: Any, order: str, names: list[str]) -> None:
    lines = osctl("top", "--sort", order, "-o", "name").out.split()
    assert lines == [f"trainingrun.opensora.dev/{name}" for name in names]


def test_all_namespaces_are_named(runs: FakeApi, osctl: Any) -> None:
    runs.on("GET", "/apis/opensora.dev/v1alpha1/trainingruns", {"items": [RUNNING], "metadata": {}})
    assert osctl("top", "-A").out.splitlines()[1].split()[:2] == ["team", "first"]


def test_no_runs_are_no_table(api: FakeApi, osctl: Any) -> None:
    api.on("GET", RUNS, {"items": [], "metadata": {}})
    assert osctl("top") == (0, "", "no trainingruns in namespace team\n")
