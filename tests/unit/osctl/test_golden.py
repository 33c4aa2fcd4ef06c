"""What commands print, to the letter: in the table and as JSON, at three widths, with and without colour."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fake_api import RUNS, FakeApi

PODS = "/api/v1/namespaces/team/pods"
WIDTHS = (80, 120, 200)


LAST_WORDS = (
    "ValueError: a clip that is \x1b[31mnone, and a line that is longer than a terminal of eighty columns is wide"
)


def _run() -> dict[str, Any]:
    """A run that has failed once, and waits for a node."""
    return {
        "apiVersion": "opensora.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {
            "name": "first", "namespace": "team", "uid": "u", "resourceVersion": "5", "generation": 1,
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"runUri": "s3://bucket/runs/first", "config": {"inline": "{}"}, "nodes": 2},
        "status": {
            "phase": "Failed",
            "observedGeneration": 1,
            "attempt": 2,
            "restarts": 1,
            "startedAt": "2026-01-01T00:01:00Z",
            "endedAt": "2026-01-01T02:00:00Z",
            "conditions": [
                {
                    "type": "Failed", "status": "True", "reason": "NoProgress", "message": "no newer checkpoint",
                    "lastTransitionTime": "2026-01-01T02:00:00Z",
                }
            ],
            "progress": {"step": 61, "totalSteps": 200, "percent": 30, "secondsPerStep": "0.42", "loss": "0.173"},
            "checkpoint": {"latestStep": 50},
            "nodes": {"ready": 1, "desired": 2},
            "resolved": {"worldSize": 4, "procsPerNode": 2, "queue": "research"},
            "attempts": [
                {
                    "number": 1, "cause": "WorkerFailed", "exitCode": 1, "rank": 3, "pod": "first-a1-1-x7",
                    "node": "gpu-7", "firstStep": 0, "lastStep": 61, "message": LAST_WORDS,
                    "startedAt": "2026-01-01T00:01:00Z", "endedAt": "2026-01-01T01:01:00Z",
                },
                {"number": 2, "cause": "Stopped", "firstStep": 50, "startedAt": "2026-01-01T01:02:00Z",
                 "endedAt": "2026-01-01T02:00:00Z"},
            ],
        },
    }  # fmt: skip


@pytest.fixture
def cluster(api: FakeApi) -> FakeApi:
    api.on("GET", f"{RUNS}/first", _run())
    api.on("GET", PODS, {"items": [], "metadata": {}})
    return api


STATUS_80 = """\
TrainingRun first in team: Failed, after 2h

  progress     [#######.................] step 61 of 200 (30 %)
  speed        0.42 s/step
  loss         0.173
  checkpoint   step 50
  nodes        1 of 2 ready, 4 ranks
  restarts     1 after failures (0 of 10 used), 0 after disruptions
  queue        research
  run          s3://bucket/runs/first

  ATTEMPT   STEPS     TOOK   END            FIRST FAILED
  1         0 to 61   1h     WorkerFailed   rank 3 on gpu-7, exit 1
  2         from 50   58m    Stopped

first failure of attempt 1: WorkerFailed, rank 3 (pod first-a1-1-x7, node gpu-7,
  exit code 1)
  | ValueError: a clip that is  [31mnone, and a line that is longer than a
    terminal of eighty columns is wide

next: REMEDY
"""


def _without_remedy(text: str) -> str:
    """The remedy is the page's of reasons, which changes with it."""
    return re.sub(r"next: .*\Z", "next: REMEDY\n", text, flags=re.DOTALL)


def test_status_to_the_letter(cluster: FakeApi, osctl: Any) -> None:
    result = osctl("status", "first")
    assert (result.code, result.err) == (0, "")
    assert _without_remedy(result.out) == STATUS_80
    assert "next: " in result.out


@pytest.mark.parametrize("width", WIDTHS)
def test_status_fits_every_width_and_says_the_same(
    cluster: FakeApi, osctl: Any, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = osctl("status", "first").out
    assert max(map(len, out.splitlines())) <= width
    assert _without_remedy(out).split() == STATUS_80.split()


@pytest.mark.parametrize("command", [("status", "first"), ("get",), ("doctor",), ("config", "view"), ("explain", "tr")])
def test_colour_carries_nothing_of_its_own(
    cluster: FakeApi, osctl: Any, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    cluster.on("GET", RUNS, {"columnDefinitions": [{"name": "Name"}], "rows": [], "metadata": {}})
    plain = osctl(*command)
    monkeypatch.setenv("OSCTL_COLOR", "always")
    painted = osctl(*command)
    stripped = re.sub(r"\x1b\[[0-9;]*m", "", painted.out)
    if command != ("config", "view"):  # which says that colours are on
        assert stripped == plain.out
    assert "\x1b" not in plain.out
    assert painted.code == plain.code


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb"), ("OSCTL_COLOR", "never")])
def test_no_colour_where_none_is_wanted_even_on_a_terminal(
    cluster: FakeApi, osctl: Any, monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setenv(*variable)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b" not in osctl("status", "first").out


def test_status_as_json_to_the_letter(cluster: FakeApi, osctl: Any) -> None:
    data = json.loads(osctl("status", "first", "-o", "json").out)
    assert data.pop("next")
    assert data.pop("status") == _run()["status"]
    assert data == {
        "name": "first",
        "namespace": "team",
        "phase": "Failed",
        "seconds": 7200,
        "runUri": "s3://bucket/runs/first",
        "firstFailure": {
            "attempt": 1, "cause": "WorkerFailed", "rank": 3, "pod": "first-a1-1-x7", "node": "gpu-7", "exitCode": 1,
            "lastWords": LAST_WORDS,
        },
        "pods": [],
        "unseen": [],
    }  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("field", ["tr.spec", "sj.spec.prompts", "config.train", "tr.spec.scheduling.gang"])
def test_explanations_fit_every_width_and_say_the_same(
    osctl: Any, monkeypatch: pytest.MonkeyPatch, field: str, width: int
) -> None:
    narrow = osctl("explain", field).out
    monkeypatch.setenv("COLUMNS", str(width))
    out = osctl("explain", field).out
    assert out.split() == narrow.split()
    prose = [line for line in out.splitlines() if line.startswith("      ")]
    assert max(map(len, prose)) <= width


def test_an_explanation_to_the_letter(osctl: Any) -> None:
    assert (
        osctl("explain", "tr.spec.restartPolicy.backoff").out
        == """\
TrainingRun.spec.restartPolicy.backoff (object)

Pause before the next attempt.

rule: backoff.baseSeconds is above backoff.maxSeconds

  baseSeconds (integer, default 10)
      Pause after the first failure.
  maxSeconds (integer, default 300)
      Longest pause.
"""
    )


TABLE = {
    "columnDefinitions": [
        {"name": "Name", "priority": 0}, {"name": "Phase", "priority": 0}, {"name": "Queue", "priority": 1},
    ],
    "rows": [
        {"cells": ["first", "Running", "gpu"], "object": {"metadata": {"namespace": "team"}}},
        {"cells": ["a-run\x1b[31m", None, True], "object": {"metadata": {"namespace": "team"}}},
    ],
    "metadata": {},
}  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_lists_are_as_wide_as_they_are(api: FakeApi, osctl: Any, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """So that they can be cut into columns, whatever the terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    api.on("GET", RUNS, TABLE)
    assert osctl("get").out == "NAME         PHASE\nfirst        Running\na-run [31m\n"
    assert osctl("get", "-o", "wide").out.splitlines()[2] == "a-run [31m             true"
