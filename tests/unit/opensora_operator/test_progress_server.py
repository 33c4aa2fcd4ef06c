"""The progress server on a real TLS connection: who is heard, and what everybody else is told."""

from __future__ import annotations

import gzip
import http.client
import json
import logging
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from opensora_operator.tokens import audience_of
from progress_channel import NAMESPACE, POD, RUN, Operator, encoded, live_run

PATH = f"/v1/namespaces/{NAMESPACE}/runs/{RUN}/progress"


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    with Operator(tmp_path).running() as running:
        yield running


@dataclass
class Answer:
    status: int
    content: Any
    headers: Mapping[str, str]


def message(**changes: Any) -> bytes:
    values = {
        "attempt": 1, "sequence": 1, "phase": "training", "state": "Training", "step": 3, "total_steps": 10, "epoch": 0,
        "loss": 0.5, "goodput": 0.5,
    }  # fmt: skip
    return json.dumps(values | changes).encode()


def connect(operator: Operator) -> http.client.HTTPSConnection:
    address = urlsplit(operator.environment["OPENSORA_PROGRESS_URL"])
    tls = ssl.create_default_context(cafile=operator.environment["OPENSORA_PROGRESS_CA_FILE"])
    return http.client.HTTPSConnection("localhost", address.port, context=tls, timeout=10)


def send(
    operator: Operator, body: Any = None, *, token: str | None = None, path: str = PATH, method: str = "POST",
    headers: Mapping[str, str] | None = None,
) -> Answer:  # fmt: skip
    if token is None:
        token = Path(operator.environment["OPENSORA_PROGRESS_TOKEN_FILE"]).read_text().strip()
    connection = connect(operator)
    given = {"Authorization": f"Bearer {token}"} | dict(headers or {})
    is_chunked = "Transfer-Encoding" in given
    connection.request(method, path, message() if body is None else body, given, encode_chunked=is_chunked)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return Answer(response.status, json.loads(text) if is_json else text.decode(), response.headers)


def refused(answer: Answer, status: int, told: str) -> None:
    assert answer.status == status, answer
    assert list(answer.content) == ["error"]
    assert told in answer.content["error"]


def test_a_report_is_taken_and_answered(operator: Operator) -> None:
    operator.ask(checkpoint={"id": "now"})
    answer = send(operator)
    assert (answer.status, answer.content) == (200, {"interval_seconds": 1.0, "checkpoint": "now"})
    assert answer.headers["Connection"] == "close"
    newest = operator.book.newest("run-uid", attempt=1)
    assert newest is not None
    assert (newest.step, newest.loss, newest.pod_uid) == (3, 0.5, POD)
    assert operator.reports == [newest], "the controller hears of it"


def test_a_run_may_report_while_others_are_refused(operator: Operator) -> None:
    for number in range(30):
        send(operator, token=f"guess-{number}")
    assert send(operator).status == 200


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({"Authorization": ""}, "send `Authorization: Bearer TOKEN`"),
        ({"Authorization": "Basic dXNlcjpwYXNz"}, "send `Authorization: Bearer TOKEN`"),
        ({"Authorization": "Bearer nonsense"}, "that is no token"),
    ],
)
def test_a_message_without_a_token_is_refused(operator: Operator, headers: Mapping[str, str], told: str) -> None:
    refused(send(operator, headers=headers), 401, told)
    assert not operator.reports


def test_a_forged_token_is_refused(operator: Operator) -> None:
    head, body, _ = operator.cluster.make_token().split(".")
    refused(send(operator, token=f"{head}.{body}.{encoded(b'forged')}"), 401, "the token is not valid")
    assert not operator.reports


def test_a_token_for_another_run_or_namespace_is_refused(operator: Operator) -> None:
    for audience in (audience_of(NAMESPACE, "other"), audience_of("elsewhere", RUN), "https://kubernetes.default.svc"):
        token = operator.cluster.make_token(audience=audience)
        refused(send(operator, token=token), 403, f"the token is not for opensora.dev/{NAMESPACE}/{RUN}")
    assert not operator.reports


def test_a_pod_that_only_claims_the_audience_is_refused(operator: Operator) -> None:
    # Any pod may have a token made for any audience.
    stranger = operator.cluster.make_token(pod="a-stranger")
    refused(send(operator, token=stranger), 403, "the token's pod does not belong to attempt 1 of demo")
    elsewhere = operator.cluster.make_token(namespace="elsewhere")
    refused(send(operator, token=elsewhere), 403, "the token's pod does not belong to attempt 1 of demo")
    assert not operator.reports


def test_a_pod_of_an_earlier_attempt_is_no_longer_heard(operator: Operator) -> None:
    assert send(operator).status == 200
    operator.directory.runs[NAMESPACE, RUN] = live_run(attempt=2, pod_uids=frozenset({"next-pod"}))
    refused(send(operator, message(sequence=2)), 403, "does not belong to attempt 2")
    refused(send(operator, message(sequence=2, attempt=2)), 403, "does not belong to attempt 2")
    assert len(operator.reports) == 1


def test_a_message_of_the_wrong_attempt_is_refused(operator: Operator) -> None:
    refused(send(operator, message(attempt=7)), 409, "attempt 7 is not the current one, 1")
    assert not operator.reports


