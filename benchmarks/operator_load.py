"""How the operator bears load: a real control plane, two-node runs, pods whose phases this script writes.

    python benchmarks/operator_load.py [--runs 1100]

Times are the API server's own, from its audit log: from the end of one request to the end of another. Memory is the
operator's resident size. Nothing else should run meanwhile: the control plane, this script and the operator share the
machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import platform
import signal
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/cluster"), str(ROOT / "tests/control_plane"), str(ROOT / "operator"), str(ROOT)]

from control_plane import ControlPlane  # noqa: E402  # tests are no package
from operator_process import OperatorProcess, grant  # noqa: E402
from processes import free_port  # noqa: E402

Object = dict[str, Any]
NAMESPACE = "load"
API = f"/apis/opensora.dev/v1alpha1/namespaces/{NAMESPACE}/trainingruns"
_SERVICE = "opensora-operator-progress"
_CONCURRENT = 32
_REST_SECONDS = 60.0
_SETTLE_SECONDS = 130.0
"""Runs that never report are told so once, after three missed heartbeats: that is not rest yet."""
_WAIT_SECONDS = 300.0


class Load:
    """A control plane, an operator, and fake kubelets."""

    def __init__(self, control_plane: ControlPlane, folder: Path, program: Sequence[str]) -> None:
        self.control_plane = control_plane
        self.progress_port = free_port()
        self.operator = OperatorProcess(
            control_plane.kubeconfig("operator"),
            folder,
            program=program,
            progress_service=_SERVICE,
            progress_port=self.progress_port,
        )
        self.rows: list[tuple[str, str, str]] = []
        self._tls = ssl.create_default_context(cafile=str(control_plane.ca_file))
        self._session: aiohttp.ClientSession | None = None
        self._pods: dict[str, Object] = {}
        self._kubelet: asyncio.Task[None] | None = None
        self._num_jobs = 0

    async def __aenter__(self) -> Load:
        token = self.control_plane.kubeconfig("admin").read_text().split("token: ")[1].split()[0]
        self._session = aiohttp.ClientSession(
            base_url=self.control_plane.url,
            headers={"Authorization": f"Bearer {token}"},
            connector=aiohttp.TCPConnector(ssl=self._tls, limit=_CONCURRENT + 4),
        )
        self._kubelet = asyncio.create_task(self._play_kubelet())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        if self._kubelet is not None:
            self._kubelet.cancel()
            await asyncio.gather(self._kubelet, return_exceptions=True)
        await self._session.close()

    def report(self, what: str, measured: str, goal: str) -> None:
        self.rows.append((what, measured, goal))
        print(f"{what}: {measured} (goal: {goal})", file=sys.stderr, flush=True)

    async def request(self, method: str, path: str, body: Any = None, *, content: str = "application/json") -> Object:
        assert self._session is not None
        headers = {"Content-Type": content} if body is not None else {}
        async with self._session.request(method, path, json=body, headers=headers) as response:
            answer: Object = await response.json()
            if response.status >= 400:
                raise RuntimeError(f"{method} {path}: {response.status} {answer.get('message')}")
            return answer

    async def create(self, names: Iterable[str]) -> None:
        """Create runs, many at the same time."""
        await _all_of(self.request("POST", API, _run(name)) for name in names)

    def times(self, since: int, verb: str, resource: str, *, user: str = "") -> dict[str, float]:
        """When requests about objects were answered, by name: the first of each."""
        found: dict[str, float] = {}
        for event in self.control_plane.audit_events(since):
            about = event.get("objectRef") or {}
            what = "/".join(filter(None, (about.get("resource"), about.get("subresource"))))
            is_meant = event["verb"] == verb and what == resource and user in ("", event["user"]["username"])
            if is_meant and event["responseStatus"]["code"] < 300:
                found.setdefault(about["name"], _seconds(event["stageTimestamp"]))
        return found

    def writes(self, since: int) -> list[str]:
        """What the operator wrote, but for its Lease."""
        return [
            f"{event['verb']} {event['objectRef']['resource']}"
            for event in self.control_plane.audit_events(since, identity="operator")
            if event["verb"] not in ("get", "list", "watch") and event["objectRef"]["resource"] != "leases"
        ]

    async def job_times(self, since: int, jobs: Sequence[str]) -> dict[str, float]:
        """When these Jobs were created, once they all are. Counting them meanwhile costs the machine little."""
        path = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs?limit=1"
        wanted = self._num_jobs = self._num_jobs + len(jobs)
        async with asyncio.timeout(_WAIT_SECONDS):
            while True:
                answer = await self.request("GET", path)
                if len(answer["items"]) + answer["metadata"].get("remainingItemCount", 0) >= wanted:
                    break
                await asyncio.sleep(0.2)
        await asyncio.sleep(0.5)  # the audit log is written after the answer
        times = self.times(since, "create", "jobs")
        return {job: times[job] for job in jobs}

    async def latencies(self, since: int, names: Sequence[str]) -> list[float]:
        """Seconds from the creation of each run to that of its Job."""
        jobs = await self.job_times(since, [f"{name}-a1" for name in names])
        runs = self.times(since, "create", "trainingruns")
        return [jobs[f"{name}-a1"] - runs[name] for name in names]

    async def settle(self, names: Iterable[str]) -> None:
        """Wait until all of these runs are shown as running."""
        waiting = set(names)
        async with asyncio.timeout(_WAIT_SECONDS):
            while waiting:
                await asyncio.sleep(2)
                listed = await self.request("GET", API)
                waiting -= {
                    run["metadata"]["name"]
                    for run in listed["items"]
                    if (run.get("status") or {}).get("phase") == "Running"
                }

    async def _play_kubelet(self) -> None:
        """Have every pod run as soon as it is there."""
        async with asyncio.TaskGroup() as group:
            async for pod in self._watch_pods():
                name = pod["metadata"]["name"]
                if name not in self._pods:
                    group.create_task(self.set_pod(pod, "Running", {"running": {}}))
                self._pods[name] = pod

    async def _watch_pods(self) -> Any:
        assert self._session is not None
        path = f"/api/v1/namespaces/{NAMESPACE}/pods?watch=true&labelSelector=opensora.dev/uid"
        while True:
            async with self._session.get(path, timeout=aiohttp.ClientTimeout(total=None)) as response:
                with contextlib.suppress(aiohttp.ClientPayloadError):
                    async for line in response.content:
                        event = await asyncio.to_thread(_parse, line) if len(line) > 2**16 else _parse(line)
                        if event["type"] in ("ADDED", "MODIFIED"):
                            yield event["object"]

    async def set_pod(self, pod: Object, phase: str, state: Object) -> None:
        """Write a pod's status as its kubelet would."""
        container = {"name": "trainer", "image": "x", "imageID": "x", "ready": phase == "Running", "restartCount": 0}
        conditions = [{"type": "PodScheduled", "status": "True"}]
        status = {
            "phase": phase,
            "startTime": pod["metadata"]["creationTimestamp"],
            "conditions": conditions,
            "containerStatuses": [container | {"state": state}],
        }
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}/status"
        with contextlib.suppress(RuntimeError):  # it is gone already
            await self.request("PATCH", path, {"status": status}, content="application/merge-patch+json")

    async def fail(self, names: Iterable[str]) -> None:
        """Have pod 0 of attempt 1 of these runs fail, all at once."""
        ended = {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": _now()}}
        firsts = {
            name: pod for name, pod in self._pods.items() if any(name.startswith(f"{run}-a1-0-") for run in names)
        }
        await _all_of(self.set_pod(pod, "Failed", ended) for pod in firsts.values())


async def one_each_200_ms(load: Load) -> None:
    mark, names = load.control_plane.audit_mark(), [f"single-{number}" for number in range(100)]
    for name in names:
        started = time.monotonic()
        await load.create([name])
        await asyncio.sleep(max(0.0, 0.2 - (time.monotonic() - started)))
    load.report("one run per 200 ms: CR → Job", _spread(await load.latencies(mark, names), "ms"), "p99 ≤ 100 ms")
    await load.settle(names)


async def many_at_once(load: Load, prefix: str, number: int, goal: str) -> None:
    mark, names = load.control_plane.audit_mark(), [f"{prefix}-{index}" for index in range(number)]
    cpu = _cpu_seconds(load.operator.pid)
    await load.create(names)
    load.report(f"{number} runs at once ({prefix}): CR → Job", _spread(await load.latencies(mark, names), "s"), goal)
    started = time.monotonic()
    await load.settle(names)
    load.report(f"  then until all are shown as Running ({prefix})", f"{time.monotonic() - started:.1f} s", "none")
    per_run = (_cpu_seconds(load.operator.pid) - cpu) / number
    load.report(f"  the operator's time on a core for one of them ({prefix})", f"{1000 * per_run:.0f} ms", "none")


async def gangs_fail(load: Load) -> None:
    names = [f"single-{number}" for number in range(50)]
    mark = load.control_plane.audit_mark()
    await load.fail(names)
    jobs = await load.job_times(mark, [f"{name}-a2" for name in names])
    failed = load.times(mark, "patch", "pods/status", user="admin")
    of_run = {name.rsplit("-a1-0-", 1)[0]: at for name, at in failed.items()}
    waits = [jobs[f"{name}-a2"] - of_run[name] for name in names]
    load.report("50 gangs fail at once: pod failed → next Job", _spread(waits, "s"), "p99 ≤ 3 s")
    await load.settle(names)


async def at_rest(load: Load, number: int) -> None:
    await asyncio.sleep(_SETTLE_SECONDS)
    mark = load.control_plane.audit_mark()
    cpu, looks = _cpu_seconds(load.operator.pid), load.operator.metric("opensora_reconcile_seconds_count")
    await asyncio.sleep(_REST_SECONDS)
    share = (_cpu_seconds(load.operator.pid) - cpu) / _REST_SECONDS
    load.report(f"{number} running: memory", f"{load.operator.memory / 2**20:.0f} MiB", "≤ 160 MiB")
    load.report(f"{number} running: writes in {_REST_SECONDS:.0f} s", f"{len(load.writes(mark))}", "0")
    looks = load.operator.metric("opensora_reconcile_seconds_count") - looks
    load.report(f"{number} running: looks, share of a core", f"{looks:.0f}, {100 * share:.1f} %", "none")


async def with_progress(load: Load) -> None:
    """Every run reports every 15 s, as rank 0 would: over TLS, with a token that is made for its pod."""
    path = f"/api/v1/namespaces/{NAMESPACE}/pods?labelSelector=batch.kubernetes.io/job-completion-index%3D0"
    pods = [pod for pod in (await load.request("GET", path))["items"] if pod["status"]["phase"] == "Running"]
    tokens: dict[str, str] = {}
    await _all_of(_get_token(load, pod, tokens) for pod in pods)
    secret = await load.request("GET", "/api/v1/namespaces/default/secrets/opensora-operator-progress-ca")
    authority = base64.b64decode(secret["data"]["ca.crt"]).decode()
    connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cadata=authority), limit=0)
    answers: Counter[int] = Counter()
    async with aiohttp.ClientSession(f"https://127.0.0.1:{load.progress_port}", connector=connector) as session:
        reporting = [
            asyncio.create_task(
                _report(session, pod, tokens[pod["metadata"]["name"]], answers, delay=15 * index / len(pods))
            )
            for index, pod in enumerate(pods)
        ]
        await asyncio.sleep(_REST_SECONDS)
        answers.clear()
        mark = load.control_plane.audit_mark()
        cpu = _cpu_seconds(load.operator.pid)
        await asyncio.sleep(_REST_SECONDS)
        share = (_cpu_seconds(load.operator.pid) - cpu) / _REST_SECONDS
        for task in reporting:
            task.cancel()
        await asyncio.gather(*reporting, return_exceptions=True)
    what = f"{len(pods)} running that report every 15 s"
    load.report(f"{what}: answers in {_REST_SECONDS:.0f} s by status", f"{dict(answers)}", "none")
    load.report(f"{what}: status writes per second", f"{len(load.writes(mark)) / _REST_SECONDS:.1f}", "≤ 5")
    load.report(f"{what}: memory", f"{load.operator.memory / 2**20:.0f} MiB", "≤ 160 MiB")
    load.report(f"{what}: share of a core", f"{100 * share:.0f} %", "none")


