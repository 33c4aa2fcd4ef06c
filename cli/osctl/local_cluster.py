"""A cluster of one run, in memory: what API server, Job controller and kubelets do for it, with processes as pods.

Nothing here decides about the run. The operator's planner does, and it finds what it would find in Kubernetes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from opensora_operator import planner
from opensora_operator.api import TRAINING_RUN
from opensora_operator.constants import JOB_INDEX, LABEL_KUEUE_QUEUE, TRAINER, ExitCode
from opensora_operator.observation import Observation
from opensora_operator.plans import Action, Child, Create, Delete, Event, FailPod, Object, Plan, SetSuspend
from opensora_operator.progress import ProgressBook, ProgressReport, StaleReportError
from opensora_operator.resources import Platform
from opensora_operator.status import TERMINAL
from opensora_operator.views import PodView, view_job, view_pod
from opensora_operator.wire import format_time

from osctl.forecast import Files

_MAX_PLANS = 64
"""So many plans in a row, none of which is the last, are a mistake of the planner."""
_PLATFORM = Platform(progress_url="https://localhost")
"""There is progress here, so that the planner judges it; it is read from the run directory, and nobody connects."""
_ENDED = ("SuccessCriteriaMet", "Complete", "FailureTarget", "Failed")


@dataclass(frozen=True, kw_only=True)
class PodEnd:
    """How the process of a pod ended."""

    code: int
    """As a container's: 128 and the signal where one killed it."""
    time: float
    """Seconds since 1970."""
    message: str
    """The termination message; empty where there is none."""


