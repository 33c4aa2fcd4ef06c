"""What a planner answers: actions on children, a new status, events, and when to look again. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
"""A Kubernetes object as the API has it."""


@dataclass(frozen=True, kw_only=True)
class Create:
    """POST an object. "Already exists" is no error: the next observation shows whether it is ours."""

    manifest: Object


@dataclass(frozen=True, kw_only=True)
class SetSuspend:
    """Suspend or resume a Job."""

    name: str
    uid: str
    suspend: bool
    parallelism: int | None = None
    """A new number of pods, which Kubernetes allows on a suspended Job alone."""


@dataclass(frozen=True, kw_only=True)
class Delete:
    """Delete an object with everything it owns. "Not found", or another UID under that name, is no error."""

    kind: str
    """`Job`, `Pod`, `Service`, …"""
    name: str
    uid: str
    grace_seconds: int | None = None
    """0 removes a pod whose kubelet is gone from the API; the object's own unless given."""


@dataclass(frozen=True, kw_only=True)
class FailPod:
    """Write phase Failed and the condition DisruptionTarget into the status of a pod whose node is dead.

    Without it the Job's controller waits for the pod for ever, even after a deletion by force.
    """

    name: str
    uid: str
    message: str


Action = Create | SetSuspend | Delete | FailPod


@dataclass(frozen=True, kw_only=True)
class Event:
    """A Kubernetes event about the object; sent once the status that it tells of is written."""

    reason: str
    """From the closed set in `reasons.py`."""
    message: str
    warning: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do about one object.

    A decision is written before anything is done about it: a plan has either `is_decision` or `actions`, never both.
    After a decision is written, the object is observed and planned again at once.
    """

    status: Object | None = None
    """The whole new status as the API has it; None leaves it."""
    is_decision: bool = False
    is_progress_only: bool = False
    """The status differs from the old one in numbers that may wait for the next flush."""
    actions: tuple[Action, ...] = ()
    """In this order."""
    events: tuple[Event, ...] = ()
    delete_self: bool = False
    """The object's time to live is over: delete it, and with it its children."""
    requeue_seconds: float | None = None
    """Look again after this time even if nothing happens."""

    def __post_init__(self) -> None:
        assert not (self.is_decision and (self.actions or self.status is None)), "a decision is a status alone"
