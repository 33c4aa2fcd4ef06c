"""`osctl doctor` against a real API server: what is missing is found, and its commands mend it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from control_plane import ControlPlane
from operator_process import OperatorProcess, eventually, grant
from shell import Terminal
from stage import set_status

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MANIFESTS = Path(__file__).parents[2] / "manifests/operator"
ROLE = "opensora-system:opensora-operator"


@pytest.fixture(scope="module")
def installed(control_plane: ControlPlane) -> Iterator[None]:
    """The operator as the manifests install it; there is no node for its pod."""
    control_plane.kubectl("apply", "-f", str(MANIFESTS / "namespace.yaml"))
    control_plane.kubectl("apply", "-f", str(MANIFESTS))
    yield
    control_plane.kubectl("delete", "-f", str(MANIFESTS), "--wait=false", "--ignore-not-found")


@pytest.fixture
def terminal(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> Terminal:
    return Terminal(control_plane, namespace, tmp_path)


def _rows(terminal: Terminal, *, code: int = 1, identity: str = "admin") -> dict[str, dict[str, str]]:
    """Check → its row."""
    done = subprocess.run(
        [sys.executable, "-m", "osctl", "doctor", "-o", "json"], env=terminal.environment(identity),
        cwd=terminal.folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return {row["check"]: row for row in json.loads(done.stdout)["checks"]}


def _states(rows: dict[str, dict[str, str]]) -> dict[str, str]:
    return {check: row["state"] for check, row in rows.items()}


def test_definitions_without_an_operator(terminal: Terminal) -> None:
    """The first test of the file: later ones install one."""
    rows = _rows(terminal)
    states = _states(rows)
    for check in ("server", "clock", "rights", "kinds", "definitions", "queue", "runs", "pods", "events"):
        assert states[check] == "ok", rows[check]
    assert states["operator"] == "failed"
    assert "no operator is installed" in rows["operator"]["message"]
    assert states["profiles"] == "warning"


def test_an_operator_that_works_outside_is_seen_by_its_lease(
    control_plane: ControlPlane, terminal: Terminal, tmp_path: Path
) -> None:
    grant(control_plane)
    operator = OperatorProcess(control_plane.kubeconfig("operator"), tmp_path)
    operator.start_and_lead()
    try:
        rows = _rows(terminal, code=1)  # there are no nodes
        assert (rows["leader"]["state"], rows["operator"]["state"]) == ("ok", "warning")
        assert operator.identity in rows["operator"]["message"]
    finally:
        operator.terminate(30.0)
    assert _rows(terminal)["leader"]["state"] == "failed", "it has given up the Lease"
    control_plane.request("DELETE", "/apis/coordination.k8s.io/v1/namespaces/default/leases/opensora-operator")


def test_definitions_of_another_version_are_told_apart(control_plane: ControlPlane, terminal: Terminal) -> None:
    name = "samplejobs.opensora.dev"
    body = json.loads(control_plane.kubectl("get", "customresourcedefinition", name, "-o", "json"))
    before = body["metadata"]["annotations"]["opensora.dev/schema-hash"]
    control_plane.kubectl("annotate", "--overwrite", "crd", name, "opensora.dev/schema-hash=0123456789abcdef")
    try:
        row = _rows(terminal)["definitions"]
        assert row["state"] == "warning"
        assert name in row["message"]
    finally:
        control_plane.kubectl("annotate", "--overwrite", "crd", name, f"opensora.dev/schema-hash={before}")


def test_an_installation_without_nodes(control_plane: ControlPlane, terminal: Terminal, installed: None) -> None:
    eventually(
        lambda: "Unschedulable" in _rows(terminal)["operator"]["message"],
        what="the scheduler has said why the operator's pod has no node",
    )
    rows = _rows(terminal)
    assert rows["operator"]["state"] == "failed"
    assert "opensora-system/opensora-operator has no ready pod" in rows["operator"]["message"]
    assert rows["version"]["state"] == "ok", rows["version"]
    assert rows["permissions"] == {
        "check": "permissions",
        "state": "ok",
        "message": "opensora-system/opensora-operator may do what it has to",
        "mend": "",
    }
    assert rows["nodes"]["message"] == "none of 0 nodes is ready for pods"


def test_rights_that_the_operator_lacks_or_need_not_have(
    control_plane: ControlPlane, terminal: Terminal, installed: None
) -> None:
    role = json.loads(control_plane.kubectl("get", "clusterrole", ROLE, "-o", "json"))
    path = f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{ROLE}"

    def write(rules: list[Any]) -> None:
        change = {"rules": rules}
        control_plane.request("PATCH", path, change, content_type="application/merge-patch+json")

    try:
        write([rule for rule in role["rules"] if rule["resources"] != ["pods"]])
        row = _rows(terminal)["permissions"]
        assert row["state"] == "failed"
        assert "may not list pods, watch pods" in row["message"]
        write([*role["rules"], {"apiGroups": [""], "resources": ["secrets"], "verbs": ["list"]}])
        row = _rows(terminal)["permissions"]
        assert row["state"] == "warning"
        assert "may list secrets" in row["message"]
    finally:
        write(role["rules"])


def test_who_may_nothing_is_given_rights_by_the_command_of_the_row(
    control_plane: ControlPlane, terminal: Terminal, installed: None
) -> None:
    rows = _rows(terminal, identity="alice")
    assert rows["rights"]["state"] == "failed"
    unseen = {check for check, row in rows.items() if row["state"] == "not seen"}
    assert {"definitions", "operator", "leader", "nodes", "pods", "events", "runs"} <= unseen
    program, *words = shlex.split(rows["rights"]["mend"])
    assert program == "kubectl"
    control_plane.kubectl(*words)
    eventually(lambda: _rows(terminal, identity="alice", code=0)["rights"]["state"] == "ok")
    rows = _rows(terminal, identity="alice", code=0)
    assert "alice may do in namespace" in rows["rights"]["message"]
    assert rows["nodes"]["message"] == "you may not list nodes"


def test_a_run_that_nobody_looks_at_and_a_pod_without_a_node(
    control_plane: ControlPlane, terminal: Terminal, namespace: str
) -> None:
    terminal.run("train", terminal.run_file())
    labels = {
        "opensora.dev/kind": "TrainingRun", "opensora.dev/name": "demo", "opensora.dev/uid": "u",
        "opensora.dev/attempt": "1",
    }  # fmt: skip
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "demo-a1-0", "namespace": namespace, "labels": labels},
        "spec": {"containers": [{"name": "trainer", "image": "x"}]},
    }
    control_plane.apply(pod)
    row = eventually(
        lambda: (row := _rows(terminal)["scheduling"])["state"] == "warning" and row, what="the scheduler has spoken"
    )
    assert "1 pod without a node; demo-a1-0: " in row["message"]
    events = _rows(terminal)["events"]
    assert (events["state"], "FailedScheduling" in events["message"]) == ("warning", True)
    runs = eventually(lambda: (row := _rows(terminal)["runs"])["state"] == "failed" and row, seconds=60.0)
    assert "has not looked at TrainingRun demo" in runs["message"]


def test_a_pod_that_cannot_start(control_plane: ControlPlane, terminal: Terminal, namespace: str) -> None:
    labels = {"opensora.dev/kind": "TrainingRun", "opensora.dev/name": "demo", "opensora.dev/uid": "u"}
    spec = {"nodeName": "nowhere", "containers": [{"name": "trainer", "image": "x"}]}
    meta = {"name": "demo-a1-0", "namespace": namespace, "labels": labels}
    control_plane.apply({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    pod = control_plane.request("GET", f"/api/v1/namespaces/{namespace}/pods/demo-a1-0")
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    set_status(control_plane, pod, "Pending", waiting)
    row = _rows(terminal)["pods"]
    assert (row["state"], "ImagePullBackOff: no such image" in row["message"]) == ("warning", True)


def test_a_secret_that_a_profile_names_and_that_is_not_there(
    control_plane: ControlPlane, terminal: Terminal, namespace: str
) -> None:
    profile = {
        "apiVersion": "opensora.dev/v1alpha1",
        "kind": "TrainingProfile",
        "metadata": {"name": "small", "namespace": namespace},
        "spec": {"default": True, "image": "example.com/trainer:1", "storage": {"secretRef": {"name": "store"}}},
    }
    control_plane.apply(profile)
    rows = _rows(terminal)
    assert rows["profiles"]["message"] == "TrainingProfile small is the default, with image example.com/trainer:1"
    assert rows["secrets"]["state"] == "failed"
    _, *words = shlex.split(rows["secrets"]["mend"])
    control_plane.kubectl(*words)
    assert _rows(terminal)["secrets"]["message"] == "Secret store: there"


def test_without_definitions_one_command_installs_all(tmp_path: Path) -> None:
    """A control plane of its own: the others need theirs."""
    with ControlPlane(tmp_path / "plane", scheduler=False) as plane:
        terminal = Terminal(plane, "default", tmp_path)
        rows = _rows(terminal)
        assert "nothing is installed" in rows["kinds"]["message"]
        assert rows["runs"]["message"] == "the cluster does not know trainingruns"
        assert yaml.safe_load(terminal.run("version", "--server", "-o", "yaml"))["definitions"] == "not installed"
        plane.stop_apiserver(kill=True)
        first = _rows(terminal)["server"]
        assert first["state"] == "failed"
        assert "cannot be reached" in first["message"]


def test_a_wrong_token_at_a_real_server(control_plane: ControlPlane, tmp_path: Path) -> None:
    terminal = Terminal(control_plane, "default", tmp_path)
    kubeconfig = yaml.safe_load(control_plane.kubeconfig().read_text())
    kubeconfig["users"][0]["user"]["token"] = "wrong"
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(kubeconfig))
    said = terminal.run("get", "--kubeconfig", str(tmp_path / "wrong.yaml"), code=8)
    assert "does not know you" in said
