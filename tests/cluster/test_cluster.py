"""The throw-away cluster itself: what the drills on top of it rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import images
import psutil
import pytest
from control_plane import ApiError
from kueue import QUEUE_LABEL, Kueue
from nodes import Cluster, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
_SECONDS = 120.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, without waiting for its end."""
    name = request.node.name.replace("_", "-")[:50].strip("-")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.control_plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    _until(lambda: _exists(cluster, f"/api/v1/namespaces/{name}/serviceaccounts/default"))
    yield name
    cluster.control_plane.kubectl("delete", "namespace", name, "--wait=false")


def test_both_nodes_are_ready(cluster: Cluster) -> None:
    nodes = json.loads(cluster.control_plane.kubectl("get", "nodes", "-o", "json"))["items"]
    ready = {
        node["metadata"]["name"]: condition["status"]
        for node in nodes
        for condition in node["status"]["conditions"]
        if condition["type"] == "Ready"
    }
    assert ready == {"node-a": "True", "node-b": "True"}


def test_pods_run_the_project_with_torch_and_without_privileges(cluster: Cluster, namespace: str) -> None:
    code = (
        "import os, opensora, torch; print(torch.arange(3).sum().item(), os.getuid(), open('/proc/self/status').read())"
    )
    _run_pod(cluster, namespace, "trainer", images.restricted_pod(["python", "-c", code]))
    output = cluster.control_plane.kubectl("logs", "--namespace", namespace, "trainer")
    assert output.startswith(f"3 {images.USER} ")
    status = dict(line.split(":\t", 1) for line in output.splitlines()[1:] if ":\t" in line)
    assert int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Seccomp"].strip() == "2"


def test_the_operator_s_image_has_its_program(cluster: Cluster, namespace: str) -> None:
    pod = images.restricted_pod(["opensora-operator", "--help"], image=images.OPERATOR)
    _run_pod(cluster, namespace, "operator", pod)
    assert "--kubeconfig" in cluster.control_plane.kubectl("logs", "--namespace", namespace, "operator")


def test_pods_of_a_job_on_both_nodes_reach_each_other_by_name(cluster: Cluster, namespace: str) -> None:
    code = (
        "import os, socket, time\n"
        "def retry(call):\n"
        "    while True:\n"
        "        try: return call()\n"
        "        except OSError: time.sleep(0.2)\n"
        "if os.environ['JOB_COMPLETION_INDEX'] == '0':\n"
        "    server = socket.create_server(('', 5000))\n"
        "    assert server.accept()[0].recv(5) == b'hello'\n"
        "else:\n"
        "    retry(lambda: socket.create_connection(('pair-0.pair', 5000))).send(b'hello')\n"
        # A name that does not exist fails at once, and not after the resolver's patience.
        "start = time.monotonic()\n"
        "try: socket.gethostbyname('no-such-pod.pair')\n"
        "except socket.gaierror as error: assert error.errno == socket.EAI_NONAME\n"
        "assert time.monotonic() - start < 3\n"
    )
    selector = {"matchLabels": {"job-name": "pair"}}
    apart = [{"topologyKey": "kubernetes.io/hostname", "labelSelector": selector}]
    pod = images.restricted_pod(["python", "-c", code]) | {
        "subdomain": "pair",
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": apart}},
    }
    cluster.control_plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "pair", "namespace": namespace},
            "spec": {"clusterIP": "None", "selector": {"job-name": "pair"}, "publishNotReadyAddresses": True},
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "pair", "namespace": namespace},
            "spec": {
                "completions": 2,
                "parallelism": 2,
                "completionMode": "Indexed",
                "backoffLimit": 0,
                "template": {"spec": pod},
            },
        },
    )
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs/pair"
    _until(lambda: "completionTime" in cluster.control_plane.request("GET", path)["status"])
    pods = cluster.control_plane.request("GET", f"/api/v1/namespaces/{namespace}/pods")["items"]
    assert {pod["spec"]["nodeName"] for pod in pods} == {"node-a", "node-b"}


def test_services_answer_pods_and_this_machine(cluster: Cluster, namespace: str) -> None:
    server = "import http.server as h; h.ThreadingHTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"
    plane = cluster.control_plane
    pod = _pod(namespace, "web", images.restricted_pod(["python", "-c", server]) | {"nodeName": "node-b"})
    pod["metadata"]["labels"] = {"app": "web"}
    spec = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8000}]}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": namespace}, "spec": spec}
    plane.apply(pod, service)
    address = plane.request("GET", f"/api/v1/namespaces/{namespace}/services/web")["spec"]["clusterIP"]
    _until(lambda: _answers(f"http://{address}/"))
    code = "import urllib.request as u; print(u.urlopen('http://web/', timeout=20).status)"
    _run_pod(cluster, namespace, "client", images.restricted_pod(["python", "-c", code]) | {"nodeName": "node-a"})
    assert plane.kubectl("logs", "--namespace", namespace, "client") == "200\n"
    assert plane.kubectl("exec", "--namespace", namespace, "web", "--", "id", "-u") == f"{images.USER}\n"


