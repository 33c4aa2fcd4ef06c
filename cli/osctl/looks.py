"""What `osctl doctor` looks at. Each look is made once, when a check first needs it; one that may not or cannot be made
says why, and that is no failure."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from opensora_operator.api import (
    BATCH_SEARCH,
    CLUSTER_TRAINING_PROFILE,
    KINDS,
    SAMPLE_JOB,
    TRAINING_PROFILE,
    TRAINING_RUN,
    Kind,
)
from opensora_operator.constants import API_VERSION, GROUP, LABEL_KIND, MANAGER
from opensora_operator.permissions import RULES, Scope
from opensora_operator.settings import PREFIX
from opensora_operator.wire import parse_time

from osctl.client import EVENTS, PODS, Client, Object, Resource
from osctl.errors import ApiError, OsctlError
from osctl.kinds import resource_of
from osctl.session import Session

CUSTOM_RESOURCES = Resource(
    "apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
)
DEPLOYMENTS = Resource("apps/v1", "deployments", "Deployment")
LEASES = Resource("coordination.k8s.io/v1", "leases", "Lease")
NODES = Resource("v1", "nodes", "Node", namespaced=False)
CLUSTER_ROLES = Resource("rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole", namespaced=False)
SECRETS = Resource("v1", "secrets", "Secret")
KUEUE_GROUP = "kueue.x-k8s.io"
LEASE_SECONDS = 60.0
"""A Lease that was renewed no longer ago belongs to an operator that works: its term, and clocks that differ."""
DEFAULT_NAMESPACE = "opensora-system"
"""Where the instructions put the operator."""
_OPERATOR_LABELS = f"app.kubernetes.io/name={MANAGER},app.kubernetes.io/component=operator"
_METADATA_ALONE = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
"""Asks that an object is there, and for nothing of what is in it."""
_STORE_SECONDS = 10.0
_MAX_STORES = 5


class UnseenError(Exception):
    """Something could not be looked at; the message says why."""


@dataclass(frozen=True)
class Server:
    """The API server."""

    address: str
    version: str
    """`v1.34.1`; empty where it does not tell."""


@dataclass(frozen=True)
class Right:
    """Something that commands ask the API server for."""

    verb: str
    group: str
    resource: str
    """`pods`, or `pods/log`."""
    commands: str
    """That need it."""
    is_needed: bool = False
    """Without it hardly anything works."""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"


RIGHTS = (
    Right("list", GROUP, TRAINING_RUN.plural, "get", is_needed=True),
    Right("get", GROUP, TRAINING_RUN.plural, "status, wait", is_needed=True),
    Right("watch", GROUP, TRAINING_RUN.plural, "wait, watch"),
    Right("create", GROUP, TRAINING_RUN.plural, "train"),
    Right("patch", GROUP, TRAINING_RUN.plural, "suspend, resume, scale, restart, stop, dump"),
    Right("delete", GROUP, TRAINING_RUN.plural, "delete"),
    Right("create", GROUP, SAMPLE_JOB.plural, "sample"),
    Right("create", GROUP, BATCH_SEARCH.plural, "search"),
    Right("list", "", "pods", "status, logs"),
    Right("get", "", "pods/log", "logs"),
    Right("create", "", "pods/exec", "exec"),
    Right("create", "", "pods/portforward", "forward"),
)


@dataclass(frozen=True)
class Operator:
    """An installation of the operator, as its Deployment tells."""

    namespace: str
    name: str
    image: str
    version: str
    """Of the chart's label, else the image's tag; empty where neither tells."""
    replicas: int
    ready: int
    account: str
    """Its service account."""
    lease: str
    watched: tuple[str, ...]
    """Namespaces that it looks after; empty means all."""
    trouble: str
    """Why its pods are not ready, in Kubernetes' words."""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    def looks_after(self, namespace: str) -> bool:
        """Whether objects of a namespace are its business."""
        return not self.watched or namespace in self.watched


