"""From a spec and its profile to Kubernetes objects. Pure; docs/reference/pod-contract.md describes the pods."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opensora_operator.api import TrainingProfileSpec
from opensora_operator.constants import (
    ANNOTATION_CONFIG,
    ANNOTATION_NODES,
    LABEL_ATTEMPT,
    LABEL_KIND,
    LABEL_KUEUE_PRIORITY,
    LABEL_KUEUE_QUEUE,
    LABEL_NAME,
    LABEL_UID,
    MANAGER,
    TRAINER,
)
from opensora_operator.plans import Object
from opensora_operator.pod_template import PodTemplate
from opensora_operator.policies.causes import RULES
from opensora_operator.wire import to_wire

CONFIG_FOLDER = "/etc/opensora/run"
"""Where the pods find the run's ConfigMap."""
CONFIG_KEY = "config.yaml"
CA_KEY = "ca.crt"
TOKEN_FOLDER = "/var/run/opensora"
_TOKEN_SECONDS = 3600
_USER = 65532
_LIST_KEYS = {"env": "name", "volumes": "name", "volumeMounts": "mountPath", "imagePullSecrets": "name"}
_UNREACHABLE_SECONDS = 30
_UNREACHABLE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What the operator knows of itself and its cluster."""

    progress_url: str | None = None
    """`https://host:port` of the progress server; None where there is none."""
    ca_bundle: str | None = None
    """What its certificate is checked with, PEM."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Pods of one kind, before they are put into a Job."""

    owner: Object
    """The object that they belong to."""
    component: str
    """`trainer`, `sampler` or `probe`."""
    attempt: int
    image: str
    profile: TrainingProfileSpec
    template: PodTemplate
    """The owner's own; it wins over the profile's."""
    command: tuple[str, ...]
    args: tuple[str, ...]
    env: Mapping[str, str]
    config_map: str
    """Mounted at `/etc/opensora/run`."""
    grace_seconds: int
    storage_secret: str | None = None
    endpoint: str | None = None
    priority_class: str | None = None
    service: str | None = None
    """Headless Service that gives the pods names."""
    avoid_nodes: tuple[str, ...] = ()
    token_audience: str | None = None
    """Audience of a token for the progress server; None mounts none."""
    topology: Object = field(default_factory=dict)
    """Placement: `annotations`, `labels`, `affinity`, `scheduler` to add to the pods."""


# ------------------------------------------------------------------------------------------------------------- objects


def labels_of(owner: Object, *, component: str, attempt: int | None = None) -> dict[str, str]:
    """The labels of a child."""
    labels = {
        LABEL_KIND: owner["kind"],
        LABEL_NAME: owner["metadata"]["name"],
        LABEL_UID: owner["metadata"]["uid"],
        "app.kubernetes.io/name": "opensora",
        "app.kubernetes.io/instance": owner["metadata"]["name"],
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/managed-by": MANAGER,
        "app.kubernetes.io/part-of": "opensora",
    }
    return labels if attempt is None else {**labels, LABEL_ATTEMPT: str(attempt)}