class PodProcess(Protocol):
    """What runs as a pod."""

    def poll(self) -> PodEnd | None:
        """Its end; None while it runs."""

    def terminate(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it at once."""


StartPod = Callable[[Object, Mapping[str, str]], PodProcess]
"""Starts a pod, given with the data of its ConfigMap."""


@dataclass
class _Pod:
    body: Object
    process: PodProcess
    end: PodEnd | None = None
    kill_at: float | None = None
    """When its grace period is over; None while it is not asked to end."""

    @property
    def is_live(self) -> bool:
        return self.end is None


class LocalCluster:
    """One TrainingRun and everything that the operator makes for it.

    Args:
        run: the TrainingRun, as the API server would store it.
        files: what it may refer to.
        node: name of this machine.
        start: starts a pod.
        tell: is told the operator's events.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        run: Object,
        files: Files,
        *,
        node: str,
        start: StartPod,
        tell: Callable[[Event], None] = lambda event: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run = run
        self._files = files
        self._node = node
        self._start = start
        self._tell = tell
        self._clock = clock
        self._versions = itertools.count(1)
        self._jobs: dict[str, Object] = {}
        self._pods: dict[str, _Pod] = {}
        self._others: dict[tuple[str, str], Object] = {}
        self._book = ProgressBook()

    @property
    def pods(self) -> list[Object]:
        """The pods, by name."""
        return [pod.body for _, pod in sorted(self._pods.items())]

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, and with it every process."""
        phase = (self.run.get("status") or {}).get("phase")
        return phase in TERMINAL and not any(pod.is_live for pod in self._pods.values())

    def stop(self) -> None:
        """A user asks for the run's end: its ranks save first."""
        requests = self.run["spec"].get("requests") or {}
        self.run["spec"]["requests"] = {**requests, "stop": True}
        self.run["metadata"]["generation"] += 1

    def kill(self) -> None:
        """End every process at once."""
        for pod in self._pods.values():
            if pod.is_live:
                self._ask_to_end(pod, grace_seconds=0)

    def report(self, report: ProgressReport) -> None:
        """Rank 0 has told how far it is."""
        with contextlib.suppress(StaleReportError):
            self._book.record(self.run["metadata"]["uid"], report)

    # ---------------------------------------------------------------------------------------------- the operator

    def reconcile(self) -> float | None:
        """Plan and apply until there is nothing left to do. Returns when to look again even if nothing happens."""
        for _ in range(_MAX_PLANS):
            plan = planner.plan(self._observe())
            for action in plan.actions:
                self._apply(action)
            for event in plan.events:
                self._tell(event)
            if not plan.actions and not self._write_status(plan):
                return plan.requeue_seconds
        raise AssertionError("the planner does not come to an end")

    def _observe(self) -> Observation:
        metadata = self.run["metadata"]
        needs = planner.needs(self.run)
        jobs = [view_job(job) for job in self._jobs.values()]
        attempt = max(1, (self.run.get("status") or {}).get("attempt", 0))
        return Observation(
            now=self._clock(),
            body=copy.deepcopy(self.run),
            jobs=tuple(job for job in jobs if job is not None),
            pods=tuple(self.pod_views()),
            objects={key: self._files.find(key) for key in needs.objects},
            default_profile=self._files.default_profile(metadata["namespace"]) if needs.default_profile else None,
            config_maps={name: self._files.config_map(metadata["namespace"], name) for name in needs.config_maps},
            children={
                place: Child(uid=body["metadata"]["uid"], owner_uid=metadata["uid"], data=body.get("data") or {})
                for place, body in self._others.items()
            },
            progress=self._book.newest(metadata["uid"], attempt=attempt),
            platform=_PLATFORM,
        )

    def pod_views(self) -> list[PodView]:
        """The pods as planner and story see them."""
        return [view for body in self.pods if (view := view_pod(body)) is not None]

    def _write_status(self, plan: Plan) -> bool:
        """Whether there was something to write."""
        if plan.status is None or plan.status == self.run.get("status"):
            return False
        self.run["status"] = json.loads(json.dumps(plan.status))
        self.run["metadata"]["resourceVersion"] = str(next(self._versions))
        return True

    def _apply(self, action: Action) -> None:
        match action:
            case Create(manifest=manifest):
                self._create(copy.deepcopy(manifest))
            case SetSuspend(name=name, suspend=suspend):
                self._jobs[name]["spec"]["suspend"] = suspend
                if suspend:
                    self._jobs[name]["status"].pop("startTime", None)
            case Delete(kind="Job", name=name):
                del self._jobs[name]
                for pod in self._pods_of(name):
                    self._ask_to_end(pod)
            case Delete(kind="Pod", name=name, grace_seconds=grace_seconds):
                self._ask_to_end(self._pods[name], grace_seconds=grace_seconds)
                if not self._pods[name].is_live:
                    del self._pods[name]
            case Delete() | FailPod():
                raise AssertionError(f"there is no reason for {action} here")

    def _create(self, body: Object) -> None:
        body["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": format_time(self._clock())}
        kind, name = body["kind"], body["metadata"]["name"]
        if kind != "Job":
            self._others.setdefault((kind, name), body)
            return
        if LABEL_KUEUE_QUEUE in body["metadata"]["labels"]:  # there is nobody else to wait for
            body["spec"]["suspend"] = False
        body["status"] = {"conditions": []}
        self._jobs[name] = body

    # ------------------------------------------------------------------------------- kubelets and Job controller

    def advance(self) -> bool:
        """Do what kubelets and the Job controller do next. Returns whether a pod has ended."""
        ended = [self._look_after(pod) for pod in self._pods.values()]
        for name, pod in list(self._pods.items()):
            if not pod.is_live and _owner(pod) not in self._jobs:
                del self._pods[name]
        for name, job in self._jobs.items():
            self._control(job, self._pods_of(name))
        return any(ended)

    def _look_after(self, pod: _Pod) -> bool:
        """Whether a pod has just ended."""
        if pod.end is not None:
            return False
        pod.end = pod.process.poll()
        if pod.end is None:
            if pod.kill_at is not None and self._clock() >= pod.kill_at:
                pod.process.kill()
            return False
        is_well = pod.end.code == ExitCode.DONE
        terminated = {
            "exitCode": pod.end.code,
            "reason": "Completed" if is_well else "Error",
            "finishedAt": format_time(pod.end.time),
            "message": pod.end.message,
        }
        status = pod.body["status"]
        status["phase"] = "Succeeded" if is_well else "Failed"
        status["containerStatuses"][0]["state"] = {"terminated": terminated}
        return True

    def _control(self, job: Object, pods: list[_Pod]) -> None:
        """Judge a Job, and have it run or end as it should."""
        ends = [(pod.end.time, _index(pod), pod.end.code) for pod in pods if pod.end is not None]
        succeeded = {index for _, index, code in ends if code == ExitCode.DONE}
        failed = [(index, code) for _, index, code in sorted(ends) if code != ExitCode.DONE]
        if not _has_ended(job):
            if len(succeeded) == job["spec"]["completions"] or ("successPolicy" in job["spec"] and 0 in succeeded):
                self._set_condition(job, "SuccessCriteriaMet")
            elif failed:
                self._set_condition(job, "FailureTarget", **_judgement(job, *failed[0]))
        if _has_ended(job) or job["spec"]["suspend"]:
            for pod in pods:
                self._ask_to_end(pod)
        else:
            self._start_pods(job, pods)
        job["status"]["active"] = sum(pod.is_live for pod in pods)
        if not job["status"]["active"]:
            for before, after in (("SuccessCriteriaMet", "Complete"), ("FailureTarget", "Failed")):
                found = _condition(job, before)
                if found is not None:
                    self._set_condition(job, after, reason=found["reason"], message=found["message"])

    def _start_pods(self, job: Object, pods: list[_Pod]) -> None:
        job["status"].setdefault("startTime", format_time(self._clock()))
        known = {_index(pod) for pod in pods}
        for index in range(job["spec"]["completions"]):
            if index in known:
                continue
            body = self._pod_of(job, index)
            config = self._others["ConfigMap", _config_map_of(body)]["data"]
            pod = _Pod(body, self._start(body, config))
            self._pods[body["metadata"]["name"]] = pod
            pods.append(pod)

    def _pod_of(self, job: Object, index: int) -> Object:
        template, metadata = copy.deepcopy(job["spec"]["template"]), job["metadata"]
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{metadata['name']}-{index}",
                "namespace": metadata["namespace"],
                "uid": str(uuid.uuid4()),
                "creationTimestamp": format_time(self._clock()),
                "labels": {**template["metadata"]["labels"], JOB_INDEX: str(index)},
                "annotations": {**template["metadata"].get("annotations", {}), JOB_INDEX: str(index)},
                "ownerReferences": [
                    {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"]}
                ],
            },
            "spec": {**template["spec"], "nodeName": self._node},
            "status": {
                "phase": "Running",
                "containerStatuses": [
                    {"name": TRAINER, "state": {"running": {"startedAt": format_time(self._clock())}}}
                ],
            },
        }

    def _ask_to_end(self, pod: _Pod, *, grace_seconds: int | None = None) -> None:
        if not pod.is_live:
            return
        now, metadata = self._clock(), pod.body["metadata"]
        if grace_seconds is None:
            grace_seconds = pod.body["spec"]["terminationGracePeriodSeconds"]
        if pod.kill_at is None:
            pod.process.terminate()
        if pod.kill_at is None or now + grace_seconds < pod.kill_at:
            pod.kill_at = now + grace_seconds
            metadata["deletionTimestamp"] = format_time(pod.kill_at)
            metadata["deletionGracePeriodSeconds"] = grace_seconds

    def _pods_of(self, job: str) -> list[_Pod]:
        return [pod for pod in self._pods.values() if _owner(pod) == job]

    def _set_condition(self, job: Object, kind: str, *, reason: str = "", message: str = "") -> None:
        if _condition(job, kind) is None:
            condition = {"type": kind, "status": "True", "reason": reason, "message": message}
            job["status"]["conditions"].append({**condition, "lastTransitionTime": format_time(self._clock())})


