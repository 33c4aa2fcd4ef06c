"""Runs on a real control plane without nodes: this plays the kubelets, a queue, and the users."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from control_plane import ApiError, ControlPlane
from operator_process import eventually

Object = dict[str, Any]
API = "/apis/opensora.dev/v1alpha1"
_INDEX = "batch.kubernetes.io/job-completion-index"
_POLL_SECONDS = 0.15
_HEARTBEAT_SECONDS = 2.0
_LINGER_SECONDS = 1.0
"""How long an ended pod stays: a kubelet takes its time as well, and the end must be seen."""
_NODES = ("node-0", "node-1")
SPEC: Object = {
    "image": "example.com/opensora:1",
    "runUri": "s3://bucket/demo",
    "config": {"inline": "train: {steps: 10}\n"},
    "nodes": 2,
    "procsPerNode": 2,
    "restartPolicy": {"backoff": {"baseSeconds": 0, "maxSeconds": 0}},
}


class Kubelets(threading.Thread):
    """Binds and starts every pod of a Job of ours, and ends those that are deleted, as the namespace's habits say."""

    def __init__(self, control_plane: ControlPlane) -> None:
        super().__init__(name="kubelets", daemon=True)
        self._control_plane = control_plane
        self._stopping = threading.Event()
        self._ended: dict[str, float] = {}
        self.habits: dict[str, str] = {}
        """Namespace → `pending` starts no pod, `stubborn` ends none; both otherwise."""
        self.exit_codes: dict[str, int] = {}
        """Namespace → what pods end with that are asked to stop; 75 unless given."""

    def run(self) -> None:
        beat = 0.0
        while not self._stopping.wait(_POLL_SECONDS):
            with contextlib.suppress(OSError, ApiError):  # the API server is away: that is some tests' business
                if time.monotonic() - beat > _HEARTBEAT_SECONDS:
                    beat = time.monotonic()
                    self._keep_nodes()
                selector = "labelSelector=opensora.dev/uid"
                for pod in self._control_plane.request("GET", f"/api/v1/pods?{selector}")["items"]:
                    if _INDEX not in pod["metadata"].get("annotations", {}):
                        continue  # no Job has made it
                    with contextlib.suppress(ApiError):  # it has changed or is gone
                        self._look_after(pod)

    def stop(self) -> None:
        self._stopping.set()
        self.join(10)
        for name in _NODES:
            with contextlib.suppress(ApiError):
                self._control_plane.request("DELETE", f"/api/v1/nodes/{name}")

    def _look_after(self, pod: Object) -> None:
        habit = self.habits.get(pod["metadata"]["namespace"], "")
        status = pod.get("status", {})
        is_live = status.get("phase") in ("Pending", "Running")
        if "deletionTimestamp" in pod["metadata"]:
            if habit == "stubborn":
                return
            if is_live and status["phase"] == "Running":
                code = self.exit_codes.get(pod["metadata"]["namespace"], 75)
                end_pod(self._control_plane, pod, code, message="asked to stop")
                self._ended[pod["metadata"]["uid"]] = time.monotonic()
            elif time.monotonic() - self._ended.get(pod["metadata"]["uid"], 0.0) > _LINGER_SECONDS:
                self._control_plane.request("DELETE", path_of(pod), {"gracePeriodSeconds": 0})
        elif status.get("phase") == "Pending" and habit != "pending" and not pod["spec"].get("schedulingGates"):
            if not pod["spec"].get("nodeName"):
                self._bind(pod)
            set_status(self._control_plane, pod, "Running", {"running": {"startedAt": now()}})

    def _keep_nodes(self) -> None:
        """Nodes that answer. The scheduler leaves them alone."""
        for name in _NODES:
            ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now()}
            path = f"/api/v1/nodes/{name}"
            body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"unschedulable": True}}
            with contextlib.suppress(ApiError):  # it is there
                self._control_plane.request("POST", "/api/v1/nodes", body)
            change = {"status": {"conditions": [ready]}}
            content = "application/strategic-merge-patch+json"
            self._control_plane.request("PATCH", f"{path}/status", change, content_type=content)

    def _bind(self, pod: Object) -> None:
        index = pod["metadata"]["annotations"][_INDEX]
        target = {"apiVersion": "v1", "kind": "Node", "name": f"node-{index}"}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]}, "target": target}
        self._control_plane.request("POST", f"{path_of(pod)}/binding", body)


