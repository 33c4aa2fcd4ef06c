"""The checks of `osctl doctor`: pure functions of what was looked at, and the table of all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opensora_operator.api import KINDS, Kind
from opensora_operator.crd import SCHEMA_HASH, crd
from opensora_operator.pod_states import STUCK_POD_SECONDS
from opensora_operator.profiles import default_profile
from opensora_operator.resources import parse_quantity
from opensora_operator.status import TERMINAL, duration
from opensora_operator.views import PodView, view_pod
from opensora_operator.wire import parse_time

from osctl.client import Object
from osctl.errors import OsctlError
from osctl.findings import Finding, Row, failed, not_seen, ok, warning, worst
from osctl.looks import (
    DEFAULT_NAMESPACE,
    LEASE_SECONDS,
    Credentials,
    Looks,
    Operator,
    Permissions,
    Right,
    Server,
    Store,
    UnseenError,
)

MIN_KUBERNETES = (1, 31)
_MAX_SHOWN = 3
_CLOCK_SECONDS = 10.0
"""What times in statuses and ages may be wrong by before it confuses."""
_CLOCK_FAILS_SECONDS = 300.0
"""Tokens and signed requests to object stores are refused beyond about this."""
_UNNOTICED_SECONDS = 30.0
"""An operator that works answers a change within a second or two."""
_UNSCHEDULED_SECONDS = 60.0
"""A scheduler says something about a pod within this time."""
_RECENT_SECONDS = 3600.0
_INSTALL = (
    f"helm upgrade --install opensora-operator charts/opensora-operator --namespace {DEFAULT_NAMESPACE} "
    "--create-namespace --reset-then-reuse-values --wait"
)
"""In the project's folder; it installs, and brings an older installation up to date."""


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    name: str
    examine: Callable[..., Finding]
    needs: tuple[str, ...]
    """Names of the looks that it is a function of."""


def examine(looks: Looks) -> Iterator[Row]:
    """Make all checks, one after the other."""
    for check in CHECKS:
        try:
            yield Row(check.name, check.examine(*(looks.see(name) for name in check.needs)))
        except UnseenError as error:
            yield Row(check.name, not_seen(str(error)))


# ------------------------------------------------------------------------------------------------- server and ourselves


def check_server(server: Server | OsctlError) -> Finding:
    """Whether the API server answers, and is of a version that the operator works with."""
    if isinstance(server, OsctlError):
        return failed(server.message, server.hint or "")
    found = re.match(r"v?(\d+)\.(\d+)", server.version)
    if found is None:
        return warning(f"{server.address} answers, but does not tell its version", "kubectl version")
    oldest = ".".join(map(str, MIN_KUBERNETES))
    if (int(found[1]), int(found[2])) < MIN_KUBERNETES:
        return failed(
            f"{server.address} has Kubernetes {server.version}; the operator needs {oldest} or newer",
            "upgrade the cluster",
        )
    return ok(f"{server.address} answers, Kubernetes {server.version}")


def check_clock(ahead: float | None) -> Finding:
    """Whether this machine and the API server, which is so many seconds ahead, have the same time."""
    if ahead is None:
        return not_seen("the API server does not tell the time")
    apart = abs(ahead)
    which = "behind" if ahead > 0 else "ahead of"
    if apart < _CLOCK_SECONDS:
        return ok("this machine and the API server have the same time")
    message = f"this machine's clock is {duration(apart)} {which} the API server's"
    mend = "sudo timedatectl set-ntp true"
    if apart >= _CLOCK_FAILS_SECONDS:
        return failed(f"{message}: logins and requests to object stores will be refused", mend)
    return warning(f"{message}: ages are wrong by that", mend)