def new_run(body: Object, *, namespace: str, attempt: int, saved_step: int | None, now: float) -> Object:
    """A run as the API server would store it; the attempts that its run directory has count."""
    metadata = {key: value for key, value in body["metadata"].items() if key in ("name", "labels", "annotations")}
    own = {"namespace": namespace, "uid": str(uuid.uuid4()), "generation": 1, "resourceVersion": "0"}
    status: Object = {"attempt": attempt + 1} if attempt else {}
    if saved_step:
        status["checkpoint"] = {"latestStep": saved_step}
    return {
        "apiVersion": body["apiVersion"],
        "kind": TRAINING_RUN.name,
        "metadata": {**metadata, **own, "creationTimestamp": format_time(now)},
        "spec": copy.deepcopy(body["spec"]),
        "status": status,
    }


def _judgement(job: Object, index: int, code: int) -> Mapping[str, str]:
    """What the Job's own rules make of a pod that ended with a code."""
    pod = f"{job['metadata']['namespace']}/{job['metadata']['name']}-{index}"
    for number, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
        if code in rule.get("onExitCodes", {}).get("values", ()):
            message = (
                f"Container {TRAINER} for pod {pod} failed with exit code {code} "
                f"matching {rule['action']} rule at index {number}"
            )
            return {"reason": "PodFailurePolicy", "message": message}
    return {"reason": "BackoffLimitExceeded", "message": "Job has reached the specified backoff limit"}


def _condition(job: Object, kind: str) -> Object | None:
    return next((found for found in job["status"]["conditions"] if found["type"] == kind), None)


def _has_ended(job: Object) -> bool:
    return any(_condition(job, kind) is not None for kind in _ENDED)


def _owner(pod: _Pod) -> str:
    return str(pod.body["metadata"]["ownerReferences"][0]["name"])


def _index(pod: _Pod) -> int:
    return int(pod.body["metadata"]["labels"][JOB_INDEX])


def _config_map_of(pod: Object) -> str:
    return next(str(volume["configMap"]["name"]) for volume in pod["spec"]["volumes"] if "configMap" in volume)