def child(
    owner: Object, api_version: str, kind: str, name: str, *, component: str, attempt: int | None = None, **body: Any
) -> Object:
    """An object that is deleted with its owner."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": owner["metadata"]["namespace"],
            "labels": labels_of(owner, component=component, attempt=attempt),
            "ownerReferences": [
                {
                    "apiVersion": owner["apiVersion"],
                    "kind": owner["kind"],
                    "name": owner["metadata"]["name"],
                    "uid": owner["metadata"]["uid"],
                    "controller": True,
                    "blockOwnerDeletion": False,
                }
            ],
        },
        **body,
    }


def config_map(owner: Object, data: Mapping[str, str], *, component: str) -> Object:
    """An immutable ConfigMap whose name tells its content, so that an attempt never sees another one."""
    digest = hashlib.sha256(json.dumps(dict(sorted(data.items()))).encode()).hexdigest()[:8]
    name = f"{owner['metadata']['name']}-cfg-{digest}"
    return child(owner, "v1", "ConfigMap", name, component=component, immutable=True, data=dict(data))


def headless_service(owner: Object) -> Object:
    """Names for the pods of all attempts: `<pod's host name>.<service>`, also before they are ready."""
    return child(
        owner,
        "v1",
        "Service",
        owner["metadata"]["name"],
        component="trainer",
        spec={
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {LABEL_UID: owner["metadata"]["uid"]},
        },
    )


def isolation(owner: Object) -> Object:
    """A NetworkPolicy: the pods receive connections from each other alone."""
    mine = {"matchLabels": {LABEL_UID: owner["metadata"]["uid"]}}
    return child(
        owner,
        "networking.k8s.io/v1",
        "NetworkPolicy",
        owner["metadata"]["name"],
        component="trainer",
        spec={"podSelector": mine, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": mine}]}]},
    )


def pod_group(owner: Object, name: str, *, attempt: int, nodes: int, timeout_seconds: int) -> Object:
    """What the coscheduling plugin counts before it lets the first pod start."""
    return child(
        owner,
        "scheduling.x-k8s.io/v1alpha1",
        "PodGroup",
        name,
        component="trainer",
        attempt=attempt,
        spec={"minMember": nodes, "scheduleTimeoutSeconds": timeout_seconds},
    )


def gang_job(workload: Workload, name: str, *, nodes: int, queue: str | None, rank_zero_decides: bool) -> Object:
    """The Job of an attempt: all pods or none; the first failure ends it, and the rule that matched says why.

    With a queue it is created suspended, and started by the queue alone.
    """
    job = indexed_job(workload, name, completions=nodes, parallelism=nodes, queue=queue)
    job["metadata"]["annotations"][ANNOTATION_NODES] = str(nodes)
    job["spec"] |= {
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [_failure_rule(codes) for codes in RULES]},
    }
    if rank_zero_decides:
        job["spec"]["successPolicy"] = {"rules": [{"succeededIndexes": "0"}]}
    return job


def indexed_job(workload: Workload, name: str, *, completions: int, parallelism: int, queue: str | None) -> Object:
    """A Job whose pods know their number. It has neither a deadline nor a time to live: its owner has them."""
    job = child(
        workload.owner,
        "batch/v1",
        "Job",
        name,
        component=workload.component,
        attempt=workload.attempt,
        spec={
            "completionMode": "Indexed",
            "completions": completions,
            "parallelism": parallelism,
            "suspend": queue is not None,
            "template": pod_of(workload),
        },
    )
    job["metadata"]["annotations"] = {ANNOTATION_CONFIG: workload.config_map}
    if queue is not None:
        job["metadata"]["labels"][LABEL_KUEUE_QUEUE] = queue
        if workload.priority_class is not None:
            job["metadata"]["labels"][LABEL_KUEUE_PRIORITY] = workload.priority_class
    return job


def _failure_rule(codes: Sequence[int] | None) -> Object:
    if codes is None:
        return {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    values = sorted(int(code) for code in codes)
    return {"action": "FailJob", "onExitCodes": {"containerName": TRAINER, "operator": "In", "values": values}}


# ---------------------------------------------------------------------------------------------------------------- pods


def pod_of(workload: Workload) -> Object:
    """The template of the pods: the operator's part, then the profile's, then the owner's own."""
    given = merge_templates(workload.profile.pod_template, workload.template)
    profile, topology = workload.profile, workload.topology
    resources: Object = {
        "requests": {},
        "limits": {},
        **{key: dict(value) for key, value in given.get("resources", {}).items()},
    }
    extra = dict(profile.network.rdma_resources)
    if profile.accelerator.count:
        extra[profile.accelerator.resource] = profile.accelerator.count
    for resource, count in extra.items():
        resources["limits"].setdefault(resource, str(count))
    volumes = [
        {"name": "opensora-config", "configMap": {"name": workload.config_map}},
        {"name": "opensora-tmp", "emptyDir": {}},
        {"name": "opensora-shm", "emptyDir": _shared_memory(profile, resources)},
    ]
    mounts = [
        {"name": "opensora-config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "opensora-tmp", "mountPath": "/tmp"},
        {"name": "opensora-shm", "mountPath": "/dev/shm"},
    ]
    if workload.token_audience is not None:
        source = {
            "audience": workload.token_audience,
            "expirationSeconds": _TOKEN_SECONDS,
            "path": "token",
        }
        volumes.append({"name": "opensora-token", "projected": {"sources": [{"serviceAccountToken": source}]}})
        mounts.append({"name": "opensora-token", "mountPath": TOKEN_FOLDER, "readOnly": True})
    if profile.host_cache is not None:
        host = {"path": profile.host_cache.host_path, "type": "DirectoryOrCreate"}
        volumes.append({"name": "opensora-cache", "hostPath": host})
        mounts.append({"name": "opensora-cache", "mountPath": profile.host_cache.mount_path})
    container: Object = {
        "name": TRAINER,
        "image": workload.image,
        "command": list(workload.command),
        "args": [_literal(argument) for argument in workload.args],
        "env": _environment(workload, given),
        "resources": {key: value for key, value in resources.items() if value},
        "volumeMounts": [*mounts, *given.get("volumeMounts", [])],
        "securityContext": _container_security(given, lock_memory=bool(profile.network.rdma_resources)),
    }
    sources = list(given.get("envFrom", []))
    if workload.storage_secret is not None:
        sources.append({"secretRef": {"name": workload.storage_secret}})
    if sources:
        container["envFrom"] = sources
    if "imagePullPolicy" in given:
        container["imagePullPolicy"] = given["imagePullPolicy"]
    spec: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": workload.grace_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
            **given.get("securityContext", {}),
        },
        "containers": [container],
        "volumes": [*volumes, *given.get("volumes", [])],
        "tolerations": _tolerations(given.get("tolerations", [])),
    }
    for key in ("nodeSelector", "imagePullSecrets", "serviceAccountName", "runtimeClassName", "schedulerName"):
        if key in given:
            spec[key] = given[key]
    if "scheduler" in topology:
        spec["schedulerName"] = topology["scheduler"]
    if workload.service is not None:
        spec["subdomain"] = workload.service
    if workload.priority_class is not None:
        spec["priorityClassName"] = workload.priority_class
    if given.get("hostNetwork"):
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    affinity = _affinity(given.get("affinity", {}), topology.get("affinity", {}), workload.avoid_nodes)
    if affinity:
        spec["affinity"] = affinity
    ours = labels_of(workload.owner, component=workload.component, attempt=workload.attempt)
    metadata: Object = {"labels": {**given.get("labels", {}), **topology.get("labels", {}), **ours}}
    annotations = {**given.get("annotations", {}), **topology.get("annotations", {})}
    if annotations:
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": spec}


