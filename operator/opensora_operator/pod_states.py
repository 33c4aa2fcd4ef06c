"""What pods that are independent of each other do, in the words of conditions; and those that cannot end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from opensora_operator.api import Condition, JobPhase
from opensora_operator.plans import Action, Delete, Event, FailPod
from opensora_operator.reasons import ConditionType, Reason
from opensora_operator.status import State, find, is_true
from opensora_operator.views import PodView

BROKEN_IMAGE = "InvalidImageName"
STUCK_POD_SECONDS = 120
"""How long a deleted pod may remain on a node that does not answer."""
_PULLING = (
    "ErrImagePull",
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "InspectFailed",
    "RegistryUnavailable",
    BROKEN_IMAGE,
)
_CONFIG_ERRORS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


def job_phase(conditions: Sequence[Condition], *, has_started: bool) -> JobPhase:
    """The conditions of a SampleJob or BatchSearch in one word. Nothing else decides a phase."""
    if is_true(conditions, ConditionType.COMPLETE):
        return "Succeeded"
    if is_true(conditions, ConditionType.FAILED):
        return "Failed"
    if is_true(conditions, ConditionType.SUSPENDED, Reason.QUEUED):
        return "Queued"
    if is_true(conditions, ConditionType.SUSPENDED):
        return "Suspended"
    scheduled = find(conditions, ConditionType.SCHEDULED)
    if scheduled is not None and scheduled.reason == Reason.WAITING_FOR_CHECKPOINT:
        return "Waiting"
    return "Running" if has_started else "Pending"


def scheduled_state(pods: Sequence[PodView]) -> State:
    """Whether every live pod has a node."""
    live = [pod for pod in pods if pod.is_live]
    placed = sum(pod.scheduled for pod in live)
    refused = next((pod for pod in live if pod.unschedulable), None)
    if refused is not None:
        message = f"{placed} of {len(live)} pods have a node; {refused.name}: {refused.unschedulable}"
        return State(status=False, reason=Reason.UNSCHEDULABLE, message=message)
    if not live:
        return State(status=False, reason=Reason.NO_PODS)
    if placed == len(live):
        return State(status=True, reason=Reason.ALL_PODS_SCHEDULED)
    return State(status=False, reason=Reason.WAITING_FOR_PODS)


def running_state(pods: Sequence[PodView]) -> State:
    """Whether the container of every live pod runs."""
    live = [pod for pod in pods if pod.is_live]
    obstacle = obstacle_to_start(live)
    if obstacle is not None:
        return obstacle
    if not live:
        return State(status=False, reason=Reason.NO_PODS)
    if all(pod.ready for pod in live):
        return State(status=True, reason=Reason.ALL_PODS_RUNNING)
    return State(status=False, reason=Reason.POD_NOT_READY)


def obstacle_to_start(pods: Sequence[PodView]) -> State | None:
    """What keeps a container from being started: its image, or what its pod refers to."""
    for reasons, reason in ((_PULLING, Reason.PULLING_IMAGES), (_CONFIG_ERRORS, Reason.CONTAINER_CONFIG_ERROR)):
        pod = next((pod for pod in pods if pod.waiting_reason in reasons), None)
        if pod is not None:
            message = f"pod {pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
            return State(status=False, reason=reason, message=message)
    return None


def remove_stuck_pods(
    pods: Sequence[PodView],
    *,
    dead_nodes: Collection[str],
    now: float,
    patience: int = STUCK_POD_SECONDS,
    is_needed: Callable[[PodView], bool] = lambda pod: False,
) -> tuple[list[Action], list[Event]]:
    """Pods that are deleted, on nodes that do not answer, end only if somebody says so for them.

    Their processes may live on: the attempt's number keeps them from committing anything. A pod that is needed is
    ended, and kept.
    """
    actions: list[Action] = []
    events: list[Event] = []
    for pod in pods:
        if pod.deleting_since is None or now - pod.deleting_since < patience:
            continue
        if not pod.is_live:
            if not is_needed(pod):
                actions.append(Delete(kind="Pod", name=pod.name, uid=pod.uid, grace_seconds=0))
        elif pod.node in dead_nodes:
            message = f"node {pod.node} does not answer, and the pod was deleted {patience} s ago"
            actions.append(FailPod(name=pod.name, uid=pod.uid, message=message))
            event = f"pod {pod.name} is removed by force: {message}"
            events.append(Event(reason=Reason.POD_FORCED, message=event, warning=True))
    return actions, events


def stuck_pods_due(pods: Sequence[PodView], *, now: float) -> list[float]:
    """Seconds until pods in deletion count as stuck."""
    return [
        pod.deleting_since + STUCK_POD_SECONDS - now for pod in pods if pod.deleting_since is not None and pod.is_live
    ]