class Stage:
    """One run in a namespace of its own."""

    def __init__(self, control_plane: ControlPlane, kubelets: Kubelets, namespace: str, name: str = "demo") -> None:
        self.control_plane = control_plane
        self.kubelets = kubelets
        self.namespace = namespace
        self.name = name

    # What users do

    def create(self, **spec: Any) -> Stage:
        body = {
            "apiVersion": "opensora.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": self.name},
            "spec": {**SPEC, **spec},
        }
        self.request("POST", f"{API}/namespaces/{self.namespace}/trainingruns", body)
        return self

    def edit(self, **spec: Any) -> None:
        self.patch(self._path, {"spec": spec})

    def delete(self) -> None:
        self.request("DELETE", self._path)

    def request(self, method: str, path: str, body: Any = None) -> Any:
        return self.control_plane.request(method, path, body)

    def patch(self, path: str, body: Object) -> Any:
        return self.control_plane.request("PATCH", path, body, content_type="application/merge-patch+json")

    def apply(self, text: str) -> None:
        self.control_plane.kubectl("apply", "-n", self.namespace, "-f", "-", input=text)

    @property
    def _path(self) -> str:
        return f"{API}/namespaces/{self.namespace}/trainingruns/{self.name}"

    # What is there

    @property
    def run(self) -> Object:
        body: Object = self.request("GET", self._path)
        return body

    @property
    def status(self) -> Object:
        return self.run.get("status") or {}

    @property
    def attempt(self) -> int:
        return int(self.status.get("attempt", 0))

    def condition(self, kind: str) -> Object:
        return next((found for found in self.status.get("conditions", ()) if found["type"] == kind), {})

    def jobs(self) -> dict[str, Object]:
        listed = self.request("GET", f"/apis/batch/v1/namespaces/{self.namespace}/jobs")
        return {job["metadata"]["name"]: job for job in listed["items"]}

    def pods(self, attempt: int | None = None) -> list[Object]:
        selector = "opensora.dev/uid" if attempt is None else f"opensora.dev/attempt={attempt}"
        listed = self.request("GET", f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={selector}")
        return sorted(listed["items"], key=lambda pod: str(pod["metadata"]["name"]))

    def events(self) -> list[Object]:
        listed = self.request("GET", f"/apis/events.k8s.io/v1/namespaces/{self.namespace}/events")
        return [event for event in listed["items"] if event["regarding"]["kind"] == "TrainingRun"]

    # What happens

    def until(self, check: Callable[[], Any], *, seconds: float = 40.0, what: str = "") -> Any:
        try:
            return eventually(check, seconds=seconds, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{yaml.safe_dump(self.status)}\n{[*self.jobs()]}") from error.__cause__

    def until_phase(self, *phases: str, attempt: int | None = None, seconds: float = 40.0) -> Stage:
        def check() -> bool:
            status = self.status
            return status.get("phase") in phases and attempt in (None, status.get("attempt"))

        self.until(check, seconds=seconds, what=f"phase {phases}, attempt {attempt}")
        return self

    def end(self, index: int, code: int, *, attempt: int | None = None, **how: Any) -> None:
        """A pod of the current attempt ends."""
        number = self.attempt if attempt is None else attempt
        pod = next(
            pod
            for pod in self.pods(number)
            if pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] == str(index)
        )
        end_pod(self.control_plane, pod, code, **how)

    def succeed(self) -> None:
        for index in range(len(self.pods(self.attempt))):
            self.end(index, 0)

    def evict(self, index: int) -> None:
        """The eviction API, which takes the pod's node to be alive."""
        pod = self.pods(self.attempt)[index]
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod["metadata"]["name"]}}
        self.request("POST", f"{path_of(pod)}/eviction", body)


def end_pod(control_plane: ControlPlane, pod: Object, code: int, **how: Any) -> None:
    """Write the end of a pod's container as its kubelet and our launcher would.

    `how`: `rank`, `step`, `message`, `reason`; `verdict=False` for one that could not write a termination message.
    """
    terminated: Object = {
        "exitCode": code,
        "finishedAt": now(),
        "startedAt": now(),
        "reason": how.get("reason", "Error" if code else "Completed"),
    }
    if how.get("verdict", True):
        first = {"rank": how.get("rank", 0), "time": time.time(), "code": code, "step": how.get("step")}
        first |= {"reason": "Error", "message": how.get("message", "")}
        verdict = {"code": code, "message": f"rank {first['rank']}: {how.get('message', '')}", "time": time.time()}
        terminated["message"] = json.dumps(verdict | {"first": first if code else None})
    set_status(control_plane, pod, "Failed" if code else "Succeeded", {"terminated": terminated})


def set_status(control_plane: ControlPlane, pod: Object, phase: str, state: Object) -> None:
    container = {"name": "trainer", "image": "x", "imageID": "x@sha256:1", "ready": phase == "Running"}
    status = {
        "phase": phase,
        "startTime": pod["metadata"]["creationTimestamp"],
        "containerStatuses": [container | {"restartCount": 0, "state": state}],
    }
    path = f"{path_of(pod)}/status"
    control_plane.request("PATCH", path, {"status": status}, content_type="application/merge-patch+json")


def path_of(pod: Object) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextlib.contextmanager
def playing_kubelets(control_plane: ControlPlane) -> Iterator[Kubelets]:
    kubelets = Kubelets(control_plane)
    kubelets.start()
    try:
        yield kubelets
    finally:
        kubelets.stop()


def folder_of(factory: Any) -> Path:
    path: Path = factory.mktemp("operator")
    return path
