"""What the operator may do to the API: one list, from which manifests and chart are rendered and which a test compares
with the API server's audit log. A verb that nothing uses does not belong here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from opensora_operator.constants import GROUP


class Scope(Enum):
    """Where a rule holds."""

    OWN = "own"
    """The namespace that the operator runs in: a Role there."""
    WATCHED = "watched"
    """Every namespace whose objects it looks after: a ClusterRole, or a Role in each of `--namespaces`."""
    CLUSTER = "cluster"
    """Objects outside namespaces: a ClusterRole always."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of a Role or ClusterRole."""

    scope: Scope
    group: str
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    reason: str
    names: tuple[str, ...] = ()
    """Only objects of these names; empty means all. "create" never has names."""


RULES: tuple[Rule, ...] = (
    Rule(
        scope=Scope.WATCHED,
        group=GROUP,
        resources=("trainingruns", "samplejobs", "batchsearches"),
        verbs=("get", "list", "watch", "delete"),
        reason="to know what is asked for, and to delete what is over after its time to live",
    ),
    Rule(
        scope=Scope.WATCHED,
        group=GROUP,
        resources=("trainingruns/status", "samplejobs/status", "batchsearches/status"),
        verbs=("patch",),
        reason="to tell how it goes",
    ),
    Rule(
        scope=Scope.WATCHED,
        group=GROUP,
        resources=("trainingprofiles",),
        verbs=("get", "list", "watch"),
        reason="to fill in what a run leaves to its profile",
    ),
    Rule(
        scope=Scope.CLUSTER,
        group=GROUP,
        resources=("clustertrainingprofiles",),
        verbs=("get", "list", "watch"),
        reason="the same, of profiles for all namespaces",
    ),
    Rule(
        scope=Scope.WATCHED,
        group="batch",
        resources=("jobs",),
        verbs=("get", "list", "watch", "create", "patch", "delete"),
        reason="one Job is one attempt: made, suspended, resumed, removed with the history",
    ),
    Rule(
        scope=Scope.WATCHED,
        group="",
        resources=("pods",),
        verbs=("list", "watch", "delete"),
        reason="to see how an attempt goes; to remove pods of an attempt that is over",
    ),
    Rule(
        scope=Scope.WATCHED,
        group="",
        resources=("pods/status",),
        verbs=("patch",),
        reason="to declare a pod failed whose node is dead",
    ),
    Rule(
        scope=Scope.WATCHED,
        group="",
        resources=("services", "configmaps"),
        verbs=("get", "create"),
        reason="the name by which the ranks meet, and the resolved configuration; ConfigMaps named by a spec",
    ),
    Rule(
        scope=Scope.WATCHED,
        group="networking.k8s.io",
        resources=("networkpolicies",),
        verbs=("get", "create"),
        reason="to let the pods of a run talk to each other alone",
    ),
    Rule(
        scope=Scope.WATCHED,
        group="scheduling.x-k8s.io",
        resources=("podgroups",),
        verbs=("get", "create"),
        reason="what the coscheduling plugin counts, of runs with `scheduling.gang.mode: Coscheduling`",
    ),
    Rule(
        scope=Scope.WATCHED,
        group="events.k8s.io",
        resources=("events",),
        verbs=("create",),
        reason="to tell of decisions",
    ),
    Rule(
        scope=Scope.CLUSTER,
        group="",
        resources=("nodes",),
        verbs=("get",),
        reason="to tell a slow node from a dead one before a pod is removed by force",
    ),
    Rule(
        scope=Scope.CLUSTER,
        group="authentication.k8s.io",
        resources=("tokenreviews",),
        verbs=("create",),
        reason="to tell which pod reports, where the cluster's keys cannot be read",
    ),
    Rule(
        scope=Scope.OWN,
        group="",
        resources=("secrets",),
        verbs=("create",),
        reason="the certificate authority of the progress channel",
    ),
    Rule(
        scope=Scope.OWN,
        group="",
        resources=("secrets",),
        verbs=("get", "update"),
        names=("opensora-operator-progress-ca",),
        reason="the same, to share it among replicas and to renew it",
    ),
    Rule(
        scope=Scope.OWN,
        group="",
        resources=("pods",),
        verbs=("patch",),
        reason="to label its own pod as the leader, which the progress Service selects",
    ),
    Rule(
        scope=Scope.OWN,
        group="coordination.k8s.io",
        resources=("leases",),
        verbs=("get", "create", "update"),
        reason="one replica leads",
    ),
)
