"""The chart as Helm renders it: every value arrives, wrong ones are refused, and an API server takes the result."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import build
import pytest
import yaml
from control_plane import ControlPlane
from helm_chart import (
    CHART,
    NAMESPACE,
    RELEASE,
    ROOT,
    VALUES,
    Object,
    deployment,
    helm,
    of_kind,
    render,
    rendered,
    template,
    without_definitions,
)
from opensora_operator import install
from opensora_operator.packaging import rbac_rules
from opensora_operator.permissions import Scope
from opensora_operator.settings import Settings, read_settings

pytestmark = pytest.mark.cluster


def settings(objects: list[Object]) -> Settings:
    (container,) = deployment(objects)["spec"]["template"]["spec"]["containers"]
    return read_settings(container["args"], {"POD_NAMESPACE": NAMESPACE, "POD_NAME": "pod"})


# ----------------------------------------------------------------------------------------------------- every value


@dataclass(frozen=True)
class Case:
    """A value other than the default, and a line that is there with it and not without it."""

    value: Any
    line: str
    also: Object = field(default_factory=dict)
    """What else has to be set for it to have an effect."""
    gone: bool = False
    """The line is there without it, and not with it."""


MONITOR = {"metrics": {"serviceMonitor": {"enabled": True}}}
DASHBOARD = {"metrics": {"dashboard": {"enabled": True}}}
POLICY = {"networkPolicy": {"enabled": True}}
CASES = {
    "fullnameOverride": Case("video", "name: video"),
    "crds.install": Case(False, "kind: CustomResourceDefinition", gone=True),
    "crds.keep": Case(False, "helm.sh/resource-policy: keep", gone=True),
    "image.repository": Case("mirror/operator", "image: mirror/operator:0.1.0"),
    "image.tag": Case("1.2", "image: opensora-operator:1.2"),
    "image.digest": Case(f"sha256:{'a' * 64}", f"image: opensora-operator@sha256:{'a' * 64}"),
    "image.pullPolicy": Case("Never", "imagePullPolicy: Never"),
    "image.pullSecrets": Case([{"name": "registry"}], "- name: registry"),
    "replicaCount": Case(2, "replicas: 2"),
    "leaderElection.leaseSeconds": Case(30, "- --lease-seconds=30"),
    "leaderElection.renewSeconds": Case(5, "- --renew-seconds=5"),
    "leaderElection.retrySeconds": Case(1.5, "- --retry-seconds=1.5"),
    "watchNamespaces": Case(["team-a", "team-b"], "- --namespaces=team-a,team-b"),
    "reconcile.concurrency": Case(3, "- --concurrency=3"),
    "reconcile.resyncSeconds": Case(60, "- --resync-seconds=60"),
    "reconcile.clientQPS": Case(50, "- --requests-per-second=50"),
    "reconcile.clientBurst": Case(100, "- --requests-burst=100"),
    "progress.enabled": Case(False, "- --progress-service=opensora-operator-progress", gone=True),
    "progress.port": Case(9555, "- {name: progress, port: 9555, targetPort: progress}"),
    "progress.writesPerSecond": Case(2, "- --progress-writes-per-second=2"),
    "metrics.port": Case(8888, "- --http-port=8888"),
    "metrics.serviceMonitor.enabled": Case(True, "kind: ServiceMonitor"),
    "metrics.serviceMonitor.interval": Case("5s", "- {port: http, path: /metrics, interval: 5s}", also=MONITOR),
    "metrics.serviceMonitor.labels": Case({"release": "prometheus"}, "release: prometheus", also=MONITOR),
    "metrics.dashboard.enabled": Case(True, "name: opensora-operator-dashboard"),
    "metrics.dashboard.labels": Case({"found-by": "grafana"}, "found-by: grafana", also=DASHBOARD),
    "networkPolicy.enabled": Case(True, "kind: NetworkPolicy"),
    "networkPolicy.apiServerPorts": Case([8443], "- {port: 8443}", also=POLICY),
    "networkPolicy.metricsFrom": Case([{"podSelector": {"matchLabels": {"a": "scraper"}}}], "a: scraper", also=POLICY),
    "podDisruptionBudget.enabled": Case(False, "kind: PodDisruptionBudget", also={"replicaCount": 2}, gone=True),
    "podDisruptionBudget.minAvailable": Case(2, "minAvailable: 2", also={"replicaCount": 3}),
    "profiles": Case({"cpu": {"image": "trainer:1"}}, 'profiles.json: "{\\"cpu\\":{\\"image\\":\\"trainer:1\\"}}"'),
    "serviceAccount.create": Case(False, "serviceAccountName: default"),
    "serviceAccount.name": Case("robot", "serviceAccountName: robot"),
    "serviceAccount.annotations": Case({"cloud": "role"}, "cloud: role"),
    "rbac.create": Case(False, "kind: ClusterRoleBinding", gone=True),
    "rbac.aggregateToView": Case(False, 'rbac.authorization.k8s.io/aggregate-to-view: "true"', gone=True),
    "rbac.aggregateToEdit": Case(False, 'rbac.authorization.k8s.io/aggregate-to-edit: "true"', gone=True),
    "podAnnotations": Case({"note": "here"}, "note: here"),
    "podLabels": Case({"team": "video"}, "team: video"),
    "podSecurityContext": Case({"runAsUser": 1234}, "runAsUser: 1234"),
    "securityContext": Case({"readOnlyRootFilesystem": False}, "readOnlyRootFilesystem: false"),
    "resources.requests": Case({"cpu": "1"}, 'cpu: "1"'),
    "resources.limits": Case({"memory": "1Gi"}, "memory: 1Gi"),
    "nodeSelector": Case({"pool": "system"}, "pool: system"),
    "tolerations": Case([{"key": "system", "operator": "Exists"}], "- key: system"),
    "affinity": Case({"nodeAffinity": {}}, "nodeAffinity: {}"),
    "topologySpreadConstraints": Case([{"maxSkew": 1, "topologyKey": "zone"}], "topologyKey: zone"),
    "priorityClassName": Case("system-cluster-critical", "priorityClassName: system-cluster-critical"),
    "logging.level": Case("debug", "- --log-level=debug"),
    "logging.format": Case("text", "- --log-format=text"),
    "extraEnv": Case([{"name": "HTTPS_PROXY", "value": "proxy:3128"}], "- name: HTTPS_PROXY"),
    "extraVolumes": Case([{"name": "extra", "emptyDir": {}}], "name: extra"),
    "extraVolumeMounts": Case([{"name": "extra", "mountPath": "/extra"}], "- mountPath: /extra"),
}


def with_value(key: str, value: Any, base: Object | None = None) -> Object:
    """Values in which one key is set."""
    values = copy.deepcopy(base or {})
    *path, last = key.split(".")
    level = values
    for name in path:
        level = level.setdefault(name, {})
    level[last] = value
    return values


def leaves(values: Object, prefix: str = "") -> Iterator[str]:
    """Keys that hold a value; maps that users fill (annotations, resources, …) are values."""
    free = {"podSecurityContext", "securityContext", "requests", "limits", "labels"}
    for name, value in values.items():
        if isinstance(value, dict) and value and name not in free:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def default_of(key: str) -> Any:
    return functools.reduce(lambda level, name: level[name], key.split("."), VALUES)


def lines_of(values: Object) -> set[str]:
    return {line.strip() for line in rendered(json.dumps(values)).splitlines()}


def test_every_value_has_its_case() -> None:
    assert set(CASES) == set(leaves(VALUES))


@pytest.mark.parametrize("key", CASES)
def test_every_value_arrives(key: str) -> None:
    case = CASES[key]
    without, with_it = lines_of(case.also), lines_of(with_value(key, case.value, case.also))
    assert (case.line in without) is case.gone
    assert (case.line in with_it) is not case.gone


@pytest.mark.parametrize("key", CASES)
def test_a_value_of_the_wrong_type_is_refused_and_named(key: str) -> None:
    wrong = 5 if isinstance(default_of(key), str) else "text"
    answer = template(with_value(key, wrong))
    assert answer.returncode != 0
    assert key in answer.stderr.replace("/", "."), answer.stderr


@pytest.mark.parametrize(
    "values",
    [
        {"replicas": 2},
        {"image": {"name": "x"}},
        {"metrics": {"serviceMonitor": {"intervall": "5s"}}},
        {"watchNamespaces": ["Team_A"]},
        {"watchNamespaces": ["a", "a"]},
        {"image": {"digest": "latest"}},
        {"image": {"pullPolicy": "Sometimes"}},
        {"logging": {"level": "loud"}},
        {"metrics": {"port": 70000}},
        {"reconcile": {"concurrency": 0}},
        {"leaderElection": {"leaseSeconds": 0}},
        {"profiles": {"Not A Name": {}}},
        {"profiles": {"cpu": "small"}},
        {"podLabels": {"app.kubernetes.io/name": "mine"}},
        {"podLabels": {"opensora.dev/leader": "true"}},
        {"image": {"pullSecrets": ["registry"]}},
    ],
    ids=json.dumps,
)
def test_a_value_that_cannot_work_is_refused(values: Object) -> None:
    assert template(values).returncode != 0


def test_helm_has_no_complaint() -> None:
    answer = helm("lint", str(CHART), "--strict", "--kube-version", build.KUBERNETES)
    assert answer.returncode == 0, answer.stdout
    assert "[WARNING]" not in answer.stdout


# --------------------------------------------------------------------------------------------------- what it means


def test_the_defaults_are_those_of_the_operator() -> None:
    service = "opensora-operator-progress"
    assert settings(render()) == Settings(own_namespace=NAMESPACE, identity="pod", progress_service=service)


def test_without_progress_there_is_nowhere_to_report_to() -> None:
    objects = render({"progress": {"enabled": False}, **POLICY})
    assert settings(objects).progress_service == ""
    assert of_kind(objects, "Service") == []
    (policy,) = of_kind(objects, "NetworkPolicy")
    assert [rule["ports"] for rule in policy["spec"]["ingress"]] == [[{"port": "http"}]]


def test_the_flags_are_understood() -> None:
    found = settings(
        render({"watchNamespaces": ["a", "b"], "leaderElection": {"leaseSeconds": 20.5}, "replicaCount": 2})
    )
    assert (found.namespaces, found.lease_seconds, found.lease_name) == (("a", "b"), 20.5, RELEASE)


def test_two_releases_in_one_namespace_have_two_leases_and_no_common_name() -> None:
    first = render({"crds": {"install": False}}, "--skip-tests")
    second = render({"crds": {"install": False}, "fullnameOverride": "second"}, "--skip-tests")
    assert settings(second).lease_name == "second"
    names = [{(body["kind"], body["metadata"]["name"]) for body in objects} for objects in (first, second)]
    assert names[0] & names[1] == set()


def test_one_replica_is_replaced_and_several_are_rolled() -> None:
    assert deployment(render())["spec"]["strategy"]["type"] == "Recreate"
    several = render({"replicaCount": 2})
    assert deployment(several)["spec"]["strategy"]["type"] == "RollingUpdate"
    assert of_kind(render(), "PodDisruptionBudget") == []
    (budget,) = of_kind(several, "PodDisruptionBudget")
    labels = deployment(several)["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_no_service_budget_or_policy_takes_a_pod_of_a_job_for_the_operator() -> None:
    values = {"replicaCount": 2, "profiles": {"cpu": {}}, **MONITOR, **POLICY}
    objects = render(values)
    others = [body["metadata"]["labels"] for body in of_kind(objects, "Pod")]
    others += [body["spec"]["template"]["metadata"]["labels"] for body in of_kind(objects, "Job")]
    assert len(others) == 2
    selectors = [body["spec"]["selector"] for body in of_kind(objects, "Service")]
    selectors += [
        body["spec"]["selector"]["matchLabels"]
        for kind in ("Deployment", "PodDisruptionBudget")
        for body in of_kind(objects, kind)
    ]
    selectors += [body["spec"]["podSelector"]["matchLabels"] for body in of_kind(objects, "NetworkPolicy")]
    assert len(selectors) == 5
    assert [(found, labels) for found in selectors for labels in others if found.items() <= labels.items()] == []


def test_the_monitor_finds_its_service() -> None:
    objects = render(MONITOR)
    (monitor,) = of_kind(objects, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    services = [body for body in of_kind(objects, "Service") if wanted.items() <= body["metadata"]["labels"].items()]
    assert [body["metadata"]["name"] for body in services] == ["opensora-operator-metrics"]


def test_the_dashboard_is_the_one_of_the_chart() -> None:
    (config_map,) = of_kind(render(DASHBOARD), "ConfigMap")
    assert json.loads(config_map["data"]["opensora.json"]) == json.loads(
        (CHART / "dashboards/opensora.json").read_text(encoding="utf-8")
    )


def test_definitions_are_those_of_the_manifests_and_stay_when_the_release_goes() -> None:
    definitions = of_kind(render(), "CustomResourceDefinition")
    assert len(definitions) == 5
    for body in definitions:
        assert body["metadata"]["annotations"].pop("helm.sh/resource-policy") == "keep"
    files = sorted((ROOT / "manifests/crds").glob("*.yaml"))
    from_files = [yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader) for path in files]
    assert sorted(definitions, key=lambda body: body["metadata"]["name"]) == from_files


# ------------------------------------------------------------------------------------------------------ permissions


def rules_of(objects: list[Object], kind: str, name: str, namespace: str | None = None) -> list[Object]:
    (role,) = (body for body in of_kind(objects, kind, name) if body["metadata"].get("namespace") == namespace)
    found: list[Object] = role["rules"]
    return found


def test_the_operator_may_do_what_the_list_says() -> None:
    objects = render()
    cluster = rules_of(objects, "ClusterRole", f"{NAMESPACE}:{RELEASE}")
    assert cluster == rbac_rules(Scope.CLUSTER) + rbac_rules(Scope.WATCHED)
    assert rules_of(objects, "Role", RELEASE, NAMESPACE) == rbac_rules(Scope.OWN)


def test_with_namespaces_only_what_has_none_is_granted_for_the_cluster() -> None:
    objects = render({"watchNamespaces": ["team-a", "team-b"]})
    assert rules_of(objects, "ClusterRole", f"{NAMESPACE}:{RELEASE}") == rbac_rules(Scope.CLUSTER)
    for namespace in ("team-a", "team-b"):
        assert rules_of(objects, "Role", f"{RELEASE}-runs", namespace) == rbac_rules(Scope.WATCHED)
    bound = {body["metadata"]["namespace"] for body in of_kind(objects, "RoleBinding", f"{RELEASE}-runs")}
    assert bound == {"team-a", "team-b"}


def test_every_binding_names_a_role_and_an_account_that_are_rendered() -> None:
    objects = render({"watchNamespaces": ["team-a"], "profiles": {"cpu": {}}})
    roles = {
        (body["kind"], body["metadata"]["name"], body["metadata"].get("namespace"))
        for body in objects
        if body["kind"].endswith("Role")
    }
    accounts = {body["metadata"]["name"] for body in of_kind(objects, "ServiceAccount")}
    bindings = [body for body in objects if body["kind"].endswith("RoleBinding")]
    for body in bindings:
        reference = body["roleRef"]
        assert (reference["kind"], reference["name"], body["metadata"].get("namespace")) in roles
        assert {subject["name"] for subject in body["subjects"]} <= accounts
    assert len(bindings) == len(roles) - 2, "all but those that add to view and edit"


def test_without_rbac_nothing_is_granted_by_any_part() -> None:
    objects = render({"rbac": {"create": False}, "watchNamespaces": ["team-a"], "profiles": {"cpu": {}}})
    assert [body for body in objects if body["kind"].endswith(("Role", "RoleBinding"))] == []


def test_no_service_sets_the_operators_settings() -> None:
    """`<SERVICE>_PORT_…` of a Service `opensora-operator-progress` reads like one."""
    objects = render({"profiles": {"cpu": {}}})
    pods = [body["spec"]["template"]["spec"] for kind in ("Deployment", "Job") for body in of_kind(objects, kind)]
    assert [pod["enableServiceLinks"] for pod in pods] == [False, False]


def test_every_pod_is_restricted() -> None:
    objects = render({"profiles": {"cpu": {}}})
    pods = [body["spec"]["template"]["spec"] for kind in ("Deployment", "Job") for body in of_kind(objects, kind)]
    pods += [body["spec"] for body in of_kind(objects, "Pod")]
    assert len(pods) == 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {"limits", "requests"} <= container["resources"].keys()


# ----------------------------------------------------------------------------------------------------- kustomize


def comparable(body: Object) -> Object:
    """Without what only Helm has: its labels. Of flags, what they mean."""
    body = copy.deepcopy(body)
    labels = [body["metadata"]["labels"]]
    if body["kind"] == "Deployment":
        labels.append(body["spec"]["template"]["metadata"]["labels"])
        body["spec"]["template"]["spec"]["containers"][0]["args"] = settings([body])
    for found in labels:
        for label in ("helm.sh/chart", "app.kubernetes.io/managed-by", "app.kubernetes.io/version"):
            found.pop(label, None)
    return body


def test_kustomize_installs_what_helm_does() -> None:
    kubectl = build.ensure("kube") / "kubectl"
    answer = subprocess.run([kubectl, "kustomize", ROOT / "manifests"], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    bodies = without_definitions(list(yaml.load_all(answer.stdout, Loader=yaml.CSafeLoader)))
    by_kustomize = {(body["kind"], body["metadata"]["name"]): comparable(body) for body in bodies}
    by_helm = {
        (body["kind"], body["metadata"]["name"]): comparable(body)
        for body in without_definitions(render(None, "--skip-tests"))
    }
    assert by_kustomize.pop(("Namespace", NAMESPACE))
    assert by_kustomize == by_helm


# ------------------------------------------------------------------------------------------------- a real API server


EVERYTHING = {
    "replicaCount": 2,
    "profiles": {"cpu": {"default": True}},
    "metrics": {"dashboard": {"enabled": True}},
    "networkPolicy": {"enabled": True, "metricsFrom": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]},
    "image": {"pullSecrets": [{"name": "registry"}], "digest": f"sha256:{'0' * 64}"},
    "podAnnotations": {"a": "b"},
    "podLabels": {"a": "b"},
    "nodeSelector": {"a": "b"},
    "tolerations": [{"key": "a", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": {}}
    ],
    "priorityClassName": "system-cluster-critical",
    "extraEnv": [{"name": "A", "value": "b"}],
    "extraVolumes": [{"name": "extra", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "extra", "mountPath": "/extra"}],
}


@pytest.mark.parametrize(
    "values",
    [{}, EVERYTHING, {**EVERYTHING, "watchNamespaces": ["default"]}],
    ids=["defaults", "everything", "one namespace"],
)
def test_an_api_server_takes_all_of_it_as_it_is(control_plane: ControlPlane, values: Object) -> None:
    objects = render({**values, "crds": {"install": False}})
    # A pod is not even tried without its account.
    control_plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    control_plane.apply(*of_kind(objects, "ServiceAccount"))
    take = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "--output=name", "-f", "-")
    output = control_plane.kubectl(*take, input=yaml.safe_dump_all(objects))
    assert len(output.splitlines()) == len(objects)


@pytest.fixture(scope="module")
def fresh_control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One without our definitions, which the chart is to bring."""
    with ControlPlane(tmp_path_factory.mktemp("fresh-control-plane"), scheduler=False) as running:
        yield running


