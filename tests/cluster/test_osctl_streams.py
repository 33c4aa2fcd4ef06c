"""`osctl exec` and `osctl forward` with pods of real nodes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import re
import select
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import images
import pytest
from nodes import Cluster, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SERVER = (
    "import http.server as h\n"
    "class Handler(h.SimpleHTTPRequestHandler):\n"
    "    def do_POST(self):\n"
    "        text = self.rfile.read(int(self.headers['Content-Length']))\n"
    "        self.send_response(200)\n"
    "        self.send_header('Content-Length', str(len(text)))\n"
    "        self.end_headers()\n"
    "        self.wfile.write(text)\n"
    "h.ThreadingHTTPServer(('127.0.0.1', 8000), Handler).serve_forever()\n"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With a run `demo` of two pods, each of two ranks; nobody looks after it."""
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        plane = cluster.control_plane
        plane.kubectl("apply", "-f", str(ROOT / "manifests/crds"))
        plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(ROOT / "manifests/crds"))
        plane.apply(
            {
                "apiVersion": "opensora.dev/v1alpha1",
                "kind": "TrainingRun",
                "metadata": {"name": "demo", "namespace": "default"},
                "spec": {"image": images.TRAINER, "runUri": "/tmp/run", "config": {"inline": "{}"}, "nodes": 2},
            }
        )
        path = "/apis/opensora.dev/v1alpha1/namespaces/default/trainingruns/demo"
        status = {"phase": "Running", "attempt": 1, "resolved": {"procsPerNode": 2, "worldSize": 4}}
        change = {"status": status}
        plane.request("PATCH", f"{path}/status", change, content_type="application/merge-patch+json")
        uid = plane.request("GET", path)["metadata"]["uid"]
        plane.apply(*(_pod(index, uid, node) for index, node in enumerate(("node-a", "node-b"))))
        plane.kubectl("wait", "--for=condition=Ready", "--timeout=120s", "pod/demo-a1-0", "pod/demo-a1-1")
        yield cluster


def _pod(index: int, uid: str, node: str) -> dict[str, Any]:
    labels = {
        "opensora.dev/kind": "TrainingRun",
        "opensora.dev/name": "demo",
        "opensora.dev/uid": uid,
        "opensora.dev/attempt": "1",
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    spec = images.restricted_pod(["python", "-c", SERVER]) | {"nodeName": node}
    spec["containers"][0]["name"] = "trainer"
    meta = {"name": f"demo-a1-{index}", "namespace": "default", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def _start(cluster: Cluster, *words: str, **more: Any) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "operator", "cli"))
    environment = {**os.environ, "PYTHONPATH": path, "KUBECONFIG": str(cluster.control_plane.kubeconfig())}
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen([sys.executable, "-m", "osctl", *words], env=environment, **given)


def _run(cluster: Cluster, *words: str, given: bytes = b"", **more: Any) -> tuple[int, bytes, bytes]:
    with _start(cluster, *words, stdin=subprocess.PIPE, **more) as process:
        out, err = process.communicate(given, timeout=120)
        return process.returncode, out, err


def test_a_command_runs_where_its_rank_is(cluster: Cluster) -> None:
    assert _run(cluster, "exec", "demo", "--", "hostname")[:2] == (0, b"demo-a1-0\n")
    assert _run(cluster, "exec", "demo", "--rank", "3", "--", "hostname")[:2] == (0, b"demo-a1-1\n")


def test_output_errors_and_code_are_the_commands_own(cluster: Cluster) -> None:
    assert _run(cluster, "exec", "demo", "--", "sh", "-c", "echo out; echo err >&2; exit 42") == (
        42,
        b"out\n",
        b"err\n",
    )


def test_a_program_that_is_not_there_is_told(cluster: Cluster) -> None:
    code, out, err = _run(cluster, "exec", "demo", "--", "no-such-program")
    assert (code not in (0, 130), out) == (True, b"")
    assert b"no-such-program" in err


def test_input_of_any_size_goes_there_and_back_to_its_end(cluster: Cluster) -> None:
    text = os.urandom(1 << 20) * 16
    code, out, err = _run(cluster, "exec", "demo", "-i", "--", "cat", given=text)
    assert (code, err, hashlib.sha256(out).digest()) == (0, b"", hashlib.sha256(text).digest())
    code, out, _ = _run(cluster, "exec", "demo", "-i", "--", "sha256sum", given=text)
    assert out.decode().split()[0] == hashlib.sha256(text).hexdigest()


def test_a_shell_in_a_terminal(cluster: Cluster) -> None:
    near, far = pty.openpty()
    with _start(cluster, "exec", "demo", stdin=far, stdout=far, stderr=far) as process:
        os.close(far)
        seen = _read_until(near, b"$")
        os.write(near, b"stty size; sleep 1000\r")
        seen += _read_until(near, b"24 80", b"0 0")
        os.write(near, b"\x03")  # ends what runs there, and not osctl
        os.write(near, b"echo $((6 * 7))-here; exit 5\r")
        _read_until(near, b"42-here")
        assert process.wait(60) == 5
    os.close(near)


def test_ports_are_reached_one_connection_after_the_other_and_at_once(cluster: Cluster) -> None:
    with _start(cluster, "forward", "demo", ":8000", "--rank", "2") as process:
        assert process.stderr is not None
        match = re.match(rb"127\.0\.0\.1:(\d+) leads to port 8000 of demo-a1-1", process.stderr.readline())
        assert match is not None
        url = f"http://127.0.0.1:{match[1].decode()}/"
        text = os.urandom(1 << 20) * 4
        for body in (b"x", text, b"y"):
            with urllib.request.urlopen(url, data=body, timeout=60) as answer:
                assert answer.read() == body
        process.terminate()
        process.wait(30)


def test_a_port_where_nobody_listens_says_so_and_the_command_goes_on(cluster: Cluster) -> None:
    with _start(cluster, "forward", "demo", ":9", ":8000") as process:
        assert process.stderr is not None
        ports = [int(process.stderr.readline().split(b" ")[0].rpartition(b":")[2]) for _ in range(2)]
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/", timeout=60)
        assert b"port 9: " in process.stderr.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[1]}/", data=b"z", timeout=60) as answer:
            assert answer.read() == b"z"
        process.terminate()
        process.wait(30)


def _read_until(descriptor: int, *words: bytes, seconds: float = 60.0) -> bytes:
    seen = b""
    deadline = time.monotonic() + seconds
    while not any(word in seen for word in words):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, seen
        seen += os.read(descriptor, 4096)
    return seen
