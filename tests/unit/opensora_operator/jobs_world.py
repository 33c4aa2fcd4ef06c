"""A cluster of plain dictionaries for tests of SampleJob and BatchSearch: their Jobs, pods, ConfigMaps, and a clock."""

from __future__ import annotations

import copy
import itertools
import json
from types import ModuleType
from typing import Any

from opensora_operator.observation import Observation
from opensora_operator.plans import Child, Create, Delete, FailPod, Key, Object, Plan, SetSuspend
from opensora_operator.views import view_job, view_pod
from opensora_operator.wire import format_time

INDEX = "batch.kubernetes.io/job-completion-index"


class CrashError(Exception):
    """The operator died between two writes."""


class JobsWorld:
    """One object of ours, planned by `planner`, and everything around it."""

    def __init__(self, planner: ModuleType, *, name: str, **spec: Any) -> None:
        self.planner = planner
        self.now = 1_000_000.0
        self._uids = itertools.count(1)
        self.body: Object = {
            "apiVersion": "opensora.dev/v1alpha1",
            "kind": planner.KIND,
            "metadata": {"name": name, "namespace": "team", "uid": "own-uid", "generation": 1},
            "spec": copy.deepcopy(spec),
        }
        self.objects: dict[Key, Object] = {}
        self.default_profile: Object | None = None
        self.user_config_maps: dict[str, dict[str, str]] = {}
        self.jobs: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.others: dict[tuple[str, str], Object] = {}
        self.dead_nodes: set[str] = set()
        self.rejected: dict[str, str] = {}
        self.events: list[str] = []
        self.writes_left: int | None = None
        self.num_writes = 0
        self.was_deleted = False

    # What the operator does

    @property
    def status(self) -> Object:
        return self.body.get("status") or {}

    @property
    def phase(self) -> str | None:
        return self.status.get("phase")

    def condition(self, kind: str) -> Object:
        return next((found for found in self.status.get("conditions", ()) if found["type"] == kind), {})

    def observe(self) -> Observation:
        needed = self.planner.needs(self.body)
        children = {}
        for place, found in self.others.items():
            owner = next((o["uid"] for o in found["metadata"].get("ownerReferences", ())), "")
            is_in_the_way = owner != "own-uid"
            if place in needed.children or is_in_the_way:
                children[place] = Child(uid=found["metadata"]["uid"], owner_uid=owner, data=found.get("data", {}))
        jobs = [view_job(job) for job in self.jobs.values()]
        pods = [view_pod(pod) for pod in self.pods.values()]
        return Observation(
            now=self.now,
            body=copy.deepcopy(self.body),
            jobs=tuple(job for job in jobs if job is not None),
            pods=tuple(pod for pod in pods if pod is not None),
            objects={key: self.objects.get(key) for key in needed.objects},
            default_profile=self.default_profile if needed.default_profile else None,
            config_maps={name: self.user_config_maps.get(name) for name in needed.config_maps},
            children=children,
            dead_nodes=frozenset(self.dead_nodes),
            rejected=dict(self.rejected),
        )

    def plan(self) -> Plan:
        plan: Plan = self.planner.plan(self.observe())
        return plan

    def reconcile(self) -> None:
        """Plan and apply until there is nothing left to do."""
        for _ in range(64):
            plan = self.plan()
            if plan.is_decision:
                self._write_status(plan)
            elif plan.actions:
                for action in plan.actions:
                    self._apply(action)
                self.events += [event.reason for event in plan.events]
            elif plan.delete_self:
                self.was_deleted = True
                return
            elif plan.status is not None:
                self._write_status(plan)
            else:
                return
        raise AssertionError("the planner does not come to an end")

    def _write_status(self, plan: Plan) -> None:
        self._count_write()
        assert plan.status is not None
        self.body["status"] = json.loads(json.dumps(plan.status))
        self.events += [event.reason for event in plan.events]

    def _count_write(self) -> None:
        if self.writes_left is not None:
            if self.writes_left == 0:
                raise CrashError
            self.writes_left -= 1
        self.num_writes += 1

    def _apply(self, action: object) -> None:
        self._count_write()
        match action:
            case Create(manifest=manifest):
                self._create(copy.deepcopy(manifest))
            case SetSuspend(name=name, uid=uid, suspend=suspend):
                assert self.jobs[name]["metadata"]["uid"] == uid
                self.suspend_job(name, suspend)
            case Delete(kind="Job", name=name, uid=uid):
                assert self.jobs[name]["metadata"]["uid"] == uid
                self.delete_job(name)
            case Delete(kind="Pod", name=name, grace_seconds=0):
                self.pods.pop(name, None)
            case FailPod(name=name):
                self.end_pod(name, 137, disruption="NodeDead", message=None)
            case _:
                raise AssertionError(f"unknown action {action}")

    def _create(self, manifest: Object) -> None:
        name = manifest["metadata"]["name"]
        if name in self.rejected:
            return
        manifest["metadata"] |= {"uid": f"uid-{next(self._uids)}", "creationTimestamp": format_time(self.now)}
        if manifest["kind"] != "Job":
            self.others.setdefault((manifest["kind"], name), manifest)
            return
        assert name not in self.jobs, f"{name} is made twice"
        manifest["status"] = {"conditions": [], "active": 0}
        self.jobs[name] = manifest

    # What the cluster does

    def _pods_of(self, job: Object) -> list[Object]:
        name = job["metadata"]["name"]
        return [pod for pod in self.pods.values() if pod["metadata"]["ownerReferences"][0]["name"] == name]

    def start_pods(self, *, ready: bool = True, node: str = "node-0") -> list[str]:
        """Make and start the pods that may run; returns the names of the new ones."""
        started = []
        for job in self.jobs.values():
            if job["spec"]["suspend"] or has_ended(job) or "deletionTimestamp" in job["metadata"]:
                continue
            job["status"].setdefault("startTime", format_time(self.now))
            mine = self._pods_of(job)
            live = {index_of(pod) for pod in mine if is_live(pod)}
            over = indexes(job, "completedIndexes") | indexes(job, "failedIndexes")
            for index in range(job["spec"]["completions"]):
                if index in live or index in over or len(live) >= job["spec"]["parallelism"]:
                    continue
                live.add(index)
                name = f"{job['metadata']['name']}-{index}-{len(mine) + len(started)}"
                self.pods[name] = self._pod(job, name, index, node, ready=ready)
                started.append(name)
            job["status"]["active"] = len(live)
        return started

    def _pod(self, job: Object, name: str, index: int, node: str, *, ready: bool) -> Object:
        template = copy.deepcopy(job["spec"]["template"])
        state = {"running": {}} if ready else {"waiting": {"reason": "ContainerCreating"}}
        return {
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": "team",
                "uid": f"uid-{next(self._uids)}",
                "creationTimestamp": format_time(self.now),
                "labels": template["metadata"]["labels"],
                "annotations": {INDEX: str(index)},
                "ownerReferences": [{"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}],
            },
            "spec": {**template["spec"], "nodeName": node},
            "status": {
                "phase": "Running" if ready else "Pending",
                "containerStatuses": [{"name": "trainer", "state": state, "imageID": "example.com/opensora@sha256:1"}],
            },
        }

    def end_pod(
        self,
        name: str,
        code: int,
        *,
        message: Object | str | None = "",
        reason: str = "Error",
        disruption: str | None = None,
    ) -> None:
        """A pod ends with a code and a termination message."""
        pod = self.pods[name]
        pod["status"]["phase"] = "Succeeded" if code == 0 else "Failed"
        terminated: Object = {"exitCode": code, "finishedAt": format_time(self.now), "reason": reason}
        if message is not None:
            terminated["message"] = message if isinstance(message, str) else json.dumps(message)
        pod["status"]["containerStatuses"][0]["state"] = {"terminated": terminated}
        if disruption is not None:
            condition = {"type": "DisruptionTarget", "status": "True", "reason": disruption}
            pod["status"]["conditions"] = [{**condition, "lastTransitionTime": format_time(self.now)}]

    def run_job_controller(self) -> None:
        """Kubernetes' own judgement of every Job."""
        for name, job in list(self.jobs.items()):
            mine = self._pods_of(job)
            if "deletionTimestamp" in job["metadata"]:
                if not any(map(is_live, mine)):
                    for pod in mine:
                        del self.pods[pod["metadata"]["name"]]
                    del self.jobs[name]
                continue
            if not has_ended(job):
                for pod in mine:
                    if not is_live(pod) and not pod.setdefault("counted", False):
                        pod["counted"] = True
                        self._count(job, pod)
            if has_ended(job):
                for pod in mine:
                    if is_live(pod):
                        self._ask_to_end(pod)
                if has_condition(job, "FailureTarget") and not any(map(is_live, mine)):
                    set_condition(job, "Failed", self.now)
            job["status"]["active"] = sum(map(is_live, mine))

    def _count(self, job: Object, pod: Object) -> None:
        spec, index = job["spec"], index_of(pod)
        code = pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
        if code == 0:
            add_index(job, "completedIndexes", index)
        else:
            action = self._rule(job, pod, code)
            if action == "FailJob" or (action is None and "backoffLimitPerIndex" not in spec):
                assert spec.get("backoffLimit", 0) == 0
                set_condition(job, "FailureTarget", self.now, reason="PodFailurePolicy", message=f"pod exited {code}")
                return
            failures = job.setdefault("failures", {})
            if action is None:
                failures[index] = failures.get(index, 0) + 1
            if action == "FailIndex" or failures.get(index, 0) > spec.get("backoffLimitPerIndex", 0):
                add_index(job, "failedIndexes", index)
        over = indexes(job, "completedIndexes") | indexes(job, "failedIndexes")
        if len(over) == spec["completions"]:
            if indexes(job, "failedIndexes"):
                set_condition(job, "FailureTarget", self.now, reason="FailedIndexes", message="Job has failed indexes")
            else:
                set_condition(job, "Complete", self.now)

    def _rule(self, job: Object, pod: Object, code: int) -> str | None:
        is_disrupted = any(found["type"] == "DisruptionTarget" for found in pod["status"].get("conditions", ()))
        for rule in job["spec"]["podFailurePolicy"]["rules"]:
            if code in rule.get("onExitCodes", {}).get("values", ()) or ("onPodConditions" in rule and is_disrupted):
                return str(rule["action"])
        return None

    def _ask_to_end(self, pod: Object) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            grace = pod["spec"]["terminationGracePeriodSeconds"]
            pod["metadata"]["deletionTimestamp"] = format_time(self.now + grace)
            pod["metadata"]["deletionGracePeriodSeconds"] = grace

    def let_pods_end(self, code: int = 75) -> None:
        """Pods that were asked to end, on nodes that answer, do so."""
        for name, pod in list(self.pods.items()):
            is_asked = "deletionTimestamp" in pod["metadata"] and is_live(pod)
            if is_asked and pod["spec"]["nodeName"] not in self.dead_nodes:
                self.end_pod(name, code, message=None)

    def suspend_job(self, name: str, suspend: bool) -> None:
        job = self.jobs[name]
        job["spec"]["suspend"] = suspend
        if suspend:
            job["status"].pop("startTime", None)
            for pod in self._pods_of(job):
                if is_live(pod):
                    self._ask_to_end(pod)

    def delete_job(self, name: str) -> None:
        job = self.jobs[name]
        job["metadata"]["deletionTimestamp"] = format_time(self.now)
        for pod in self._pods_of(job):
            if is_live(pod):
                self._ask_to_end(pod)

    def edit(self, **spec: Any) -> None:
        """A user changes the spec."""
        self.body["spec"] = {**self.body["spec"], **spec}
        self.body["metadata"]["generation"] += 1

    def settle(self) -> None:
        """Everybody does what is theirs to do, until nothing changes."""
        for _ in range(6):
            self.reconcile()
            self.run_job_controller()
            self.let_pods_end()
        self.reconcile()

    def live_pods(self) -> list[str]:
        return [name for name, pod in self.pods.items() if is_live(pod)]


def is_live(pod: Object) -> bool:
    return pod["status"]["phase"] not in ("Succeeded", "Failed")


def index_of(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][INDEX])


def indexes(job: Object, key: str) -> set[int]:
    return {int(text) for text in job["status"].get(key, "").split(",") if text}


def add_index(job: Object, key: str, index: int) -> None:
    job["status"][key] = ",".join(str(number) for number in sorted(indexes(job, key) | {index}))


def has_condition(job: Object, kind: str) -> bool:
    return any(found["type"] == kind for found in job["status"]["conditions"])


def has_ended(job: Object) -> bool:
    return any(has_condition(job, kind) for kind in ("FailureTarget", "Failed", "Complete"))


def set_condition(job: Object, kind: str, now: float, **more: str) -> None:
    if not has_condition(job, kind):
        condition = {"type": kind, "status": "True", "lastTransitionTime": format_time(now), **more}
        job["status"]["conditions"].append(condition)