RUN = {
    "apiVersion": "opensora.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "demo", "namespace": "default"},
    "spec": {"image": "trainer:1", "runUri": "s3://bucket/demo", "config": {"inline": "seed: 1\n"}, "suspend": True},
}


def uid_of_the_run(control_plane: ControlPlane) -> str:
    path = "/apis/opensora.dev/v1alpha1/namespaces/default/trainingruns/demo"
    uid: str = control_plane.request("GET", path)["metadata"]["uid"]
    return uid


def test_uninstalling_leaves_runs_and_their_definitions_and_installing_again_adopts_them(
    fresh_control_plane: ControlPlane,
) -> None:
    def succeed(*arguments: str) -> str:
        answer = helm(*arguments, "--namespace", NAMESPACE, kubeconfig=fresh_control_plane.kubeconfig())
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    assert "all namespaces" in succeed("install", RELEASE, str(CHART), "--create-namespace")
    fresh_control_plane.kubectl("wait", "--for=condition=Established", "crd/trainingruns.opensora.dev")
    fresh_control_plane.apply(RUN)
    uid = uid_of_the_run(fresh_control_plane)

    succeed("uninstall", RELEASE)
    assert fresh_control_plane.kubectl("get", "deployments", "-n", NAMESPACE, "-o", "name") == ""
    assert RELEASE not in fresh_control_plane.kubectl("get", "clusterroles,clusterrolebindings", "-o", "name")
    assert uid_of_the_run(fresh_control_plane) == uid

    succeed("install", RELEASE, str(CHART), "--set", "replicaCount=2")
    # There is no node that could run the Job for profiles.
    succeed("upgrade", RELEASE, str(CHART), "--set", "replicaCount=1", "--no-hooks")
    assert fresh_control_plane.kubectl("get", "poddisruptionbudgets", "-n", NAMESPACE, "-o", "name") == ""
    assert uid_of_the_run(fresh_control_plane) == uid


