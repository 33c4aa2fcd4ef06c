"""Progress from a rank to a status, and requests back: the core's reporter, the operator, and tokens of a real API
server."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from control_plane import ApiError, ControlPlane
from operator_process import OperatorProcess, eventually, grant
from stage import Kubelets, Object, Stage, now, playing_kubelets

from opensora.training.operator_link import OperatorAddress, OperatorLink, Requests
from opensora.training.progress import ProgressState

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SERVICE = "opensora-operator-progress"
SECRET = "opensora-operator-progress-ca"


@pytest.fixture(scope="module")
def nodes(control_plane: ControlPlane) -> Iterator[None]:
    """The nodes that pods are bound to. Kubernetes removes pods whose node does not exist after 40 s."""
    stopping = threading.Event()
    names = ("node-0", "node-1")

    def renew() -> None:
        while not stopping.wait(3):
            for name in names:
                status = {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": now()}]}
                path = f"/api/v1/nodes/{name}/status"
                control_plane.request(
                    "PATCH", path, {"status": status}, content_type="application/strategic-merge-patch+json"
                )

    for name in names:
        control_plane.request("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    thread = threading.Thread(target=renew)
    thread.start()
    yield
    stopping.set()
    thread.join()
    for name in names:
        with contextlib.suppress(ApiError):  # the API server may have removed it already
            control_plane.request("DELETE", f"/api/v1/nodes/{name}")


@pytest.fixture(scope="module")
def kubelets(control_plane: ControlPlane, nodes: None) -> Iterator[Kubelets]:
    with playing_kubelets(control_plane) as kubelets:
        yield kubelets


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    grant(control_plane)
    operator = make_operator(control_plane.kubeconfig("operator"), tmp_path_factory.mktemp("operator"))
    operator.start_and_lead()
    yield operator
    operator.terminate(30.0)
    assert "this is a bug" not in operator.log.read_text()


def make_operator(kubeconfig: Path, folder: Path) -> OperatorProcess:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    return OperatorProcess(kubeconfig, folder, progress_service=SERVICE, progress_port=port, lease_seconds=4.0,
                           renew_seconds=3.0, retry_seconds=0.5)  # fmt: skip


@pytest.fixture
def stage(control_plane: ControlPlane, kubelets: Kubelets, operator: OperatorProcess, namespace: str) -> Stage:
    return Stage(control_plane, kubelets, namespace).create().until_phase("Running")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Service leads to this machine, and the reporter looks often."""
    find = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **keywords: Any) -> Any:
        return find("127.0.0.1" if str(host).endswith(".svc") else host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("opensora.training.operator_link._TICK_SECONDS", 0.2)


STARTING = ProgressState(
    phase="training", state="Starting", step=0, total_steps=100, epoch=0, loss=None, seconds_per_step=None,
    samples_per_second=None, eta_seconds=None, goodput=0.5, attempt=1, checkpoint_step=None, samples_step=None,
    updated=0.0,
)  # fmt: skip


@dataclass
class Rank:
    """Rank 0 in a pod, as far as it reports."""

    link: OperatorLink
    stops: list[bool] = field(default_factory=list)
    dumps: list[str] = field(default_factory=list)
    latest: ProgressState = STARTING

    def report(self, **changes: Any) -> None:
        self.latest = replace(self.latest, **changes)
        self.link.update(self.latest)


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    started: list[Rank] = []
    yield started
    for rank in started:
        rank.link.close(rank.latest, timeout_seconds=0.1)


def environment_of(pod: Object) -> dict[str, str]:
    return {item["name"]: item["value"] for item in pod["spec"]["containers"][0]["env"] if "value" in item}


def token_of(stage: Stage, pod: Object, *, audience: str) -> str:
    """What a kubelet asks for, and puts into the pod."""
    bound = {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    account = pod["spec"].get("serviceAccountName", "default")
    path = f"/api/v1/namespaces/{stage.namespace}/serviceaccounts/{account}/token"
    spec = {"audiences": [audience], "expirationSeconds": 3600, "boundObjectRef": bound}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    token: str = stage.request("POST", path, body)["status"]["token"]
    return token


def mounted(stage: Stage, pod: Object, folder: Path) -> OperatorAddress:
    """The address of the operator in a pod, whose files are where a kubelet has put them."""
    address = OperatorAddress.from_environment(environment_of(pod))
    assert address is not None
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
    source = mounts[str(address.token_file.parent)]["projected"]["sources"][0]["serviceAccountToken"]
    assert address.token_file.name == source["path"]
    config_map = mounts[str(address.ca_file.parent)]["configMap"]["name"]
    data = stage.request("GET", f"/api/v1/namespaces/{stage.namespace}/configmaps/{config_map}")["data"]
    folder.mkdir(exist_ok=True)
    (folder / "ca.crt").write_text(data[address.ca_file.name])
    (folder / "token").write_text(token_of(stage, pod, audience=source["audience"]))
    return replace(address, token_file=folder / "token", ca_file=folder / "ca.crt")


def start_rank(address: OperatorAddress, ranks: list[Rank], **state: Any) -> Rank:
    stops: list[bool] = []
    dumps: list[str] = []

    def dump(name: str, done: Any) -> None:
        dumps.append(name)
        done()

    requests = Requests(stop=lambda: stops.append(True), dump=dump)
    link = OperatorLink(address, requests=requests, stop_requested=lambda: bool(stops))
    rank = Rank(link=link, stops=stops, dumps=dumps)
    ranks.append(rank)
    rank.report(**state)
    return rank


def test_a_status_shows_what_rank_zero_reports(stage: Stage, ranks: list[Rank], tmp_path: Path) -> None:
    rank = start_rank(mounted(stage, stage.pods(1)[0], tmp_path), ranks)
    rank.report(state="Training", step=25, loss=0.125, seconds_per_step=2.0, eta_seconds=150.0, checkpoint_step=20)
    shown = stage.until(lambda: (progress := stage.status.get("progress", {})).get("step") == 25 and progress)
    assert (shown["percent"], shown["state"], shown["eta"]) == (25, "Training", "2m30s")
    assert float(shown["loss"]) == 0.125
    assert stage.status["checkpoint"]["latestStep"] == 20
    assert stage.condition("Progressing")["status"] == "True"
    rank.report(state="Saving", step=26)
    stage.until(lambda: stage.condition("Progressing").get("reason") == "SavingCheckpoint")


def test_requests_reach_the_rank_and_are_echoed(stage: Stage, ranks: list[Rank], tmp_path: Path) -> None:
    rank = start_rank(mounted(stage, stage.pods(1)[0], tmp_path), ranks, state="Training", step=3)
    stage.until(lambda: stage.status.get("progress", {}).get("step") == 3)
    stage.edit(requests={"checkpoint": {"id": "before-lunch"}, "dump": {"id": "curious"}})

    def asked() -> bool:
        rank.report(state="Evaluating" if rank.latest.state == "Training" else "Training")  # a milestone
        return rank.link.requests.num_checkpoints == 1 and rank.dumps == ["curious"]

    eventually(asked)
    stage.until(lambda: stage.status["requests"].get("dump") == "curious")
    assert "checkpoint" not in stage.status["requests"], "it is not saved yet"
    rank.link.requests.saving(1, step=3, is_committed=lambda: True)
    stage.until(lambda: stage.status["requests"].get("checkpoint") == "before-lunch")
    stage.until(lambda: stage.status["checkpoint"].get("latestStep") == 3)
    assert rank.dumps == ["curious"]


def test_only_pods_of_the_current_attempt_are_heard(
    stage: Stage, ranks: list[Rank], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = stage.pods(1)[0]
    address = mounted(stage, first, tmp_path / "first")
    rank = start_rank(address, ranks, state="Training", step=3)
    stage.until(lambda: stage.status.get("progress", {}).get("step") == 3)

    # Another pod of the namespace, with a token made for this run's audience.
    stage.request("POST", f"/api/v1/namespaces/{stage.namespace}/pods", STRANGER)
    stranger = stage.request("GET", f"/api/v1/namespaces/{stage.namespace}/pods/stranger")
    audience = f"opensora.dev/{stage.namespace}/demo"
    assert refusal(stage, stranger, address, audience, ranks, tmp_path, caplog).startswith("HTTP 403: the token's pod")
    other = refusal(stage, first, address, f"opensora.dev/{stage.namespace}/other", ranks, tmp_path, caplog)
    assert other == f"HTTP 403: the token is not for {audience}"

    stage.end(0, 1)
    stage.until_phase("Running", attempt=2)
    rank.report(step=99)
    late = refusal(stage, None, address, audience, ranks, tmp_path, caplog)
    assert late.startswith(("HTTP 403: the token's pod does not belong to attempt 2", "HTTP 401"))
    rank = start_rank(mounted(stage, stage.pods(2)[0], tmp_path / "second"), ranks, attempt=2, state="Training", step=4)
    stage.until(lambda: stage.status.get("progress", {}).get("step") == 4)


STRANGER = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "stranger"},
    "spec": {"containers": [{"name": "main", "image": "example.com/main:1"}]},
}


def refusal(
    stage: Stage, pod: Object | None, address: OperatorAddress, audience: str, ranks: list[Rank], folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> str:  # fmt: skip
    """What a report is answered that is sent with a pod's token; None: the one that is there."""
    if pod is not None:
        address = replace(address, token_file=folder / "strange-token")
        address.token_file.write_text(token_of(stage, pod, audience=audience))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        rank = start_rank(address, ranks, state="Training", step=77)
        prefix = "progress does not reach the operator: "
        said = eventually(lambda: [line for line in caplog.messages if line.startswith(prefix)])
        rank.link.close(rank.latest, timeout_seconds=0.1)
        rank.link.join()
    assert stage.status["progress"]["step"] != 77
    return str(said[0].removeprefix(prefix).removesuffix("; training goes on"))


def test_another_replica_is_known_by_the_same_authority(
    stage: Stage, operator: OperatorProcess, ranks: list[Rank], tmp_path: Path
) -> None:
    rank = start_rank(mounted(stage, stage.pods(1)[0], tmp_path), ranks, state="Training", step=3)
    stage.until(lambda: stage.status.get("progress", {}).get("step") == 3)
    operator.kill()
    rank.report(step=4, checkpoint_step=4)
    operator.start_and_lead()
    stage.until(lambda: stage.status.get("progress", {}).get("step") == 4)
    data = stage.request("GET", f"/api/v1/namespaces/default/secrets/{SECRET}")["data"]
    assert sorted(data) == ["ca.crt", "current.crt", "current.key"]


def test_the_api_server_is_asked_about_a_token_only_where_its_keys_cannot_be_read(
    stage: Stage,
    control_plane: ControlPlane,
    operator: OperatorProcess,
    ranks: list[Rank],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    def num_reviews(since: int) -> int:
        events = control_plane.audit_events(since, identity="operator")
        return sum((event.get("objectRef") or {}).get("resource") == "tokenreviews" for event in events)

    mark = control_plane.audit_mark()
    address = mounted(stage, stage.pods(1)[0], tmp_path)
    rank = start_rank(address, ranks, state="Training", step=3)
    stage.until(lambda: stage.status.get("progress", {}).get("step") == 3)
    rank.report(step=4, checkpoint_step=4)
    stage.until(lambda: stage.status.get("checkpoint", {}).get("latestStep") == 4)
    assert num_reviews(mark) == 1, "the answer is kept for a minute"

    control_plane.apply(READS_KEYS)
    request.addfinalizer(lambda: control_plane.request("DELETE", f"{RBAC}/clusterrolebindings/operator-reads-keys"))
    operator.kill()
    mark = control_plane.audit_mark()
    operator.start_and_lead()
    rank.report(step=5, checkpoint_step=5)
    stage.until(lambda: stage.status.get("checkpoint", {}).get("latestStep") == 5)
    assert num_reviews(mark) == 0
    forged = address.token_file.read_text()
    address.token_file.write_text(forged[:-20] + forged[-20:].swapcase())
    rank.report(step=6, checkpoint_step=6)
    eventually(lambda: "the token is not signed by this cluster" in operator.log.read_text())
    assert json.dumps(stage.status).count('"latestStep": 6') == 0


RBAC = "/apis/rbac.authorization.k8s.io/v1"
READS_KEYS = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRoleBinding",
    "metadata": {"name": "operator-reads-keys"},
    "roleRef": {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "ClusterRole",
        "name": "system:service-account-issuer-discovery",
    },
    "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "operator"}],
}
"""Every service account may read the cluster's keys by default; this user has to be allowed to."""