async def _get_token(load: Load, pod: Object, tokens: dict[str, str]) -> None:
    """What the kubelet asks for on behalf of a pod."""
    name, run = pod["metadata"]["name"], pod["metadata"]["labels"]["opensora.dev/name"]
    reference = {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod["metadata"]["uid"]}
    spec = {"audiences": [f"opensora.dev/{NAMESPACE}/{run}"], "expirationSeconds": 3600, "boundObjectRef": reference}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default/token"
    tokens[name] = (await load.request("POST", path, body))["status"]["token"]


async def _report(
    session: aiohttp.ClientSession, pod: Object, token: str, answers: Counter[int], *, delay: float
) -> None:
    labels = pod["metadata"]["labels"]
    path = f"/v1/namespaces/{NAMESPACE}/runs/{labels['opensora.dev/name']}/progress"
    await asyncio.sleep(delay)
    for sequence in itertools.count(1):
        body = {
            "attempt": int(labels["opensora.dev/attempt"]),
            "sequence": sequence,
            "phase": "training",
            "state": "Training",
            "step": 10 * sequence,
            "total_steps": 100_000,
            "epoch": 0,
            "loss": 1 / sequence,
            "seconds_per_step": 1.5,
            "samples_per_second": 10.0,
            "eta_seconds": 1.5 * (100_000 - 10 * sequence),
            "goodput": 0.9,
            "checkpoint_step": None,
            "samples_step": None,
        }
        headers = {"Authorization": f"Bearer {token}"}
        async with session.post(
            path, json=body, headers=headers, server_hostname=f"{_SERVICE}.default.svc"
        ) as response:
            answers[response.status] += 1
        await asyncio.sleep(15)


