"""What a progress message may hold, which of two is newer, and what the reply asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from opensora_operator.progress import (
    BadReportError,
    LiveRun,
    ProgressBook,
    ProgressReport,
    StaleReportError,
    command_for,
    parse_report,
    reply_to,
)

MESSAGE: dict[str, Any] = {
    "attempt": 2, "sequence": 7, "phase": "training", "state": "Training", "step": 120, "total_steps": 1000,
    "epoch": 1, "loss": 0.25, "seconds_per_step": 1.5, "samples_per_second": 21.3, "eta_seconds": 1320.0,
    "goodput": 0.9, "checkpoint_step": 100, "samples_step": None, "requests": {"checkpoint": "c-1"}, "updated": 1e9,
}  # fmt: skip


def report(*, received: float = 50.0, pod_uid: str = "pod", **changes: Any) -> ProgressReport:
    return parse_report(json.dumps(MESSAGE | changes).encode(), pod_uid=pod_uid, received=received)


def test_a_message_is_read_as_it_was_sent() -> None:
    assert report() == ProgressReport(
        pod_uid="pod", attempt=2, sequence=7, phase="training", state="Training", step=120, total_steps=1000, epoch=1,
        loss=0.25, seconds_per_step=1.5, samples_per_second=21.3, eta_seconds=1320.0, goodput=0.9, checkpoint_step=100,
        samples_step=None, requests={"checkpoint": "c-1"}, received=50.0, advanced=50.0,
    )  # fmt: skip


def test_what_a_newer_core_adds_is_ignored() -> None:
    assert report(something_new={"a": [1]}) == report()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"step": -1}, "step is a whole number from 0, not -1"),
        ({"step": 1.5}, "step is a whole number"),
        ({"step": True}, "step is a whole number from 0, not True"),
        ({"step": 2**60}, "step is a whole number"),
        ({"attempt": "2"}, "attempt is a whole number from 0, not '2'"),
        ({"sequence": None}, "sequence is a whole number"),
        ({"loss": "low"}, "loss is a number, not 'low'"),
        ({"goodput": -0.1}, "goodput is a number"),
        ({"phase": "resting"}, "phase is one of training, done, stopped, failed, not 'resting'"),
        ({"phase": ["training"]}, "phase is one of"),
        ({"state": "x" * 500}, "…"),
        ({"requests": ["dump"]}, "requests is an object"),
        ({"requests": {"dump": "../../etc"}}, "requests.dump is an id, not '../../etc'"),
        ({"requests": {"checkpoint": 7}}, "requests.checkpoint is an id, not 7"),
    ],
)
def test_what_is_wrong_with_a_message_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadReportError) as error:
        report(**changes)
    assert told in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("key", ["attempt", "sequence", "phase", "state", "step", "epoch"])
def test_what_is_missing_is_named(key: str) -> None:
    message = {name: value for name, value in MESSAGE.items() if name != key}
    with pytest.raises(BadReportError, match=f"{key} is missing"):
        parse_report(json.dumps(message).encode(), pod_uid="pod", received=1.0)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff\xfe", b"{", b"[]", b"7", b'{"step": NaN}', b"[" * 60_000, b'{"step": ' + b"9" * 60_000 + b"}",
        json.dumps(MESSAGE | {"loss": 0}).replace('"loss": 0', '"loss": -1e999').encode(),
        json.dumps(MESSAGE | {"loss": 0}).replace('"loss": 0', '"loss": -Infinity').encode(),
    ],
    ids=["empty", "binary", "cut", "list", "number", "nan", "deep", "long number", "overflow", "infinity"],
)  # fmt: skip
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(BadReportError):
        parse_report(body, pod_uid="pod", received=1.0)


def test_the_newest_report_of_the_current_attempt_is_kept() -> None:
    book = ProgressBook()
    book.record("run", report(sequence=1, step=5))
    book.record("run", report(sequence=2, step=6))
    book.record("other", report(sequence=1, step=70))
    newest = book.newest("run", attempt=2)
    assert newest is not None
    assert newest.step == 6
    assert book.newest("run", attempt=3) is None, "the new attempt has not reported yet"
    book.forget("run")
    assert book.newest("run", attempt=2) is None
    assert len(book) == 1


def test_a_message_that_is_sent_again_is_refused() -> None:
    book = ProgressBook()
    book.record("run", report(sequence=2, step=6))
    for sequence in (1, 2):
        with pytest.raises(StaleReportError, match=f"message {sequence} is not newer than message 2"):
            book.record("run", report(sequence=sequence, step=99))
    with pytest.raises(StaleReportError, match="attempt 1 is over"):
        book.record("run", report(attempt=1, sequence=3, step=99))
    newest = book.newest("run", attempt=2)
    assert newest is not None
    assert newest.step == 6


def test_a_new_attempt_counts_its_messages_anew() -> None:
    book = ProgressBook()
    book.record("run", report(attempt=2, sequence=900))
    book.record("run", report(attempt=3, sequence=1, pod_uid="another", step=100))
    newest = book.newest("run", attempt=3)
    assert newest is not None
    assert newest.step == 100


def test_a_step_that_stands_still_keeps_the_time_of_its_first_report() -> None:
    book = ProgressBook()
    times = []
    for sequence, (received, step) in enumerate([(10, 5), (25, 5), (40, 5), (55, 6), (70, 6)], start=1):
        book.record("run", report(sequence=sequence, received=received, step=step))
        newest = book.newest("run", attempt=2)
        assert newest is not None
        times.append((newest.received, newest.advanced))
    assert times == [(10, 10), (25, 10), (40, 10), (55, 55), (70, 55)]


@pytest.mark.parametrize(
    ("requests", "answered", "carried_out", "commands"),
    [
        ({}, {}, {}, {}),
        ({"checkpoint": {"id": "a"}}, {}, {}, {"checkpoint": "a"}),
        ({"checkpoint": {"id": "a"}}, {"checkpoint": "a"}, {}, {}),
        ({"checkpoint": {"id": "a"}}, {}, {"checkpoint": "a"}, {}),
        ({"checkpoint": {"id": "b"}}, {"checkpoint": "a"}, {"checkpoint": "a"}, {"checkpoint": "b"}),
        ({"dump": {"id": "a"}}, {"checkpoint": "a"}, {"checkpoint": "a"}, {"dump": "a"}),
        ({"checkpoint": None, "dump": None, "stop": False}, {}, {}, {}),
        ({"stop": True}, {"stop": True}, {}, {"stop": True}),
        ({"restart": {"id": "r"}}, {}, {}, {}),
        ({"checkpoint": {"id": "a"}, "dump": {"id": "b"}, "stop": True}, {}, {},
         {"checkpoint": "a", "dump": "b", "stop": True}),
    ],
)  # fmt: skip
def test_requests_are_passed_on_until_they_are_answered(
    requests: dict[str, Any], answered: dict[str, Any], carried_out: dict[str, str], commands: dict[str, Any]
) -> None:
    assert command_for(requests, answered, report(requests=carried_out)) == commands


@pytest.mark.parametrize("phase", ["done", "stopped", "failed"])
def test_nothing_is_asked_of_a_run_that_has_ended(phase: str) -> None:
    assert command_for({"stop": True, "dump": {"id": "a"}}, {}, report(phase=phase)) == {}


@pytest.mark.parametrize(("heartbeat", "interval"), [(5.0, 5.0), (30.0, 15.0)])
def test_the_reply_says_when_to_report_again(heartbeat: float, interval: float) -> None:
    run = LiveRun(
        uid="run", attempt=2, pod_uids=frozenset({"pod"}), heartbeat_seconds=heartbeat, requests={}, answered={}
    )
    assert reply_to(report(), run) == {"interval_seconds": interval}