def merge_templates(profile: PodTemplate, own: PodTemplate) -> Object:
    """Two templates as one, in the names of the API: maps and named lists item by item, the rest replaced; the second
    wins. Tolerations and sources of variables have no names and are put one after the other."""
    merged = to_wire(profile)
    for key, value in to_wire(own).items():
        if key in _LIST_KEYS:
            merged[key] = _merge_lists(merged.get(key, []), value, by=_LIST_KEYS[key])
        elif key in ("tolerations", "envFrom"):
            merged[key] = [*merged.get(key, []), *(item for item in value if item not in merged.get(key, []))]
        elif key == "resources":
            merged[key] = {
                part: {**merged.get(key, {}).get(part, {}), **value.get(part, {})} for part in ("requests", "limits")
            }
        elif isinstance(value, dict) and key != "affinity":
            merged[key] = {**merged.get(key, {}), **value}
        else:
            merged[key] = value
    return merged


def _merge_lists(first: Iterable[Object], second: Iterable[Object], *, by: str) -> list[Object]:
    merged = {item[by]: item for item in first}
    for item in second:
        merged[item[by]] = item
    return list(merged.values())


def _environment(workload: Workload, given: Object) -> list[Object]:
    """The operator's variables stand last and cannot be given by others: the schema refuses their names."""
    env = [{"name": name, "value": value} for name, value in sorted(workload.profile.network.env.items())]
    env = _merge_lists(env, given.get("env", []), by="name")
    ours: list[Object] = [{"name": name, "value": _literal(value)} for name, value in workload.env.items()]
    for name, path in (
        ("OPENSORA_POD_NAME", "metadata.name"),
        ("OPENSORA_POD_UID", "metadata.uid"),
        ("OPENSORA_NODE_NAME", "spec.nodeName"),
    ):
        ours.append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
    if workload.endpoint is not None:
        ours.insert(0, {"name": "AWS_ENDPOINT_URL", "value": workload.endpoint})
    return _merge_lists(env, ours, by="name")