def check_rights(me: str, rights: Mapping[Right, bool], namespace: str) -> Finding:
    """Whether we may do in the namespace what commands ask for."""
    denied = [right for right, is_allowed in rights.items() if not is_allowed]
    user = me or "you"
    if not denied:
        return ok(f"{user} may do in namespace {namespace} what all commands need")
    commands = ", ".join(dict.fromkeys(", ".join(right.commands for right in denied).split(", ")))
    message = f"{user} may not {_some(map(str, denied))} in namespace {namespace}: {commands} will not work"
    account = re.fullmatch(r"system:serviceaccount:([^:]+):([^:]+)", me)
    subject = f"--serviceaccount {account[1]}:{account[2]}" if account else f"--user {me or 'NAME'}"
    binding = re.sub(r"[^a-z0-9.-]+", "-", me.lower()).strip("-.") or "user"
    mend = f"kubectl --namespace {namespace} create rolebinding {binding}-edit --clusterrole edit {subject}"
    return failed(message, mend) if any(right.is_needed for right in denied) else warning(message, mend)


# ------------------------------------------------------------------------------------------------------ installation


def check_kinds(served: frozenset[str]) -> Finding:
    """Whether the API server knows our kinds."""
    missing = [kind.plural for kind in KINDS if kind.plural not in served]
    if len(missing) == len(KINDS):
        return failed("the cluster knows none of the kinds of opensora.dev: nothing is installed", _INSTALL)
    if missing:
        return failed(f"the cluster does not know {_some(missing)}", _INSTALL)
    return ok(f"{_some(kind.plural for kind in KINDS)} are served")


def check_schemas(definitions: Mapping[Kind, Object | None]) -> Finding:
    """Whether the definitions are those of this osctl, and in good order."""
    names = [kind.crd_name for kind, body in definitions.items() if body is None]
    if names:
        return failed(f"not installed: {_some(names)}", _INSTALL)
    found = {kind: body for kind, body in definitions.items() if body is not None}
    for kind, body in found.items():
        if body["metadata"].get("deletionTimestamp"):
            return failed(
                f"{kind.crd_name} is being deleted, with all its objects",
                f"kubectl get {kind.plural} --all-namespaces, and once none is left: {_INSTALL}",
            )
        for condition in (body.get("status") or {}).get("conditions") or ():
            if condition.get("type") in ("NamesAccepted", "Established") and condition.get("status") == "False":
                return failed(
                    f"{kind.crd_name}: {condition.get('reason')}: {condition.get('message')}",
                    f"kubectl describe customresourcedefinition {kind.crd_name}",
                )
    others = [kind.crd_name for kind, body in found.items() if _schema_hash(body) != _schema_hash(crd(kind))]
    if others:
        return warning(
            f"other than what this osctl knows: {_some(others)}; fields may be missing on one side",
            f"{_INSTALL} (or install the osctl of the operator's version)",
        )
    return ok("the definitions are those of this osctl")


def _schema_hash(body: Object) -> str:
    return str((body["metadata"].get("annotations") or {}).get(SCHEMA_HASH) or "")


def check_operator(operators: Sequence[Operator], outside: str, namespace: str) -> Finding:
    """Whether an operator is there and ready, and looks after the namespace. `outside` leads without a Deployment."""
    if not operators and outside:
        return warning(f"{outside} works outside this cluster: nothing starts it again when it ends", _INSTALL)
    if not operators:
        return failed("no operator is installed in this cluster", _INSTALL)
    mine = [operator for operator in operators if operator.looks_after(namespace)]
    if not mine:
        first = operators[0]
        watched = ",".join([*first.watched, namespace])
        return failed(
            f"{first} does not look after namespace {namespace}, only after {_some(first.watched)}",
            f"{_upgrade(first)} --set watchNamespaces={{{watched}}}",
        )
    if len(mine) > 1:
        return warning(
            f"{_some(map(str, mine))} all look after namespace {namespace}, and get in each other's way",
            f"helm uninstall {mine[-1].name} --namespace {mine[-1].namespace}",
        )
    operator = mine[0]
    if operator.replicas == 0:
        scale = f"kubectl --namespace {operator.namespace} scale deployment/{operator.name} --replicas 1"
        return failed(f"{operator} is scaled to 0 replicas", scale)
    if operator.ready == 0:
        why = f": {operator.trouble}" if operator.trouble else ""
        return failed(f"{operator} has no ready pod{why}", f"kubectl {_of(operator)} describe pods")
    if operator.ready < operator.replicas:
        why = f": {operator.trouble}" if operator.trouble else ""
        message = f"{operator} has {operator.ready} of {operator.replicas} pods ready{why}"
        return warning(message, f"kubectl {_of(operator)} describe pods")
    return ok(f"{operator} is ready")