@dataclass(frozen=True)
class Permissions:
    """What an operator may not do although it has to, and what it may although it need not."""

    operator: Operator
    missing: tuple[str, ...]
    surplus: tuple[str, ...]


@dataclass(frozen=True)
class Store:
    """A place that run directories are in, tried from this machine."""

    uri: str
    is_asked: bool
    """Named by the user, rather than by a run."""
    problem: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Credentials:
    """A Secret that objects name for their access to storage."""

    namespace: str
    name: str
    user: str
    """An object that names it."""
    state: Literal["there", "missing", "unseen"]


class Looks:
    """Everything that was looked at for one `osctl doctor`."""

    def __init__(self, session: Session, *, run_uri: str = "", now: Callable[[], float] = time.time) -> None:
        self.session = session
        self.run_uri = run_uri
        self.now = now
        self._found: dict[str, Any] = {}

    def see(self, name: str) -> Any:
        """What a look has found. Raises UnseenError."""
        if name not in self._found:
            try:
                self._found[name] = LOOKS[name](self)
            except UnseenError as error:
                self._found[name] = error
            except OsctlError as error:
                self._found[name] = UnseenError(error.message)
        found = self._found[name]
        if isinstance(found, UnseenError):
            raise found
        return found

    @property
    def client(self) -> Client:
        """The API server, once it is known to answer. Raises UnseenError."""
        if isinstance(self.see("server"), OsctlError):
            raise UnseenError("the API server cannot be asked")
        return self.session.client

    def list(self, resource: Resource, namespace: str | None = None, **selectors: str) -> list[Object]:
        """All objects of a kind. Raises UnseenError where we may not, or there is no such kind."""
        with _explained("list", resource.plural):
            return self.client.list(resource, namespace, **selectors)

    def find(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """An object, or None. Raises UnseenError where we may not."""
        with _explained("get", resource.plural):
            return self.client.find(resource, namespace, name)

    def review(self, kind: str, spec: Mapping[str, Any], *, group: str = "authorization.k8s.io") -> Object:
        """Ask the API server who may do what. Raises UnseenError where we may not."""
        resource = Resource(f"{group}/v1", f"{kind.lower()}s", kind, namespaced=False)
        with _explained("create", resource.plural):
            body = {"apiVersion": resource.api_version, "kind": kind, **({"spec": spec} if spec else {})}
            status: Object = self.client.create(resource, None, body).get("status") or {}
            return status


@contextmanager
def _explained(verb: str, plural: str) -> Iterator[None]:
    """Refusals of the API server, as the reason why something was not seen."""
    try:
        yield
    except ApiError as error:
        if error.status == 403:
            raise UnseenError(f"you may not {verb} {plural}") from error
        if error.reason == "UnknownKind":
            raise UnseenError(f"the cluster does not know {plural}") from error
        raise


# ------------------------------------------------------------------------------------------------- server and ourselves


def _server(looks: Looks) -> Server | OsctlError:
    """The only look whose failure is a finding: everything else needs what it tells."""
    try:
        client = looks.session.client
        try:
            version = str(client.request("GET", "/version").get("gitVersion") or "")
        except ApiError as error:
            if error.status != 403:
                raise
            version = ""
        return Server(client.access.server, version)
    except OsctlError as error:
        return error
    except AttributeError:
        return OsctlError(
            f"{looks.session.client.access.server} answers, but is no API server",
            hint=f"correct the address in {looks.session.client.access.source}",
        )


def _me(looks: Looks) -> str:
    """Who we are to the API server; empty where it does not tell."""
    info = looks.review("SelfSubjectReview", {}, group="authentication.k8s.io").get("userInfo") or {}
    return str(info.get("username") or "")


def _namespace(looks: Looks) -> str:
    return looks.session.settings.namespace or looks.client.access.namespace


def _now(looks: Looks) -> float:
    """By the API server's clock, since its objects are older or younger by that one."""
    return looks.now() + (looks.client.clock_ahead or 0.0)


def _rights(looks: Looks) -> dict[Right, bool]:
    return {right: _may(looks, "SelfSubjectAccessReview", right, looks.see("namespace"), {}) for right in RIGHTS}


def _may(looks: Looks, kind: str, right: Right, namespace: str, who: Mapping[str, Any], name: str = "") -> bool:
    resource, _, subresource = right.resource.partition("/")
    asked = {
        "verb": right.verb,
        "group": right.group,
        "resource": resource,
        "subresource": subresource,
        "namespace": namespace,
        "name": name,
    }
    return bool(looks.review(kind, {"resourceAttributes": asked, **who}).get("allowed"))


# ------------------------------------------------------------------------------------------------------ installation


def _served(looks: Looks) -> frozenset[str]:
    """Kinds of ours that the API server serves."""
    with _explained("list", "kinds"):
        try:
            found = looks.client.request("GET", f"/apis/{API_VERSION}")
        except ApiError as error:
            if error.status == 404:
                return frozenset()
            raise
    return frozenset(entry["name"] for entry in found.get("resources") or () if "/" not in entry["name"])


def _definitions(looks: Looks) -> dict[Kind, Object | None]:
    return {kind: looks.find(CUSTOM_RESOURCES, None, kind.crd_name) for kind in KINDS}


def _operators(looks: Looks) -> Sequence[Operator]:
    try:
        found = looks.list(DEPLOYMENTS, labels=_OPERATOR_LABELS)
    except UnseenError:  # a right in its usual namespace alone will do
        found = looks.list(DEPLOYMENTS, DEFAULT_NAMESPACE, labels=_OPERATOR_LABELS)
        if not found:
            raise
    return [_operator(looks, body) for body in found]


def _operator(looks: Looks, body: Object) -> Operator:
    metadata, spec, status = body["metadata"], body["spec"], body.get("status") or {}
    template = spec["template"]["spec"]
    containers = template["containers"]
    container = next((entry for entry in containers if entry["name"] == "operator"), containers[0])
    settings = _settings(container)
    image = str(container.get("image") or "")
    replicas, ready = int(spec.get("replicas", 1)), int(status.get("readyReplicas") or 0)
    return Operator(
        namespace=metadata["namespace"],
        name=metadata["name"],
        image=image,
        version=(metadata.get("labels") or {}).get("app.kubernetes.io/version") or _tag(image),
        replicas=replicas,
        ready=ready,
        account=template.get("serviceAccountName") or "default",
        lease=settings.get("lease_name") or MANAGER,
        watched=tuple(filter(None, settings.get("namespaces", "").split(","))),
        trouble="" if ready >= replicas else _trouble(looks, body),
    )


def _settings(container: Mapping[str, Any]) -> dict[str, str]:
    """The operator's settings: variables, and flags, which win."""
    variables = {str(entry["name"]): str(entry.get("value") or "") for entry in container.get("env") or ()}
    given = {name[len(PREFIX) :].lower(): value for name, value in variables.items() if name.startswith(PREFIX)}
    for argument in map(str, container.get("args") or ()):
        name, _, value = argument.lstrip("-").partition("=")
        given[name.replace("-", "_")] = value
    return given


def _tag(image: str) -> str:
    name, _, _ = image.partition("@")
    return name.rpartition("/")[2].partition(":")[2]


def _trouble(looks: Looks, deployment: Object) -> str:
    """Why pods of a Deployment are not ready."""
    selector = deployment["spec"]["selector"].get("matchLabels") or {}
    labels = ",".join(f"{key}={value}" for key, value in selector.items())
    try:
        pods = looks.list(PODS, deployment["metadata"]["namespace"], labels=labels)
    except UnseenError as error:
        return str(error)
    for pod in pods:
        for container in (pod.get("status") or {}).get("containerStatuses") or ():
            waiting = (container.get("state") or {}).get("waiting")
            if waiting:
                return f"{waiting.get('reason')}: {waiting.get('message') or ''}".rstrip(": ")
    for condition in _conditions(pods) or _conditions([deployment]):
        return f"{condition.get('reason')}: {condition.get('message') or ''}".rstrip(": ")
    return ""


def _conditions(objects: Sequence[Object]) -> list[Mapping[str, Any]]:
    """Those that are false and say why."""
    return [
        condition
        for body in objects
        for condition in (body.get("status") or {}).get("conditions") or ()
        if condition.get("status") == "False" and condition.get("reason")
    ]


def _leases(looks: Looks) -> list[Object]:
    """Leases of operators; where no Deployment is to be seen, any of the usual name."""
    try:
        operators = looks.see("operators")
    except UnseenError:
        operators = ()
    if not operators:
        return looks.list(LEASES, fields=f"metadata.name={MANAGER}")
    found = [looks.find(LEASES, operator.namespace, operator.lease) for operator in operators]
    return [lease for lease in found if lease is not None]


def _outside(looks: Looks) -> str:
    """Who leads by a Lease that is fresh; empty where nobody does, or it is not to be seen."""
    try:
        leases, now = looks.see("leases"), looks.see("now")
    except UnseenError:
        return ""
    specs = [lease.get("spec") or {} for lease in leases]
    fresh = [spec for spec in specs if spec.get("renewTime") and now - parse_time(spec["renewTime"]) < LEASE_SECONDS]
    return next((str(spec["holderIdentity"]) for spec in fresh if spec.get("holderIdentity")), "")


def _permissions(looks: Looks) -> list[Permissions]:
    found = []
    for operator in looks.see("operators"):
        missing = tuple(_missing(looks, operator))
        try:
            surplus = tuple(_surplus(looks, operator))
        except UnseenError:  # that it may do too much is then not told
            surplus = ()
        found.append(Permissions(operator, missing, surplus))
    return found


def _missing(looks: Looks, operator: Operator) -> Iterator[str]:
    """Asked about the account rather than read from roles: so it does not matter how the rights were given."""
    user = f"system:serviceaccount:{operator.namespace}:{operator.account}"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{operator.namespace}", "system:authenticated"]
    who = {"user": user, "groups": groups}
    places: Mapping[Scope, Sequence[str]] = {
        Scope.OWN: [operator.namespace],
        Scope.WATCHED: operator.watched or [""],
        Scope.CLUSTER: [""],
    }
    for rule in RULES:
        for namespace in places[rule.scope]:
            for resource in rule.resources:
                for verb in rule.verbs:
                    right = Right(verb, rule.group, resource, "")
                    if not all(
                        _may(looks, "SubjectAccessReview", right, namespace, who, name) for name in rule.names or [""]
                    ):
                        yield f"{right}{f' in {namespace}' if namespace else ''}"


def _surplus(looks: Looks, operator: Operator) -> Iterator[str]:
    """What its ClusterRole has beyond the rules: a role of another version, or a right that somebody added."""
    role = looks.find(CLUSTER_ROLES, None, f"{operator.namespace}:{operator.name}")
    known = {
        (verb, rule.group, resource)
        for rule in RULES
        if rule.scope is not Scope.OWN
        for resource in rule.resources
        for verb in rule.verbs
    }
    for rule in (role or {}).get("rules") or ():
        for group in rule.get("apiGroups") or ():
            for resource in rule.get("resources") or ():
                for verb in rule.get("verbs") or ():
                    if (verb, group, resource) not in known:
                        yield f"{verb} {resource}"


# ------------------------------------------------------------------------------------------- the namespace and its runs


def _profiles(looks: Looks) -> list[Object]:
    """Profiles that objects of the namespace can have."""
    kinds = (TRAINING_PROFILE, CLUSTER_TRAINING_PROFILE)
    return [
        {**body, "kind": kind.name} for kind in kinds for body in looks.list(resource_of(kind), looks.see("namespace"))
    ]


def _objects(looks: Looks) -> list[Object]:
    """Runs, sample jobs and batch searches of the namespace."""
    kinds = (TRAINING_RUN, SAMPLE_JOB, BATCH_SEARCH)
    return [
        {**body, "kind": kind.name} for kind in kinds for body in looks.list(resource_of(kind), looks.see("namespace"))
    ]


def _pods(looks: Looks) -> list[Object]:
    return looks.list(PODS, looks.see("namespace"), labels=LABEL_KIND)


def _events(looks: Looks) -> list[Object]:
    return looks.list(EVENTS, looks.see("namespace"), fields="type=Warning")


def _nodes(looks: Looks) -> list[Object]:
    return looks.list(NODES)


def _queues(looks: Looks) -> list[Object] | None:
    """LocalQueues of the namespace; None where there is no Kueue."""
    with _explained("list", "groups"):
        groups = looks.client.request("GET", "/apis").get("groups") or ()
    versions = [group["preferredVersion"]["groupVersion"] for group in groups if group.get("name") == KUEUE_GROUP]
    if not versions:
        return None
    return looks.list(Resource(versions[0], "localqueues", "LocalQueue"), looks.see("namespace"))


# ------------------------------------------------------------------------------------------------------------ storage


def _stores(looks: Looks) -> list[Store]:
    """The URI that was asked for, else the buckets of the namespace's runs."""
    if looks.run_uri:
        return [_try_store(looks.run_uri, is_asked=True)]
    specs = [body.get("spec") or {} for body in looks.see("objects")]
    roots = {uri.split("/")[2]: spec for spec in specs if (uri := str(spec.get("runUri"))).startswith("s3://")}
    return [_try_store(spec["runUri"], spec, is_asked=False) for spec in list(roots.values())[:_MAX_STORES]]


def _try_store(uri: str, spec: Object | None = None, *, is_asked: bool) -> Store:
    from opensora.errors import OpenSoraError  # slow to import
    from osctl.run_directory import open_storage

    try:
        open_storage(uri, spec, patience_seconds=_STORE_SECONDS).check_access(write=False)
    except OpenSoraError as error:
        return Store(uri, is_asked, error.message, error.hint or "")
    return Store(uri, is_asked)


def _credentials(looks: Looks) -> list[Credentials]:
    """Secrets that profiles and live objects of the namespace name."""
    namespace = looks.see("namespace")
    named: dict[str, str] = {}
    for body in [*looks.see("profiles"), *looks.see("objects")]:
        spec = body.get("spec") or {}
        secret = ((spec.get("storage") or {}).get("secretRef") or {}).get("name")
        if secret:
            named.setdefault(str(secret), f"{body['kind']} {body['metadata']['name']}")
    return [
        Credentials(namespace, secret, user, _secret_state(looks, namespace, secret)) for secret, user in named.items()
    ]


def _secret_state(looks: Looks, namespace: str, name: str) -> Literal["there", "missing", "unseen"]:
    path = SECRETS.path(namespace, name)
    try:
        looks.client.request("GET", path, accept=_METADATA_ALONE)
    except ApiError as error:
        if error.status == 404:
            return "missing"
        if error.status == 403:
            return "unseen"
        raise
    return "there"


LOOKS: Mapping[str, Callable[[Looks], Any]] = {
    "server": _server,
    "me": _me,
    "rights": _rights,
    "served": _served,
    "definitions": _definitions,
    "operators": _operators,
    "outside": _outside,
    "version": lambda looks: importlib.metadata.version("opensora"),
    "clock": lambda looks: looks.client.clock_ahead,
    "leases": _leases,
    "permissions": _permissions,
    "profiles": _profiles,
    "objects": _objects,
    "pods": _pods,
    "events": _events,
    "nodes": _nodes,
    "queues": _queues,
    "stores": _stores,
    "credentials": _credentials,
    "namespace": _namespace,
    "now": _now,
}
"""Every look by its name, for the table of checks."""
