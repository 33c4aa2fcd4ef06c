"""The HTTPS client: what each refusal means, and what is tried again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_api import RUNS, CutError, FakeApi, Request, refusal
from osctl.client import Client, Resource
from osctl.errors import ApiError, ExitCode, OsctlError, UnreachableError
from osctl.kubeconfig import Access

RUN = Resource("opensora.dev/v1alpha1", "trainingruns", "TrainingRun")
FIRST = f"{RUNS}/first"


def _client(api: FakeApi, **more: Any) -> Client:
    return Client(Access(server=api.url, namespace="team", source="a file", token="secret"), **more)


def test_a_request_carries_the_token(api: FakeApi) -> None:
    api.on("GET", FIRST, {"kind": "TrainingRun"})
    with _client(api) as client:
        assert client.get(RUN, "team", "first") == {"kind": "TrainingRun"}
    assert api.requests[0].headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("answer", "code", "line", "hint"),
    [
        (refusal(401, "Unauthorized", "Unauthorized"), 8, "does not know you", "log in again"),
        (refusal(403, "Forbidden", "you cannot get it"), 8, "you cannot get it", "ask whoever"),
        (refusal(404, "NotFound", "there is no first", name="first"), 3, "there is no first", "`osctl get`"),
        ((404, "404 page not found\n"), 3, "does not know /apis", "is the operator installed"),
        (refusal(409, "AlreadyExists", "first exists", name="first"), 4, "first exists", "choose another name"),
        (
            refusal(422, "Invalid", "long", causes=[{"field": "spec.x", "message": "is bad"}]),
            2,
            "spec.x: is bad",
            "explain",
        ),
        (refusal(400, "BadRequest", 'unknown field "spec.y"'), 2, "unknown field", None),
        ((500, "oops"), 1, "oops", "try again later"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else None,
)
def test_a_refusal_has_a_line_a_hint_and_an_exit_code(
    api: FakeApi, answer: tuple[int, Any], code: int, line: str, hint: str | None
) -> None:
    api.on("POST", RUNS, answer)
    with _client(api) as client, pytest.raises(ApiError) as caught:
        client.create(RUN, "team", {})
    assert caught.value.exit_code == code
    assert line in caught.value.message
    assert (hint is None) or (hint in str(caught.value.hint))


def test_a_busy_server_is_asked_again(api: FakeApi) -> None:
    api.on("GET", FIRST, (429, "busy"), (429, "busy"), (200, {"kind": "TrainingRun"}))
    with _client(api) as client:
        assert client.get(RUN, "team", "first")["kind"] == "TrainingRun"
    assert len(api.requests) == 3


def test_what_may_have_been_done_is_not_done_twice(api: FakeApi) -> None:
    api.on("POST", RUNS, (500, "oops"), (200, {}))
    with _client(api) as client, pytest.raises(ApiError):
        client.create(RUN, "team", {})
    assert len(api.requests) == 1


def test_a_list_is_read_to_its_last_page(api: FakeApi) -> None:
    api.on("GET", RUNS, {"metadata": {"continue": "t"}, "items": [1]}, {"metadata": {}, "items": [2]})
    with _client(api) as client:
        assert client.list(RUN, "team") == [1, 2]
    assert "continue=t" in api.requests[1].query


def test_what_is_not_there_is_found_to_be_none(api: FakeApi) -> None:
    api.on("GET", FIRST, refusal(404, "NotFound", "no", name="first"))
    with _client(api) as client:
        assert client.find(RUN, "team", "first") is None


def test_an_unreachable_server_is_named_with_the_file_that_leads_to_it() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = Client(Access(server=server, namespace="x", source="/my/config"))
    with pytest.raises(OsctlError, match="cannot be reached: Connection refused") as caught:
        client.request("GET", "/version")
    assert "/my/config" in str(caught.value.hint)
    assert caught.value.exit_code == ExitCode.ERROR


def test_a_silent_server_ends_with_the_time_it_was_given() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        server = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = Client(Access(server=server, namespace="x", source="f"), timeout_seconds=0.05)
        with pytest.raises(OsctlError, match=r"did not answer within 0.05 s"):
            client.request("GET", "/version")


def test_an_answer_of_something_else_is_no_traceback(api: FakeApi) -> None:
    api.on("GET", FIRST, "<html>")
    with _client(api) as client, pytest.raises(OsctlError, match="no object"):
        client.get(RUN, "team", "first")


@pytest.mark.parametrize(
    ("namespace", "name", "path"),
    [
        ("team", "a b?c", f"{RUNS}/a%20b%3Fc"),
        (None, None, "/apis/opensora.dev/v1alpha1/trainingruns"),
    ],
)
def test_names_cannot_leave_their_place_in_a_path(namespace: str | None, name: str | None, path: str) -> None:
    assert RUN.path(namespace, name) == path


# ------------------------------------------------------------------------------------------------------------- streams


def test_a_stream_arrives_bit_by_bit(api: FakeApi) -> None:
    gate = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"one"
        assert gate.wait(10)
        yield b"two"

    api.on("GET", "/log", lambda request: pieces())
    with _client(api) as client:
        stream = client.stream("/log", {"follow": "true"})
        assert next(stream) == b"one"
        gate.set()
        assert list(stream) == [b"two"]
    assert api.requests[0].query == "follow=true"


def test_a_stream_that_is_cut_off_is_told_from_one_that_ends(api: FakeApi) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"one"
        raise CutError

    api.on("GET", "/log", lambda request: pieces())
    with _client(api) as client:
        stream = client.stream("/log", {})
        assert next(stream) == b"one"
        with pytest.raises(UnreachableError):
            next(stream)


def test_a_quiet_stream_is_given_up_after_its_own_time(api: FakeApi) -> None:
    gate = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"one"
        gate.wait(10)

    api.on("GET", "/log", lambda request: pieces())
    with _client(api) as client, pytest.raises(UnreachableError):
        list(client.stream("/log", {}, quiet_seconds=0.05))
    gate.set()


def test_another_thread_can_end_a_stream(api: FakeApi) -> None:
    gate = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"one"
        gate.wait(10)

    api.on("GET", "/log", lambda request: pieces())
    with _client(api) as client:
        stream = client.stream("/log", {})
        next(stream)
        threading.Thread(target=client.abort).start()
        with pytest.raises(UnreachableError):
            next(stream)
    gate.set()


# --------------------------------------------------------------------------------------------------------------- login


def test_a_login_that_expires_is_made_anew_once_for_all_connections(api: FakeApi) -> None:
    def answer(request: Request) -> Any:
        if request.headers["Authorization"] != "Bearer fresh":
            return refusal(401, "Unauthorized", "expired")
        return iter([b"a line"]) if request.path == "/log" else {"kind": "TrainingRun"}

    api.on("GET", FIRST, answer)
    api.on("GET", "/log", answer)
    renewals: list[Access] = []

    def renew() -> Access:
        renewals.append(Access(server=api.url, namespace="team", source="a file", token="fresh"))
        return renewals[-1]

    with _client(api, renew=renew) as client, client.another() as other:
        assert client.get(RUN, "team", "first")["kind"] == "TrainingRun"
        assert list(other.stream("/log", {})) == [b"a line"]
    assert len(renewals) == 1


def test_a_login_that_stays_refused_is_not_tried_for_ever(api: FakeApi) -> None:
    api.on("GET", FIRST, refusal(401, "Unauthorized", "no"))
    access = Access(server=api.url, namespace="team", source="a file", token="secret")
    with _client(api, renew=lambda: access) as client, pytest.raises(ApiError) as caught:
        client.get(RUN, "team", "first")
    assert caught.value.exit_code == ExitCode.NOT_ALLOWED
    assert len(api.requests) == 1
