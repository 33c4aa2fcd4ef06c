"""How long short commands of osctl take, and what `status` asks of the API server; beside kubectl on the same objects.

    python benchmarks/osctl_commands.py [--objects 500] [--repeats 20]

A real API server holds that many runs. Commands are whole processes, started one after another, osctl's and kubectl's
in turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/cluster"), str(ROOT / "tests/control_plane"), str(ROOT)]

from control_plane import ControlPlane  # noqa: E402  # tests are no package
from stage import SPEC  # noqa: E402

RUNS = "/apis/opensora.dev/v1alpha1/namespaces/default/trainingruns"
OSCTL = str(Path(sys.executable).with_name("osctl"))
CRDS = str(ROOT / "manifests/crds")


def fill(control_plane: ControlPlane, objects: int) -> None:
    """Create runs that look as if they were running."""
    conditions = [
        {"type": kind, "status": "True", "reason": reason, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        for kind, reason in (("Accepted", "Valid"), ("Running", "AllPodsReady"))
    ]
    status = {
        "phase": "Running",
        "attempt": 1,
        "conditions": conditions,
        "nodes": {"desired": 2, "ready": 2, "summary": "2/2"},
        "progress": {"step": 1200, "totalSteps": 23000, "percent": 5, "eta": "3h10m", "loss": "0.21"},
    }
    for number in range(objects):
        name = f"run-{number:04d}"
        body = {"apiVersion": "opensora.dev/v1alpha1", "kind": "TrainingRun", "metadata": {"name": name}, "spec": SPEC}
        control_plane.request("POST", RUNS, body)
        change = "application/merge-patch+json"
        control_plane.request("PATCH", f"{RUNS}/{name}/status", {"status": status}, content_type=change)


def seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Wall time of a command that works."""
    started = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def medians(commands: Mapping[str, Sequence[str]], environment: Mapping[str, str], *, repeats: int) -> dict[str, float]:
    """Median wall time of each command, all of them in turn."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(repeats + 1):
        for name, command in commands.items():
            value = seconds(command, environment)
            if repeat:  # the first fills caches
                taken[name].append(value)
    return {name: statistics.median(values) for name, values in taken.items()}


def rows(control_plane: ControlPlane, *, objects: int, repeats: int) -> Iterator[tuple[str, str, str]]:
    """What is measured, as it is, and the goal."""
    kubeconfig = str(control_plane.kubeconfig())
    environment = {**os.environ, "KUBECONFIG": kubeconfig}
    kubectl = str(control_plane.bin / "kubectl")
    taken = medians(
        {
            "python": [sys.executable, "-c", ""],
            "help": [OSCTL, "--help"],
            "version": [OSCTL, "version"],
            "get": [OSCTL, "get", "tr"],
            "kubectl get": [kubectl, "get", "tr"],
            "status": [OSCTL, "status", "run-0000"],
        },
        environment,
        repeats=repeats,
    )
    yield "an empty Python", f"{taken['python']:.2f} s", ""
    yield "`osctl --help`", f"{taken['help']:.2f} s", "at most 0.25 s"
    yield "`osctl version`", f"{taken['version']:.2f} s", "at most 0.25 s"
    compared = f"{taken['get']:.2f} s; `kubectl get tr` {taken['kubectl get']:.2f} s"
    yield f"`osctl get tr`, {objects} runs", compared, "at most 0.5 s more"
    mark = control_plane.audit_mark()
    seconds([OSCTL, "status", "run-0000"], environment)
    time.sleep(1.0)  # the audit log is written a moment later
    calls = len(list(control_plane.audit_events(mark, identity="admin")))
    yield "`osctl status`", f"{taken['status']:.2f} s, {calls} requests", "at most 5 requests"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="osctl-") as folder,
        ControlPlane(Path(folder), scheduler=False) as control_plane,
    ):
        control_plane.kubectl("apply", "-f", CRDS)
        control_plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", CRDS)
        fill(control_plane, arguments.objects)
        print(f"Python {platform.python_version()}, {os.cpu_count()} cores\n")
        print("| what | measured | goal |\n| --- | --- | --- |")
        for row in rows(control_plane, objects=arguments.objects, repeats=arguments.repeats):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