async def restart(load: Load, number: int, how: signal.Signals, goal: str) -> None:
    mark = load.control_plane.audit_mark()
    load.operator.signal(how)
    load.operator.terminate(30)
    name = f"after-{how.name.lower()}"
    await load.create([name])
    started = time.time()
    load.operator.start()
    jobs = await load.job_times(mark, [f"{name}-a1"])
    load.report(
        f"restart after {how.name} with {number} runs: first new Job", f"{jobs[f'{name}-a1'] - started:.1f} s", goal
    )
    await load.settle([name])
    await asyncio.sleep(20)
    others = [
        event
        for event in load.control_plane.audit_events(mark, identity="operator")
        if event["verb"] not in ("get", "list", "watch")
        and event["objectRef"]["resource"] != "leases"
        and name not in str(event["objectRef"].get("name"))
    ]
    load.report(f"restart after {how.name} with {number} runs: writes about the others", f"{len(others)}", "0")


async def run(arguments: argparse.Namespace, folder: Path) -> list[tuple[str, str, str]]:
    with ControlPlane(folder, scheduler=False, controller_qps=1000) as control_plane:
        control_plane.kubectl("apply", "-f", str(ROOT / "manifests/crds"))
        control_plane.kubectl(
            "wait", "--for=condition=Established", "--timeout=60s", "-f", str(ROOT / "manifests/crds")
        )
        control_plane.kubectl("create", "namespace", NAMESPACE)
        grant(control_plane)
        control_plane.kubectl(  # what every service account has: the keys that tokens are checked with
            "create",
            "clusterrolebinding",
            "issuer",
            "--clusterrole=system:service-account-issuer-discovery",
            "--user=operator",
        )
        async with Load(control_plane, folder, arguments.program) as load:
            load.operator.start_and_lead()
            load.report("idle: memory", f"{load.operator.memory / 2**20:.0f} MiB", "none")
            try:
                await one_each_200_ms(load)
                half = (arguments.runs - 100) // 2
                await many_at_once(load, "first", half, "p99 ≤ 4 s")
                await gangs_fail(load)
                await many_at_once(load, "second", arguments.runs - 100 - half, "p99 ≤ 6 s")
                await at_rest(load, arguments.runs)
                await with_progress(load)
                await restart(load, arguments.runs, signal.SIGTERM, "≤ 3 s")
                await restart(load, arguments.runs, signal.SIGKILL, "≤ 17 s")
            finally:
                load.operator.terminate(20)
            return load.rows


