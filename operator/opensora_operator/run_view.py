"""A TrainingRun with what can be read off it and off what is there of it."""

from __future__ import annotations

from functools import cached_property

from opensora_operator import status as states
from opensora_operator.api import (
    AttemptStatus,
    TrainingRunSpec,
    TrainingRunStatus,
)
from opensora_operator.observation import Observation
from opensora_operator.plans import Key, Object
from opensora_operator.progress import ProgressReport
from opensora_operator.reasons import ConditionType, Reason
from opensora_operator.views import JobView, PodView
from opensora_operator.wire import from_wire


def job_name(run_name: str, attempt: int) -> str:
    """The Job of an attempt. No name is ever used twice."""
    return f"{run_name}-a{attempt}"


def profile_key(spec: TrainingRunSpec, namespace: str) -> Key | None:
    """The profile that a spec names."""
    ref = spec.profile_ref
    return None if ref is None else Key(ref.kind, namespace if ref.kind == "TrainingProfile" else "", ref.name)


class Run:
    """A run with what can be read off it."""

    def __init__(self, observed: Observation) -> None:
        self.observed = observed
        self.now = observed.now
        self.object = observed.body
        self.name: str = observed.body["metadata"]["name"]
        self.namespace: str = observed.body["metadata"]["namespace"]
        self.generation: int = observed.body["metadata"].get("generation", 0)
        self.spec = from_wire(TrainingRunSpec, observed.body.get("spec") or {})
        self.status = from_wire(TrainingRunStatus, observed.body.get("status") or {})
        self.attempt = max(1, self.status.attempt)

    @property
    def is_over(self) -> bool:
        return self.status.phase in states.TERMINAL

    @cached_property
    def job(self) -> JobView | None:
        """The Job of the current attempt."""
        return self.job_of(self.attempt)

    def job_of(self, attempt: int) -> JobView | None:
        name = job_name(self.name, attempt)
        return next((job for job in self.observed.jobs if job.name == name and not job.deleting), None)

    @cached_property
    def pods(self) -> tuple[PodView, ...]:
        """The pods of the current attempt."""
        return tuple(pod for pod in self.observed.pods if pod.attempt == self.attempt)

    @cached_property
    def earlier_live_pods(self) -> tuple[PodView, ...]:
        return tuple(pod for pod in self.observed.pods if pod.attempt != self.attempt and pod.is_live)

    @property
    def queue(self) -> str | None:
        """The queue that starts the Jobs, decided when the run was accepted."""
        if self.status.resolved.config_map is not None:
            return self.status.resolved.queue
        profile = (self.profile or {}).get("spec") or {}
        queue: str | None = (profile.get("scheduling") or {}).get("queue")
        return self.spec.scheduling.queue or queue

    @property
    def profile(self) -> Object | None:
        """The profile that the spec names, or else the default one."""
        key = profile_key(self.spec, self.namespace)
        return self.observed.default_profile if key is None else self.observed.objects.get(key)

    @property
    def nodes(self) -> int:
        """Pods of the current attempt."""
        nodes = self.status.nodes
        return nodes.desired if nodes.desired and nodes.requested == self.spec.nodes else self.spec.nodes

    @property
    def is_resized(self) -> bool:
        """Another number of nodes was asked for since the attempt began."""
        is_described = self.status.job == job_name(self.name, self.attempt)
        return is_described and self.status.nodes.requested != self.spec.nodes

    @property
    def restart_id(self) -> str | None:
        """A restart that was asked for and not done."""
        asked = self.spec.requests.restart
        return asked.id if asked is not None and asked.id != self.status.requests.restart else None

    @property
    def wants_pods(self) -> bool:
        return not self.spec.suspend and not self.spec.requests.stop

    @property
    def must_stop(self) -> Reason | None:
        """Why pods that run now shall end."""
        if self.spec.requests.stop:
            return Reason.CANCELLED
        if self.spec.suspend:
            return Reason.SUSPENDED
        if self.is_resized:
            return Reason.RESIZED
        return Reason.RESTART_REQUESTED if self.restart_id is not None else None

    @cached_property
    def running_since(self) -> float | None:
        """When the last pod of the attempt began to run; None while one does not."""
        condition = states.find(self.status.conditions, ConditionType.RUNNING)
        if not self.all_running:
            return None
        return condition.last_transition_time if condition and condition.status == "True" else self.now

    @cached_property
    def all_running(self) -> bool:
        indexes = {pod.index for pod in self.pods if pod.ready or pod.exit_code is not None}
        return self.job is not None and len(indexes) >= self.job.completions

    @cached_property
    def report(self) -> ProgressReport | None:
        report = self.observed.progress
        return report if report is not None and report.attempt == self.attempt else None

    def record(self) -> AttemptStatus:
        """The record of the current attempt."""
        for record in self.status.attempts:
            if record.number == self.attempt:
                return record
        return AttemptStatus(number=self.attempt, nodes=self.nodes, first_step=self.status.checkpoint.latest_step or 0)