def _upgrade(operator: Operator) -> str:
    return (
        f"helm upgrade {operator.name} charts/opensora-operator --namespace {operator.namespace} "
        "--reset-then-reuse-values --wait"
    )


def _of(operator: Operator) -> str:
    return f"--namespace {operator.namespace} --selector app.kubernetes.io/name=opensora-operator"


def check_version(operators: Sequence[Operator], ours: str) -> Finding:
    """Whether operator and osctl are of the same version."""
    if not operators:
        return not_seen("no operator is installed")
    for operator in operators:
        if not operator.version:
            return not_seen(f"{operator} does not tell its version: its image is {operator.image}")
        if operator.version != ours:
            return warning(
                f"{operator} is of version {operator.version}, and osctl of {ours}",
                f"pip install 'opensora=={operator.version}' (or {_upgrade(operator)})",
            )
    return ok(f"operator and osctl are both of version {ours}")


def check_leader(leases: Sequence[Object], now: float) -> Finding:
    """Whether an operator works: the one that does renews its Lease every few seconds."""
    if not leases:
        return failed("there is no Lease: no operator has ever worked", _INSTALL)
    return worst([_check_lease(lease, now) for lease in leases])


def _check_lease(lease: Object, now: float) -> Finding:
    metadata, spec = lease["metadata"], lease.get("spec") or {}
    place = f"{metadata['namespace']}/{metadata['name']}"
    logs = f"kubectl --namespace {metadata['namespace']} logs deployment/{metadata['name']}"
    holder = spec.get("holderIdentity")
    if not holder:
        return failed(f"nobody holds the Lease {place}: no operator works", logs)
    renewed = spec.get("renewTime")
    since = now - parse_time(renewed) if renewed else None
    if since is None or since > max(LEASE_SECONDS, 2.0 * float(spec.get("leaseDurationSeconds") or 0)):
        ago = "never" if since is None else f"{duration(since)} ago"
        return failed(f"{holder} renewed the Lease {place} {ago}: no operator works", logs)
    return ok(f"{holder} leads")


def check_permissions(permissions: Sequence[Permissions]) -> Finding:
    """Whether the operator may do what it does, and no more."""
    if not permissions:
        return not_seen("no operator is installed")
    return worst([_check_permissions(entry) for entry in permissions])


def _check_permissions(entry: Permissions) -> Finding:
    operator = entry.operator
    if entry.missing:
        return failed(f"{operator} may not {_some(entry.missing)}, and has to", _upgrade(operator))
    if entry.surplus:
        return warning(f"{operator} may {_some(entry.surplus)}, and need not", _upgrade(operator))
    return ok(f"{operator} may do what it has to")


# ------------------------------------------------------------------------------------------- what runs are made from


