"""How the pods of an attempt are, as conditions tell it."""

from __future__ import annotations

from opensora_operator.pod_states import obstacle_to_start
from opensora_operator.reasons import Reason
from opensora_operator.run_view import Run
from opensora_operator.status import State


def suspended(run: Run, *, job_exists: bool) -> State:
    """Whether somebody, or a queue, holds the run back."""
    if run.spec.suspend:
        ending = sum(pod.is_live for pod in run.observed.pods)
        message = f"{ending} pods are still saving" if ending else ""
        return State(status=True, reason=Reason.SUSPENDED, message=message)
    waits_for_queue = job_exists and (run.job is None or run.job.suspended)
    if run.queue is not None and waits_for_queue:
        return State(status=True, reason=Reason.QUEUED, message=f"the queue {run.queue} holds it back")
    return State(status=False, reason=Reason.RESUMED)


def scheduled(run: Run) -> State:
    """Whether all pods have a node."""
    if run.job is None:
        return State(status=False, reason=Reason.NO_PODS)
    if run.job.suspended:
        reason = Reason.WAITING_FOR_QUOTA if run.queue is not None else Reason.NO_PODS
        return State(status=False, reason=reason)
    placed = sum(pod.scheduled for pod in run.pods)
    if placed >= run.job.completions:
        return State(status=True, reason=Reason.ALL_PODS_SCHEDULED)
    refused = next((pod for pod in run.pods if pod.unschedulable), None)
    if refused is not None:
        message = f"{placed} of {run.job.completions} pods have a node; {refused.name}: {refused.unschedulable}"
        return State(status=False, reason=Reason.UNSCHEDULABLE, message=message)
    return State(
        status=False, reason=Reason.WAITING_FOR_PODS, message=f"{placed} of {run.job.completions} pods have a node"
    )


def running(run: Run) -> State:
    """Whether all pods run."""
    if run.job is None or run.job.suspended:
        return State(status=False, reason=Reason.NO_PODS)
    if run.all_running:
        return State(status=True, reason=Reason.ALL_PODS_RUNNING)
    return obstacle_to_start(run.pods) or State(status=False, reason=Reason.POD_NOT_READY)
