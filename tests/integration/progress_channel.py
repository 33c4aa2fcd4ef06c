"""The operator's end of the progress channel for tests: the real server and real TLS, beside a pretended cluster.

Tokens look like those of Kubernetes. The pretended API server believes those that it has made itself.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from opensora_operator.certificates import Authorities, ServerTls, make_authority
from opensora_operator.plans import Object
from opensora_operator.progress import LiveRun, ProgressBook, ProgressReport
from opensora_operator.progress_server import ProgressServer
from opensora_operator.tokens import TokenChecker, audience_of

NAMESPACE, RUN, POD = "videos", "demo", "5f0c7c5e-8f0e-4a52-9a52-0f6f0c1d2e3f"
T = TypeVar("T")


def encoded(value: Any) -> str:
    """A part of a JSON Web Token."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claims(*, namespace: str = NAMESPACE, audience: str = audience_of(NAMESPACE, RUN), pod: str = POD) -> Object:
    """What Kubernetes writes into the token of a pod."""
    now = int(time.time())
    return {
        "aud": [audience],
        "exp": now + 3600,
        "iat": now,
        "iss": "https://kubernetes.default.svc.cluster.local",
        "kubernetes.io": {
            "namespace": namespace,
            "pod": {"name": "demo-a1-0-x7k2p", "uid": pod},
            "serviceaccount": {"name": "default", "uid": "0a1b"},
        },
        "nbf": now,
        "sub": f"system:serviceaccount:{namespace}:default",
    }


@dataclass
class PretendedCluster:
    """An API server that knows its tokens, and whose keys cannot be read."""

    tokens: dict[str, Object] = field(default_factory=dict)
    num_reviews: int = 0
    is_up: bool = True

    def make_token(self, **changes: Any) -> str:
        """A projected token, which only a review can check."""
        content = claims(**changes)
        token = f"{encoded({'alg': 'RS256', 'kid': 'hidden'})}.{encoded(content)}.{encoded(b'signature')}"
        self.tokens[token] = content
        return token

    async def review_token(self, token: str, *, audience: str) -> Object:
        self.num_reviews += 1
        if not self.is_up:
            raise ConnectionError("the API server does not answer")
        content = self.tokens.get(token)
        if content is None:
            return {"authenticated": False, "error": "unknown"}
        pod = content["kubernetes.io"].get("pod")
        extra = {"authentication.kubernetes.io/pod-uid": [pod["uid"]]} if pod else {}
        user = {"username": content["sub"], "extra": extra}
        return {"authenticated": True, "audiences": [a for a in content["aud"] if a == audience], "user": user}

    async def read_public(self, path: str) -> Object | None:
        return None


@dataclass
class PretendedDirectory:
    """The runs that exist."""

    runs: dict[tuple[str, str], LiveRun] = field(default_factory=dict)

    def live_run(self, namespace: str, name: str) -> LiveRun | None:
        return self.runs.get((namespace, name))


def live_run(**changes: Any) -> LiveRun:
    """A run in its first attempt."""
    run = LiveRun(uid="run-uid", attempt=1, pod_uids=frozenset({POD}), heartbeat_seconds=1.0, requests={}, answered={})
    return replace(run, **changes)


class Operator:
    """A progress server that can be stopped and started again on the same port, in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.cluster = PretendedCluster()
        self.directory = PretendedDirectory({(NAMESPACE, RUN): live_run()})
        self.book = ProgressBook()
        self.reports: list[ProgressReport] = []
        self.times: list[float] = []
        self.leads = True
        self._tls = ServerTls(["localhost"])
        authorities = Authorities(current=make_authority(time.time()))
        self._tls.use(authorities, now=time.time())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: ProgressServer | None = None
        self._port = 0
        self._folder = folder
        (folder / "ca.crt").write_text(authorities.bundle)
        (folder / "token").write_text(self.cluster.make_token() + "\n")

    def ask(self, **requests: Any) -> None:
        """Change `spec.requests`."""
        run = self.directory.runs[NAMESPACE, RUN]
        self.directory.runs[NAMESPACE, RUN] = replace(run, requests={**run.requests, **requests})

    @property
    def environment(self) -> Mapping[str, str]:
        """What the operator sets in a pod."""
        return {
            "OPENSORA_PROGRESS_URL": f"https://localhost:{self._port}/v1/namespaces/{NAMESPACE}/runs/{RUN}/progress",
            "OPENSORA_PROGRESS_TOKEN_FILE": str(self._folder / "token"),
            "OPENSORA_PROGRESS_CA_FILE": str(self._folder / "ca.crt"),
        }

    @contextmanager
    def running(self) -> Iterator[Operator]:
        """The thread, and the server in it."""
        self._thread.start()
        try:
            self.start()
            yield self
        finally:
            self.stop()
            self._do(asyncio.sleep(0.1))  # connections that clients have left are closed on this side, too
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def start(self) -> None:
        tokens = TokenChecker(self.cluster)
        self._server = ProgressServer(
            self.book, self.directory, tokens, is_leader=lambda: self.leads, on_report=self._keep
        )
        self._port = self._do(self._server.start(host="127.0.0.1", port=self._port, tls=self._tls.context))

    def stop(self) -> None:
        if self._server is not None:
            self._do(self._server.stop())
            self._server = None

    def _keep(self, namespace: str, name: str) -> None:
        run = self.directory.runs[namespace, name]
        report = self.book.newest(run.uid, attempt=run.attempt)
        assert report is not None
        self.reports.append(report)
        self.times.append(time.monotonic())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)