def check_profiles(profiles: Sequence[Object], namespace: str) -> Finding:
    """Whether runs that name no profile get one, with an image."""
    chosen = default_profile(profiles, namespace)
    if chosen is None:
        return warning(
            f"no default profile for namespace {namespace}: run files have to name a profile, or image and hardware",
            "kubectl apply --filename manifests/samples/clustertrainingprofile.yaml",
        )
    name = f"{chosen['kind']} {_name(chosen)}"
    rivals = [
        profile
        for profile in profiles
        if profile is not chosen
        and (profile.get("spec") or {}).get("default")
        and profile["metadata"].get("namespace") == chosen["metadata"].get("namespace")
    ]
    if rivals:
        return warning(
            f"{name} and {_some(map(_name, rivals))} are all the default: the first by name is taken",
            f"""{_patch(rivals[0])} '{{"spec": {{"default": false}}}}'""",
        )
    image = chosen["spec"].get("image")
    if not image:
        return warning(
            f"{name} is the default, and has no image: run files have to name one",
            f"""{_patch(chosen)} '{{"spec": {{"image": "REGISTRY/opensora-trainer:TAG"}}}}'""",
        )
    return ok(f"{name} is the default, with image {image}")


def check_storage(stores: Sequence[Store]) -> Finding:
    """Whether run directories can be read from this machine."""
    if not stores:
        return not_seen("no run of this namespace has its directory in a bucket; --run-uri URI tries one")
    for store in stores:
        if store.problem and store.is_asked:
            return failed(store.problem, store.hint)
        if store.problem:
            return warning(f"runs' files cannot be read from here: {store.problem}", store.hint)
    return ok(f"{_some(store.uri for store in stores)} can be read from here")


def check_credentials(credentials: Sequence[Credentials]) -> Finding:
    """Whether the Secrets are there by which pods reach storage."""
    if not credentials:
        return ok("no profile and no run names a Secret for its storage")
    for entry in credentials:
        if entry.state == "missing":
            return failed(
                f"{entry.user} names the Secret {entry.name}, which is not in namespace {entry.namespace}",
                f"kubectl --namespace {entry.namespace} create secret generic {entry.name} "
                "--from-literal=AWS_ACCESS_KEY_ID=… --from-literal=AWS_SECRET_ACCESS_KEY=…",
            )
    unseen = [entry.name for entry in credentials if entry.state == "unseen"]
    if unseen:
        return not_seen(f"whether there is a Secret {_some(unseen)}: you may not get secrets")
    return ok(f"Secret {_some(entry.name for entry in credentials)}: there")


def check_nodes(nodes: Sequence[Object], profiles: Sequence[Object], namespace: str) -> Finding:
    """Whether there are nodes that can take pods of the default profile."""
    silent = [_name(node) for node in nodes if not _is_ready(node)]
    usable = [node for node in nodes if _is_ready(node) and not (node.get("spec") or {}).get("unschedulable")]
    if not usable:
        return failed(f"none of {len(nodes)} nodes is ready for pods", "kubectl get nodes")
    chosen = default_profile(profiles, namespace)
    problem = None if chosen is None else _misfit(usable, chosen)
    if problem is not None:
        return problem
    if silent:
        message = f"{len(silent)} of {len(nodes)} nodes are not ready: {_some(silent)}"
        return warning(message, f"kubectl describe node {silent[0]}")
    resource = str(((chosen or {}).get("spec") or {}).get("accelerator", {}).get("resource") or "nvidia.com/gpu")
    return ok(f"{len(usable)} ready, {_capacity(usable, resource)}")


def _misfit(nodes: Sequence[Object], profile: Object) -> Finding | None:
    """What keeps pods of a profile off all nodes: too few accelerators, or a taint."""
    spec = profile.get("spec") or {}
    accelerator = spec.get("accelerator") or {}
    resource, count = str(accelerator.get("resource") or "nvidia.com/gpu"), int(accelerator.get("count") or 0)
    if not count:
        return None
    having = [node for node in nodes if _amount(node, resource) >= count]
    asks = f"the default profile {_name(profile)}"
    if not having:
        most = max(_amount(node, resource) for node in nodes)
        return failed(
            f"{asks} asks for {count} {resource} on a node; the most that one has is {most}",
            "kubectl describe nodes (the vendor's device plugin makes accelerators known)",
        )
    barring = [[taint for taint in _taints(node) if not _tolerates(spec, taint)] for node in having]
    if all(barring):
        key = barring[0][0].get("key")
        change = {"spec": {"podTemplate": {"tolerations": [{"key": key, "operator": "Exists"}]}}}
        return failed(
            f"{asks} does not tolerate the taint {key}, which every node with {resource} has",
            f"{_patch(profile)} '{json.dumps(change)}'",
        )
    return None