def _run(name: str) -> Object:
    return {
        "apiVersion": "opensora.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "image": "trainer:1",
            "runUri": f"s3://bucket/{name}",
            "config": {"inline": "train:\n  steps: 1000\n"},
            "nodes": 2,
            "restartPolicy": {"backoff": {"baseSeconds": 0}},
        },
    }


async def _all_of(requests: Iterable[Any]) -> None:
    """At the same time, as many as there are connections."""
    semaphore = asyncio.Semaphore(_CONCURRENT)

    async def one(request: Any) -> None:
        async with semaphore:
            await request

    await asyncio.gather(*(one(request) for request in requests))


def _parse(line: bytes) -> Object:
    event: Object = json.loads(line)
    return event


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _spread(values: Sequence[float], unit: str) -> str:
    ordered = sorted(values)
    factor, digits = (1000, 0) if unit == "ms" else (1, 2)
    picked = (ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], ordered[-1])
    return "p50 {:.{d}f}, p99 {:.{d}f}, max {:.{d}f} {unit}".format(*(factor * v for v in picked), d=digits, unit=unit)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _table(rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    yield "| what | measured | goal |"
    yield "| --- | --- | --- |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1100, help="how many runs there are in the end")
    parser.add_argument("--program", nargs="+", default=["-m", "opensora_operator"], help="what Python is to run")
    parser.add_argument("--folder", type=Path, help="where logs are kept; nowhere unless given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="operator-load-") as temporary:
        rows = asyncio.run(run(arguments, arguments.folder or Path(temporary)))
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores\n")
    print("\n".join(_table(rows)))


if __name__ == "__main__":
    main()
