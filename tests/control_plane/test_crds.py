"""The kinds of the API on a real API server: what it fills in, what it refuses and in which words, what it shows."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from control_plane import ApiError, ControlPlane
from opensora_operator.api import (
    BATCH_SEARCH,
    CLUSTER_TRAINING_PROFILE,
    KINDS,
    SAMPLE_JOB,
    TRAINING_PROFILE,
    TRAINING_RUN,
    Kind,
)
from opensora_operator.crd import crd
from opensora_operator.fields import FieldInfo, Immutable, fields_of, is_optional, split, unwrap_optional
from opensora_operator.wire import from_wire, to_wire

pytestmark = pytest.mark.cluster

SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"
FULL: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("full_objects.yaml").read_text(encoding="utf-8")
)
"""Kind → spec and status with every field set."""
LEAST: dict[str, dict[str, Any]] = {
    "TrainingRun": {"runUri": "s3://bucket/run", "config": {"inline": "dtype: bf16"}},
    "SampleJob": {
        "checkpoint": {"runRef": {"name": "run"}},
        "prompts": {"inline": ["a cat"]},
        "outputUri": "s3://bucket/clips",
    },
    "BatchSearch": {"config": {"inline": "dtype: bf16"}},
    "TrainingProfile": {},
    "ClusterTrainingProfile": {},
}
"""Kind → a spec with what is required alone."""
Object = dict[str, Any]
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Api:
    """The API server, for one namespace."""

    control_plane: ControlPlane
    namespace: str

    def path(self, kind: Kind) -> str:
        scope = f"namespaces/{self.namespace}/" if kind.namespaced else ""
        return f"/apis/opensora.dev/v1alpha1/{scope}{kind.plural}"

    def create(self, body: Object, *, dry_run: bool = False) -> Object:
        query = "?fieldValidation=Strict&fieldManager=tests" + ("&dryRun=All" if dry_run else "")
        return self._send("POST", self.path(_kind_of(body)) + query, body)

    def replace(self, body: Object, *, subresource: str = "", dry_run: bool = False) -> Object:
        path = f"{self.path(_kind_of(body))}/{body['metadata']['name']}{subresource}?fieldValidation=Strict"
        return self._send("PUT", path + ("&dryRun=All" if dry_run else ""), body)

    def create_with_status(self, body: Object) -> Object:
        created = self.create({key: value for key, value in body.items() if key != "status"})
        return (
            self.replace(created | {"status": body["status"]}, subresource="/status") if "status" in body else created
        )

    def get(self, body: Object) -> Object:
        return self._send("GET", f"{self.path(_kind_of(body))}/{body['metadata']['name']}")

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return self.control_plane.kubectl("--namespace", self.namespace, *arguments, input=input)

    def _send(self, method: str, path: str, body: Object | None = None) -> Object:
        answer = self.control_plane.request(method, path, body)
        assert isinstance(answer, dict)
        return answer


@pytest.fixture(scope="module")
def api(control_plane: ControlPlane) -> Iterator[Api]:
    namespace = f"crds-{uuid4().hex[:8]}"
    control_plane.kubectl("create", "namespace", namespace)
    yield Api(control_plane, namespace)
    # A default profile that stays would change the runs of other tests.
    control_plane.kubectl("delete", "clustertrainingprofiles", "-l", "made-by=test-crds")


def least(kind: Kind, name: str | None = None, **spec: Any) -> Object:
    """A new object with what is required, and with `spec` over it."""
    return _object(kind, {"spec": {**LEAST[kind.name], **spec}}, name)


def hollow(kind: Kind) -> Object:
    """A new object with what is required, in which every group of fields is given, and empty."""
    return least(kind, **{**_empty_groups(kind.spec), **LEAST[kind.name]})


def _empty_groups(cls: type) -> Object:
    return {
        info.wire_name: _empty_groups(info.hint)
        for info in fields_of(cls)
        if isinstance(info.hint, type) and dataclasses.is_dataclass(info.hint) and not info.is_required
    }


def full(kind: Kind, name: str | None = None) -> Object:
    """A new object in which every field is set."""
    return _object(kind, FULL[kind.name], name)


def _object(kind: Kind, body: Object, name: str | None) -> Object:
    metadata = {"name": name or f"x-{uuid4().hex[:8]}", "labels": {"made-by": "test-crds"}}
    return {"apiVersion": "opensora.dev/v1alpha1", "kind": kind.name, "metadata": metadata, **copy.deepcopy(body)}


def refusal(action: Callable[[], object]) -> tuple[int, str]:
    """The code and the message that the API server refuses an action with."""
    with pytest.raises(ApiError) as caught:
        action()
    return caught.value.code, str(caught.value).removeprefix(f"{caught.value.code}: ")


def _problems(message: str) -> list[tuple[str, str]]:
    """(field, what is wrong with it) of every rule that a message tells of."""
    text = re.sub(r"^\S+ \S+ is invalid: \[?", "", message).removesuffix("]" if " is invalid: [" in message else "")
    parts = re.split(r'(?:^|, )(\S+): Invalid value: "\w*": ', text)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _kind_of(body: Object) -> Kind:
    return next(kind for kind in KINDS if kind.name == body["kind"])


def _schema(kind: Kind) -> Object:
    schema: Object = crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def _put(body: Object, place: Place, value: Any) -> None:
    """Set, or remove, what is at a place; objects on the way are made."""
    inner: Any = body
    for step in place[:-1]:
        inner = inner[step] if isinstance(step, int) else inner.setdefault(step, {})
    if value is _REMOVE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value


# ---------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_field_can_be_set_and_comes_back_as_it_was(api: Api, kind: Kind) -> None:
    body = full(kind)
    stored = api.create_with_status(body)
    assert _only_given(stored["spec"], body["spec"]) == body["spec"]
    assert stored.get("status") == body.get("status")


def test_the_full_objects_leave_out_no_field() -> None:
    seen: dict[tuple[str, str], bool] = {}
    for kind in KINDS:
        _note_fields(kind.spec, FULL[kind.name]["spec"], seen)
        if kind.status is not None:
            _note_fields(kind.status, FULL[kind.name]["status"], seen)
    assert {field for field, is_set in seen.items() if not is_set} == {
        # Each excludes another one that is set.
        ("ConfigSource", "ref"),
        ("SampleConfigSource", "inline"),
        ("SampleConfigSource", "file"),
        ("CheckpointSource", "uri"),
        ("Prompts", "ref"),
        ("SampleJobSpec", "imageSize"),
    }


def _note_fields(cls: type, value: Object, seen: dict[tuple[str, str], bool]) -> None:
    """Note for every field of a class, and of those that it is made of, whether it is set anywhere."""
    for info in fields_of(cls):
        key = (cls.__name__, info.wire_name)
        seen[key] = seen.get(key, False) or info.wire_name in value
        hint, _ = unwrap_optional(info.hint, info.markers)
        inner = [value[info.wire_name]] if info.wire_name in value else []
        if typing.get_origin(hint) is tuple:
            hint, _ = split(typing.get_args(hint)[0])
            inner = [item for items in inner for item in items]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            for item in inner:
                _note_fields(hint, item, seen)


def _only_given(stored: Any, given: Any) -> Any:
    """What is stored, without what was not given."""
    if isinstance(given, dict):
        return {key: _only_given(stored.get(key), value) for key, value in given.items()}
    if isinstance(given, list):
        return [_only_given(*pair) for pair in zip(stored, given, strict=True)]
    return stored


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("which", [least, hollow, full])
def test_the_typed_classes_read_and_write_what_is_stored(api: Api, kind: Kind, which: Callable[[Kind], Object]) -> None:
    stored = api.create_with_status(which(kind))
    # Defaults are written once, in the classes, and filled in twice: by the API server and by the classes.
    typed = from_wire(kind.spec, stored["spec"])
    assert typed == from_wire(kind.spec, which(kind)["spec"])
    written = to_wire(typed)
    assert _only_given(written, stored["spec"]) == _as_text_quantities(stored["spec"])
    assert api.create(least(kind) | {"spec": written}, dry_run=True)["spec"] == written
    if kind.status is not None and "status" in stored:
        assert to_wire(from_wire(kind.status, stored["status"])) == stored["status"]


def _as_text_quantities(value: Any, *, within: str = "") -> Any:
    """The one thing that is not stored in one form: quantities, given as numbers or as text."""
    if isinstance(value, dict):
        return {name: _as_text_quantities(inner, within=f"{within}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [_as_text_quantities(item) for item in value]
    return str(value) if within.startswith(".podTemplate.resources.") else value


def test_a_run_with_nothing_but_what_is_required_gets_the_documented_defaults(api: Api) -> None:
    assert api.create(least(TRAINING_RUN))["spec"] == {
        "runUri": "s3://bucket/run",
        "config": {"inline": "dtype: bf16"},
        "suspend": False,
        "managedBy": "",
        "entrypoint": "train",
        "nodes": 1,
        "procsPerNode": "auto",
        "parallelism": {},
        "rendezvous": {"port": 29400, "timeoutSeconds": 900},
        "storage": {},
        "data": {},
        "checkpoint": {},
        "sampling": {},
        "restartPolicy": {
            "maxRestarts": 10,
            "maxDisruptions": 100,
            "noProgressAttempts": 3,
            "healthySteps": 100,
            "backoff": {"baseSeconds": 10, "maxSeconds": 300},
        },
        "successPolicy": "AllRanks",
        "watchdog": {"heartbeatSeconds": 30},
        "deadlines": {"startupSeconds": 1800, "activeSeconds": 0, "stuckPodSeconds": 120},
        "scheduling": {"gang": {}, "topology": {}},
        "terminationGracePeriodSeconds": 180,
        "network": {"policy": "Isolated"},
        "cleanup": {"attemptHistoryLimit": 3, "podPolicy": "KeepAll"},
        "podTemplate": {"resources": {}},
        "requests": {"stop": False},
    }


def test_the_samples_can_be_applied_as_they_are(api: Api) -> None:
    printed = api.kubectl("apply", "--dry-run=server", "-f", str(SAMPLES))
    kinds = sorted(line.split(".")[0] for line in printed.splitlines())
    assert kinds == ["batchsearch", "clustertrainingprofile", "samplejob", "trainingrun"]
    assert printed.count("created (server dry run)") == 4


def test_applying_the_same_file_again_changes_nothing(api: Api) -> None:
    body = full(TRAINING_RUN)
    del body["status"]
    document = yaml.safe_dump(body)
    assert api.kubectl("apply", "-f", "-", input=document).endswith("created\n")
    assert api.kubectl("apply", "-f", "-", input=document).endswith("unchanged\n")
    assert api.get(body)["metadata"]["generation"] == 1


def test_two_owners_of_variables_do_not_take_them_from_each_other(api: Api) -> None:
    body = least(TRAINING_RUN)
    for manager in ("one", "two"):
        body["spec"]["podTemplate"] = {"env": [{"name": f"FROM_{manager.upper()}", "value": "1"}]}
        api.kubectl("apply", "--server-side", "--field-manager", manager, "-f", "-", input=yaml.safe_dump(body))
    assert [item["name"] for item in api.get(body)["spec"]["podTemplate"]["env"]] == ["FROM_ONE", "FROM_TWO"]


def test_a_generated_name_is_accepted(api: Api) -> None:
    body = least(TRAINING_RUN)
    body["metadata"] = {"generateName": "sweep-"}
    assert api.create(body)["metadata"]["name"].startswith("sweep-")


# ----------------------------------------------------------------------------------------------- what is refused


@dataclass(frozen=True, kw_only=True)
class RuleCase:
    """A rule, a spec that keeps it and one that breaks it alone."""

    path: str
    message: str
    accepted: Object
    refused: Object
    kind: Kind = TRAINING_RUN


def _template(**fields: Any) -> Object:
    return {"podTemplate": fields}


def _source(**source: Any) -> Object:
    return _template(volumes=[{"name": "a", **source}])


def _mount(path: str) -> Object:
    return _template(volumeMounts=[{"name": "a", "mountPath": path}])


def _profile_network(**network: Any) -> Object:
    return {"network": network}


_RESERVED = (
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "JOB_COMPLETION_INDEX"),
    *("OPENSORA_ATTEMPT", "OPENSORA_"),
)
_ONE_CONFIG = "give exactly one config source: inline, ref or file"
_ONE_VALUE = "give exactly one of configMapKeyRef, secretKeyRef and fieldRef"
_ONE_VOLUME = "give exactly one of configMap, secret, emptyDir, hostPath, persistentVolumeClaim, nfs and csi"
_WORLD = "the world size, nodes x procsPerNode, must divide by sequence x tensor x pipeline"
_GRACE = "terminationGracePeriodSeconds must cover checkpoint.sigtermBudgetSeconds plus 30 s"
_LABELS = "keys are names such as app or example.com/app"
_URI = "expected s3://bucket/path, or a path in the container"
_IMAGE = "expected an image such as registry.example.com/team/opensora:1.4.0"
_NCCL = "names begin with NCCL_, TORCH_NCCL_, GLOO_, UCX_ or FI_; others belong into podTemplate.env"
_DIGEST = "sha256:" + "0" * 64
_REF = {"configMap": "a", "key": "b"}

RULES = [
    RuleCase(
        path="spec.config", message=_ONE_CONFIG,
        accepted={"config": {"file": "/opt/a.py"}}, refused={"config": {"inline": "a: 1", "ref": _REF}},
    ),
    RuleCase(
        path="spec.config", message=_ONE_CONFIG,
        accepted={"config": {"ref": _REF}}, refused={"config": {"overrides": ["a=1"]}},
    ),
    RuleCase(
        path="spec", message="nodes must be one of elastic.allowedNodes",
        accepted={"nodes": 2, "elastic": {"allowedNodes": [4, 2]}},
        refused={"nodes": 3, "elastic": {"allowedNodes": [4, 2]}},
    ),
    RuleCase(
        path="spec", message=_WORLD,
        accepted={"nodes": 3, "procsPerNode": 4, "parallelism": {"sequence": 2, "tensor": 3, "pipeline": 2}},
        refused={"nodes": 3, "procsPerNode": 4, "parallelism": {"sequence": 2, "tensor": 4}},
    ),
    RuleCase(
        path="spec", message=_WORLD,
        accepted={"nodes": 3, "procsPerNode": "auto", "parallelism": {"sequence": 2}},
        refused={"nodes": 3, "procsPerNode": 1, "parallelism": {"sequence": 2}},
    ),
    RuleCase(
        path="spec", message=_GRACE,
        accepted={"terminationGracePeriodSeconds": 120, "checkpoint": {"sigtermBudgetSeconds": 90}},
        refused={"terminationGracePeriodSeconds": 119, "checkpoint": {"sigtermBudgetSeconds": 90}},
    ),
    RuleCase(
        path="spec.watchdog.stepTimeoutFactor", message="watchdog.stepTimeoutFactor must be at least 2",
        accepted={"watchdog": {"stepTimeoutFactor": 2}}, refused={"watchdog": {"stepTimeoutFactor": 1.9}},
    ),
    RuleCase(
        path="spec.deadlines.startupSeconds", message="deadlines.startupSeconds must be at least 60",
        accepted={"deadlines": {"startupSeconds": 60}}, refused={"deadlines": {"startupSeconds": 59}},
    ),
    RuleCase(
        path="spec.restartPolicy.backoff", message="backoff.baseSeconds is above backoff.maxSeconds",
        accepted={"restartPolicy": {"backoff": {"baseSeconds": 300}}},
        refused={"restartPolicy": {"backoff": {"baseSeconds": 301}}},
    ),
    RuleCase(
        path="spec.scheduling", message="name the queue in scheduling.queue to use Kueue",
        accepted={"scheduling": {"queue": "a", "gang": {"mode": "Kueue"}}},
        refused={"scheduling": {"gang": {"mode": "Kueue"}}},
    ),
    *(
        RuleCase(
            path="spec.podTemplate.env[1]", message=f"{name} is set by the operator: remove it",
            accepted=_template(env=[{"name": "A"}, {"name": f"MY_{name}", "value": "1"}]),
            refused=_template(env=[{"name": "A"}, {"name": name, "value": "1"}]),
        )
        for name in _RESERVED
    ),
    RuleCase(
        path="spec.podTemplate.env[0]", message="give value or valueFrom, not both",
        accepted=_template(env=[{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]),
        refused=_template(
            env=[{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
        ),
    ),
    RuleCase(
        path="spec.podTemplate.env[0].valueFrom", message=_ONE_VALUE,
        accepted=_template(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]),
        refused=_template(env=[{"name": "A", "valueFrom": {}}]),
    ),
    RuleCase(
        path="spec.podTemplate.envFrom[0]", message="give exactly one of configMapRef and secretRef",
        accepted=_template(envFrom=[{"secretRef": {"name": "a"}}]), refused=_template(envFrom=[{"prefix": "A_"}]),
    ),
    RuleCase(
        path="spec.podTemplate.volumes[0]", message=_ONE_VOLUME,
        accepted=_source(emptyDir={}), refused=_source(emptyDir={}, hostPath={"path": "/a"}),
    ),
    RuleCase(path="spec.podTemplate.volumes[0]", message=_ONE_VOLUME, accepted=_source(emptyDir={}), refused=_source()),
    RuleCase(
        path="spec.podTemplate.volumes[0]",
        message="names that begin with opensora- are the operator's: choose another",
        accepted=_template(volumes=[{"name": "opensora", "emptyDir": {}}]),
        refused=_template(volumes=[{"name": "opensora-shm", "emptyDir": {}}]),
    ),
    *(
        RuleCase(
            path="spec.podTemplate.volumeMounts[0]",
            message=f"{taken} is mounted by the operator: choose another path",
            accepted=_mount(free), refused=_mount(taken),
        )
        for taken, free in [
            ("/tmp", "/tmp/mine"), ("/tmp/", "/tmpfs"), ("/dev/shm", "/dev/shmem"), ("//etc/opensora", "/etc/other"),
            ("/etc/opensora/run/x", "/mnt/etc/opensora"), ("/var/run/opensora", "/var/run/opensora2"),
        ]
    ),
    *(
        RuleCase(path=f"spec.podTemplate.{field}", message=_LABELS,
                 accepted=_template(**{field: {"example.com/a": "1"}}), refused=_template(**{field: {"a b": "1"}}))
        for field in ("labels", "annotations", "nodeSelector")
    ),
    RuleCase(
        path="spec.podTemplate.resources.limits", message=_LABELS,
        accepted=_template(resources={"limits": {"example.com/a": 1}}),
        refused=_template(resources={"limits": {"-": 1}}),
    ),
    *(
        RuleCase(path="spec.runUri", message=_URI, accepted={"runUri": good}, refused={"runUri": bad})
        for good, bad in [
            ("s3://bucket", "s3://b"), ("s3://bucket/a/b c", "s3://Bucket/a"), ("/runs/a", "gs://bucket/a"),
            ("./runs/a", "pvc://claim/a"), ("runs", "runs\nrm"), ("a/b", "file:///a"), ("s3://a.b-c/", "s3:/bucket/a"),
        ]
    ),
    *(
        RuleCase(path="spec.image", message=_IMAGE, accepted={"image": good}, refused={"image": bad})
        for good, bad in [
            ("opensora", "open sora"), ("a.b:5000/c/d:1.0", "a.b/C/d:1.0:2"), (f"a/b@{_DIGEST}", "a/b@sha256:12"),
            ("localhost/a", "-a/b"), ("a/b:1", "a/b:"), ("a/b:1", "$(reboot)"),
        ]
    ),
    RuleCase(
        kind=SAMPLE_JOB, path="spec.checkpoint", message="give exactly one checkpoint: runRef or uri",
        accepted={"checkpoint": {"uri": "s3://bucket/a"}}, refused={"checkpoint": {}},
    ),
    RuleCase(
        kind=SAMPLE_JOB, path="spec.config", message="give at most one config source: inline, ref or file",
        accepted={"config": {"overrides": ["a=1"]}}, refused={"config": {"inline": "a: 1", "file": "a.yaml"}},
    ),
    RuleCase(
        kind=SAMPLE_JOB, path="spec.prompts", message="give exactly one source of prompts: inline or ref",
        accepted={"prompts": {"ref": _REF}}, refused={"prompts": {"inline": ["a"], "ref": _REF}},
    ),
    RuleCase(
        kind=SAMPLE_JOB, path="spec.prompts", message="prompts.inline is empty: give at least one prompt",
        accepted={"prompts": {"inline": ["a"]}}, refused={"prompts": {"inline": []}},
    ),
    RuleCase(
        kind=SAMPLE_JOB, path="spec", message="resolution and aspectRatio need each other",
        accepted={"resolution": "240p", "aspectRatio": "9:16"}, refused={"resolution": "240p"},
    ),
    RuleCase(
        kind=SAMPLE_JOB, path="spec", message="give imageSize or resolution with aspectRatio, not both",
        accepted={"imageSize": [240, 426]},
        refused={"imageSize": [240, 426], "resolution": "240p", "aspectRatio": "9:16"},
    ),
    RuleCase(
        kind=SAMPLE_JOB, path="spec", message="imageSize is height and width, for example [240, 426]",
        accepted={"imageSize": [64, 64]}, refused={"imageSize": [64]},
    ),
    RuleCase(
        kind=BATCH_SEARCH, path="spec", message="stepSeconds needs objective EqualStepTime",
        accepted={"stepSeconds": 1.5, "objective": "EqualStepTime"}, refused={"stepSeconds": 1.5},
    ),
    RuleCase(
        kind=TRAINING_PROFILE, path="spec.network.env", message=_NCCL,
        accepted=_profile_network(env={"NCCL_DEBUG": "INFO", "TORCH_NCCL_TRACE_BUFFER_SIZE": "1"}),
        refused=_profile_network(env={"RANK": "0"}),
    ),
    RuleCase(
        kind=CLUSTER_TRAINING_PROFILE, path="spec.network.rdmaResources",
        message="names are those of device plugins, for example rdma/hca",
        accepted=_profile_network(rdmaResources={"rdma/hca": 8}), refused=_profile_network(rdmaResources={"hca": 8}),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", RULES, ids=lambda case: f"{case.path}-{case.message}"[:80])
def test_a_rule_refuses_with_a_message_that_names_the_field_and_the_remedy(api: Api, case: RuleCase) -> None:
    api.create(least(case.kind, **case.accepted), dry_run=True)
    code, message = refusal(lambda: api.create(least(case.kind, **case.refused), dry_run=True))
    assert code == 422
    assert _problems(message) == [(case.path, case.message)]


def test_every_rule_has_a_case_here() -> None:
    seen = {case.message for case in RULES} | {_SUSPEND_FIRST, _NAME}
    texts = {rule["message"] for kind in KINDS for rule in _rules(_schema(kind)) if "oldSelf" not in rule["rule"]}
    by_expression = {
        "this variable is set by the operator: remove it",
        "the operator mounts something here: choose another path",
    }
    assert texts - by_expression - seen == set()


def _rules(schema: Object) -> Iterator[Object]:
    yield from schema.get("x-kubernetes-validations", ())
    for inner in (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")):
        if inner:
            yield from _rules(inner)


_NAME = (
    "at most 48 characters out of a-z, 0-9 and -, a letter first and no - at the end: "
    "the names of pods are made from it"
)


@pytest.mark.parametrize("kind", [TRAINING_RUN, SAMPLE_JOB, BATCH_SEARCH], ids=lambda kind: kind.name)
def test_a_name_leaves_room_for_those_of_pods(api: Api, kind: Kind) -> None:
    for name in ("a", "a-1", "a" * 48):
        api.create(least(kind, name), dry_run=True)
    for name in ("a" * 49, "1a", "a.b"):
        code, message = refusal(lambda name=name: api.create(least(kind, name), dry_run=True))  # type: ignore[misc]
        assert (code, _problems(message)) == (422, [("metadata.name", _NAME)])


_SUSPEND_FIRST = "suspend the run before changing nodes"


@pytest.mark.parametrize(
    ("before", "after", "accepted"),
    [
        ({"nodes": 2}, {"nodes": 3}, False),
        ({"nodes": 2}, {"nodes": 3, "suspend": True}, True),
        ({"nodes": 2, "suspend": True}, {"nodes": 3, "suspend": True}, True),
        ({"nodes": 2, "suspend": True}, {"nodes": 3, "suspend": False}, True),
        ({"nodes": 2, "elastic": {"allowedNodes": [4, 2]}}, {"nodes": 4, "elastic": {"allowedNodes": [4, 2]}}, True),
        ({"nodes": 2}, {"nodes": 2, "suspend": True}, True),
    ],
)
def test_nodes_change_while_suspended_or_within_elastic_alone(
    api: Api, before: Object, after: Object, accepted: bool
) -> None:
    created = api.create(least(TRAINING_RUN, **before))
    changed = least(TRAINING_RUN, **after) | {"metadata": created["metadata"]}
    if accepted:
        api.replace(changed, dry_run=True)
    else:
        assert _problems(refusal(lambda: api.replace(changed, dry_run=True))[1]) == [("spec", _SUSPEND_FIRST)]


_OTHER: dict[str, Any] = {
    "profileRef": {"name": "other"},
    "managedBy": "kueue.x-k8s.io/multikueue",
    "image": "other",
    "entrypoint": "train",
    "runUri": "s3://other/run",
    "config": {"inline": "seed: 1"},
    "checkpoint": {"uri": "s3://other/a"},
    "prompts": {"inline": ["another"]},
    "seed": 8,
    "numSamples": 3,
    "numFrames": 17,
    "imageSize": [64, 64],
    "resolution": "360p",
    "aspectRatio": "1:1",
    "fps": 8,
    "samplingSteps": 10,
    "guidance": 1.5,
    "outputUri": "s3://other/clips",
    "workers": 2,
    "procsPerNode": 2,
    "promptsPerShard": 2,
    "retriesPerShard": 0,
    "storage": {},
    "scheduling": {},
    "activeDeadlineSeconds": 60,
    "terminationGracePeriodSeconds": 90,
    "podTemplate": {"labels": {"a": "b"}},
    "parallelism": {},
    "buckets": [],
    "bounds": {"maxBatch": 2},
    "headroomPercent": 20,
    "objective": "MaxFit",
    "memoryBudget": "1Gi",
    "parallelTrials": 8,
    "trialTimeoutSeconds": 60,
    "retriesPerBucket": 5,
}
"""A value of each field that cannot be changed, other than that of the full object."""
_FIXED = [
    (kind, info, marker)
    for kind in KINDS
    for info in fields_of(kind.spec)
    for marker in info.markers
    if isinstance(marker, Immutable)
]


@pytest.mark.parametrize(
    ("kind", "info", "marker"), _FIXED, ids=[f"{kind.name}-{info.name}" for kind, info, _ in _FIXED]
)
def test_what_is_fixed_cannot_be_changed_added_or_removed(
    api: Api, kind: Kind, info: FieldInfo, marker: Immutable
) -> None:
    name = info.wire_name
    body = full(kind)
    if name == "imageSize":  # excludes what the full object has
        body["spec"] = {key: value for key, value in body["spec"].items() if key not in ("resolution", "aspectRatio")}
        body["spec"]["imageSize"] = [240, 426]
    created = api.create(body)
    others = [created["spec"] | {name: _OTHER[name]}]
    if is_optional(info.hint) and name not in ("resolution", "aspectRatio"):  # which need each other
        others.append({key: value for key, value in created["spec"].items() if key != name})
        without = api.create(least(kind))
        added = without | {"spec": without["spec"] | {name: body["spec"][name]}}
        assert _problems(refusal(lambda: api.replace(added, dry_run=True))[1]) == [(f"spec.{name}", marker.message)]
    for spec in others:
        code, message = refusal(lambda spec=spec: api.replace(created | {"spec": spec}, dry_run=True))  # type: ignore[misc]
        assert code == 422
        assert (f"spec.{name}", marker.message) in _problems(message)  # another value may break a rule as well


def test_what_a_run_may_change_can_be_changed(api: Api) -> None:
    created = api.create(full(TRAINING_RUN))
    fixed = {info.wire_name for kind, info, _ in _FIXED if kind is TRAINING_RUN}
    assert fixed == {"profileRef", "managedBy", "image", "entrypoint", "runUri", "config"}
    kept = {name: value for name, value in created["spec"].items() if name in fixed}
    assert api.replace(created | {"spec": kept})["spec"]["nodes"] == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "checkpoint", "everyStep"), 1),
        (("spec", "podTemplate", "env"), [{"name": "A", "valeu": "1"}]),
        (("spec", "podTemplate", "initContainers"), []),
        (("spec", "podTemplate", "volumes"), [{"name": "a", "configmap": {"name": "b"}}]),
        (("spec", "nodeCount"), 2),
        (("specs",), {}),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_an_unknown_field_is_named(api: Api, path: Place, value: Any) -> None:
    body = least(TRAINING_RUN)
    _put(body, path, value)
    code, message = refusal(lambda: api.create(body, dry_run=True))
    assert code == 400
    inner = f"[0].{next(key for key in value[0] if key != 'name')}" if isinstance(value, list) and value else ""
    assert f'strict decoding error: unknown field "{".".join(map(str, path))}{inner}"' in message


def test_kubectl_names_a_misspelt_field_by_itself(api: Api) -> None:
    body = least(TRAINING_RUN, nodse=2)
    with pytest.raises(ApiError, match=r'unknown field "spec\.nodse"'):
        api.kubectl("apply", "-f", "-", input=yaml.safe_dump(body))


# -------------------------------------------------------------------------------------------------- random input


def test_random_wrong_values_are_all_refused_with_the_name_of_the_field(api: Api) -> None:
    draw = random.Random(20_260_131)
    wrong = [(kind, *item) for kind in KINDS for item in _wrong_values(_schema(kind)["properties"]["spec"], kind, draw)]
    assert len(wrong) > 1000
    for kind, place, value in draw.sample(wrong, 500):
        body = full(kind)
        _put(body, place, value)
        code, message = _answer(api, body)
        assert code in (400, 422), f"{place}={value!r:.100}: {code} {message}"
        assert [part for part in place if isinstance(part, str)][-1] in message, f"{place}={value!r:.100}: {message}"


def _answer(api: Api, body: Object) -> tuple[int, str]:
    try:
        api.create(body, dry_run=True)
    except ApiError as error:
        return error.code, str(error)
    return 201, "created"


@pytest.mark.parametrize("spec", [None, [], "text", 1, True, {}], ids=repr)
def test_a_spec_that_is_none_is_refused(api: Api, spec: Any) -> None:
    body = least(TRAINING_RUN) | {"spec": spec}
    assert refusal(lambda: api.create(body))[0] in (400, 422)
    del body["spec"]
    assert refusal(lambda: api.create(body))[0] == 422


_REMOVE = object()


def _wrong_values(schema: Object, kind: Kind, draw: random.Random) -> Iterator[tuple[Place, Any]]:
    """Places of the full object with values that break one thing each."""
    yield from _wrong_at(schema, FULL[kind.name]["spec"], ("spec",), draw)


def _wrong_at(schema: Object, value: Any, place: Place, draw: random.Random) -> Iterator[tuple[Place, Any]]:
    if "properties" in schema:
        yield from ((place, bad) for bad in ("text", 1, [], True))
        yield (*place, "unknownField"), 1
        yield from (((*place, name), _REMOVE) for name in schema.get("required", ()))
        for name, inner in schema["properties"].items():
            if name in value:
                yield from _wrong_at(inner, value[name], (*place, name), draw)
    elif schema.get("type") == "array":
        yield from ((place, bad) for bad in ("text", 1, {}))
        yield place, value[:1] * (schema["maxItems"] + 1)
        for index, item in enumerate(value):
            yield from _wrong_at(schema["items"], item, (*place, index), draw)
    elif "additionalProperties" in schema:
        yield from ((place, bad) for bad in ("text", 1, []))
        yield place, {f"key{number}": next(iter(value.values())) for number in range(schema["maxProperties"] + 1)}
        for name, item in value.items():
            yield from _wrong_at(schema["additionalProperties"], item, (*place, name), draw)
    else:
        yield from ((place, bad) for bad in _wrong_scalars(schema, draw))


def _wrong_scalars(schema: Object, draw: random.Random) -> list[Any]:
    numbers = [schema[name] + step for name, step in (("minimum", -1), ("maximum", 1)) if name in schema]
    if schema.get("x-kubernetes-int-or-string"):
        return [[], {}, True, 1.5, "\x01", *numbers]
    if schema["type"] in ("integer", "number"):
        huge = draw.choice((2**63, -(2**63) - 1, 10**30))
        return ["1", [], {}, True, huge, *numbers, *([0.5] if schema["type"] == "integer" else [])]
    if schema["type"] == "boolean":
        return ["true", 1, 0, [], {}]
    wrong: list[Any] = [1, 1.5, [], {}, True]
    if "enum" in schema:
        return [*wrong, "".join(draw.choices("ABCxyz ${}`;", k=draw.randint(1, 20)))]
    if "pattern" in schema or "x-kubernetes-validations" in schema:
        wrong.append("\x01")
    return [*wrong, *([""] if "minLength" in schema else []), "a" * (schema["maxLength"] + draw.randint(1, 1000))]


# --------------------------------------------------------------------------------------------- what it looks like


def test_status_is_written_apart_from_the_spec(api: Api) -> None:
    created = api.create(least(TRAINING_RUN) | {"status": {"phase": "Succeeded"}})
    assert "status" not in created
    written = api.replace(
        created | {"spec": FULL["TrainingRun"]["spec"], "status": {"phase": "Running"}}, subresource="/status"
    )
    assert written["status"] == {"phase": "Running"}
    assert (written["spec"], written["metadata"]["generation"]) == (created["spec"], 1)
    changed = api.replace(written | {"spec": written["spec"] | {"suspend": True}, "status": {"phase": "Failed"}})
    assert changed["status"] == {"phase": "Running"}
    assert changed["metadata"]["generation"] == 2


def test_a_phase_outside_the_closed_set_is_refused(api: Api) -> None:
    created = api.create(least(TRAINING_RUN))
    code, message = refusal(lambda: api.replace(created | {"status": {"phase": "Fine"}}, subresource="/status"))
    assert code == 422
    assert 'status.phase: Unsupported value: "Fine"' in message


def test_kubectl_get_shows_how_a_run_goes(api: Api, namespace: str) -> None:
    there = Api(api.control_plane, namespace)
    there.create_with_status(full(TRAINING_RUN, "going"))
    there.create(least(TRAINING_RUN, "new"))
    assert (
        _table(api, "get", "tr", "-n", namespace)
        == """\
