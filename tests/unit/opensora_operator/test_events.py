"""Events: each reason once for an attempt, in the background, and never in the way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opensora_operator import events
from opensora_operator.cluster import ApiError
from opensora_operator.events import Recorder
from opensora_operator.plans import Event, Object


class Server:
    def __init__(self) -> None:
        self.created: list[Object] = []
        self.answers: Iterator[ApiError] = iter(())

    async def create(self, manifest: Object, *, later: bool = False) -> Object:
        assert later, "an event is not more important than a Job"
        answer = next(self.answers, None)
        if answer is not None:
            raise answer
        self.created.append(manifest)
        return manifest


def body(attempt: int = 1, uid: str = "u1") -> Object:
    metadata = {"name": "demo", "namespace": "team", "uid": uid, "resourceVersion": "7"}
    return {
        "apiVersion": "opensora.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": metadata,
        "status": {"attempt": attempt},
    }


def sent(server: Server, *recorded: tuple[Object, Event], recorder: Recorder | None = None) -> list[Object]:
    """What the API server has after these were recorded."""

    async def scenario() -> None:
        found = recorder or Recorder(server, identity="operator-1")  # type: ignore[arg-type]  # as much as is used
        for about, event in recorded:
            found.record(about, event)
        sending = asyncio.create_task(found.send())
        await found.flush()
        sending.cancel()

    asyncio.run(scenario())
    return server.created


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_RETRY_SECONDS", 0.0)


FAILED = Event(reason="WorkerFailed", message="rank 3 ended with exit code 1", warning=True)


def test_an_event_says_what_happened_to_whom() -> None:
    (event,) = sent(Server(), (body(), FAILED))
    assert (event["type"], event["reason"], event["note"]) == ("Warning", FAILED.reason, FAILED.message)
    assert event["regarding"]["uid"] == "u1"
    assert event["metadata"]["namespace"] == "team"


def test_a_reason_is_told_once_for_an_attempt() -> None:
    created = sent(Server(), (body(), FAILED), (body(), FAILED), (body(attempt=2), FAILED), (body(uid="u2"), FAILED))
    assert len(created) == len({event["metadata"]["name"] for event in created}) == 3


def test_another_process_does_not_tell_it_again() -> None:
    first = sent(Server(), (body(), FAILED))
    second = sent(Server(), (body(), FAILED))
    assert first[0]["metadata"]["name"] == second[0]["metadata"]["name"]
    server = Server()
    server.answers = iter([ApiError(409, "exists")])
    assert sent(server, (body(), FAILED)) == []


def test_a_busy_server_is_asked_again() -> None:
    server = Server()
    server.answers = iter([ApiError(503, "busy"), ApiError(429, "busy")])
    assert len(sent(server, (body(), FAILED))) == 1


@pytest.mark.parametrize("answers", [[ApiError(403, "no")], [ApiError(500, "broken")] * 5])
def test_an_event_that_cannot_be_sent_is_said_in_the_log_and_holds_up_no_other(
    answers: list[ApiError], caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    server.answers = iter(answers)
    created = sent(server, (body(), FAILED), (body(attempt=2), FAILED))
    assert len(created) == 1
    assert "an event was not sent" in caplog.text


def test_a_long_message_is_cut_to_what_the_api_allows() -> None:
    (event,) = sent(Server(), (body(), Event(reason="Rejected", message="x" * 5000)))
    assert len(event["note"]) == 1024


def test_decisions_are_in_the_log_with_run_attempt_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sent(Server(), (body(attempt=3), FAILED))
    fields: dict[str, Any] = caplog.records[0].__dict__
    assert (fields["run"], fields["attempt"], fields["reason"]) == ("team/demo", 3, "WorkerFailed")
    assert caplog.records[0].levelname == "WARNING"


def test_more_events_than_can_wait_are_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "_MAX_WAITING", 2)
    created = sent(Server(), *((body(attempt=number), FAILED) for number in range(4)))
    assert len(created) == 2
    assert caplog.text.count("one is left out") == 2


def test_an_object_that_is_gone_leaves_nothing() -> None:
    recorder = Recorder(Server(), identity="x")  # type: ignore[arg-type]
    recorder.record(body(), FAILED)
    recorder.forget("u1")
    assert recorder._sent == {}
