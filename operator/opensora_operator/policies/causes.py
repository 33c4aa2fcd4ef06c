"""Why an attempt ended: from the launchers' verdicts, the pods and the Job's condition."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opensora_operator.constants import ExitCode
from opensora_operator.reasons import Reason
from opensora_operator.views import JobView, PodView

RULES: tuple[tuple[ExitCode, ...] | None, ...] = (
    (ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG, ExitCode.SUPERSEDED),
    None,
    (ExitCode.STOPPED,),
    (ExitCode.STALLED,),
    (ExitCode.OUT_OF_MEMORY,),
    (ExitCode.DIVERGED,),
    (ExitCode.NODE_UNHEALTHY,),
    (ExitCode.PEER_LOST,),
)
"""The rules of the Job's podFailurePolicy, in order: exit codes, or None for the condition DisruptionTarget. The first
rule that matches is named in the Job's condition, so its index survives the pods."""
DISRUPTION_RULE = RULES.index(None)

_CAUSES: dict[int, Reason] = {
    ExitCode.USAGE: Reason.NON_RETRYABLE_EXIT,
    ExitCode.DATA: Reason.NON_RETRYABLE_EXIT,
    ExitCode.CONFIG: Reason.NON_RETRYABLE_EXIT,
    ExitCode.SUPERSEDED: Reason.NON_RETRYABLE_EXIT,
    ExitCode.STOPPED: Reason.STOPPED,
    ExitCode.STALLED: Reason.HANG,
    ExitCode.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
    ExitCode.DIVERGED: Reason.DIVERGED,
    ExitCode.NODE_UNHEALTHY: Reason.NODE_FAILURE,
    ExitCode.PEER_LOST: Reason.PEER_LOST,
}
_NODE_DISRUPTIONS = ("DeletionByTaintManager", "DeletionByPodGC", "NodeDead")
_PREEMPTIONS = ("PreemptionByScheduler",)
_MAX_WORDS = 1000


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why an attempt ended, and which rank explains it."""

    reason: Reason
    message: str
    exit_code: int | None = None
    rank: int | None = None
    """Global rank; None where only the pod is known."""
    pod: str | None = None
    node: str | None = None
    time: float | None = None
    step: int | None = None
    bucket: str | None = None
    is_certain: bool = True
    """Nothing that may still come would tell more: not so while only lost peers are known."""


def cause_of(job: JobView, pods: Sequence[PodView]) -> Cause:
    """The cause of a Job's failure.

    A rank that failed tells more than a disruption, that more than a stop on request, and a lost peer is never a cause.
    Within a kind the earliest counts.
    """
    seen = [found for pod in pods for found in _seen_of(pod)]
    if seen:
        kind, _, cause = min(seen, key=lambda found: found[:2])
        if kind < _LOST:
            return cause
        by_rule = _from_rule(job)
        return by_rule if by_rule is not None and by_rule.reason is not Reason.PEER_LOST else cause
    return _from_rule(job) or Cause(
        reason=Reason.WORKER_FAILED, message=_job_message(job) or "the Job failed; no pod is left that tells why"
    )


_FAILED, _DISRUPTED, _STOPPED, _LOST = range(4)
"""How much an end explains, most first."""


def _seen_of(pod: PodView) -> list[tuple[int, float, Cause]]:
    """(kind, time, cause) of what a pod tells; a pod that is deleted for another one's failure tells nothing."""
    found = []
    time = pod.finished_at or 0.0
    if pod.disruption is not None:
        reason = Reason.DISRUPTED
        if pod.disruption.reason in _NODE_DISRUPTIONS:
            reason = Reason.NODE_FAILURE
        elif pod.disruption.reason in _PREEMPTIONS:
            reason = Reason.PREEMPTED
        message = f"pod {pod.name} on {pod.node or 'no node'}: {pod.disruption.reason}: {pod.disruption.message}"
        cause = Cause(
            reason=reason,
            message=message,
            exit_code=pod.exit_code,
            pod=pod.name,
            node=pod.node,
            time=pod.disruption.time,
        )
        found.append((_DISRUPTED, pod.disruption.time, cause))
    if pod.exit_code in (None, ExitCode.DONE):
        return found
    assert pod.exit_code is not None
    if pod.verdict is not None:
        return [*found, _from_verdict(pod, pod.verdict)]
    if found:
        return found  # killed by what disrupted it
    if pod.end_reason == "OOMKilled":
        message = f"pod {pod.name} exceeded its memory limit and was killed as a whole"
        cause = Cause(
            reason=Reason.OUT_OF_MEMORY,
            message=message,
            exit_code=pod.exit_code,
            pod=pod.name,
            node=pod.node,
            time=pod.finished_at,
        )
        return [(_FAILED, time, cause)]
    if pod.deleting_since is not None and pod.exit_code in (137, 143):
        # Deleted, and ended without a word: the deletion is the cause unless another pod tells more.
        cause = Cause(
            reason=Reason.DISRUPTED,
            message=f"pod {pod.name} was deleted",
            exit_code=pod.exit_code,
            pod=pod.name,
            node=pod.node,
            time=pod.deleting_since,
        )
        return [(_STOPPED, pod.deleting_since, cause)]
    words = f": {pod.last_words}" if pod.last_words else ""
    message = f"pod {pod.name} on {pod.node} ended with {pod.exit_code} ({pod.end_reason or 'no reason'}){words}"
    cause = Cause(
        reason=_CAUSES.get(pod.exit_code, Reason.WORKER_FAILED),
        message=message[:_MAX_WORDS],
        exit_code=pod.exit_code,
        pod=pod.name,
        node=pod.node,
        time=pod.finished_at,
        is_certain=pod.exit_code != ExitCode.PEER_LOST,
    )
    return [(_kind(pod.exit_code), time, cause)]