NAME    PHASE     NODES   STEP    %     ETA     ATTEMPT   RESTARTS   AGE
going   Running   4/4     18200   36    1h30m   2         1          0s
new                                                                  0s
"""
    )
    assert (
        _table(api, "get", "tr", "going", "-n", namespace, "-o", "wide")
        == """\
NAME    PHASE     NODES   STEP    %     ETA     ATTEMPT   RESTARTS   AGE   QUEUE    LOSS     S/STEP   JOB
going   Running   4/4     18200   36    1h30m   2         1          0s    team-a   0.1234   1.41     full-a2
"""
    )


def test_kubectl_get_shows_the_other_kinds(api: Api, namespace: str) -> None:
    for kind in (SAMPLE_JOB, BATCH_SEARCH, TRAINING_PROFILE):
        Api(api.control_plane, namespace).create_with_status(full(kind, "one"))
    assert (
        _table(api, "get", "sj", "-n", namespace, "-o", "wide")
        == """\
NAME   PHASE     SHARDS   FAILED   STEP    AGE   SHEET                              QUEUE    JOB
one    Running   3/8      1        18000   0s    s3://bucket/clips/full/sheet.png   team-a   full-sample
"""
    )
    assert (
        _table(api, "get", "bs", "-n", namespace, "-o", "wide")
        == """\
