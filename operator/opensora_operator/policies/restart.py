"""After the end of an attempt: the next one, or the end of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from opensora_operator.api import AttemptStatus, RestartPolicy, TrainingRunStatus
from opensora_operator.policies.causes import Cause
from opensora_operator.reasons import Reason

Budget = Literal["failures", "disruptions", "executions"]
"""What an attempt's end counts against. Executions are not limited."""

_BUDGETS: dict[str, Budget] = {
    Reason.DISRUPTED: "disruptions",
    Reason.PREEMPTED: "disruptions",
    Reason.STOPPED: "disruptions",
    Reason.JOB_DELETED: "disruptions",
    Reason.SUSPENDED: "executions",
    Reason.QUEUED: "executions",
    Reason.RESIZED: "executions",
    Reason.RESTART_REQUESTED: "executions",
    Reason.NOT_STARTED: "executions",
}
_SUSPECT_NODE = (Reason.WORKER_FAILED, Reason.HANG)
"""Failures that a bad machine may be behind: twice first on the same node, and it is avoided."""
MAX_AVOIDED = 64


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What follows from the end of an attempt."""

    budget: Budget
    failed: Reason | None
    """The run is over for this reason; None starts the next attempt."""
    message: str
    backoff_seconds: float
    recent_restarts: int
    """Failures that count, with this one."""
    no_progress_attempts: int
    node_failures: Mapping[str, int]
    avoid_node: str | None
    """A node that becomes one to avoid."""


def budget_of(reason: str, *, accused_by_rank: bool) -> Budget:
    """What an end counts against.

    Args:
        reason: the cause.
        accused_by_rank: with NodeFailure: a rank found its machine unhealthy, which is a failure; a node that goes away
            under the run is a disruption.
    """
    if reason == Reason.NODE_FAILURE:
        return "failures" if accused_by_rank else "disruptions"
    return _BUDGETS.get(reason, "failures")


def after(cause: Cause, record: AttemptStatus, status: TrainingRunStatus, policy: RestartPolicy) -> Ending:
    """Decide what follows.

    Args:
        cause: why the attempt ended.
        record: the attempt's record, closed.
        status: of the run before that.
        policy: the run's own.
    """
    budget = budget_of(cause.reason, accused_by_rank=cause.rank is not None)
    is_healthy = (record.last_step or 0) - (record.first_step or 0) >= policy.healthy_steps
    recent = 0 if is_healthy else status.recent_restarts
    stuck = 0 if _made_progress(record, status) else status.no_progress_attempts
    if budget == "failures":
        recent += 1
        stuck += not _made_progress(record, status)
    node_failures = dict(status.node_failures)
    if cause.node and cause.reason in _SUSPECT_NODE and (cause.node in node_failures or len(node_failures) < 64):
        node_failures[cause.node] = node_failures.get(cause.node, 0) + 1
    failed, why = _end_of_run(cause, budget, recent, stuck, status, policy)
    backoff = 0.0
    if budget == "failures":
        backoff = min(policy.backoff.max_seconds, policy.backoff.base_seconds * 2.0 ** min(recent - 1, 30))
    return Ending(
        budget=budget,
        failed=failed,
        message=why,
        backoff_seconds=backoff,
        recent_restarts=recent,
        no_progress_attempts=stuck,
        node_failures=node_failures,
        avoid_node=_node_to_avoid(cause, budget, node_failures, status),
    )


def _made_progress(record: AttemptStatus, status: TrainingRunStatus) -> bool:
    """Whether the attempt left a newer checkpoint than it found; by its steps where nothing is ever reported."""
    if status.progress.step is not None:
        return (record.checkpoint_step or 0) > (record.first_step or 0)
    return (record.last_step or 0) > max((earlier.last_step or 0 for earlier in status.attempts), default=0)


def _end_of_run(
    cause: Cause, budget: Budget, recent: int, stuck: int, status: TrainingRunStatus, policy: RestartPolicy
) -> tuple[Reason | None, str]:
    if cause.reason is Reason.NON_RETRYABLE_EXIT:
        return cause.reason, f"starting again would end the same way: {cause.message}"
    if cause.reason is Reason.DIVERGED and _diverged_there_before(cause, status):
        return Reason.NON_RETRYABLE_EXIT, f"diverged twice at step {cause.step}: {cause.message}"
    if budget == "disruptions" and status.disruptions + 1 > policy.max_disruptions:
        return Reason.DISRUPTION_BUDGET_EXCEEDED, f"more than {policy.max_disruptions} disruptions: {cause.message}"
    if budget == "failures" and recent > policy.max_restarts:
        return Reason.RESTART_BUDGET_EXCEEDED, f"more than {policy.max_restarts} failures: {cause.message}"
    if budget == "failures" and stuck >= policy.no_progress_attempts:
        return Reason.NO_PROGRESS, f"{stuck} attempts failed without a newer checkpoint: {cause.message}"
    return None, ""


def _diverged_there_before(cause: Cause, status: TrainingRunStatus) -> bool:
    """Training is exact, so a second divergence at the same step is no accident of a machine."""
    for record in reversed(status.attempts):
        if record.cause is not None and budget_of(record.cause, accused_by_rank=record.rank is not None) == "failures":
            return record.cause == Reason.DIVERGED and cause.step is not None and record.last_step == cause.step
    return False


def _node_to_avoid(
    cause: Cause, budget: Budget, node_failures: Mapping[str, int], status: TrainingRunStatus
) -> str | None:
    node = cause.node
    if not node or node in status.avoid_nodes or len(status.avoid_nodes) >= MAX_AVOIDED:
        return None
    is_bad = budget == "failures" and (cause.reason is Reason.NODE_FAILURE or node_failures.get(node, 0) >= 2)
    return node if is_bad else None
