"""An operator that the chart installs for some namespaces: it does its work there, and has no right anywhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from control_plane import ApiError, ControlPlane
from helm_chart import Object, of_kind, render
from operator_process import OperatorProcess
from stage import Stage, playing_kubelets

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]
IDENTITY = "operator-of-two-namespaces"


@pytest.fixture
def namespaces(control_plane: ControlPlane) -> list[str]:
    """Its own, two that it looks after, and another one."""
    names = ["opensora-system", "team-a", "team-b", "team-c"]
    for name in names:
        control_plane.kubectl("create", "namespace", name)
        control_plane.kubectl("wait", "--for=create", "--timeout=60s", "-n", name, "serviceaccount/default")
    return names


def permissions(watched: list[str]) -> list[Object]:
    """The chart's roles and bindings, for a user instead of the service account of a pod."""
    objects = render({"watchNamespaces": watched})
    bindings = [*of_kind(objects, "RoleBinding"), *of_kind(objects, "ClusterRoleBinding")]
    subject = {"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": IDENTITY}
    return [
        *of_kind(objects, "Role"),
        *of_kind(objects, "ClusterRole"),
        *({**binding, "subjects": [subject]} for binding in bindings),
    ]


def test_it_looks_after_its_namespaces_alone(
    control_plane: ControlPlane, namespaces: list[str], tmp_path: Path
) -> None:
    own, watched, other = namespaces[0], namespaces[1:3], namespaces[3]
    control_plane.apply(*permissions(watched))
    operator = OperatorProcess(
        control_plane.kubeconfig(IDENTITY), tmp_path, namespace=own, namespaces=",".join(watched)
    )
    with playing_kubelets(control_plane) as kubelets, operator:
        stages = {name: Stage(control_plane, kubelets, name).create() for name in (*watched, other)}
        for name in watched:
            stages[name].until_phase("Running")
        stages[watched[0]].end(1, 1, message="boom")
        stages[watched[0]].until_phase("Running", attempt=2)
        for name in watched:
            stages[name].succeed()
            stages[name].until_phase("Succeeded")
    assert stages[other].jobs() == {}
    assert stages[other].status == {}
    assert control_plane.denials(identity=IDENTITY) == []
    with pytest.raises(ApiError) as refused:
        control_plane.request("GET", "/apis/batch/v1/jobs", identity=IDENTITY)
    assert refused.value.code == 403
    assert "team-c" not in json.dumps(list(control_plane.audit_events(identity=IDENTITY)))