NAME   PHASE       BUCKETS   FAILED   TABLE                          AGE   OBJECTIVE       REUSED
one    Succeeded   1/2       1        batch-table-0123456789abcdef   0s    EqualStepTime   true
"""
    )
    assert (
        _table(api, "get", "tp", "-n", namespace, "-o", "wide")
        == """\
NAME   DEFAULT   ACCELERATOR   COUNT   AGE   IMAGE                                      DESCRIPTION
one    true      H200          8       0s    registry.example.com/team/opensora:1.4.0   Eight H200 a node
"""
    )


def test_kubectl_knows_all_kinds_by_their_category(api: Api, namespace: str) -> None:
    for kind in (TRAINING_RUN, SAMPLE_JOB, BATCH_SEARCH, TRAINING_PROFILE):
        Api(api.control_plane, namespace).create(least(kind, "one"))
    names = api.kubectl("get", "os", "-n", namespace, "-o", "name").split()
    assert [name for name in names if not name.startswith("clustertrainingprofile.")] == [
        "batchsearch.opensora.dev/one",
        "samplejob.opensora.dev/one",
        "trainingprofile.opensora.dev/one",
        "trainingrun.opensora.dev/one",
    ]


def test_kubectl_explains_a_field(api: Api) -> None:
    text = api.kubectl("explain", "tr.spec.checkpoint.sigtermBudgetSeconds")
    assert "Time after SIGTERM within which the step is finished and saved" in " ".join(text.split())


def _table(api: Api, *arguments: str) -> str:
    """What kubectl prints, with all ages alike and without spaces at the ends of lines."""
    text = re.sub(r"\b\d+s( |$)", r"0s\1", api.kubectl(*arguments), flags=re.MULTILINE)
    return re.sub(r" +$", "", text, flags=re.MULTILINE)