def test_profiles_are_written_by_whom_the_hook_runs_as(
    fresh_control_plane: ControlPlane, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Job's command in this process, with the permissions of the Job's account."""
    objects = render({"profiles": {"cpu": {}}, "fullnameOverride": "second"})
    roles = [body for body in objects if body["metadata"]["name"] == f"{NAMESPACE}:second:profiles"]
    assert [body["kind"] for body in roles] == ["ClusterRole", "ClusterRoleBinding"]
    (job,) = of_kind(objects, "Job")
    account = f"system:serviceaccount:{NAMESPACE}:{job['spec']['template']['spec']['serviceAccountName']}"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", install.__name__]
    fresh_control_plane.apply(*roles, *of_kind(render(), "CustomResourceDefinition"))
    kubeconfig = fresh_control_plane.add_identity("hook", user=account)
    file = tmp_path / "profiles.json"

    def write(profiles: Object) -> str:
        file.write_text(json.dumps(profiles))
        arguments = [str(file) if argument.startswith("/etc/") else argument for argument in container["args"]]
        code = install.main(["--kubeconfig", str(kubeconfig), *arguments])
        output = capsys.readouterr()
        return output.out if code == 0 else output.err

    def stored() -> list[str]:
        return fresh_control_plane.kubectl("get", "clustertrainingprofiles", "-o", "name").split()

    assert write({"cpu": {"default": True}, "gpu": {"image": "trainer:1"}}) == "cpu created\ngpu created\n"
    assert write({"cpu": {"default": True}, "gpu": {"image": "trainer:2"}}) == "cpu unchanged\ngpu updated\n"
    assert 'unknown field "spec.imagee"' in write({"gpu": {"imagee": "trainer:2"}})
    assert "spec.image" in write({"gpu": {"image": 5}})
    assert write({"gpu": {"image": "trainer:2"}}) == "gpu unchanged\ncpu deleted\n"
    assert stored() == ["clustertrainingprofile.opensora.dev/gpu"]
    fresh_control_plane.kubectl("label", "clustertrainingprofile/gpu", "app.kubernetes.io/instance-")
    assert "somebody else made it" in write({"gpu": {}})
    assert stored() == ["clustertrainingprofile.opensora.dev/gpu"]


def test_kustomize_installs_an_operator_whose_pod_the_namespace_lets_in(control_plane: ControlPlane) -> None:
    def pods() -> str:
        return control_plane.kubectl(
            "get", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=operator", "-o", "name"
        )

    try:
        control_plane.kubectl("apply", "--kustomize", str(ROOT / "manifests"))
        again = control_plane.kubectl("apply", "--kustomize", str(ROOT / "manifests"))
        assert [line for line in again.splitlines() if not line.endswith(" unchanged")] == []
        # The namespace enforces the standard `restricted` when the ReplicaSet makes the pod.
        control_plane.kubectl("wait", "deployment/opensora-operator", "-n", NAMESPACE, "--for=condition=Progressing")
        deadline = time.monotonic() + 60
        while not pods():
            assert time.monotonic() < deadline, control_plane.kubectl("describe", "replicasets", "-n", NAMESPACE)
            time.sleep(0.2)
    finally:
        control_plane.kubectl("delete", "--wait=false", "-f", str(ROOT / "manifests/operator"))
