"""A cluster of plain dictionaries for tests of planners: a Job controller, kubelets, a queue, and a clock."""

from __future__ import annotations

import copy
import itertools
import json
import re
from typing import Any

from opensora_operator import planner
from opensora_operator.constants import ExitCode
from opensora_operator.observation import Observation
from opensora_operator.plans import Child, Create, Delete, FailPod, Object, Plan, SetSuspend
from opensora_operator.progress import ProgressReport
from opensora_operator.resources import Platform
from opensora_operator.views import view_job, view_pod
from opensora_operator.wire import format_time

MINIMAL_SPEC: Object = {
    "image": "example.com/opensora:1",
    "runUri": "s3://bucket/demo",
    "config": {"inline": "train: {steps: 10}\n"},
    "nodes": 2,
    "procsPerNode": 2,
    "restartPolicy": {"backoff": {"baseSeconds": 0}},
}


class CrashError(Exception):
    """The operator died between two writes."""


class World:
    """One TrainingRun and everything around it."""

    def __init__(self, *, progress_url: str | None = "https://operator:9443", **spec: Any) -> None:
        self.now = 1_000_000.0
        self._uids = itertools.count(1)
        self.run: Object = {
            "apiVersion": "opensora.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": "demo", "namespace": "team", "uid": "run-uid", "generation": 1},
            "spec": {**copy.deepcopy(MINIMAL_SPEC), **spec},
        }
        self.platform = Platform(progress_url=progress_url, ca_bundle="PEM" if progress_url else None)
        self.profiles: dict[Any, Object] = {}
        self.default_profile: Object | None = None
        self.user_config_maps: dict[str, dict[str, str]] = {}
        self.jobs: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.others: dict[tuple[str, str], Object] = {}
        self.dead_nodes: set[str] = set()
        self.rejected: dict[str, str] = {}
        self.report: ProgressReport | None = None
        self.events: list[str] = []
        self.suspended_jobs_fail = True
        """Whether pods that end because their Job is suspended make it fail: Kubernetes does either."""
        self.writes_left: int | None = None
        self.num_writes = 0
        self.was_deleted = False

    # What the operator does

    @property
    def status(self) -> Object:
        return self.run.get("status") or {}

    @property
    def phase(self) -> str | None:
        return self.status.get("phase")

    def condition(self, kind: str) -> Object:
        return next((found for found in self.status.get("conditions", ()) if found["type"] == kind), {})

    def observe(self) -> Observation:
        needed = planner.needs(self.run)
        children = {
            place: Child(
                uid=found["metadata"]["uid"],
                owner_uid=next((o["uid"] for o in found["metadata"].get("ownerReferences", ())), ""),
                data=found.get("data", {}),
            )
            for place, found in self.others.items()
        }
        jobs = [view_job(job) for job in self.jobs.values()]
        pods = [view_pod(pod) for pod in self.pods.values()]
        attempt = max(1, self.status.get("attempt", 0))
        return Observation(
            now=self.now,
            body=copy.deepcopy(self.run),
            jobs=tuple(job for job in jobs if job is not None),
            pods=tuple(pod for pod in pods if pod is not None),
            objects={key: self.profiles.get(key) for key in needed.objects},
            default_profile=self.default_profile if needed.default_profile else None,
            config_maps={name: self.user_config_maps.get(name) for name in needed.config_maps},
            children=children,
            dead_nodes=frozenset(self.dead_nodes),
            progress=self.report if self.report is not None and self.report.attempt == attempt else None,
            rejected=dict(self.rejected),
            platform=self.platform,
        )

    def plan(self) -> Plan:
        return planner.plan(self.observe())

    def reconcile(self) -> None:
        """Plan and apply until there is nothing left to do."""
        for _ in range(32):
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
        self.run["status"] = json.loads(json.dumps(plan.status))
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
            case Delete(kind="Pod", name=name, grace_seconds=grace):
                if grace == 0:
                    self.pods.pop(name, None)
                elif name in self.pods:
                    self._ask_to_end(self.pods[name])
            case FailPod(name=name):
                self.end_pod(name, phase="Failed", disruption="NodeDead")
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
        attempt = manifest["metadata"]["labels"]["opensora.dev/attempt"]
        alive = [pod for pod in self.pods.values() if is_live(pod)]
        assert all(pod["metadata"]["labels"]["opensora.dev/attempt"] == attempt for pod in alive), "two live attempts"
        manifest["status"] = {"conditions": []}
        self.jobs[name] = manifest

    # What the cluster does

    def job(self, attempt: int) -> Object:
        return self.jobs[f"demo-a{attempt}"]

    @property
    def attempt(self) -> int:
        return int(self.status.get("attempt", 0))

    def start_pods(self, *, ready: bool = True, nodes: tuple[str, ...] = ("node-0", "node-1", "node-2")) -> None:
        """The Job controller, scheduler and kubelets do their work for every Job that may run."""
        for job in self.jobs.values():
            if job["spec"]["suspend"] or ended(job):
                continue
            job["status"].setdefault("startTime", format_time(self.now))
            for index in range(job["spec"]["completions"]):
                name = f"{job['metadata']['name']}-{index}"
                if name not in self.pods:
                    self.pods[name] = self._pod(job, name, index, nodes[index % len(nodes)], ready=ready)

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
                "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
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
        code: int | None = None,
        *,
        phase: str | None = None,
        disruption: str | None = None,
        message: str = "",
        rank: int = 0,
        step: int | None = None,
        has_verdict: bool = True,
        reason: str = "Error",
    ) -> None:
        """A pod ends: with a code of its launcher, or because of its node."""
        pod = self.pods[name]
        status = pod["status"]
        status["phase"] = phase or ("Succeeded" if code == 0 else "Failed")
        if disruption is not None:
            status["conditions"] = [
                {
                    "type": "DisruptionTarget",
                    "status": "True",
                    "reason": disruption,
                    "message": message or "the node is gone",
                    "lastTransitionTime": format_time(self.now),
                }
            ]
        if code is None:
            return
        terminated: Object = {"exitCode": code, "finishedAt": format_time(self.now), "reason": reason}
        if has_verdict:
            first = {"rank": rank, "time": self.now, "code": code, "reason": "E", "message": message, "step": step}
            verdict = {
                "code": code,
                "message": f"rank {rank} failed first: {message}",
                "time": self.now,
                "first": first if code else None,
            }
            terminated["message"] = json.dumps(verdict)
        status["containerStatuses"][0]["state"] = {"terminated": terminated}

    def run_job_controller(self) -> None:
        """Kubernetes' own judgement of every Job; pods that it deletes get their SIGTERM."""
        for job in self.jobs.values():
            mine = [pod for pod in self.pods.values() if pod["metadata"]["ownerReferences"][0]["name"] == _name(job)]
            if ended(job):
                for pod in mine:
                    if is_live(pod):
                        self._ask_to_end(pod)
                if not any(map(is_live, mine)) and not has_condition(job, "Complete"):
                    set_condition(job, "Failed", self.now, **_reason_of(job))
                continue
            if (
                mine
                and len(mine) >= job["spec"]["completions"]
                and all(p["status"]["phase"] == "Succeeded" for p in mine)
            ):
                set_condition(job, "Complete", self.now)
                continue
            failed = [pod for pod in mine if pod["status"]["phase"] == "Failed"]
            if failed and (self.suspended_jobs_fail or not job["spec"]["suspend"]):
                failed.sort(key=_ended_at)
                set_condition(job, "FailureTarget", self.now, **self._judge(job, failed[0]))
                for pod in mine:
                    if is_live(pod):
                        self._ask_to_end(pod)

    def _judge(self, job: Object, pod: Object) -> dict[str, str]:
        for index, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
            codes = rule.get("onExitCodes", {}).get("values", ())
            state = pod["status"]["containerStatuses"][0]["state"].get("terminated", {})
            is_disrupted = any(found["type"] == "DisruptionTarget" for found in pod["status"].get("conditions", ()))
            if state.get("exitCode") in codes or ("onPodConditions" in rule and is_disrupted):
                text = f"Container trainer for pod team/{_name(pod)} failed matching FailJob rule at index {index}"
                return {"reason": "PodFailurePolicy", "message": text}
        return {"reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}

    def _ask_to_end(self, pod: Object) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            grace = pod["spec"]["terminationGracePeriodSeconds"]
            pod["metadata"]["deletionTimestamp"] = format_time(self.now + grace)
            pod["metadata"]["deletionGracePeriodSeconds"] = grace

    def let_pods_end(self, code: int = ExitCode.STOPPED) -> None:
        """Pods that were asked to end, on nodes that answer, do so."""
        for name, pod in list(self.pods.items()):
            on_dead_node = pod["spec"]["nodeName"] in self.dead_nodes
            if "deletionTimestamp" in pod["metadata"] and is_live(pod) and not on_dead_node:
                self.end_pod(name, code, message="asked to stop")
            job = pod["metadata"]["ownerReferences"][0]["name"]
            if job not in self.jobs and not is_live(self.pods[name]):
                del self.pods[name]

    def suspend_job(self, name: str, suspend: bool) -> None:
        job = self.jobs[name]
        job["spec"]["suspend"] = suspend
        if suspend:
            job["status"].pop("startTime", None)
            for pod in self.pods.values():
                if pod["metadata"]["ownerReferences"][0]["name"] == name and is_live(pod):
                    self._ask_to_end(pod)
        else:
            gone = [pod for pod in self.pods if re.fullmatch(rf"{name}-\d+", pod) and not is_live(self.pods[pod])]
            for pod in gone:
                del self.pods[pod]

    def delete_job(self, name: str) -> None:
        del self.jobs[name]
        for pod in self.pods.values():
            if pod["metadata"]["ownerReferences"][0]["name"] == name and is_live(pod):
                self._ask_to_end(pod)

    def edit(self, **spec: Any) -> None:
        """A user changes the spec."""
        self.run["spec"] = {**self.run["spec"], **spec}
        self.run["metadata"]["generation"] += 1

    def say(self, step: int, **values: Any) -> None:
        """Rank 0 reports."""
        settings: dict[str, Any] = {
            "pod_uid": "p",
            "attempt": max(1, self.attempt),
            "sequence": 1,
            "phase": "training",
            "state": "Training",
            "step": step,
            "total_steps": 100,
            "epoch": 0,
            "loss": 0.5,
            "seconds_per_step": 1.0,
            "samples_per_second": 4.0,
            "eta_seconds": 100.0 - step,
            "goodput": 0.9,
            "checkpoint_step": None,
            "samples_step": None,
            "received": self.now,
            "advanced": self.now,
        }
        self.report = ProgressReport(**{**settings, **values})

    def settle(self, *, code: int = ExitCode.STOPPED) -> None:
        """Everybody does what is theirs to do, until nothing changes."""
        for _ in range(6):
            self.reconcile()
            self.run_job_controller()
            self.let_pods_end(code)
        self.reconcile()

    def running(self) -> World:
        """Bring the run to where all pods run."""
        self.reconcile()
        self.start_pods()
        self.reconcile()
        return self


def is_live(pod: Object) -> bool:
    return pod["status"]["phase"] not in ("Succeeded", "Failed")


def has_condition(job: Object, kind: str) -> bool:
    return any(found["type"] == kind for found in job["status"]["conditions"])


def ended(job: Object) -> bool:
    return any(has_condition(job, kind) for kind in ("FailureTarget", "Failed", "Complete"))


def set_condition(job: Object, kind: str, now: float, **more: str) -> None:
    if not has_condition(job, kind):
        condition = {"type": kind, "status": "True", "lastTransitionTime": format_time(now), **more}
        job["status"]["conditions"].append(condition)


def _reason_of(job: Object) -> dict[str, str]:
    found = next(found for found in job["status"]["conditions"] if found["type"] == "FailureTarget")
    return {"reason": found["reason"], "message": found["message"]}


def _name(body: Object) -> str:
    return str(body["metadata"]["name"])


def _ended_at(pod: Object) -> str:
    state = pod["status"]["containerStatuses"][0]["state"].get("terminated", {})
    return str(state.get("finishedAt", ""))