def test_a_replayed_message_is_refused(operator: Operator) -> None:
    assert send(operator, message(sequence=5)).status == 200
    refused(send(operator, message(sequence=5)), 409, "message 5 is not newer than message 5")
    assert len(operator.reports) == 1


def test_a_run_that_does_not_exist_is_not_found(operator: Operator) -> None:
    token = operator.cluster.make_token(audience=audience_of(NAMESPACE, "other"))
    answer = send(operator, token=token, path=PATH.replace(RUN, "other"))
    refused(answer, 404, "there is no run other in namespace videos that goes on")


@pytest.mark.parametrize(
    "path",
    ["/", "/v1/namespaces/a/runs/progress", PATH + "/more", PATH.replace(RUN, "de%0amo"), PATH.replace(RUN, "..")],
)
def test_other_paths_do_not_exist(operator: Operator, path: str) -> None:
    assert send(operator, path=path).status == 404


def test_only_post_is_allowed(operator: Operator) -> None:
    assert send(operator, method="GET").status == 405


def test_a_body_that_is_too_large_is_refused(operator: Operator) -> None:
    large = message(padding="x" * 64 * 1024)
    refused(send(operator, large), 413, "the body exceeds 65536 bytes")
    chunks = iter([b"x" * 10_000] * 10)
    refused(send(operator, chunks, headers={"Transfer-Encoding": "chunked"}), 413, "the body exceeds 65536 bytes")
    assert send(operator, message(padding="x" * 60 * 1024)).status == 200
    assert len(operator.reports) == 1


def test_a_body_that_is_no_report_is_refused(operator: Operator) -> None:
    refused(send(operator, b"{"), 400, "the body is no JSON")
    refused(send(operator, message(step="three")), 400, "step is a whole number from 0, not 'three'")
    bomb = gzip.compress(message(padding="x" * 60_000))
    refused(send(operator, bomb, headers={"Content-Encoding": "gzip"}), 400, "the body is no JSON")
    assert not operator.reports


def test_a_run_that_reports_too_often_has_to_wait(operator: Operator) -> None:
    operator.directory.runs[NAMESPACE, "calm"] = live_run(uid="calm-uid")
    answers = [send(operator, message(sequence=number)) for number in range(1, 15)]
    assert [answer.status for answer in answers[:10]] == [200] * 10
    late = next(answer for answer in answers if answer.status != 200)
    refused(late, 429, "this run reports too often")
    assert late.headers["Retry-After"] == "1"
    token = operator.cluster.make_token(audience=audience_of(NAMESPACE, "calm"))
    assert send(operator, token=token, path=PATH.replace(RUN, "calm")).status == 200, "another run is not held up"


def test_a_replica_that_does_not_lead_says_so(operator: Operator) -> None:
    operator.leads = False
    answer = send(operator)
    refused(answer, 503, "this replica does not lead")
    assert answer.headers["Retry-After"] == "2"
    assert operator.cluster.num_reviews == 0


def test_without_the_api_server_the_sender_is_asked_to_come_again(operator: Operator) -> None:
    operator.cluster.is_up = False
    answer = send(operator)
    refused(answer, 503, "the token cannot be checked now")
    assert answer.headers["Retry-After"] == "2"
    operator.cluster.is_up = True
    assert send(operator).status == 200


def test_refusals_are_logged_once_a_minute_and_without_the_token(
    operator: Operator, caplog: pytest.LogCaptureFixture
) -> None:
    token = operator.cluster.make_token(pod="a-stranger")
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            send(operator, token=token)
    assert [record.message for record in caplog.records] == [
        "progress of videos/demo from 127.0.0.1 refused: the token's pod does not belong to attempt 1 of demo"
    ]
    assert token not in caplog.text


def test_a_sender_that_leaves_in_the_middle_harms_nobody(operator: Operator, caplog: pytest.LogCaptureFixture) -> None:
    address = urlsplit(operator.environment["OPENSORA_PROGRESS_URL"])
    assert address.port is not None
    token = Path(operator.environment["OPENSORA_PROGRESS_TOKEN_FILE"]).read_text().strip()
    tls = ssl.create_default_context(cafile=operator.environment["OPENSORA_PROGRESS_CA_FILE"])
    with caplog.at_level(logging.WARNING):
        with (
            socket.create_connection(("localhost", address.port)) as plain,
            tls.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(
                f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n"
                f"Authorization: Bearer {token}\r\n\r\n{{".encode()
            )
        with socket.create_connection(("localhost", address.port)) as plain:
            plain.sendall(b"POST / HTTP/1.1\r\n\r\n")  # no TLS
        assert send(operator).status == 200
    assert "Traceback" not in caplog.text
    assert len(operator.reports) == 1


def test_a_stranger_in_place_of_the_operator_gets_no_token(operator: Operator, tmp_path: Path) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    with Operator(folder).running() as stranger:
        (folder / "ca.crt").write_text((tmp_path / "ca.crt").read_text())  # what the pod trusts
        with pytest.raises(ssl.SSLCertVerificationError):
            send(stranger)
