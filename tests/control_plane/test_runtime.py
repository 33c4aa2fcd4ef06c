"""The runtime against a real API server that is cut off, restarted, forgetful and busy; the planner is a small one."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from control_plane import ControlPlane
from dying_operator import EXIT_CODE
from faulty_proxy import FaultyProxy, storm
from operator_process import SMALL, OperatorProcess, eventually, grant

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

Object = dict[str, Any]
FAST_LEASE = {"lease_seconds": 10, "renew_seconds": 6, "retry_seconds": 0.5}


class Stage:
    """Runs in one namespace, and the operators that look after it alone."""

    def __init__(self, control_plane: ControlPlane, namespace: str, folder: Path) -> None:
        self.control_plane = control_plane
        self.namespace = namespace
        self._folder = folder
        self.operators: list[OperatorProcess] = []
        self.mark = control_plane.audit_mark()
        grant(control_plane, namespace=namespace)

    def operator(self, *, program: Path = SMALL, kubeconfig: Path | None = None, **settings: Any) -> OperatorProcess:
        """An operator that has not been started."""
        made = OperatorProcess(
            kubeconfig or self.control_plane.kubeconfig("operator"),
            self._folder,
            namespace=self.namespace,
            program=[program],
            environment=settings.pop("environment", None),
            **{"namespaces": self.namespace} | FAST_LEASE | settings,
        )
        self.operators.append(made)
        return made

    def leader(self, **options: Any) -> OperatorProcess:
        """An operator at work."""
        made = self.operator(**options)
        made.start_and_lead()
        return made

    def create(self, name: str = "demo", **spec: Any) -> None:
        body = {
            "apiVersion": "opensora.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": name},
            "spec": {"image": "x", "runUri": "/runs/x", "config": {"inline": "a: 1"}, "nodes": 2} | spec,
        }
        self.control_plane.request("POST", self.runs, body)

    def delete(self, name: str = "demo") -> None:
        self.control_plane.request("DELETE", f"{self.runs}/{name}")

    @property
    def runs(self) -> str:
        return f"/apis/opensora.dev/v1alpha1/namespaces/{self.namespace}/trainingruns"

    def status(self, name: str = "demo") -> Object:
        status: Object = self.control_plane.request("GET", f"{self.runs}/{name}").get("status", {})
        return status

    def until_running(self, *names: str, seconds: float = 60.0) -> None:
        """Wait until the operator has counted both pods of these runs."""
        for name in names or ("demo",):
            eventually(lambda name=name: self.status(name)["nodes"]["ready"] == 2, seconds=seconds, what=f"{name} runs")  # type: ignore[misc]

    def jobs(self) -> list[str]:
        listed = self.control_plane.request("GET", f"/apis/batch/v1/namespaces/{self.namespace}/jobs")
        return sorted(job["metadata"]["name"] for job in listed["items"])

    def fail_pod(self, job: str) -> None:
        """A pod of a Job ends with exit code 1."""
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        pod = self.control_plane.request("GET", f"{path}?labelSelector=job-name%3D{job}")["items"][0]
        body = {"status": {"phase": "Failed"}}
        name = pod["metadata"]["name"]
        content = "application/merge-patch+json"
        self.control_plane.request("PATCH", f"{path}/{name}/status", body, content_type=content)

    def requests(self) -> list[Object]:
        """What the operators asked of this namespace, in order."""
        return [
            event
            for event in self.control_plane.audit_events(self.mark, identity="operator")
            if (event.get("objectRef") or {}).get("namespace") == self.namespace
        ]

    def writes(self) -> list[str]:
        """What they wrote, but for the Lease."""
        return [
            f"{event['verb']} {event['objectRef']['resource']} {event['objectRef'].get('name')}"
            for event in self.requests()
            if event["verb"] not in ("get", "list", "watch") and event["objectRef"]["resource"] != "leases"
        ]

    def lease(self) -> Object:
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases/opensora-operator"
        spec: Object = self.control_plane.request("GET", path)["spec"]
        return spec


@pytest.fixture
def stage(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(control_plane, namespace, tmp_path)
    yield made
    for operator in made.operators:
        operator.terminate()
        assert "this is a bug" not in operator.log.read_text()
    assert control_plane.denials(made.mark, identity="operator") == []


@pytest.fixture
def proxy(control_plane: ControlPlane) -> Iterator[FaultyProxy]:
    with FaultyProxy(control_plane) as made:
        yield made


def test_a_run_gets_its_job_and_a_failed_job_its_successor(stage: Stage) -> None:
    operator = stage.leader()
    stage.create()
    stage.until_running()
    stage.fail_pod("demo-a1")
    eventually(lambda: stage.jobs() == ["demo-a1", "demo-a2"])
    stage.until_running()
    decisive = [write for write in stage.writes() if "jobs" in write or "services" in write]
    assert decisive == ["create services demo", "create jobs demo-a1", "create jobs demo-a2"]
    events = stage.control_plane.request("GET", f"/api/v1/namespaces/{stage.namespace}/events")["items"]
    told = [event for event in events if event["involvedObject"]["kind"] == "TrainingRun"]
    assert [(event["reason"], event["type"]) for event in told] == [("WorkerFailed", "Warning")]
    assert operator.metric("opensora_objects", kind="TrainingRun", phase="Running") == 1
    assert operator.metric("opensora_api_requests_total", verb="create", resource="jobs", code="201") == 2
    assert operator.get("/healthz") == (200, "ok")


def test_nothing_is_written_at_rest_nor_after_a_restart(stage: Stage) -> None:
    operator = stage.leader()
    stage.create()
    stage.until_running()
    time.sleep(1)
    before = stage.writes()
    time.sleep(4)
    operator.terminate(20)
    operator.start_and_lead()
    time.sleep(3)
    assert stage.writes() == before


def test_a_new_run_of_the_same_name_is_another_run(stage: Stage) -> None:
    stage.leader()
    stage.create()
    stage.until_running()
    first = stage.control_plane.request("GET", f"{stage.runs}/demo")["metadata"]["uid"]
    stage.delete()
    eventually(lambda: stage.jobs() == [])
    stage.create(nodes=1)
    eventually(lambda: stage.status()["nodes"]["summary"] == "1/1")
    job = stage.control_plane.request("GET", f"/apis/batch/v1/namespaces/{stage.namespace}/jobs/demo-a1")
    assert job["metadata"]["ownerReferences"][0]["uid"] != first


def test_an_operator_of_some_namespaces_leaves_the_others_alone(stage: Stage, control_plane: ControlPlane) -> None:
    other = f"{stage.namespace}-other"
    control_plane.kubectl("create", "namespace", other)
    stage.leader()
    elsewhere = Stage(control_plane, other, stage._folder)
    elsewhere.create()
    stage.create()
    stage.until_running()
    assert elsewhere.status() == {}


def test_watches_that_are_cut_are_taken_up_again(stage: Stage, proxy: FaultyProxy) -> None:
    stage.leader(kubeconfig=proxy.kubeconfig("operator"))
    for number in range(3):
        stage.create(f"run-{number}")
        stage.until_running(f"run-{number}")
        proxy.cut()


def test_a_restart_of_the_api_server_is_survived(stage: Stage, control_plane: ControlPlane) -> None:
    operator = stage.leader(renew_seconds=25, lease_seconds=30)
    stage.create("before")
    stage.until_running("before")
    control_plane.restart_apiserver(kill=True)
    stage.create("after")
    stage.until_running("after", seconds=120)
    assert operator.is_running


def test_what_happens_while_nothing_is_heard_is_found_afterwards(
    stage: Stage, control_plane: ControlPlane, proxy: FaultyProxy
) -> None:
    """The API server forgets its history meanwhile, so no watch can be resumed: 410."""
    operator = stage.leader(
        kubeconfig=proxy.kubeconfig("operator"), lease_seconds=120, renew_seconds=90, resync_seconds=5
    )
    for name in ("stays", "goes"):
        stage.create(name)
    stage.until_running("stays", "goes")
    proxy.refuse()
    stage.delete("goes")
    eventually(lambda: stage.jobs() == ["stays-a1"])
    stage.fail_pod("stays-a1")
    stage.create("new")
    control_plane.forget_history()
    proxy.refuse(False)
    stage.until_running("new")
    eventually(lambda: stage.jobs() == ["new-a1", "stays-a1", "stays-a2"])
    eventually(
        lambda: operator.metric("opensora_objects", kind="TrainingRun") == 2, what="the deleted run is forgotten"
    )


def test_a_storm_of_errors_loses_nothing_and_doubles_nothing(stage: Stage, proxy: FaultyProxy) -> None:
    operator = stage.leader(kubeconfig=proxy.kubeconfig("operator"))
    proxy.fault = storm(0.3)
    names = [f"run-{number}" for number in range(12)]
    for name in names:
        stage.create(name)
    proxy.cut()  # the watches, too, have to get through it
    stage.until_running(*names, seconds=90)
    for name in names[:4]:
        stage.fail_pod(f"{name}-a1")
    eventually(lambda: len(stage.jobs()) == 16, seconds=60)
    proxy.fault = lambda request: None
    stage.until_running(*names)
    counted = Counter(write for write in stage.writes() if write.startswith("create jobs"))
    created = [
        event for event in stage.requests() if event["verb"] == "create" and event["responseStatus"]["code"] == 201
    ]
    assert len([event for event in created if event["objectRef"]["resource"] == "jobs"]) == 16, counted
    assert operator.metric("opensora_api_requests_total", code="429") > 0
    assert operator.metric("opensora_reconcile_failures_total") > 0


def test_the_crds_may_come_after_the_operator(stage: Stage, proxy: FaultyProxy) -> None:
    def without_our_group(request: web.Request) -> web.Response | None:
        return web.json_response({"message": "not yet"}, status=404) if "opensora.dev" in request.path else None

    proxy.fault = without_our_group
    operator = stage.operator(kubeconfig=proxy.kubeconfig("operator"))
    operator.start()
    operator.wait_until(lambda: "waiting for the CRDs of" in operator.log.read_text(), 60)
    proxy.fault = lambda request: None
    stage.create()
    stage.until_running()


def test_of_two_replicas_one_works_and_the_other_takes_over(stage: Stage) -> None:
    first = stage.leader()
    second = stage.operator()
    second.start()
    second.wait_until(lambda: f"which {first.identity} holds" in second.log.read_text(), 60)
    assert [replica.metric("opensora_leader") for replica in (first, second)] == [1, 0]
    assert second.get("/healthz")[0] == 200
    stage.create("before")
    stage.until_running("before")
    first.kill()
    killed = time.monotonic()
    stage.create("after")
    stage.until_running("after")
    assert time.monotonic() - killed < FAST_LEASE["lease_seconds"] + 15
    assert stage.lease()["holderIdentity"] == second.identity
    assert stage.jobs() == ["after-a1", "before-a1"]


def test_a_clean_stop_lets_the_other_take_over_at_once(stage: Stage) -> None:
    first = stage.leader(lease_seconds=60, renew_seconds=40)
    second = stage.operator(lease_seconds=60, renew_seconds=40)
    second.start()
    second.wait_until(lambda: "waiting for the Lease" in second.log.read_text(), 60)
    first.signal(signal.SIGTERM)
    assert first.wait_for_end(20) == 0
    second.wait_until(lambda: "at work in" in second.log.read_text(), 15)
    assert stage.lease()["holderIdentity"] == second.identity


def test_a_standby_stops_at_a_word(stage: Stage) -> None:
    stage.leader()
    standby = stage.operator()
    standby.start()
    standby.wait_until(lambda: "waiting for the Lease" in standby.log.read_text(), 60)
    standby.signal(signal.SIGTERM)
    assert standby.wait_for_end(10) == 0


def test_a_leader_that_is_cut_off_ends_before_another_may_lead(stage: Stage, proxy: FaultyProxy) -> None:
    leader = stage.leader(kubeconfig=proxy.kubeconfig("operator"))
    cut = time.monotonic()
    proxy.refuse()
    assert leader.wait_for_end(30) == 1
    assert time.monotonic() - cut < FAST_LEASE["lease_seconds"]
    assert "the Lease could not be renewed for 6 s" in leader.log.read_text()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 5, 6])
def test_wherever_the_operator_dies_its_successor_ends_where_it_would_have(
    stage: Stage, when: str, number: int
) -> None:
    """Service, Job 1, status, status, decision, Job 2, …: of none is there too little or too much in the end."""
    environment = {**os.environ, "DIE": f"{when}:{number}", "PLANNER": "small"}
    program = SMALL.with_name("dying_operator.py")
    dying = stage.operator(program=program, environment=environment, leader_election=False)
    dying.start()
    stage.create()
    failed = False
    deadline = time.monotonic() + 60
    while dying.is_running and time.monotonic() < deadline:
        if not failed and stage.jobs() == ["demo-a1"] and stage.status().get("nodes", {}).get("ready") == 2:
            stage.fail_pod("demo-a1")
            failed = True
        time.sleep(0.05)
    assert dying.wait_for_end(0) == EXIT_CODE
    stage.leader(leader_election=False)
    if not failed:
        stage.until_running()
        stage.fail_pod("demo-a1")
    eventually(lambda: stage.jobs() == ["demo-a1", "demo-a2"])
    eventually(lambda: stage.status()["attempt"] == 2)
    stage.until_running()
    time.sleep(0.5)
    assert stage.jobs() == ["demo-a1", "demo-a2"]


def test_an_unusable_kubeconfig_is_said_in_one_line(stage: Stage, tmp_path: Path) -> None:
    operator = stage.operator(kubeconfig=tmp_path / "missing.yaml")
    operator.start()
    assert operator.wait_for_end(60) == 1
    assert "neither a service account nor a usable kubeconfig" in operator.log.read_text()
    assert "Traceback" not in operator.log.read_text()


def test_a_lost_answer_to_a_creation_is_no_conflict(stage: Stage, proxy: FaultyProxy) -> None:
    """The Job is there, and the operator does not know it."""
    lost: list[str] = []

    def lose(request: web.Request) -> web.Response | None:
        if request.method == "POST" and request.path.endswith("/jobs") and not lost:
            lost.append(request.path)
            return web.Response(status=503, text="upstream is gone")
        return None

    proxy.fault_of_answer = lose
    stage.leader(kubeconfig=proxy.kubeconfig("operator"))
    stage.create()
    stage.until_running()
    assert lost
    assert stage.jobs() == ["demo-a1"]
