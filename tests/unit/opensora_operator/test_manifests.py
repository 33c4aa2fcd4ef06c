"""`kubectl apply -k manifests`: what is listed, and what it says about the operator's pod."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from opensora_operator.certificates import LEADER_LABEL
from opensora_operator.settings import Settings, read_settings

MANIFESTS = Path(__file__).parents[3] / "manifests"


def kustomization() -> list[str]:
    resources: list[str] = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    return resources


def objects() -> list[dict[str, Any]]:
    return [
        body for path in kustomization() for body in yaml.safe_load_all((MANIFESTS / path).read_text(encoding="utf-8"))
    ]


def only(kind: str) -> dict[str, Any]:
    (found,) = (body for body in objects() if body["kind"] == kind)
    return found


def container() -> dict[str, Any]:
    (found,) = only("Deployment")["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_definitions_and_operator_are_installed_and_nothing_else() -> None:
    files = {path.relative_to(MANIFESTS).as_posix() for path in MANIFESTS.rglob("*.yaml")}
    assert set(kustomization()) == {path for path in files if path.startswith(("crds/", "operator/"))}
    assert {path.split("/")[0] for path in files - set(kustomization())} == {"kustomization.yaml", "samples", "trial"}


def test_the_namespace_comes_before_what_is_in_it() -> None:
    kinds = [body["kind"] for body in objects()]
    places = [(body["metadata"].get("namespace"), index) for index, body in enumerate(objects())]
    assert {place for place, _ in places} == {None, "opensora-system"}
    assert kinds.index("Namespace") < min(index for place, index in places if place)


def test_the_operator_is_as_restricted_as_its_namespace_demands() -> None:
    """The Pod Security Standard `restricted`, which the namespace enforces."""
    assert only("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = only("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container()["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [volume for volume in pod["volumes"] if "hostPath" in volume] == []


def test_ports_and_probes_fit_the_settings() -> None:
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports["http"] == Settings().http_port
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container()[probe]["httpGet"] == {"path": "/healthz", "port": "http"}
    (port,) = only("Service")["spec"]["ports"]
    assert port["targetPort"] in ports
    assert port["port"] == ports[port["targetPort"]]


def test_the_pod_runs_with_settings_that_exist() -> None:
    environment = {entry["name"]: entry.get("value", "") for entry in container()["env"]}
    settings = read_settings(container().get("args", []), {**environment, "POD_NAMESPACE": "here", "POD_NAME": "me"})
    assert (settings.own_namespace, settings.identity) == ("here", "me")
    assert settings.leader_election
    assert settings.progress_service == only("Service")["metadata"]["name"]
    assert settings.progress_port == only("Service")["spec"]["ports"][0]["port"]


def test_the_progress_service_selects_the_leader_alone() -> None:
    selector = dict(only("Service")["spec"]["selector"])
    assert selector.pop(LEADER_LABEL) == "true"
    assert selector.items() <= only("Deployment")["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("kind", ["Role", "ClusterRole"])
def test_roles_are_bound_to_the_operators_account(kind: str) -> None:
    account = only("Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    (binding,) = (body for body in objects() if body["kind"] == f"{kind}Binding")
    assert binding["roleRef"]["name"] in {body["metadata"]["name"] for body in objects() if body["kind"] == kind}
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "opensora-system"}]
    assert only("ServiceAccount")["metadata"]["name"] == account


def test_the_store_to_try_things_out_is_what_the_sample_profile_names() -> None:
    service, store = yaml.safe_load_all((MANIFESTS / "trial/object-store.yaml").read_text(encoding="utf-8"))
    profile = yaml.safe_load((MANIFESTS / "samples/clustertrainingprofile.yaml").read_text(encoding="utf-8"))["spec"]
    (port,) = service["spec"]["ports"]
    place = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc:{port['port']}"
    assert profile["storage"]["endpoint"] == f"http://{place}"
    (container,) = store["spec"]["template"]["spec"]["containers"]
    assert {"secretRef": profile["storage"]["secretRef"]} in container["envFrom"]
    assert container["image"] == profile["image"]
    assert f"--port={container['ports'][0]['containerPort']}" in container["args"]
    assert service["spec"]["selector"].items() <= store["spec"]["template"]["metadata"]["labels"].items()
