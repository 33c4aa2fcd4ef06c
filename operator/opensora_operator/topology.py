"""Where the pods of a gang go: together, by whichever scheduler is there."""

from __future__ import annotations

from dataclasses import dataclass

from opensora_operator.api import TrainingProfileSpec, TrainingRunSpec
from opensora_operator.constants import LABEL_ATTEMPT, LABEL_UID
from opensora_operator.plans import Object

_VOLCANO = "volcano"
_COSCHEDULING = "scheduler-plugins-scheduler"
_GANG_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What placement adds to the objects of an attempt."""

    pods: Object
    """`annotations`, `labels`, `affinity` and `scheduler` of the pods."""
    pod_group_seconds: int | None
    """Timeout of a PodGroup that has to be made; None makes none."""


def placement_of(
    spec: TrainingRunSpec, profile: TrainingProfileSpec, owner: Object, *, attempt: int, nodes: int, procs: int
) -> Placement:
    """The placement of an attempt.

    Args:
        nodes: pods of the attempt.
        procs: ranks per pod: how many pods a sequence-parallel group takes follows from it.
    """
    mine, theirs = spec.scheduling, profile.scheduling
    queue = mine.queue or theirs.queue
    mode = mine.gang.mode or theirs.gang.mode or "Auto"
    if mode == "Auto":
        mode = "Kueue" if queue is not None else "None"
    annotations: dict[str, str] = {}
    labels: dict[str, str] = {}
    pods: Object = {"annotations": annotations, "labels": labels}
    timeout = None
    if mode == "Volcano":
        pods["scheduler"] = _VOLCANO
        annotations["scheduling.volcano.sh/group-min-member"] = str(nodes)
        if queue is not None:
            annotations["scheduling.volcano.sh/queue-name"] = queue
    elif mode == "Coscheduling":
        pods["scheduler"] = _COSCHEDULING
        labels["scheduling.x-k8s.io/pod-group"] = f"{owner['metadata']['name']}-a{attempt}"
        timeout = mine.gang.timeout_seconds or theirs.gang.timeout_seconds or _GANG_SECONDS
    key = mine.topology.key or theirs.topology.key
    wish = mine.topology.mode or theirs.topology.mode or "Preferred"
    if key is not None and wish != "None":
        by_sequence = (mine.topology.group_by or theirs.topology.group_by) == "SequenceParallel"
        group = max(1, (spec.parallelism.sequence or 1) // procs) if by_sequence else nodes
        _keep_together(
            pods,
            key=key,
            is_required=wish == "Required",
            group=group,
            nodes=nodes,
            by_kueue=mode == "Kueue",
            selector={LABEL_UID: owner["metadata"]["uid"], LABEL_ATTEMPT: str(attempt)},
        )
    return Placement(pods=pods, pod_group_seconds=timeout)


def _keep_together(
    pods: Object, *, key: str, is_required: bool, group: int, nodes: int, by_kueue: bool, selector: dict[str, str]
) -> None:
    """Put groups of `group` pods into one place each.

    Kueue places groups by the pods' numbers. A scheduler that knows affinity alone can only be asked to keep all pods
    near to each other; where each group is a single pod there is nothing to ask for.
    """
    if group == 1:
        return
    if by_kueue and group < nodes:
        pods["annotations"] |= {
            "kueue.x-k8s.io/podset-slice-required-topology": key,
            "kueue.x-k8s.io/podset-slice-size": str(group),
        }
    elif by_kueue:
        pods["annotations"][f"kueue.x-k8s.io/podset-{'required' if is_required else 'preferred'}-topology"] = key
    else:
        term = {"labelSelector": {"matchLabels": selector}, "topologyKey": key}
        if is_required and group == nodes:
            rule: Object = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
        else:
            rule = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}
        pods["affinity"] = {"podAffinity": rule}
