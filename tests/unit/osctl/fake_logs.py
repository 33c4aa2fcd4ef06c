"""Pods whose logs grow while they are read, behind the API server of canned answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

from fake_api import RUNS, CutError, FakeApi, Request, refusal

PODS = "/api/v1/namespaces/team/pods"
START = 1_767_225_600
"""2026-01-01T00:00:00Z."""


def stamp(seconds: float) -> str:
    """A time as a kubelet writes it, `seconds` after START."""
    whole, nanoseconds = divmod(round(seconds * 1e9), 1_000_000_000)
    return f"{datetime.fromtimestamp(START + whole, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


class FakePod:
    """A pod of the run `demo`, and its log."""

    def __init__(self, api: FakeApi, attempt: int, index: int, *, uid: str = "run-uid", **labels: str) -> None:
        self.name = f"demo-a{attempt}-{index}"
        self.path = f"{PODS}/{self.name}"
        self.requests: list[dict[str, str]] = []
        self.cuts: list[int] = []
        """After so many lines the connection breaks, for one request after the other."""
        self._lines: list[tuple[str, str]] = []
        self._news = threading.Condition()
        self._state: dict[str, Any] = {"waiting": {"reason": "ContainerCreating"}}
        self._body = {
            "metadata": {
                "name": self.name,
                "namespace": "team",
                "uid": f"uid-{self.name}",
                "labels": {
                    "opensora.dev/kind": "TrainingRun",
                    "opensora.dev/name": "demo",
                    "opensora.dev/uid": uid,
                    "opensora.dev/attempt": str(attempt),
                    "batch.kubernetes.io/job-completion-index": str(index),
                    **labels,
                },
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {"nodeName": f"node-{index}"},
        }
        api.on("GET", self.path, lambda request: self.body())
        api.on("GET", f"{self.path}/log", self._serve)

    def start(self, *lines: tuple[float, str]) -> FakePod:
        """The trainer runs; lines are (seconds after START, text)."""
        self._state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        return self.say(*lines)

    def say(self, *lines: tuple[float, str]) -> FakePod:
        """More lines."""
        with self._news:
            self._lines += [(stamp(seconds), text) for seconds, text in lines]
            self._news.notify_all()
        return self

    def end(self, code: int = 0) -> FakePod:
        """The trainer ends."""
        with self._news:
            self._state = {"terminated": {"exitCode": code, "finishedAt": "2026-01-01T01:00:00Z"}}
            self._news.notify_all()
        return self

    def body(self) -> dict[str, Any]:
        """As the API server has it now."""
        phase = "Pending" if "waiting" in self._state else "Running" if "running" in self._state else "Succeeded"
        container = {"name": "trainer", "state": self._state}
        return {**self._body, "status": {"phase": phase, "containerStatuses": [container]}}

    def _serve(self, request: Request) -> Iterator[bytes]:
        asked = {key: values[0] for key, values in parse_qs(request.query).items()}
        self.requests.append(asked)
        left = self.cuts.pop(0) if self.cuts else None
        with self._news:
            known = self._lines[:]
        first = 0
        if "sinceTime" in asked:
            first = sum(line[0] < asked["sinceTime"].replace("Z", ".000000000Z") for line in known)
        if "tailLines" in asked:
            first = max(first, len(known) - int(asked["tailLines"]))
        number = first
        while True:
            with self._news:
                while len(self._lines) <= number and "follow" in asked and "terminated" not in self._state:
                    if not self._news.wait(10):
                        return
                lines = self._lines[number:]
                is_over = "follow" not in asked or "terminated" in self._state
            for moment, text in lines:
                if left == 0:
                    raise CutError
                left = None if left is None else left - 1
                yield f"{moment} {text}\n".encode()
            number += len(lines)
            if is_over:
                return


class FakeRun:
    """The run `demo`, whose changes are watched."""

    def __init__(self, api: FakeApi, *, run_uri: str = "s3://bucket/demo", nodes: int = 2, **status: Any) -> None:
        self.pods: list[FakePod] = []
        self.num_watches = 0
        self._api = api
        self._news = threading.Condition()
        self._nodes = nodes
        self._version = 1
        self._is_deleted = False
        self.body: dict[str, Any] = {
            "apiVersion": "opensora.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {
                "name": "demo",
                "namespace": "team",
                "uid": "run-uid",
                "resourceVersion": "1",
                "generation": 1,
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {"runUri": run_uri, "config": {"inline": "x"}, "nodes": nodes},
            "status": {
                "phase": "Running",
                "attempt": 1,
                "observedGeneration": 1,
                "nodes": {"desired": nodes, "ready": nodes},
                "resolved": {"procsPerNode": 2, "worldSize": 2 * nodes},
                **status,
            },
        }
        api.on("GET", f"{RUNS}/demo", lambda request: self._get())
        api.on("GET", RUNS, lambda request: self._watch(request) if "watch=1" in request.query else self._list())
        api.on("GET", PODS, lambda request: {"items": [pod.body() for pod in self.pods], "metadata": {}})

    def pod(self, index: int, *, attempt: int = 1) -> FakePod:
        """One more pod."""
        self.pods.append(FakePod(self._api, attempt, index))
        return self.pods[-1]

    def set(self, **status: Any) -> None:
        """The operator writes the status."""
        with self._news:
            self._version += 1
            metadata = {**self.body["metadata"], "resourceVersion": str(self._version)}
            self.body = {**self.body, "metadata": metadata, "status": {**self.body["status"], **status}}
            self._news.notify_all()

    def delete(self) -> None:
        """Somebody deletes it."""
        with self._news:
            self._is_deleted = True
            self._news.notify_all()

    def _get(self) -> Any:
        if self._is_deleted:
            return refusal(404, "NotFound", "there is no demo", name="demo")
        return self.body

    def _list(self) -> Any:
        return {"items": [self.body], "metadata": {}}

    def _watch(self, request: Request) -> Iterator[bytes]:
        self.num_watches += 1
        seen = int(parse_qs(request.query)["resourceVersion"][0])
        while True:
            with self._news:
                while self._version == seen and not self._is_deleted:
                    if not self._news.wait(10):
                        return
                seen = self._version
            kind = "DELETED" if self._is_deleted else "MODIFIED"
            yield json.dumps({"type": kind, "object": self.body}).encode() + b"\n"
            if self._is_deleted:
                return
