"""`osctl doctor`: each check on what can be found, and the whole against canned answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_api import FakeApi, refusal
from opensora_operator.api import KINDS
from opensora_operator.crd import crd
from opensora_operator.permissions import RULES, Scope
from opensora_operator.wire import format_time
from osctl import checkup
from osctl.errors import OsctlError
from osctl.findings import Finding, State
from osctl.looks import RIGHTS, Credentials, Operator, Permissions, Server, Store

NOW = 1_000_000.0
TEAM = "/api/v1/namespaces/team"
OURS = "/apis/opensora.dev/v1alpha1"
SYSTEM = "opensora-system"


# --------------------------------------------------------------------------------------------------- server and rights


@pytest.mark.parametrize(
    ("server", "state", "words"),
    [
        (Server("https://c", "v1.34.1"), State.OK, "https://c answers, Kubernetes v1.34.1"),
        (Server("https://c", "v1.31.0-eks-123"), State.OK, "v1.31.0-eks-123"),
        (Server("https://c", "v2.0.0"), State.OK, "v2.0.0"),
        (Server("https://c", "v1.30.9"), State.FAILED, "needs 1.31 or newer"),
        (Server("https://c", ""), State.WARNING, "does not tell its version"),
        (OsctlError("https://c cannot be reached", hint="check that"), State.FAILED, "cannot be reached"),
    ],
)
def test_server(server: Server | OsctlError, state: State, words: str) -> None:
    _expect(checkup.check_server(server), state, words)


@pytest.mark.parametrize(
    ("ahead", "state", "words"),
    [
        (-0.9, State.OK, "the same time"),
        (25.0, State.WARNING, "25s behind"),
        (-90.0, State.WARNING, "1m30s ahead of"),
        (3600.0, State.FAILED, "1h behind the API server's: logins and requests"),
        (None, State.NOT_SEEN, "does not tell the time"),
    ],
)
def test_clock(ahead: float | None, state: State, words: str) -> None:
    _expect(checkup.check_clock(ahead), state, words)


def test_rights_that_are_missing_are_given_by_one_command() -> None:
    allowed = dict.fromkeys(RIGHTS, True)
    _expect(checkup.check_rights("alice", allowed, "team"), State.OK, "alice may do in namespace team")
    no_exec = {right: right.resource != "pods/exec" for right in RIGHTS}
    finding = checkup.check_rights("Alice@example.com", no_exec, "team")
    _expect(finding, State.WARNING, "may not create pods/exec in namespace team: exec will not work")
    assert finding.mend == (
        "kubectl --namespace team create rolebinding alice-example.com-edit --clusterrole edit --user Alice@example.com"
    )
    none = checkup.check_rights("system:serviceaccount:ci:bot", dict.fromkeys(RIGHTS, False), "team")
    _expect(none, State.FAILED, "get, status, wait, watch, train")
    assert none.mend.endswith("--serviceaccount ci:bot")


# -------------------------------------------------------------------------------------------------------- installation


def test_kinds() -> None:
    plurals = [kind.plural for kind in KINDS]
    _expect(checkup.check_kinds(frozenset(plurals)), State.OK, "are served")
    _expect(checkup.check_kinds(frozenset(plurals[1:])), State.FAILED, f"does not know {plurals[0]}")
    nothing = checkup.check_kinds(frozenset())
    _expect(nothing, State.FAILED, "nothing is installed")
    assert nothing.mend.startswith("helm upgrade --install opensora-operator charts/opensora-operator")


def test_definitions() -> None:
    good: dict[Any, Any] = {kind: crd(kind) for kind in KINDS}
    _expect(checkup.check_schemas(good), State.OK, "those of this osctl")
    first = KINDS[0]
    _expect(checkup.check_schemas({**good, first: None}), State.FAILED, f"not installed: {first.crd_name}")
    other = crd(first)
    other["metadata"]["annotations"] = {}
    _expect(checkup.check_schemas({**good, first: other}), State.WARNING, first.crd_name)
    going = crd(first)
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    _expect(checkup.check_schemas({**good, first: going}), State.FAILED, "is being deleted")
    clash = crd(first) | {
        "status": {"conditions": [{"type": "NamesAccepted", "status": "False", "reason": "Conflict", "message": "tr"}]}
    }
    _expect(checkup.check_schemas({**good, first: clash}), State.FAILED, "Conflict: tr")


def _operator(**more: Any) -> Operator:
    values: dict[str, Any] = {
        "namespace": SYSTEM, "name": "opensora-operator", "image": "r/opensora-operator:0.1.0", "version": "0.1.0",
        "replicas": 1, "ready": 1, "account": "opensora-operator", "lease": "opensora-operator", "watched": (),
        "trouble": "",
    }  # fmt: skip
    return Operator(**(values | more))


@pytest.mark.parametrize(
    ("operators", "outside", "state", "words"),
    [
        ([_operator()], "", State.OK, "opensora-system/opensora-operator is ready"),
        ([], "", State.FAILED, "no operator is installed"),
        ([], "laptop-1", State.WARNING, "laptop-1 works outside this cluster"),
        ([_operator(ready=0, trouble="ImagePullBackOff: no")], "", State.FAILED, "no ready pod: ImagePullBackOff: no"),
        ([_operator(ready=1, replicas=2)], "", State.WARNING, "1 of 2 pods ready"),
        ([_operator(ready=0, replicas=0)], "", State.FAILED, "scaled to 0"),
        ([_operator(watched=("a", "b"))], "", State.FAILED, "does not look after namespace team, only after a, b"),
        ([_operator(watched=("a",)), _operator(name="x", watched=("team",))], "", State.OK, f"{SYSTEM}/x"),
        ([_operator(), _operator(name="other")], "", State.WARNING, "get in each other's way"),
    ],
)
def test_operator(operators: list[Operator], outside: str, state: State, words: str) -> None:
    _expect(checkup.check_operator(operators, outside, "team"), state, words)


def test_version() -> None:
    _expect(checkup.check_version([_operator()], "0.1.0"), State.OK, "both of version 0.1.0")
    _expect(checkup.check_version([_operator(version="0.2.0")], "0.1.0"), State.WARNING, "of version 0.2.0")
    _expect(checkup.check_version([_operator(version="")], "0.1.0"), State.NOT_SEEN, "does not tell")
    _expect(checkup.check_version([], "0.1.0"), State.NOT_SEEN, "no operator")


def _lease(holder: str = "op-1", *, ago: float | None = 1.0) -> dict[str, Any]:
    spec: dict[str, Any] = {"holderIdentity": holder, "leaseDurationSeconds": 15}
    if ago is not None:
        spec["renewTime"] = format_time(NOW - ago)
    return {"metadata": {"namespace": SYSTEM, "name": "opensora-operator"}, "spec": spec}


@pytest.mark.parametrize(
    ("leases", "state", "words"),
    [
        ([_lease()], State.OK, "op-1 leads"),
        ([_lease(ago=600)], State.FAILED, "op-1 renewed the Lease opensora-system/opensora-operator 10m ago"),
        ([_lease(ago=None)], State.FAILED, "never"),
        ([_lease("")], State.FAILED, "nobody holds the Lease"),
        ([_lease(), _lease("")], State.FAILED, "nobody holds"),
        ([], State.FAILED, "no operator has ever worked"),
    ],
)
def test_leader(leases: list[dict[str, Any]], state: State, words: str) -> None:
    _expect(checkup.check_leader(leases, NOW), state, words)


def test_permissions() -> None:
    def entry(missing: tuple[str, ...] = (), surplus: tuple[str, ...] = ()) -> Permissions:
        return Permissions(_operator(), missing, surplus)

    _expect(checkup.check_permissions([entry()]), State.OK, "may do what it has to")
    _expect(
        checkup.check_permissions([entry(("list pods", "get nodes"))]), State.FAILED, "may not list pods, get nodes"
    )
    _expect(checkup.check_permissions([entry(), entry(surplus=("get secrets",))]), State.WARNING, "may get secrets")
    _expect(checkup.check_permissions([]), State.NOT_SEEN, "no operator")


# ------------------------------------------------------------------------------------------- what runs are made from


def _profile(name: str = "h200", *, namespace: str = "", **spec: Any) -> dict[str, Any]:
    kind = "TrainingProfile" if namespace else "ClusterTrainingProfile"
    values = {"default": True, "image": "r/trainer:1", "accelerator": {"resource": "nvidia.com/gpu", "count": 8}}
    place = {"namespace": namespace} if namespace else {}
    return {"kind": kind, "metadata": {"name": name, **place}, "spec": {**values, **spec}}


@pytest.mark.parametrize(
    ("profiles", "state", "words", "mend"),
    [
        ([_profile()], State.OK, "ClusterTrainingProfile h200 is the default, with image r/trainer:1", ""),
        ([_profile(), _profile("own", namespace="team")], State.OK, "TrainingProfile own is the default", ""),
        ([_profile(default=False)], State.WARNING, "no default profile", "clustertrainingprofile.yaml"),
        ([_profile(), _profile("x")], State.WARNING, "h200 and x", "patch clustertrainingprofile x --type merge"),
        ([_profile(namespace="team", image=None)], State.WARNING, "no image", "--namespace team patch trainingprofile"),
    ],
)
def test_profiles(profiles: list[Any], state: State, words: str, mend: str) -> None:
    finding = checkup.check_profiles(profiles, "team")
    _expect(finding, state, words)
    assert mend in finding.mend


def test_storage() -> None:
    _expect(checkup.check_storage([Store("s3://b/a", False)]), State.OK, "s3://b/a can be read from here")
    _expect(checkup.check_storage([]), State.NOT_SEEN, "--run-uri")
    _expect(checkup.check_storage([Store("s3://b/a", False, "refused", "log in")]), State.WARNING, "refused")
    asked = checkup.check_storage([Store("s3://b/a", True, "refused", "log in")])
    assert asked == Finding(State.FAILED, "refused", "log in")


def test_secrets() -> None:
    there = Credentials("team", "store", "TrainingRun first", "there")
    missing = Credentials("team", "keys", "TrainingRun second", "missing")
    unseen = Credentials("team", "other", "TrainingRun third", "unseen")
    _expect(checkup.check_credentials([]), State.OK, "names a Secret")
    _expect(checkup.check_credentials([there]), State.OK, "Secret store: there")
    _expect(checkup.check_credentials([there, unseen]), State.NOT_SEEN, "other: you may not get secrets")
    finding = checkup.check_credentials([there, unseen, missing])
    _expect(finding, State.FAILED, "TrainingRun second names the Secret keys, which is not in namespace team")
    assert finding.mend.startswith("kubectl --namespace team create secret generic keys")


def _node(name: str = "gpu-1", *, gpus: int = 8, ready: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": more.get("labels", {})},
        "spec": {"taints": more.get("taints", []), "unschedulable": more.get("unschedulable", False)},
        "status": {
            "conditions": [{"type": "Ready", "status": "True" if ready else "Unknown"}],
            "allocatable": {"cpu": "64", "nvidia.com/gpu": str(gpus)} if gpus else {"cpu": "64"},
        },
    }


TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
H200 = {"nvidia.com/gpu.product": "NVIDIA-H200"}


@pytest.mark.parametrize(
    ("nodes", "profile", "state", "words"),
    [
        ([_node(labels=H200), _node("gpu-2")], _profile(), State.OK, "2 ready, 16 nvidia.com/gpu (NVIDIA-H200)"),
        ([_node(gpus=0)], None, State.OK, "1 ready, none with nvidia.com/gpu"),
        ([_node(gpus=0)], _profile(accelerator={"count": 0}), State.OK, "1 ready"),
        ([_node(gpus=0)], _profile(), State.FAILED, "asks for 8 nvidia.com/gpu on a node; the most that one has is 0"),
        ([_node(gpus=4)], _profile(), State.FAILED, "the most that one has is 4"),
        ([], _profile(), State.FAILED, "none of 0 nodes"),
        ([_node(ready=False)], _profile(), State.FAILED, "none of 1 nodes is ready"),
        ([_node(unschedulable=True)], _profile(), State.FAILED, "none of 1 nodes is ready"),
        ([_node(), _node("gpu-2", ready=False)], _profile(), State.WARNING, "1 of 2 nodes are not ready: gpu-2"),
        ([_node(taints=[TAINT])], _profile(), State.FAILED, "does not tolerate the taint nvidia.com/gpu"),
        ([_node(taints=[TAINT]), _node("free")], _profile(), State.OK, "2 ready"),
    ],
)
def test_nodes(nodes: list[Any], profile: Any, state: State, words: str) -> None:
    _expect(checkup.check_nodes(nodes, [] if profile is None else [profile], "team"), state, words)


@pytest.mark.parametrize(
    ("toleration", "is_tolerated"),
    [
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Equal", "value": "present", "effect": "NoSchedule"}, True),
        ({"key": "nvidia.com/gpu", "value": "other"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_taints_are_tolerated_by_the_rules_of_kubernetes(toleration: Any, is_tolerated: bool) -> None:
    profile = _profile(podTemplate={"tolerations": [toleration]})
    finding = checkup.check_nodes([_node(taints=[TAINT])], [profile], "team")
    assert (finding.state is State.OK) == is_tolerated


def _object(name: str = "first", *, phase: str | None = "Running", age: float = 3600.0, **more: Any) -> dict[str, Any]:
    status: dict[str, Any] = {} if phase is None else {"phase": phase, "observedGeneration": 1}
    return {
        "kind": "TrainingRun",
        "metadata": {"name": name, "generation": 1, "creationTimestamp": format_time(NOW - age)},
        "spec": {"runUri": f"s3://b/{name}", **more.get("spec", {})},
        "status": {**status, **more.get("status", {})},
    }


def _queue(name: str = "research", **condition: str) -> dict[str, Any]:
    found = {"type": "Active", "status": "True", **condition}
    return {"metadata": {"name": name}, "status": {"conditions": [found]}}


QUEUED = _object(phase="Queued", spec={"scheduling": {"queue": "research"}})


@pytest.mark.parametrize(
    ("queues", "objects", "state", "words"),
    [
        (None, [_object()], State.OK, "no Kueue"),
        (None, [QUEUED], State.FAILED, "first waits for queue research, but Kueue is not installed"),
        (None, [{**QUEUED, "status": {"phase": "Succeeded"}}], State.OK, "no Kueue"),
        ([_queue()], [QUEUED], State.OK, "research in namespace team; waiting for admission: first"),
        ([_queue("other")], [QUEUED], State.FAILED, "names queue research; namespace team has other"),
        ([], [QUEUED], State.FAILED, "has no LocalQueue"),
        ([_queue(status="False", reason="Gone", message="no")], [], State.FAILED, "admits nothing: Gone: no"),
    ],
)
def test_queue(queues: Any, objects: list[Any], state: State, words: str) -> None:
    _expect(checkup.check_queue(queues, [], objects, "team"), state, words)


def test_the_default_profiles_queue_counts_too() -> None:
    profile = _profile(scheduling={"queue": "research"})
    _expect(checkup.check_queue(None, [profile], [], "team"), State.FAILED, "ClusterTrainingProfile h200 waits for")


# -------------------------------------------------------------------------------------------------- what is going on


@pytest.mark.parametrize(
    ("body", "state", "words"),
    [
        (_object(), State.OK, "has looked at all 1"),
        (_object(phase=None), State.FAILED, "has not looked at TrainingRun first"),
        (_object(phase=None, age=5.0), State.OK, "all 1"),
        (_object(phase=None, spec={"managedBy": "kueue.x-k8s.io/multikueue"}), State.OK, "all 1"),
        (_object(status={"observedGeneration": 0}), State.FAILED, "has not looked at"),
        (
            _object(status={"conditions": [{"type": "Accepted", "status": "False", "message": "no ConfigMap c"}]}),
            State.WARNING,
            "first is not accepted: no ConfigMap c",
        ),
    ],
)
def test_runs(body: Any, state: State, words: str) -> None:
    _expect(checkup.check_noticed([body], NOW, "team"), state, words)


def test_no_runs_are_no_problem() -> None:
    _expect(checkup.check_noticed([], NOW, "team"), State.OK, "no runs in namespace team")


def _pod(name: str = "first-a1-0", *, node: str = "gpu-1", age: float = 300.0, **more: Any) -> dict[str, Any]:
    labels = {"opensora.dev/kind": "TrainingRun", "opensora.dev/name": "first", "opensora.dev/uid": "u"}
    metadata = {"name": name, "uid": name, "labels": labels, "creationTimestamp": format_time(NOW - age)}
    if "deleted" in more:
        metadata |= {"deletionTimestamp": format_time(NOW - more["deleted"] + 30), "deletionGracePeriodSeconds": 30}
    status: dict[str, Any] = {"phase": more.get("phase", "Running" if node else "Pending")}
    if "unschedulable" in more:
        condition = {"type": "PodScheduled", "status": "False", "reason": "x", "message": more["unschedulable"]}
        status["conditions"] = [condition]
    if "waiting" in more:
        state = {"waiting": {"reason": more["waiting"], "message": "it is so"}}
        status["containerStatuses"] = [{"name": "trainer", "state": state}]
    return {"metadata": metadata, "spec": {"nodeName": node} if node else {}, "status": status}


@pytest.mark.parametrize(
    ("pod", "state", "words"),
    [
        (_pod(), State.OK, "every pod has a node"),
        (_pod(node="", unschedulable="0/3 nodes are available"), State.WARNING, "0/3 nodes are available"),
        (_pod(node=""), State.FAILED, "no scheduler has said why"),
        (_pod(node="", age=5.0), State.OK, "1 pod about to get a node"),
    ],
)
def test_scheduling(pod: Any, state: State, words: str) -> None:
    _expect(checkup.check_scheduling([pod], NOW, "team"), state, words)


@pytest.mark.parametrize(
    ("pod", "state", "words"),
    [
        (_pod(), State.OK, "1 pod alive, none is stuck"),
        (_pod(deleted=60.0), State.OK, "none is stuck"),
        (_pod(deleted=600.0), State.FAILED, "first-a1-0 on gpu-1 since 10m"),
        (_pod(deleted=600.0, phase="Failed"), State.OK, "none is stuck"),
        (_pod(waiting="ImagePullBackOff"), State.WARNING, "first-a1-0: ImagePullBackOff: it is so"),
        (_pod(waiting="ContainerCreating"), State.OK, "none is stuck"),
    ],
)
def test_pods(pod: Any, state: State, words: str) -> None:
    _expect(checkup.check_pods([pod], NOW, "team"), state, words)


def _event(reason: str = "FailedCreate", *, of: str = "first-a1", ago: float = 60.0) -> dict[str, Any]:
    return {
        "metadata": {"creationTimestamp": format_time(NOW - ago)},
        "involvedObject": {"kind": "Job", "name": of},
        "reason": reason,
        "message": "exceeded quota",
        "lastTimestamp": format_time(NOW - ago),
    }


@pytest.mark.parametrize(
    ("events", "objects", "state", "words"),
    [
        ([_event()], [_object()], State.WARNING, "FailedCreate: Job first-a1: exceeded quota (1m ago)"),
        ([_event(ago=60), _event("Unhealthy", ago=30)], [_object()], State.WARNING, "Unhealthy"),
        ([_event(ago=7200)], [_object()], State.OK, "no warnings"),
        ([_event(of="web")], [_object()], State.OK, "no warnings"),
        ([_event()], [_object(phase="Succeeded")], State.OK, "no warnings"),
    ],
)
def test_events(events: list[Any], objects: list[Any], state: State, words: str) -> None:
    _expect(checkup.check_events(events, objects, NOW, "team"), state, words)


def _expect(finding: Finding, state: State, words: str) -> None:
    assert finding.state is state
    assert words in finding.message
    assert bool(finding.mend) == (state in (State.WARNING, State.FAILED)), "what is wrong can be mended"


# ----------------------------------------------------------------------------------------------------------- the whole


def _deployment() -> dict[str, Any]:
    container = {"name": "operator", "image": "r/opensora-operator:0.1.0", "args": ["--lease-name=opensora-operator"]}
    labels = {"app.kubernetes.io/name": "opensora-operator"}
    return {
        "metadata": {"name": "opensora-operator", "namespace": SYSTEM, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"spec": {"serviceAccountName": "opensora-operator", "containers": [container]}},
        },
        "status": {"readyReplicas": 1},
    }


def _items(*items: Any) -> dict[str, Any]:
    return {"items": list(items), "metadata": {}}


@pytest.fixture
def healthy(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """A cluster in which all is well."""
    monkeypatch.setattr("osctl.looks.importlib.metadata.version", lambda name: "0.1.0")
    rules = [
        {"apiGroups": [rule.group], "resources": list(rule.resources), "verbs": list(rule.verbs)}
        for rule in RULES
        if rule.scope is not Scope.OWN
    ]
    lease = _lease()
    lease["spec"]["renewTime"] = format_time(time.time())
    api.on("GET", "/version", {"gitVersion": "v1.34.1"})
    user = {"status": {"userInfo": {"username": "alice"}}}
    api.on("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", user)
    for kind in ("selfsubjectaccessreviews", "subjectaccessreviews"):
        api.on("POST", f"/apis/authorization.k8s.io/v1/{kind}", {"status": {"allowed": True}})
    api.on("GET", OURS, {"resources": [{"name": kind.plural} for kind in KINDS]})
    for kind in KINDS:
        api.on("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{kind.crd_name}", crd(kind))
    api.on("GET", "/apis/apps/v1/deployments", _items(_deployment()))
    api.on("GET", f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/opensora-operator", lease)
    role = f"{SYSTEM}%3Aopensora-operator"
    api.on("GET", f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{role}", {"rules": rules})
    api.on("GET", f"{OURS}/namespaces/team/trainingprofiles", _items())
    api.on("GET", f"{OURS}/clustertrainingprofiles", _items(_profile(accelerator={"count": 0})))
    for plural in ("trainingruns", "samplejobs", "batchsearches"):
        api.on("GET", f"{OURS}/namespaces/team/{plural}", _items())
    api.on("GET", f"{TEAM}/pods", _items())
    api.on("GET", f"{TEAM}/events", _items())
    api.on("GET", "/api/v1/nodes", _items(_node()))
    api.on("GET", "/apis", {"groups": []})
    return api


GOLDEN_80 = """\
CHECK        STATE     FINDING
server       ok        SERVER answers, Kubernetes v1.34.1
clock        ok        this machine and the API server have the same time
rights       ok        alice may do in namespace team what all commands need
kinds        ok        trainingruns, samplejobs, batchsearches and 2 more are
                       served
