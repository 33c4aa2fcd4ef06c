"""What planners see of Kubernetes objects: a few fields each, so that thousands of them are cheap to keep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from opensora_operator.constants import (
    ANNOTATION_CONFIG,
    JOB_INDEX,
    LABEL_ATTEMPT,
    LABEL_KIND,
    LABEL_NAME,
    LABEL_UID,
    TRAINER,
)

_MAX_MESSAGE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A condition of a Job or pod."""

    type: str
    is_true: bool
    reason: str
    message: str
    time: float
    """Seconds since 1970 of the last change; 0 where unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerKey:
    """Whose child it is, by its labels."""

    kind: str
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A Job."""

    name: str
    uid: str
    owner: OwnerKey
    attempt: int
    """0 where the label is missing or no number."""
    config: str
    """The ConfigMap that its pods read."""
    created: float
    started: float | None
    """`status.startTime`: of the last time it was not suspended."""
    finished: float | None
    """When it became Complete or Failed."""
    suspended: bool
    deleting: bool
    parallelism: int
    completions: int
    active: int
    ready: int
    succeeded: int
    failed: int
    completed_indexes: str
    failed_indexes: str
    conditions: tuple[Condition, ...]

    def condition(self, kind: str) -> Condition | None:
        """The condition of this type, if it is true."""
        return next((found for found in self.conditions if found.type == kind and found.is_true), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """A pod; `exit_code` and what follows are of the trainer's container, of its last end."""

    name: str
    uid: str
    owner: OwnerKey
    job: str
    """Name of the Job that owns it; empty where none does."""
    attempt: int
    index: int
    """Completion index; -1 where unknown."""
    node: str
    phase: str
    created: float
    scheduled: bool
    ready: bool
    """The trainer runs."""
    deleting_since: float | None
    """When its deletion was asked for (the time stamp less the grace period)."""
    grace_seconds: int
    disruption: Condition | None
    """The condition DisruptionTarget."""
    unschedulable: str
    """The scheduler's reason; empty where it has a node or none was looked for."""
    waiting_reason: str
    """Why the container does not run (`ImagePullBackOff`, …); empty where it does."""
    waiting_message: str
    image_id: str
    exit_code: int | None
    finished_at: float | None
    end_reason: str
    """Kubernetes' own word for the end (`OOMKilled`, `Error`, …)."""
    verdict: Mapping[str, Any] | None
    """The launcher's termination message; None where there is none or it is no JSON object."""
    last_words: str
    """The termination message as text, where it is no verdict."""

    @property
    def is_live(self) -> bool:
        """Whether a process of it may run."""
        return self.phase not in ("Succeeded", "Failed")


def parse_time(text: str | None) -> float | None:
    """Seconds since 1970 of an RFC 3339 time."""
    return None if not text else datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def owner_of(body: Mapping[str, Any]) -> OwnerKey | None:
    """Whose child an object is; None when it is none of ours."""
    metadata = body["metadata"]
    labels = metadata.get("labels") or {}
    if not all(labels.get(label) for label in (LABEL_KIND, LABEL_NAME, LABEL_UID)):
        return None
    return OwnerKey(
        kind=labels[LABEL_KIND],
        namespace=metadata.get("namespace", ""),
        name=labels[LABEL_NAME],
        uid=labels[LABEL_UID],
    )


def view_job(body: Mapping[str, Any]) -> JobView | None:
    """The view of a Job; None when it is none of ours."""
    owner = owner_of(body)
    if owner is None:
        return None
    metadata, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    conditions = _conditions(status)
    ended = [found.time for found in conditions if found.type in ("Complete", "Failed") and found.is_true]
    return JobView(
        name=metadata["name"],
        uid=metadata["uid"],
        owner=owner,
        attempt=_number(metadata["labels"].get(LABEL_ATTEMPT)),
        config=(metadata.get("annotations") or {}).get(ANNOTATION_CONFIG, ""),
        created=parse_time(metadata.get("creationTimestamp")) or 0.0,
        started=parse_time(status.get("startTime")),
        finished=max(ended, default=None),
        suspended=bool(spec.get("suspend")),
        deleting="deletionTimestamp" in metadata,
        parallelism=spec.get("parallelism", 1),
        completions=spec.get("completions", 1),
        active=status.get("active", 0),
        ready=status.get("ready", 0),
        succeeded=status.get("succeeded", 0),
        failed=status.get("failed", 0),
        completed_indexes=status.get("completedIndexes", ""),
        failed_indexes=status.get("failedIndexes", ""),
        conditions=conditions,
    )


def view_pod(body: Mapping[str, Any]) -> PodView | None:
    """The view of a pod; None when it is none of ours."""
    owner = owner_of(body)
    if owner is None:
        return None
    metadata, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    conditions = {found.type: found for found in _conditions(status)}
    containers = _items(status.get("containerStatuses"))
    container: Mapping[str, Any] = next((found for found in containers if found["name"] == TRAINER), {})
    state = container.get("state") or {}
    waiting = (container.get("state") or {}).get("waiting") or _waiting_init(status)
    ended = (
        (container.get("state") or {}).get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    )
    message = ended.get("message") or ""
    verdict = _json_object(message)
    grace = metadata.get("deletionGracePeriodSeconds", spec.get("terminationGracePeriodSeconds", 30))
    deletion = parse_time(metadata.get("deletionTimestamp"))
    scheduled = conditions.get("PodScheduled")
    disruption = conditions.get("DisruptionTarget")
    owners = metadata.get("ownerReferences") or ()
    index = {**(metadata.get("labels") or {}), **(metadata.get("annotations") or {})}.get(JOB_INDEX)
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        owner=owner,
        job=next((found["name"] for found in owners if found["kind"] == "Job"), ""),
        attempt=_number(metadata["labels"].get(LABEL_ATTEMPT)),
        index=_number(index, default=-1),
        node=spec.get("nodeName") or "",
        phase=status.get("phase", "Pending"),
        created=parse_time(metadata.get("creationTimestamp")) or 0.0,
        scheduled=bool(spec.get("nodeName")),
        ready="running" in state,
        deleting_since=None if deletion is None else deletion - grace,
        grace_seconds=grace,
        disruption=disruption if disruption is not None and disruption.is_true else None,
        unschedulable=scheduled.message[:_MAX_MESSAGE] if scheduled is not None and not scheduled.is_true else "",
        waiting_reason=(waiting or {}).get("reason", ""),
        waiting_message=((waiting or {}).get("message") or "")[:_MAX_MESSAGE],
        image_id=container.get("imageID", ""),
        exit_code=ended.get("exitCode"),
        finished_at=parse_time(ended.get("finishedAt")),
        end_reason=ended.get("reason", ""),
        verdict=verdict,
        last_words="" if verdict is not None else message[-_MAX_MESSAGE:],
    )


def _conditions(status: Mapping[str, Any]) -> tuple[Condition, ...]:
    return tuple(
        Condition(
            type=found["type"],
            is_true=found.get("status") == "True",
            reason=found.get("reason") or "",
            message=found.get("message") or "",
            time=parse_time(found.get("lastTransitionTime")) or 0.0,
        )
        for found in _items(status.get("conditions"))
    )


def _items(values: Iterable[Mapping[str, Any]] | None) -> Iterable[Mapping[str, Any]]:
    return values or ()


def _waiting_init(status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The state of an init container that is in the way."""
    for found in _items(status.get("initContainerStatuses")):
        waiting: Mapping[str, Any] | None = (found.get("state") or {}).get("waiting")
        if waiting is not None:
            return waiting
    return None


def _json_object(text: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _number(text: str | None, *, default: int = 0) -> int:
    return int(text) if text is not None and text.isdigit() else default
