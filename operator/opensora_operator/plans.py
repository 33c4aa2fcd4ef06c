"""What a planner answers: actions on children, a new status, events, and when to look again. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Object = dict[str, Any]
"""A Kubernetes object as the API has it."""


class Key(NamedTuple):
    """Names an object of one of our kinds."""

    kind: str
    namespace: str
    """Empty for what lives outside namespaces."""
    name: str


@dataclass(frozen=True, kw_only=True)
class Child:
    """What is known of an object that is neither a Job of ours nor a pod: enough to tell whose it is."""

    uid: str
    owner_uid: str
    """Of its controller; empty where it has none."""
    data: Mapping[str, str]
    """Of a ConfigMap; empty otherwise."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the controller has to look up before it can plan an object, beside its Jobs and pods."""

    objects: tuple[Key, ...] = ()
    """Of our kinds (a profile, the run to sample from, …). A change of one of them plans this object again."""
    default_profile: bool = False
    """The object names no profile: it takes the default one, of its namespace or else of the cluster."""
    config_maps: tuple[str, ...] = ()
    """Users' ConfigMaps in the object's namespace: read again when they are older than a few seconds."""
    children: tuple[tuple[str, str], ...] = ()
    """(kind, name): read once and remembered until the next resync."""
    stuck_pod_seconds: float | None = None
    """Look at the nodes of pods that have been in deletion for longer than this; None never looks."""


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
class Wait:
    """Something that comes with time alone, of which no event tells."""

    seconds: float
    """Until then; below 0 where it has come."""
    what: str
    """What it is, for people."""


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
    waits: tuple[Wait, ...] = ()
    """What it is waited for by the clock, where the planner tells; the first of them sets `requeue_seconds`."""

    def __post_init__(self) -> None:
        assert not (self.is_decision and (self.actions or self.status is None)), "a decision is a status alone"