def _literal(text: str) -> str:
    """Text that the kubelet leaves as it is: it puts the value of a variable, secrets included, for `$(NAME)`."""
    return text.replace("$", "$$")


def _container_security(given: Object, *, lock_memory: bool) -> Object:
    own = dict(given.get("containerSecurityContext", {}))
    added = list(own.pop("capabilities", {}).get("add", []))
    if lock_memory and "IPC_LOCK" not in added:
        added.append("IPC_LOCK")  # registered memory of RDMA is pinned
    capabilities: Object = {"drop": ["ALL"]}
    if added:
        capabilities["add"] = added
    return {"allowPrivilegeEscalation": False, "capabilities": capabilities, **own}


def _shared_memory(profile: TrainingProfileSpec, resources: Object) -> Object:
    """`/dev/shm`: what NCCL and data workers use; Kubernetes' own 64 MiB are too little."""
    volume = {"medium": "Memory"}
    if profile.shared_memory.size_limit is not None:
        volume["sizeLimit"] = profile.shared_memory.size_limit
    elif "memory" in resources["limits"]:
        volume["sizeLimit"] = str(int(parse_quantity(resources["limits"]["memory"]) // 2))
    return volume


def _tolerations(given: list[Object]) -> list[Object]:
    """A gang that has lost a node waits for nothing: 30 s instead of Kubernetes' 5 minutes."""
    known = {item.get("key") for item in given}
    return [
        *given,
        *(
            {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _UNREACHABLE_SECONDS}
            for key in _UNREACHABLE
            if key not in known
        ),
    ]


def _affinity(given: Object, topology: Object, avoid_nodes: Sequence[str]) -> Object:
    affinity = {**topology, **given}
    if not avoid_nodes:
        return affinity
    node = dict(affinity.get("nodeAffinity", {}))
    required = node.get("requiredDuringSchedulingIgnoredDuringExecution") or {"nodeSelectorTerms": [{}]}
    away = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": list(avoid_nodes)}
    terms = [
        {**term, "matchExpressions": [*term.get("matchExpressions", []), away]}
        for term in required["nodeSelectorTerms"]
    ]
    node["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms}
    return {**affinity, "nodeAffinity": node}


_SUFFIXES = {
    "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60,
}  # fmt: skip


def parse_quantity(text: str) -> float:
    """The number behind a quantity such as `500m` or `2Gi`."""
    match = re.fullmatch(r"([+-]?[0-9.]+)(e[+-]?[0-9]+|[a-zA-Z]*)", text)
    if match is None:
        raise ValueError(f"{text!r} is no quantity")
    number, suffix = match.groups()
    if suffix.startswith("e") and len(suffix) > 1:
        return float(number + suffix)
    return float(number) * _SUFFIXES[suffix]