def _patch(profile: Object) -> str:
    place = profile["metadata"].get("namespace")
    where = f"--namespace {place} " if place else ""
    return f"kubectl {where}patch {str(profile['kind']).lower()} {_name(profile)} --type merge --patch"


def _is_ready(node: Object) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or ()
    return any(entry.get("type") == "Ready" and entry.get("status") == "True" for entry in conditions)


def _amount(node: Object, resource: str) -> int:
    text = ((node.get("status") or {}).get("allocatable") or {}).get(resource)
    return 0 if text is None else int(parse_quantity(str(text)))


def _taints(node: Object) -> list[Mapping[str, Any]]:
    taints = (node.get("spec") or {}).get("taints") or ()
    return [taint for taint in taints if taint.get("effect") in ("NoSchedule", "NoExecute")]


def _tolerates(spec: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    """Whether pods of a profile may be on a node with this taint, by Kubernetes' rules."""
    for toleration in (spec.get("podTemplate") or {}).get("tolerations") or ():
        is_for_all = not toleration.get("key") and toleration.get("operator") == "Exists"
        same_value = toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")
        same_key = toleration.get("key") == taint.get("key")
        if (is_for_all or (same_key and same_value)) and toleration.get("effect") in (None, "", taint.get("effect")):
            return True
    return False


def _capacity(nodes: Sequence[Object], resource: str) -> str:
    total = sum(_amount(node, resource) for node in nodes)
    products = {
        str(labels["nvidia.com/gpu.product"])
        for node in nodes
        if "nvidia.com/gpu.product" in (labels := node["metadata"].get("labels") or {})
    }
    kinds = f" ({_some(sorted(products))})" if products else ""
    return f"{total} {resource}{kinds}" if total else f"none with {resource}"


def check_queue(
    queues: Sequence[Object] | None, profiles: Sequence[Object], objects: Sequence[Object], namespace: str
) -> Finding:
    """Whether the queues that are named exist and admit."""
    named = _named_queues(profiles, objects, namespace)
    if queues is None and not named:
        return ok("no Kueue, and nobody names a queue: runs start at once")
    if queues is None:
        queue, user = next(iter(named.items()))
        return failed(
            f"{user} waits for queue {queue}, but Kueue is not installed",
            "install Kueue (https://kueue.sigs.k8s.io/docs/installation), or leave out scheduling.queue",
        )
    known = [queue["metadata"]["name"] for queue in queues]
    for queue, user in named.items():
        if queue not in known:
            return failed(
                f"{user} names queue {queue}; namespace {namespace} has {_some(known) or 'no LocalQueue'}",
                "kubectl get localqueues --all-namespaces, then name one of this namespace with --queue",
            )
    for body in queues:
        inactive = next((entry for entry in _conditions(body) if entry.get("type") == "Active"), {})
        if inactive.get("status") == "False":
            name = body["metadata"]["name"]
            return failed(
                f"queue {name} admits nothing: {inactive.get('reason')}: {inactive.get('message')}",
                f"kubectl --namespace {namespace} describe localqueue {name}",
            )
    waiting = [_name(body) for body in objects if _phase(body) == "Queued"]
    waits = f"; waiting for admission: {_some(waiting)}" if waiting else ""
    return ok(f"{_some(known) or 'no LocalQueue'} in namespace {namespace}{waits}")


def _named_queues(profiles: Sequence[Object], objects: Sequence[Object], namespace: str) -> dict[str, str]:
    """Queue → who names it."""
    named: dict[str, str] = {}
    chosen = default_profile(profiles, namespace)
    for body in ([] if chosen is None else [chosen]) + [body for body in objects if _phase(body) not in TERMINAL]:
        queue = ((body.get("spec") or {}).get("scheduling") or {}).get("queue")
        if queue:
            named.setdefault(str(queue), f"{body['kind']} {_name(body)}")
    return named


# ------------------------------------------------------------------------------------------------- what is going on


def check_noticed(objects: Sequence[Object], now: float, namespace: str) -> Finding:
    """Whether the operator looks at what is in the namespace."""
    if not objects:
        return ok(f"no runs in namespace {namespace}")
    unnoticed = [f"{body['kind']} {_name(body)}" for body in objects if _is_unnoticed(body, now)]
    if unnoticed:
        return failed(
            f"the operator has not looked at {_some(unnoticed)}",
            f"kubectl --namespace {DEFAULT_NAMESPACE} logs deployment/opensora-operator --tail 50",
        )
    refused = [body for body in objects if _refusal(body)]
    if refused:
        first = refused[0]
        message = f"{first['kind']} {_name(first)} is not accepted: {_refusal(first)}"
        return warning(message, f"kubectl --namespace {namespace} describe {str(first['kind']).lower()} {_name(first)}")
    return ok(f"the operator has looked at all {len(objects)}")


def _is_unnoticed(body: Object, now: float) -> bool:
    if (body.get("spec") or {}).get("managedBy") not in (None, "", "opensora.dev/operator"):
        return False
    if now - parse_time(body["metadata"]["creationTimestamp"]) < _UNNOTICED_SECONDS:
        return False
    status = body.get("status") or {}
    generation = int(body["metadata"].get("generation") or 0)
    return not status.get("phase") or int(status.get("observedGeneration") or 0) < generation


def _refusal(body: Object) -> str:
    accepted = next((entry for entry in _conditions(body) if entry.get("type") == "Accepted"), {})
    if accepted.get("status") != "False" or _phase(body) in TERMINAL:
        return ""
    return str(accepted.get("message") or accepted.get("reason"))


def check_scheduling(pods: Sequence[Object], now: float, namespace: str) -> Finding:
    """Whether pods that wait for a node know why."""
    views = _views(pods)
    waiting = [pod for pod in views if pod.is_live and not pod.scheduled and pod.deleting_since is None]
    refused = [pod for pod in waiting if pod.unschedulable]
    if refused:
        first = refused[0]
        message = f"{_counted(refused)} without a node; {first.name}: {first.unschedulable}"
        return warning(message, f"kubectl --namespace {namespace} describe pod {first.name}")
    silent = [pod for pod in waiting if now - pod.created > _UNSCHEDULED_SECONDS]
    if silent:
        message = f"{_counted(silent)} without a node, and no scheduler has said why, such as {silent[0].name}"
        return failed(message, "kubectl --namespace kube-system get pods --selector component=kube-scheduler")
    return ok("every pod has a node" if not waiting else f"{_counted(waiting)} about to get a node")


def check_pods(pods: Sequence[Object], now: float, namespace: str) -> Finding:
    """Whether pods begin and end as they should."""
    views = _views(pods)
    stuck = [pod for pod in views if _is_stuck(pod, now)]
    if stuck:
        pod = stuck[0]
        since = duration(now - (pod.deleting_since or now))
        return failed(
            f"{_counted(stuck)} do not end; {pod.name} on {pod.node or 'no node'} since {since}",
            f"kubectl get node {pod.node}; once the machine is certainly off: kubectl taint node {pod.node} "
            "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute",
        )
    broken = [
        pod for pod in views if pod.is_live and pod.waiting_reason not in ("", "ContainerCreating", "PodInitializing")
    ]
    if broken:
        pod = broken[0]
        message = f"{_counted(broken)} cannot start; {pod.name}: {pod.waiting_reason}: {pod.waiting_message}"
        return warning(message.rstrip(": "), f"kubectl --namespace {namespace} describe pod {pod.name}")
    return ok(f"{_counted([pod for pod in views if pod.is_live])} alive, none is stuck")


def _is_stuck(pod: PodView, now: float) -> bool:
    if pod.deleting_since is None or not pod.is_live:
        return False
    return now - pod.deleting_since > pod.grace_seconds + STUCK_POD_SECONDS


def check_events(events: Sequence[Object], objects: Sequence[Object], now: float, namespace: str) -> Finding:
    """What Kubernetes has warned of lately about objects that are not over."""
    live = [_name(body) for body in objects if _phase(body) not in TERMINAL]
    newest: dict[str, tuple[float, Object]] = {}
    for event in events:
        of = str((event.get("involvedObject") or {}).get("name") or "")
        when = _event_time(event)
        if now - when > _RECENT_SECONDS or not any(of == name or of.startswith(f"{name}-") for name in live):
            continue
        reason = str(event.get("reason"))
        newest[reason] = max(newest.get(reason, (0.0, event)), (when, event), key=lambda entry: entry[0])
    if not newest:
        return ok("no warnings about runs in the last hour")
    when, event = max(newest.values(), key=lambda entry: entry[0])
    of = event["involvedObject"]
    message = (
        f"{event['reason']}: {of.get('kind')} {of.get('name')}: {event.get('message')} ({duration(now - when)} ago)"
    )
    return warning(
        message, f"kubectl --namespace {namespace} events --for {str(of.get('kind')).lower()}/{of.get('name')}"
    )


def _event_time(event: Object) -> float:
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    text = next((time for time in times if time), None) or event["metadata"].get("creationTimestamp")
    return parse_time(text) if text else 0.0


def _views(pods: Sequence[Object]) -> list[PodView]:
    return [view for body in pods if (view := view_pod(body)) is not None]


def _counted(pods: Sequence[PodView]) -> str:
    return "1 pod" if len(pods) == 1 else f"{len(pods)} pods"


def _name(body: Object) -> str:
    return str(body["metadata"]["name"])


def _phase(body: Object) -> str:
    return str((body.get("status") or {}).get("phase") or "")


def _conditions(body: Object) -> list[Mapping[str, Any]]:
    return list((body.get("status") or {}).get("conditions") or ())


def _some(words: Any) -> str:
    """The first of some words, and how many more there are."""
    found = list(words)
    more = f" and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN + 1 else ""
    return ", ".join(found[:_MAX_SHOWN] if more else found) + more


CHECKS = (
    Check("server", check_server, ("server",)),
    Check("clock", check_clock, ("clock",)),
    Check("rights", check_rights, ("me", "rights", "namespace")),
    Check("kinds", check_kinds, ("served",)),
    Check("definitions", check_schemas, ("definitions",)),
    Check("operator", check_operator, ("operators", "outside", "namespace")),
    Check("version", check_version, ("operators", "version")),
    Check("leader", check_leader, ("leases", "now")),
    Check("permissions", check_permissions, ("permissions",)),
    Check("profiles", check_profiles, ("profiles", "namespace")),
    Check("storage", check_storage, ("stores",)),
    Check("secrets", check_credentials, ("credentials",)),
    Check("nodes", check_nodes, ("nodes", "profiles", "namespace")),
    Check("queue", check_queue, ("queues", "profiles", "objects", "namespace")),
    Check("scheduling", check_scheduling, ("pods", "now", "namespace")),
    Check("pods", check_pods, ("pods", "now", "namespace")),
    Check("runs", check_noticed, ("objects", "now", "namespace")),
    Check("events", check_events, ("events", "objects", "now", "namespace")),
)
"""All checks, in the order in which one that fails explains those after it."""
