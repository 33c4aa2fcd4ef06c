"""An API server of canned answers for units of the command line: it speaks HTTP and knows no rules."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import yaml

RUNS = "/apis/opensora.dev/v1alpha1/namespaces/team/trainingruns"


class CutError(Exception):
    """The connection breaks here."""


@dataclass(frozen=True)
class Request:
    """What was asked."""

    method: str
    path: str
    query: str
    body: Any
    headers: dict[str, str]


@dataclass
class FakeApi:
    """Answers by method and path; anything else is an unknown path.

    An answer may be a function of the request; what it returns is answered, and an iterator of bytes as a stream.
    """

    answers: dict[tuple[str, str], list[tuple[int, Any]]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    tls: ssl.SSLContext | None = None
    """Speaks HTTPS with it."""
    knows: Callable[[Mapping[str, str], Mapping[str, Any] | None], bool] = lambda headers, certificate: True
    """Whether it knows who asks, by headers and client certificate."""

    def __enter__(self) -> Self:
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                text = self.rfile.read(length)
                path, _, query = self.path.partition("?")
                body = json.loads(text) if text else None
                request = Request(self.command, path, query, body, dict(self.headers.items()))
                api.requests.append(request)
                certificate = self.connection.getpeercert() if isinstance(self.connection, ssl.SSLSocket) else None
                if api.knows(request.headers, certificate):
                    status, answer = api.answer(request)
                else:
                    status, answer = refusal(401, "Unauthorized", "Unauthorized")
                if isinstance(answer, Iterator):
                    self.stream(answer)
                    return
                content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(content)

            def stream(self, pieces: Iterator[bytes]) -> None:
                """An answer that arrives bit by bit. CutError ends it without its end, as a broken connection does."""
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                try:
                    for piece in pieces:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    self.wfile.write(b"0\r\n\r\n")
                except (CutError, OSError):  # OSError: the client has gone away
                    self.close_connection = True

            do_GET = do_POST = do_PATCH = do_DELETE = handle_any  # noqa: N815  (the base class calls them so)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if self.tls is not None:  # the handshake is the business of the thread that answers
            self._server.socket = self.tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls is not None else ''}://127.0.0.1:{self._server.server_port}"

    def on(self, method: str, path: str, *answers: Any, status: int = 200) -> None:
        """Give these answers one after the other, the last one for ever. A tuple is (status, answer)."""
        self.answers[method, path] = [answer if isinstance(answer, tuple) else (status, answer) for answer in answers]

    def answer(self, request: Request) -> tuple[int, Any]:
        known = self.answers.get((request.method, request.path))
        if known is None:
            return 404, "404 page not found"
        status, answer = known.pop(0) if len(known) > 1 else known[0]
        if callable(answer):
            answer = answer(request)
        return answer if isinstance(answer, tuple) else (status, answer)

    def writes(self) -> list[tuple[str, str, Any]]:
        """What would have changed something."""
        return [(each.method, each.path, each.body) for each in self.requests if each.method != "GET"]

    def write_kubeconfig(self, path: Path) -> None:
        config = {
            "current-context": "fake",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "contexts": [{"name": "fake", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
        }
        path.write_text(yaml.safe_dump(config))


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, or that TLS turns away, is what some tests are about."""


def refusal(status: int, reason: str, message: str, **details: Any) -> tuple[int, Any]:
    """A Status object, as the API server refuses with one."""
    body = {"kind": "Status", "status": "Failure", "code": status, "reason": reason, "message": message}
    return status, {**body, "details": details}