def test_pods_reach_a_server_of_this_machine(cluster: Cluster, namespace: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "--bind", cluster.host_address, "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().split(" port ")[1].split()[0]
            code = f"import urllib.request as u; u.urlopen('http://{cluster.host_address}:{port}/', timeout=20)"
            _run_pod(cluster, namespace, "client", images.restricted_pod(["python", "-c", code]))
        finally:
            server.kill()


def test_a_dead_node_takes_its_pods_along_and_comes_back(cluster: Cluster, namespace: str) -> None:
    node = cluster.nodes["node-b"]
    (rank,) = _start_sleeper(cluster, namespace, "node-b")
    node.kill()
    assert not rank.is_running()
    assert node.processes() == []
    _until(lambda: not node.is_ready())
    assert cluster.nodes["node-a"].is_ready()
    _until(lambda: _is_evicted(cluster, namespace))
    node.restart()
    _until(lambda: not _exists(cluster, f"/api/v1/namespaces/{namespace}/pods/sleeper"))
    _run_pod(cluster, namespace, "after", images.restricted_pod(["python", "-c", ""]) | {"nodeName": "node-b"})


def test_pods_of_a_partitioned_node_live_on_until_it_comes_back(cluster: Cluster, namespace: str) -> None:
    node = cluster.nodes["node-b"]
    (rank,) = _start_sleeper(cluster, namespace, "node-b")
    node.partition()
    _until(lambda: not node.is_ready())
    _until(lambda: _is_evicted(cluster, namespace))
    assert rank.is_running()
    node.restart()
    _until(lambda: not _exists(cluster, f"/api/v1/namespaces/{namespace}/pods/sleeper"))
    assert not rank.is_running()


def test_kueue_admits_what_fits_and_preempts_for_what_matters_more(cluster: Cluster, namespace: str) -> None:
    plane = cluster.control_plane
    plane.apply(
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": "matters-more"},
            "value": 1000,
        }
    )

    def submit(name: str, **spec: str) -> None:
        pod = images.restricted_pod(["sleep", "600"], resources={"requests": {"cpu": "100m"}}) | spec
        metadata = {"name": name, "namespace": namespace, "labels": {QUEUE_LABEL: "queue"}}
        job = {"suspend": True, "template": {"spec": pod}}
        plane.apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job})

    def is_suspended(name: str) -> bool:
        return bool(plane.request("GET", f"/apis/batch/v1/namespaces/{namespace}/jobs/{name}")["spec"]["suspend"])

    with Kueue(plane) as kueue:
        kueue.make_queue("queue", namespace=namespace, cpu="100m")
        submit("first")
        _until(lambda: not is_suspended("first"))
        submit("second")
        submit("important", priorityClassName="matters-more")
        _until(lambda: not is_suspended("important"))
        assert is_suspended("first")
        assert is_suspended("second")


def test_two_clusters_run_beside_each_other_and_leave_nothing(cluster: Cluster, tmp_path: Path) -> None:
    before = _traces()
    with Cluster(tmp_path, names=["node-a"]) as second:
        assert second.nodes["node-a"].is_ready()
        assert second.host_address != cluster.host_address
        assert cluster.nodes["node-a"].is_ready()
    assert _traces() - before == set()


def test_a_cluster_whose_owner_was_killed_leaves_no_process_and_the_next_one_removes_the_rest(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    before = _traces()
    code = (
        "import pathlib, sys, time, nodes\n"
        "with nodes.Cluster(pathlib.Path(sys.argv[1]), names=['node-a']): print('up', flush=True); time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{images.REPOSITORY}:{images.REPOSITORY / 'tests/cluster'}"}
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "killed"], env=environment, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        owner.kill()
    _until(lambda: not _processes_in(tmp_path))
    with Cluster(tmp_path / "next", names=["node-a"]):
        pass
    assert _traces() - before == set()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.1)


def _exists(cluster: Cluster, path: str) -> bool:
    try:
        cluster.control_plane.request("GET", path)
    except ApiError as error:
        if error.code != 404:
            raise
        return False
    return True


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _pod(namespace: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def _phase(cluster: Cluster, namespace: str, name: str) -> str:
    return str(cluster.control_plane.request("GET", f"/api/v1/namespaces/{namespace}/pods/{name}")["status"]["phase"])


def _run_pod(cluster: Cluster, namespace: str, name: str, spec: dict[str, Any]) -> None:
    """Run a pod until it has succeeded."""
    cluster.control_plane.apply(_pod(namespace, name, spec))
    _until(lambda: _phase(cluster, namespace, name) in ("Succeeded", "Failed"))
    assert _phase(cluster, namespace, name) == "Succeeded", cluster.control_plane.kubectl("logs", "-n", namespace, name)


def _start_sleeper(cluster: Cluster, namespace: str, node: str) -> list[psutil.Process]:
    """Start a pod `sleeper` on a node; returns its processes, but for the one that holds its sandbox."""
    spec = images.restricted_pod(["sleep", "12345"]) | {"nodeName": node}
    cluster.control_plane.apply(_pod(namespace, "sleeper", spec))
    _until(lambda: _phase(cluster, namespace, "sleeper") == "Running")
    return [process for process in cluster.nodes[node].processes() if process.name() == "sleep"]


def _is_evicted(cluster: Cluster, namespace: str) -> bool:
    pod = cluster.control_plane.request("GET", f"/api/v1/namespaces/{namespace}/pods/sleeper")
    return "deletionTimestamp" in pod["metadata"]


def _processes_in(folder: Path) -> list[int]:
    """The processes of a cluster: all name a file in its folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or []):
            found.append(process.pid)
    return found


def _traces() -> set[str]:
    """What of this machine a cluster could change, as far as clusters do. Others may leave meanwhile."""
    commands = {
        "interface": "ip -o link | grep -o 'opensora[0-9]*-[a-z0-9]*' | sort -u",
        "route": "ip route | grep -o '.* dev opensora[0-9]*-[a-z0-9]*'",
        "filter": "iptables-save | grep -v '^[#:]'",
        "mount": "grep -E 'opensora|/var/lib/(kubelet|cni)|containerd' /proc/mounts",
        "cgroup": "find /sys/fs/cgroup -maxdepth 2 -name 'opensora*-*'",
    }
    return {
        f"{name} {line}"
        for name, command in commands.items()
        for line in subprocess.run(["sh", "-c", command], capture_output=True, text=True).stdout.splitlines()
    }
