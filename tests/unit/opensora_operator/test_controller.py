"""The reconcile step against an API server in memory: what is written, in which order, and what happens on errors."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import pytest
from opensora_operator.cluster import ApiError
from opensora_operator.constants import LABEL_KIND, LABEL_NAME, LABEL_UID
from opensora_operator.controller import Controller
from opensora_operator.kinds import Kind
from opensora_operator.metrics import Metrics
from opensora_operator.observation import Observation
from opensora_operator.pacing import ProgressPace
from opensora_operator.plans import Create, Delete, Event, FailPod, Key, Needs, Object, Plan, SetSuspend
from opensora_operator.progress import ProgressBook
from opensora_operator.queue import Queue
from opensora_operator.store import Store

RUN = Key("TrainingRun", "team", "demo")
Planner = Callable[[Observation], Plan]


class Server:
    """An API server in memory, as far as the controller can see."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str | None, str], Object] = {}
        self.requests: list[str] = []
        self.failures: dict[str, list[ApiError]] = {}
        """Request → what it is answered with, one after another, before it works."""
        self.version = 100

    def add(self, kind: str, name: str, namespace: str | None = "team", **content: Any) -> Object:
        self.version += 1
        metadata = {"name": name, "uid": f"uid-{name}", "resourceVersion": str(self.version)}
        if namespace is not None:
            metadata["namespace"] = namespace
        metadata |= content.pop("metadata", {})
        body = {"apiVersion": "v1", "kind": kind, "metadata": metadata, "spec": {}} | content
        self.objects[kind, namespace, name] = body
        return copy.deepcopy(body)

    async def find(self, kind: str, namespace: str | None, name: str) -> Object | None:
        self._enter(f"get {kind} {name}")
        return copy.deepcopy(self.objects.get((kind, namespace, name)))

    async def list_pages(self, kind: str, namespace: str | None = None, *, labels: str = "") -> Any:
        self._enter(f"list {kind}")
        found = [body for place, body in self.objects.items() if place[0] == kind and place[1] in (None, namespace)]
        yield copy.deepcopy(found), self.version

    async def create(self, manifest: Object, *, later: bool = False) -> Object:
        kind, metadata = manifest["kind"], manifest["metadata"]
        self._enter(f"create {kind} {metadata['name']}")
        if (kind, metadata["namespace"], metadata["name"]) in self.objects:
            raise ApiError(409, "it exists", reason="AlreadyExists")
        content = copy.deepcopy({key: value for key, value in manifest.items() if key != "kind"})
        return self.add(kind, metadata["name"], metadata["namespace"], **content)

    async def patch(
        self, kind: str, namespace: str, name: str, body: Object, *, subresource: str = "", strategic: bool = False
    ) -> Object:
        self._enter(f"patch {kind}{'/' if subresource else ''}{subresource} {name}")
        found = self.objects.get((kind, namespace, name))
        if found is None:
            raise ApiError(404, "not there")
        if any(found["metadata"][key] != value for key, value in body["metadata"].items()):
            raise ApiError(409, "it is another one", reason="Conflict")
        self.version += 1
        _merge(found, {key: value for key, value in body.items() if key != "metadata"})
        found["metadata"]["resourceVersion"] = str(self.version)
        return copy.deepcopy(found)

    async def delete(
        self, kind: str, namespace: str, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> Object:
        self._enter(f"delete {kind} {name}")
        if self.objects.get((kind, namespace, name), {}).get("metadata", {}).get("uid") != uid:
            raise ApiError(404, "not there")
        return self.objects.pop((kind, namespace, name))

    def _enter(self, request: str) -> None:
        self.requests.append(request)
        if self.failures.get(request):
            raise self.failures[request].pop(0)


class Recorded:
    """Takes events."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def record(self, body: Object, event: Event) -> None:
        self.reasons.append(event.reason)

    def forget(self, uid: str) -> None:
        self.reasons.append(f"forget {uid}")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A controller with one run and a planner of the test's own."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.server = Server()
        self.store = Store()
        self.queue = Queue(clock=self.clock, jitter=lambda: 0.5)
        self.recorded = Recorded()
        self.metrics = Metrics()
        self.seen: list[Observation] = []
        self.planner: Planner = lambda seen: Plan()
        self.needs = Needs()
        self.controller = Controller(
            cluster=self.server,  # type: ignore[arg-type]  # as much of it as is used
            store=self.store,
            queue=self.queue,
            recorder=self.recorded,  # type: ignore[arg-type]
            metrics=self.metrics,
            kinds={"TrainingRun": Kind(needs=lambda body: self.needs, plan=self._plan)},
            pace=ProgressPace(clock=self.clock),
            resync_seconds=300,
            book=ProgressBook(),
            clock=self.clock,
        )
        self.body = self.server.add("TrainingRun", "demo", status={"phase": "Pending"})
        self.store.put("TrainingRun", self.body)

    def _plan(self, seen: Observation) -> Plan:
        self.seen.append(seen)
        return self.planner(seen)

    def turn(self) -> None:
        """One turn of whoever is due."""

        async def one() -> None:
            turn = self.queue.take()
            assert turn is not None, "nobody is due"
            await self.controller._take(turn)
            self.queue.done(turn.key)

        asyncio.run(one())

    def settle(self, most: int = 20) -> None:
        """Turns until nobody is due."""
        for _ in range(most):
            if not len(self.queue):
                return
            self.turn()
        raise AssertionError("it does not come to rest")

    def start(self) -> None:
        self.controller.concern(RUN)
        self.settle()

    def manifest(self, kind: str, name: str) -> Object:
        owner = {"uid": "uid-demo", "controller": True}
        labels = {LABEL_KIND: "TrainingRun", LABEL_NAME: "demo", LABEL_UID: "uid-demo"}
        metadata = {"name": name, "namespace": "team", "ownerReferences": [owner], "labels": labels}
        return {"apiVersion": "v1", "kind": kind, "metadata": metadata}

    @property
    def status(self) -> Object:
        found: Object = self.server.objects["TrainingRun", "team", "demo"]["status"]
        return found


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_nothing_is_written_where_nothing_is_to_do(bench: Bench) -> None:
    bench.planner = lambda seen: Plan(status={"phase": "Pending"})
    bench.start()
    assert bench.server.requests == []


def test_what_a_job_needs_is_there_before_the_job_and_the_status_follows(bench: Bench) -> None:
    def plan(seen: Observation) -> Plan:
        actions = [Create(manifest=bench.manifest(kind, "demo")) for kind in ("Service", "ConfigMap", "Job")]
        return Plan(status={"phase": "Running"}, actions=() if seen.jobs else tuple(actions))

    bench.planner = plan
    bench.start()
    writes = bench.server.requests
    assert sorted(writes[:2]) == ["create ConfigMap demo", "create Service demo"]
    assert writes[2:] == ["create Job demo", "patch TrainingRun/status demo"]
    assert bench.status == {"phase": "Running"}


def test_a_decision_is_written_and_planned_on_at_once_with_the_new_status(bench: Bench) -> None:
    def plan(seen: Observation) -> Plan:
        attempt = seen.body["status"].get("attempt", 1)
        if attempt == 1:
            event = Event(reason="WorkerFailed", message="exit code 1", warning=True)
            return Plan(status={"phase": "Restarting", "attempt": 2}, is_decision=True, events=(event,))
        return Plan() if seen.jobs else Plan(actions=(Create(manifest=bench.manifest("Job", "demo-a2")),))

    bench.planner = plan
    bench.controller.concern(RUN)
    bench.turn()
    assert bench.server.requests == ["patch TrainingRun/status demo", "create Job demo-a2"]
    assert bench.recorded.reasons == ["WorkerFailed"]


def test_a_decision_about_an_old_state_is_not_written(bench: Bench) -> None:
    changed = bench.server.add("TrainingRun", "demo", status={"phase": "Pending"}, spec={"suspend": True})

    def plan(seen: Observation) -> Plan:
        if seen.body["spec"].get("suspend"):
            return Plan(status={"phase": "Suspended"})
        return Plan(status={"phase": "Restarting"}, is_decision=True)

    bench.planner = plan
    bench.start()
    assert bench.status == {"phase": "Suspended"}
    assert changed["metadata"]["uid"] == "uid-demo"
    assert [seen.body["spec"] for seen in bench.seen] == [{}, {"suspend": True}]


def test_what_is_gone_from_the_status_is_gone_on_the_server(bench: Bench) -> None:
    bench.server.objects["TrainingRun", "team", "demo"]["status"] = {"phase": "Failed", "nodes": {"ready": 2, "x": 1}}
    bench.store.put("TrainingRun", bench.server.add("TrainingRun", "demo", status={"a": 1, "nodes": {"x": 1, "y": 2}}))
    bench.planner = lambda seen: Plan(status={"nodes": {"x": 1}, "list": [1]})
    bench.start()
    assert bench.status == {"nodes": {"x": 1}, "list": [1]}


def test_a_name_that_somebody_else_has_is_shown_to_the_planner_and_left_alone(bench: Bench) -> None:
    bench.server.add("Service", "demo", metadata={"uid": "theirs"})

    def plan(seen: Observation) -> Plan:
        if ("Service", "demo") in seen.children:
            return Plan(status={"phase": "Pending", "taken": seen.children["Service", "demo"].owner_uid})
        return Plan(
            actions=(Create(manifest=bench.manifest("Service", "demo")), Create(manifest=bench.manifest("Job", "j")))
        )

    bench.planner = plan
    bench.start()
    assert bench.status["taken"] == ""
    assert "create Job j" not in bench.server.requests
    assert bench.server.objects["Service", "team", "demo"]["metadata"]["uid"] == "theirs"
    bench.server.objects.pop(("Service", "team", "demo"))
    bench.clock.now += 11
    bench.planner = lambda seen: plan(seen) if ("Job", "team", "j") not in bench.server.objects else Plan()
    bench.start()
    assert ("Job", "team", "j") in bench.server.objects


def test_our_own_object_from_before_is_taken_as_created(bench: Bench) -> None:
    """The answer to a create may be lost: the operator died, or the connection."""
    job = bench.manifest("Job", "j")
    bench.server.add("Job", "j", metadata=job["metadata"])
    bench.planner = lambda seen: Plan(actions=() if seen.jobs else (Create(manifest=job),))
    bench.start()
    assert bench.server.requests == ["create Job j", "get Job j"]


@pytest.mark.parametrize("code", [400, 403, 413, 422])
def test_what_the_server_refuses_is_told_to_the_planner_and_tried_again_a_minute_later(bench: Bench, code: int) -> None:
    bench.server.failures["create Job j"] = [ApiError(code, "exceeded quota: pods")]

    def plan(seen: Observation) -> Plan:
        if "j" in seen.rejected:
            return Plan(status={"why": seen.rejected["j"]})
        return Plan(status={}, actions=() if seen.jobs else (Create(manifest=bench.manifest("Job", "j")),))

    bench.planner = plan
    bench.start()
    assert bench.status == {"why": "exceeded quota: pods"}
    assert bench.server.requests.count("create Job j") == 1
    bench.clock.now += 59
    bench.settle()
    assert bench.server.requests.count("create Job j") == 1
    bench.clock.now += 2
    bench.settle()
    assert bench.status == {}
    assert bench.server.requests.count("create Job j") == 2


def test_a_new_spec_is_tried_at_once_although_the_old_one_was_refused(bench: Bench) -> None:
    bench.server.failures["create Job j"] = [ApiError(422, "spec.template is bad")]
    bench.planner = lambda seen: (
        Plan() if seen.rejected or seen.jobs else Plan(actions=(Create(manifest=bench.manifest("Job", "j")),))
    )
    bench.start()
    assert ("Job", "team", "j") not in bench.server.objects
    bench.store.put("TrainingRun", bench.server.add("TrainingRun", "demo", metadata={"generation": 2}))
    bench.start()
    assert ("Job", "team", "j") in bench.server.objects


def test_an_unreachable_server_is_asked_again_after_a_while(bench: Bench) -> None:
    bench.server.failures["patch TrainingRun/status demo"] = [
        ApiError(503, "not now"),
        ApiError(429, "", retry_seconds=7),
    ]
    bench.planner = lambda seen: Plan(status={"phase": "Running"})
    bench.start()
    assert bench.status == {"phase": "Pending"}
    bench.clock.now += 0.3
    bench.settle()
    bench.clock.now += 6.9
    bench.settle()
    assert bench.status == {"phase": "Pending"}
    bench.clock.now += 0.2
    bench.settle()
    assert bench.status == {"phase": "Running"}
    assert b'opensora_reconcile_failures_total{kind="TrainingRun"} 2.0' in bench.metrics.text()


def test_events_wait_for_the_status_that_they_tell_of(bench: Bench) -> None:
    bench.server.failures["patch TrainingRun/status demo"] = [ApiError(500, "broken")]
    event = Event(reason="AttemptStarted", message="")
    bench.planner = lambda seen: Plan(
        status={"phase": "Running"},
        actions=() if seen.jobs else (Create(manifest=bench.manifest("Job", "j")),),
        events=() if seen.jobs else (event,),
    )
    bench.start()
    assert bench.recorded.reasons == []
    bench.clock.now += 1
    bench.settle()
    assert bench.recorded.reasons == ["AttemptStarted"]


def test_new_jobs_come_before_statuses(bench: Bench) -> None:
    names = [f"r{number}" for number in range(5)]
    for name in names:
        bench.store.put("TrainingRun", bench.server.add("TrainingRun", name, status={}))

    def plan(seen: Observation) -> Plan:
        name = seen.body["metadata"]["name"]
        exists = ("Job", "team", name) in bench.server.objects
        return Plan(status={"phase": "x"}, actions=() if exists else (Create(manifest=bench.manifest("Job", name)),))

    bench.planner = plan
    for name in names:
        bench.controller.concern(Key("TrainingRun", "team", name))
    bench.settle()
    assert [request.split()[0] for request in bench.server.requests] == ["create"] * 5 + ["patch"] * 5


def test_progress_waits_for_its_turn_and_a_change_of_state_does_not(bench: Bench) -> None:
    step = 0

    def plan(seen: Observation) -> Plan:
        return Plan(status={"phase": "Running", "step": step}, is_progress_only=step > 0)

    bench.planner = plan
    bench.start()
    step = 1
    bench.start()
    assert bench.status["step"] == 0
    bench.clock.now += 10
    bench.settle()
    assert bench.status["step"] == 1
    assert b'opensora_status_writes_total{cause="progress"} 1.0' in bench.metrics.text()


def test_actions_that_change_nothing_are_not_repeated_without_a_pause(bench: Bench) -> None:
    bench.planner = lambda seen: Plan(actions=(Delete(kind="Service", name="x", uid="u"),))
    bench.start()
    assert len(bench.server.requests) == 4
    for seconds, number in ((0.1, 4), (0.2, 5), (0.2, 5), (0.3, 6), (60, 7)):
        bench.clock.now += seconds
        bench.settle()
        assert len(bench.server.requests) == number


def test_an_action_that_failed_often_and_then_works_is_no_bug(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.server.failures["create Job j"] = [ApiError(503, "not now") for _ in range(6)]
    bench.planner = lambda seen: Plan(
        actions=() if seen.jobs else (Create(manifest=bench.manifest("Job", "j")),),
    )
    bench.start()
    for _ in range(8):
        bench.clock.now += 60
        bench.settle()
    assert ("Job", "team", "j") in bench.server.objects
    assert "bug" not in caplog.text


def test_decisions_without_an_end_are_stopped(bench: Bench) -> None:
    bench.planner = lambda seen: Plan(status={"n": seen.body["status"].get("n", 0) + 1}, is_decision=True)
    bench.start()
    assert bench.status["n"] == 16
    assert len(bench.queue) == 0


def test_a_bug_in_a_planner_does_not_stop_the_worker(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def plan(seen: Observation) -> Plan:
        raise ZeroDivisionError

    bench.planner = plan
    bench.start()
    assert "this is a bug" in caplog.text
    assert caplog.records[-1].__dict__["run"] == "team/demo"


def test_an_object_that_is_being_deleted_is_left_alone(bench: Bench) -> None:
    bench.store.put("TrainingRun", bench.server.add("TrainingRun", "demo", metadata={"deletionTimestamp": "2026"}))
    bench.start()
    assert bench.seen == []


def test_what_is_gone_is_forgotten(bench: Bench) -> None:
    bench.start()
    bench.store.remove("TrainingRun", bench.server.add("TrainingRun", "demo"))
    bench.start()
    assert bench.recorded.reasons == ["forget uid-demo"]


def test_a_run_that_is_over_its_time_is_deleted(bench: Bench) -> None:
    bench.planner = lambda seen: Plan(delete_self=True)
    bench.start()
    assert bench.server.requests == ["delete TrainingRun demo"]


def test_a_status_for_an_object_that_is_gone_is_no_error(bench: Bench) -> None:
    bench.server.objects.clear()
    bench.planner = lambda seen: Plan(status={"phase": "Running"})
    bench.start()
    assert bench.store.get(RUN) is None


def test_jobs_are_suspended_and_pods_failed_only_if_they_are_the_ones_meant(bench: Bench) -> None:
    labels = bench.manifest("Job", "j")["metadata"]["labels"]
    bench.store.put("Job", bench.server.add("Job", "j", metadata={"labels": labels}))
    bench.store.put("Pod", bench.server.add("Pod", "p", metadata={"labels": labels, "uid": "another"}))
    stale = [
        FailPod(name="p", uid="uid-p", message="node n is gone"),
        Delete(kind="Pod", name="p", uid="uid-p", grace_seconds=0),
    ]
    bench.planner = lambda seen: (
        Plan() if seen.jobs[0].suspended else Plan(actions=(SetSuspend(name="j", uid="uid-j", suspend=True), *stale))
    )
    bench.start()
    assert bench.server.objects["Job", "team", "j"]["spec"]["suspend"] is True
    assert "phase" not in bench.server.objects["Pod", "team", "p"].get("status", {})
    assert bench.server.requests == ["patch Job j", "patch Pod/status p", "delete Pod p"]


def test_a_pod_removed_by_force_is_gone_for_the_next_plan(bench: Bench) -> None:
    labels = bench.manifest("Pod", "p")["metadata"]["labels"]
    bench.store.put("Pod", bench.server.add("Pod", "p", metadata={"labels": labels}, spec={"nodeName": "n"}))
    bench.planner = lambda seen: Plan(
        actions=tuple(
            action
            for pod in seen.pods
            for action in (
                FailPod(name=pod.name, uid=pod.uid, message="gone"),
                Delete(kind="Pod", name=pod.name, uid=pod.uid, grace_seconds=0),
            )
        )
    )
    bench.start()
    assert [len(seen.pods) for seen in bench.seen] == [1, 0]


def test_what_a_planner_needs_is_looked_up_once_and_again_when_it_is_old(bench: Bench) -> None:
    bench.server.add("ConfigMap", "user", data={"config.yaml": "a: 1"})
    bench.server.add("ConfigMap", "ours", metadata={"ownerReferences": [{"uid": "uid-demo", "controller": True}]})
    profile = Key("ClusterTrainingProfile", "", "h200")
    bench.needs = Needs(objects=(profile,), config_maps=("user", "missing"), children=(("ConfigMap", "ours"),))
    bench.start()
    bench.start()
    assert sorted(bench.server.requests) == [
        "get ClusterTrainingProfile h200",
        "get ConfigMap missing",
        "get ConfigMap ours",
        "get ConfigMap user",
    ]
    seen = bench.seen[-1]
    assert seen.config_maps == {"user": {"config.yaml": "a: 1"}, "missing": None}
    assert seen.children["ConfigMap", "ours"].owner_uid == "uid-demo"
    assert seen.objects == {profile: None}
    bench.server.add("ConfigMap", "missing", data={})
    bench.clock.now += 10
    bench.start()
    assert bench.seen[-1].config_maps["missing"] == {}
    assert bench.server.requests.count("get ConfigMap ours") == 1


def test_an_object_is_planned_again_when_what_it_refers_to_changes(bench: Bench) -> None:
    parent = Key("TrainingRun", "team", "parent")
    bench.needs = Needs(objects=(parent,))
    bench.start()
    bench.needs = Needs()
    bench.controller.concern(parent)
    bench.settle()
    assert [seen.body["metadata"]["name"] for seen in bench.seen] == ["demo", "demo"]
    bench.controller.concern(parent)
    bench.settle()
    assert len(bench.seen) == 2, "it does not depend on it any more"


def test_the_default_profile_of_the_namespace_wins_and_is_not_missed_for_a_late_watch(bench: Bench) -> None:
    bench.needs = Needs(default_profile=True)
    bench.server.add("ClusterTrainingProfile", "b", None, spec={"default": True})
    bench.server.add("ClusterTrainingProfile", "a", None, spec={"default": True})
    bench.server.add("TrainingProfile", "other", "elsewhere", spec={"default": True})
    bench.start()
    assert bench.seen[-1].default_profile is not None
    assert bench.seen[-1].default_profile["metadata"]["name"] == "a"
    mine = bench.server.add("TrainingProfile", "z", spec={"default": True})
    bench.store.put("TrainingProfile", mine)
    bench.start()
    assert bench.seen[-1].default_profile == mine


@pytest.mark.parametrize(("ready", "dead"), [("True", set()), ("Unknown", {"n"}), (None, {"n"})])
def test_the_node_of_a_pod_that_does_not_go_is_looked_at(bench: Bench, ready: str | None, dead: set[str]) -> None:
    if ready is not None:
        bench.server.add("Node", "n", None, status={"conditions": [{"type": "Ready", "status": ready}]})
    labels = bench.manifest("Pod", "p")["metadata"]["labels"]
    metadata = {"labels": labels, "deletionTimestamp": "1970-01-01T00:15:30Z", "deletionGracePeriodSeconds": 30}
    bench.store.put("Pod", bench.server.add("Pod", "p", metadata=metadata, spec={"nodeName": "n"}))
    bench.needs = Needs(stuck_pod_seconds=120)
    bench.start()
    assert bench.seen[-1].dead_nodes == set()
    assert bench.server.requests == []
    bench.clock.now += 25
    bench.start()
    assert bench.seen[-1].dead_nodes == dead


def test_every_object_is_looked_at_again_after_the_resync_time(bench: Bench) -> None:
    bench.start()
    bench.clock.now += 331
    bench.settle()
    assert len(bench.seen) == 2


def test_a_deadline_is_kept(bench: Bench) -> None:
    bench.planner = lambda seen: Plan(requeue_seconds=5)
    bench.start()
    bench.clock.now += 4.9
    bench.settle()
    assert len(bench.seen) == 1
    bench.clock.now += 0.2
    bench.settle()
    assert len(bench.seen) == 2


def test_a_status_that_the_crd_does_not_have_is_reported(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    original = bench.server.patch

    async def prune(*arguments: Any, **options: Any) -> Object:
        body = await original(*arguments, **options)
        del body["status"]["unknown"]
        return body

    bench.server.patch = prune  # type: ignore[method-assign]
    bench.planner = lambda seen: Plan(status={"phase": "Running", "unknown": 1})
    bench.start()
    assert "the CRD does not have what the planner writes" in caplog.text


def _merge(old: Object, change: Object) -> None:
    for key, value in change.items():
        if value is None:
            old.pop(key, None)
        elif isinstance(value, dict) and isinstance(old.get(key), dict):
            _merge(old[key], value)
        else:
            old[key] = value