definitions  ok        the definitions are those of this osctl
operator     ok        opensora-system/opensora-operator is ready
version      ok        operator and osctl are both of version 0.1.0
leader       ok        op-1 leads
permissions  ok        opensora-system/opensora-operator may do what it has to
profiles     ok        ClusterTrainingProfile h200 is the default, with image
                       r/trainer:1
storage      not seen  no run of this namespace has its directory in a bucket;
                       --run-uri URI tries one
secrets      ok        no profile and no run names a Secret for its storage
nodes        ok        1 ready, 8 nvidia.com/gpu
queue        ok        no Kueue, and nobody names a queue: runs start at once
scheduling   ok        every pod has a node
pods         ok        0 pods alive, none is stuck
runs         ok        no runs in namespace team
events       ok        no warnings about runs in the last hour
"""


def test_when_all_is_well_the_table_says_so(healthy: FakeApi, osctl: Any) -> None:
    result = osctl("doctor")
    assert result.out.replace(healthy.url, "SERVER") == GOLDEN_80
    assert (result.code, result.err) == (0, "17 ok, 1 not seen\n")
    assert not [path for method, path, _ in healthy.writes() if "reviews" not in path], "it changes nothing"


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_fits_the_terminal_and_says_the_same(
    healthy: FakeApi, osctl: Any, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = osctl("doctor").out.replace(healthy.url, "SERVER")
    assert max(map(len, out.splitlines())) <= width
    assert out.split() == GOLDEN_80.split()
    assert len(out.splitlines()) == (22 if width == 80 else 19)


def test_colour_is_added_and_nothing_taken_away(healthy: FakeApi, osctl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSCTL_COLOR", "always")
    out = osctl("doctor").out
    assert "\x1b[32mok\x1b[0m" in out
    plain = out.replace("\x1b[32m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert plain.replace(healthy.url, "SERVER") == GOLDEN_80


def test_what_fails_ends_in_the_command_that_mends_it(healthy: FakeApi, osctl: Any) -> None:
    healthy.on("GET", "/apis/apps/v1/deployments", _items())
    healthy.on("GET", "/apis/coordination.k8s.io/v1/leases", _items())
    result = osctl("doctor")
    assert result.code == 1
    assert result.err == "13 ok, 2 failed, 3 not seen\n"
    lines = result.out.splitlines()
    start = lines.index("operator     failed    no operator is installed in this cluster")
    assert lines[start + 1 : start + 5] == [
        "                       mend: helm upgrade --install opensora-operator",
        "                             charts/opensora-operator --namespace",
        "                             opensora-system --create-namespace",
        "                             --reset-then-reuse-values --wait",
    ]
    assert osctl("doctor", "-o", "name").out.split() == ["operator", "leader"]


def test_json_is_the_same_table(healthy: FakeApi, osctl: Any) -> None:
    healthy.on("GET", "/api/v1/nodes", refusal(403, "Forbidden", "no"))
    result = osctl("doctor", "-o", "json")
    data = json.loads(result.out)
    assert [entry["check"] for entry in data["checks"]] == [check.name for check in checkup.CHECKS]
    assert data["checks"][12] == {
        "check": "nodes", "state": "not seen", "message": "you may not list nodes", "mend": "",
    }  # fmt: skip
    assert data["count"] == {"ok": 16, "warning": 0, "failed": 0, "not seen": 2}
    assert (result.code, yaml.safe_load(osctl("doctor", "-o", "yaml").out)) == (0, data)


def test_without_any_right_everything_is_not_seen_and_one_command_helps(healthy: FakeApi, osctl: Any) -> None:
    for method, path in list(healthy.answers):
        if path != "/version" and "selfsubject" not in path:
            healthy.on(method, path, refusal(403, "Forbidden", "no"))
    for path in ("/apis/apps/v1/namespaces/opensora-system/deployments", "/apis/coordination.k8s.io/v1/leases"):
        healthy.on("GET", path, refusal(403, "Forbidden", "no"))
    healthy.on("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", {"status": {"allowed": False}})
    data = json.loads(osctl("doctor", "-o", "json").out)
    states = {entry["check"]: entry["state"] for entry in data["checks"]}
    assert {check for check, state in states.items() if state == "ok"} == {"server", "clock"}
    assert [check for check, state in states.items() if state == "failed"] == ["rights"]
    messages = {entry["message"] for entry in data["checks"] if entry["state"] == "not seen"}
    assert all(message.startswith("you may not ") for message in messages), messages


def test_a_cluster_with_nothing_installed_says_so_once(healthy: FakeApi, osctl: Any) -> None:
    for method, path in list(healthy.answers):
        if "opensora.dev" in path:
            del healthy.answers[method, path]
    for kind in KINDS:
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{kind.crd_name}"
        healthy.on("GET", path, refusal(404, "NotFound", "no", name=kind.crd_name))
    healthy.on("GET", "/apis/apps/v1/deployments", _items())
    healthy.on("GET", "/apis/coordination.k8s.io/v1/leases", _items())
    data = json.loads(osctl("doctor", "-o", "json").out)
    failed = {entry["check"]: entry["mend"] for entry in data["checks"] if entry["state"] == "failed"}
    assert list(failed) == ["kinds", "definitions", "operator", "leader"]
    assert len(set(failed.values())) == 1, "one command mends it"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no kubeconfig"),
        ("{", "cannot be read"),
        ("clusters: []\n", "has no current context"),
        ("current-context: x\n", "has no context 'x'"),
    ],
)
def test_without_a_cluster_the_first_row_tells(osctl: Any, home: Path, text: str | None, words: str) -> None:
    if text is not None:
        (home / ".kube").mkdir()
        (home / ".kube/config").write_text(text)
    result = osctl("doctor", "-o", "json")
    first, *rest = json.loads(result.out)["checks"]
    assert (result.code, first["check"], first["state"]) == (1, "server", "failed")
    assert words in first["message"]
    assert {entry["message"] for entry in rest} == {"the API server cannot be asked"}


def test_storage_can_be_tried_without_a_cluster(osctl: Any, home: Path) -> None:
    (home / "run").mkdir()
    checks = json.loads(osctl("doctor", "--run-uri", str(home / "run"), "-o", "json").out)["checks"]
    assert {"check": "storage", "state": "ok", "message": f"{home}/run can be read from here", "mend": ""} in checks
    checks = json.loads(osctl("doctor", "--run-uri", "gs://x/y", "-o", "json").out)["checks"]
    storage = next(entry for entry in checks if entry["check"] == "storage")
    assert (storage["state"], storage["mend"]) == ("failed", "use a local path or s3://bucket")


def test_an_address_of_something_else_is_told(api: FakeApi, osctl: Any) -> None:
    api.on("GET", "/version", "<html>hello</html>")
    first = json.loads(osctl("doctor", "-o", "json").out)["checks"][0]
    assert first["state"] == "failed"
    assert "answers, but is no API server" in first["message"]


def test_secrets_are_asked_for_without_what_is_in_them(healthy: FakeApi, osctl: Any) -> None:
    profile = _profile(accelerator={"count": 0}, storage={"secretRef": {"name": "keys"}})
    healthy.on("GET", f"{OURS}/clustertrainingprofiles", _items(profile))
    healthy.on("GET", f"{TEAM}/secrets/keys", {"kind": "PartialObjectMetadata"})
    assert osctl("doctor").code == 0
    asked = next(request for request in healthy.requests if request.path.endswith("/secrets/keys"))
    assert "PartialObjectMetadata" in asked.headers["Accept"]
    assert "," not in asked.headers["Accept"], "nothing else would do"