def _from_verdict(pod: PodView, verdict: Mapping[str, Any]) -> tuple[int, float, Cause]:
    first = verdict.get("first")
    first = first if isinstance(first, dict) else {}
    code = first.get("code", verdict.get("code"))
    code = code if isinstance(code, int) else pod.exit_code
    assert code is not None
    time = first.get("time")
    time = float(time) if isinstance(time, int | float) else pod.finished_at or 0.0
    words = first.get("last_words")
    message = str(verdict.get("message") or "")
    if code != ExitCode.STOPPED and isinstance(words, list) and words:
        message += "\n" + "\n".join(str(word) for word in words[-12:])
    rank, step, bucket = first.get("rank"), first.get("step"), first.get("bucket")
    cause = Cause(
        reason=_CAUSES.get(code, Reason.WORKER_FAILED),
        message=message[:_MAX_WORDS],
        exit_code=code,
        rank=rank if isinstance(rank, int) else None,
        pod=pod.name,
        node=pod.node,
        time=time,
        step=step if isinstance(step, int) else None,
        bucket=bucket if isinstance(bucket, str) else None,
        is_certain=code != ExitCode.PEER_LOST,
    )
    return _kind(code), time, cause


_KINDS: dict[int, int] = {ExitCode.STOPPED: _STOPPED, ExitCode.PEER_LOST: _LOST}


def _kind(code: int) -> int:
    return _KINDS.get(code, _FAILED)


def _job_message(job: JobView) -> str:
    condition = job.condition("FailureTarget") or job.condition("Failed")
    return f"{condition.reason}: {condition.message}" if condition is not None else ""


def _from_rule(job: JobView) -> Cause | None:
    """What the Job's condition tells, which outlives the pods."""
    message = _job_message(job)
    match = re.search(r"rule at index (\d+)", message)
    if match is None or int(match[1]) >= len(RULES):
        return None
    codes = RULES[int(match[1])]
    if codes is None:
        return Cause(reason=Reason.DISRUPTED, message=message)
    return Cause(
        reason=_CAUSES[codes[0]],
        message=message,
        exit_code=int(codes[0]) if len(codes) == 1 else None,
        is_certain=ExitCode.PEER_LOST not in codes,
    )
