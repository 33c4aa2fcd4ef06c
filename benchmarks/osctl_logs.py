"""Measures `osctl logs` of a large run: how soon the first line is out, how fast the rest, how much memory it takes.

python benchmarks/osctl_logs.py                          64 pods of 10,000 lines, and one pod beside kubectl
python benchmarks/osctl_logs.py --pods 8 --lines 100000
python benchmarks/osctl_logs.py --kubectl PATH           where kubectl is not on the PATH

The API server is a small one on this machine that speaks HTTP and knows the run, its pods and their logs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LIMIT_TIMES_KUBECTL = 1.5
_PIECE_BYTES = 32 * 1024


PODS = {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": ["get", "list"]}
DISCOVERY = {
    "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [PODS]},
}
"""What kubectl asks for before anything else."""


@dataclass(frozen=True)
class Measured:
    """One command."""

    first_seconds: float
    """Until the first line was out."""
    total_seconds: float
    num_lines: int
    peak_mib: float


class Handler(BaseHTTPRequestHandler):
    """A run of one rank per pod, whose ranks log a line every 10 ms."""

    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024  # header and body in one segment, as real servers send them
    disable_nagle_algorithm = True
    logs: Sequence[bytes] = ()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.endswith("/log"):
            self.send_log(int(path.split("/")[-2].rpartition("-")[2]))
        elif path.endswith("/pods"):
            self.send({"kind": "PodList", "metadata": {}, "items": [pod(index) for index in range(len(self.logs))]})
        elif "/pods/" in path:
            self.send({"apiVersion": "v1", "kind": "Pod", **pod(int(path.rpartition("-")[2]))})
        elif path.startswith("/apis/opensora.dev/"):
            self.send(run(len(self.logs)))
        else:
            self.send(DISCOVERY.get(path), status=200 if path in DISCOVERY else 404)

    def send(self, body: Any, *, status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_log(self, index: int) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        log = self.logs[index]
        tail = re.search(r"tailLines=([0-9]+)", self.path)
        start = len(log) - len(b"\n".join(log.split(b"\n")[-int(tail[1]) - 1 :])) if tail else 0
        with contextlib.suppress(BrokenPipeError):
            for position in range(start, len(log), _PIECE_BYTES):
                piece = log[position : position + _PIECE_BYTES]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def log_of(index: int, num_lines: int) -> bytes:
    prefix = f"[rank {index}] " if index else ""
    lines = []
    for step in range(num_lines):
        second, hundredth = divmod(step, 100)
        stamp = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}.{hundredth:02d}{index:07d}Z"
        lines.append(f"2026-01-01T{stamp} {prefix}step {step} loss 0.123456 grad_norm 1.234 {'x' * 60}\n")
    return "".join(lines).encode()


def run(num_pods: int) -> dict[str, Any]:
    status = {"phase": "Running", "attempt": 1, "nodes": {"desired": num_pods}}
    status |= {"resolved": {"procsPerNode": 1, "worldSize": num_pods}}
    return {
        "apiVersion": "opensora.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "demo", "namespace": "default", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"runUri": "/nowhere", "config": {"inline": "x"}},
        "status": status,
    }


def pod(index: int) -> dict[str, Any]:
    labels = {"opensora.dev/kind": "TrainingRun", "opensora.dev/name": "demo", "opensora.dev/uid": "u"}
    labels |= {"opensora.dev/attempt": "1", "batch.kubernetes.io/job-completion-index": str(index)}
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    return {
        "metadata": {"name": f"demo-a1-{index}", "namespace": "default", "uid": f"p{index}", "labels": labels},
        "spec": {"nodeName": "node", "containers": [{"name": "trainer"}]},
        "status": {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": state}]},
    }


def serve(num_pods: int, num_lines: int, port: Any) -> None:
    Handler.logs = [log_of(index, num_lines) for index in range(num_pods)]
    ThreadingHTTPServer.request_queue_size = 512
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.value = server.server_port
    server.serve_forever()


@contextlib.contextmanager
def api_server(num_pods: int, num_lines: int) -> Iterator[str]:
    """An address; the server is a process of its own, so that it takes no time of the reader's interpreter."""
    port = multiprocessing.Value("i", 0)
    process = multiprocessing.Process(target=serve, args=(num_pods, num_lines, port), daemon=True)
    process.start()
    while not port.value:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port.value}"
    finally:
        process.terminate()
        process.join()


def measure(command: Sequence[str], environment: dict[str, str]) -> Measured:
    """Run a command, and look at its output as it comes."""
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        piece = os.read(process.stdout.fileno(), 1 << 20)
        first = time.perf_counter() - started
        num_lines = 0
        while piece:
            num_lines += piece.count(b"\n")
            piece = os.read(process.stdout.fileno(), 1 << 20)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return Measured(first, time.perf_counter() - started, num_lines, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", type=int, default=64)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kubectl", default=shutil.which("kubectl"))
    given = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, median of {given.repeats}"
    )
    print(f"{'what':<34} {'first line':>10} {'all lines':>10} {'lines':>9} {'lines/s':>9} {'memory':>9}")
    osctl = [sys.executable, "-m", "osctl", "logs", "demo"]
    rows = [("osctl logs, one rank", 1, osctl), (f"osctl logs, {given.pods} ranks", given.pods, osctl)]
    rows.append((f"osctl logs --tail 100, {given.pods} ranks", given.pods, [*osctl, "--tail", "100"]))
    if given.kubectl:
        rows.insert(0, ("kubectl logs, one pod", 1, [given.kubectl, "logs", "--timestamps", "demo-a1-0"]))
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, num_pods, command in rows:
            with api_server(num_pods, given.lines) as address:
                config = Path(folder) / "config"
                config.write_text(kubeconfig(address))
                environment = {**os.environ, "KUBECONFIG": str(config), "HOME": folder}
                seen = [measure(command, environment) for _ in range(given.repeats)]
            first[name] = statistics.median(one.first_seconds for one in seen)
            total = statistics.median(one.total_seconds for one in seen)
            lines, memory = seen[0].num_lines, max(one.peak_mib for one in seen)
            print(
                f"{name:<34} {first[name]:>8.2f} s {total:>8.2f} s {lines:>9} {lines / total:>9.0f} {memory:>5.0f} MiB"
            )
    if given.kubectl:
        times = first["osctl logs, one rank"] / first["kubectl logs, one pod"]
        print(f"first line: {times:.2f} times kubectl's (limit {LIMIT_TIMES_KUBECTL:g})")


def kubeconfig(address: str) -> str:
    config = {
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    return json.dumps(config)


if __name__ == "__main__":
    main()
