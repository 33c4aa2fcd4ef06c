"""The control plane itself: what the tests beside this one rely on."""

from __future__ import annotations

import pytest
from control_plane import ApiError, ControlPlane

pytestmark = pytest.mark.cluster


def _config_map(namespace: str, value: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "note", "namespace": namespace},
        "data": {"value": value},
    }


def test_identities_have_no_rights_of_their_own(control_plane: ControlPlane, namespace: str) -> None:
    with pytest.raises(ApiError, match='User "alice" cannot list resource "configmaps"'):
        control_plane.request("GET", f"/api/v1/namespaces/{namespace}/configmaps", identity="alice")


def test_an_identity_of_a_service_account_has_its_rights(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.kubectl(
        "create", "rolebinding", "viewer", "-n", namespace, "--clusterrole=view", "--serviceaccount=default:reader"
    )
    control_plane.add_identity("reader", user="system:serviceaccount:default:reader")
    found = control_plane.request("GET", f"/api/v1/namespaces/{namespace}/configmaps", identity="reader")
    assert [item["metadata"]["name"] for item in found["items"]] == ["kube-root-ca.crt"]


def test_the_audit_log_has_every_request_of_an_identity_since_a_mark(
    control_plane: ControlPlane, namespace: str
) -> None:
    path = f"/api/v1/namespaces/{namespace}/pods"
    for _ in range(2):  # the second time, the first request is before the mark
        mark = control_plane.audit_mark()
        with pytest.raises(ApiError):
            control_plane.request("GET", path, identity="bob")
        control_plane.request("GET", path)
        events = list(control_plane.audit_events(mark, identity="bob"))
        assert [(event["verb"], event["requestURI"], event["responseStatus"]["code"]) for event in events] == [
            ("list", path, 403)
        ]


@pytest.mark.parametrize("kill", [False, True])
def test_data_outlives_the_api_server(control_plane: ControlPlane, namespace: str, kill: bool) -> None:
    control_plane.apply(_config_map(namespace, "kept"))
    control_plane.stop_apiserver(kill=kill)
    with pytest.raises(OSError, match="refused"):
        control_plane.request("GET", "/readyz")
    control_plane.start_apiserver()
    note = control_plane.request("GET", f"/api/v1/namespaces/{namespace}/configmaps/note")
    assert note["data"] == {"value": "kept"}


def test_after_history_is_forgotten_an_old_watch_is_gone(control_plane: ControlPlane, namespace: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    version = control_plane.request("GET", path)["metadata"]["resourceVersion"]
    for value in ("one", "two"):
        control_plane.apply(_config_map(namespace, value))
    control_plane.forget_history()
    answer = control_plane.request("GET", f"{path}?watch=1&timeoutSeconds=5&resourceVersion={version}")
    assert (answer["type"], answer["object"]["code"]) == ("ERROR", 410)
