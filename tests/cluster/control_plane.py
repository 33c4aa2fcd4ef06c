"""A real Kubernetes control plane on this machine: etcd, kube-apiserver, kube-controller-manager, kube-scheduler."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import build
import yaml
from processes import Process, StartError, free_port

_START_SECONDS = 120.0
"""Three seconds on an idle machine; a busy one with two cores may need many more."""
_START_TRIES = 3
_CLIENTS = ("kube-controller-manager", "kube-scheduler")
_WARM_UP_SECONDS = 10.0
"""So long after its start an API server may not have read all roles."""
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


@dataclass(frozen=True)
class Identity:
    """Who a client is to the API server."""

    user: str
    groups: tuple[str, ...] = ()
    token: str = ""


class ApiError(Exception):
    """The API server refused a request; the message is its own."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def _is_denied(event: dict[str, Any]) -> bool:
    """By who asks; a quota or an admission webhook refuses with the same code."""
    decision = (event.get("annotations") or {}).get("authorization.k8s.io/decision")
    return event["responseStatus"]["code"] == 401 or decision == "forbid"


class ControlPlane:
    """A control plane without nodes. A context manager; it also ends with this process on Linux.

    Besides the identities asked for there are `admin`, who may do everything, and those of the parts themselves.
    `stop` loses all data: nothing of it is meant to last.
    """

    def __init__(
        self,
        folder: Path,
        *,
        address: str = "127.0.0.1",
        identities: Sequence[str] = ("operator", "alice", "bob"),
        scheduler: bool = True,
        service_range: str = "10.96.0.0/24",
        node_grace_seconds: int = 8,
        eviction_seconds: int = 4,
        controller_qps: int = 50,
        apiserver_flags: Sequence[str] = (),
        controller_flags: Sequence[str] = (),
    ) -> None:
        """`node_grace_seconds`: how long a silent node counts as ready; `eviction_seconds`: and then keeps its pods."""
        self.address = address
        self.folder = folder.absolute()
        self.logs = self.folder / "logs"
        self.audit_log = self.folder / "audit.jsonl"
        self.etcd_port = 0
        self.port = 0
        self._certificates = self.folder / "certificates"
        self._service_range = service_range
        self._has_scheduler = scheduler
        self._node_grace_seconds = node_grace_seconds
        self._eviction_seconds = eviction_seconds
        self._controller_qps = controller_qps
        self._apiserver_flags = tuple(apiserver_flags)
        self._controller_flags = tuple(controller_flags)
        self._identities: dict[str, Identity] = {}
        self._processes: dict[str, Process] = {}
        self._restarts: list[float] = []
        self._ssl: ssl.SSLContext | None = None
        for name in identities:
            self.add_identity(name)
        self.add_identity("admin", groups=("system:masters",))
        for name in _CLIENTS:
            self.add_identity(f"system:{name}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # The whole

    def start(self) -> None:
        """Start all parts and wait until objects can be created. Raises StartError with the end of a log."""
        self._programs = build.ensure("kube")
        for folder in (self.logs, self._certificates):
            folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "audit-policy.yaml").write_text(yaml.safe_dump(_AUDIT_POLICY))
        self._write_tokens()
        try:
            self._start_storage()
            self._start_apiserver_somewhere()
            self._launch("kube-controller-manager", *self._controller_manager_flags())
            if self._has_scheduler:
                self._launch("kube-scheduler", *self._scheduler_flags())
            self._processes["kube-controller-manager"].wait_until(self._gives_accounts, _START_SECONDS)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all parts at once."""
        for name in reversed(self._processes):
            self._processes[name].kill()
        self._processes.clear()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by program, of those that run."""
        return {name: process.pid for name, process in self._processes.items() if process.is_running}

    # Clients

    @property
    def url(self) -> str:
        """Where the API server answers; it stays the same over its restarts."""
        return f"https://{self.address}:{self.port}"

    @property
    def ca_file(self) -> Path:
        """The certificate by which clients know the API server."""
        return self._certificates / "apiserver.crt"

    @property
    def bin(self) -> Path:
        """The folder of kubectl and of the other programs."""
        return self._programs

    def add_identity(self, name: str, *, user: str | None = None, groups: Sequence[str] = ()) -> Path | None:
        """Make `name` known as `user` (itself unless given), and return its kubeconfig once there is a server.

        The API server reads them at its start only, so a running one is restarted. A `user` of the form
        `system:serviceaccount:NAMESPACE:NAME` has the permissions of that service account.
        """
        if user and user.startswith("system:serviceaccount:"):
            groups = (*groups, "system:serviceaccounts", f"system:serviceaccounts:{user.split(':')[2]}")
        self._identities[name] = Identity(user or name, tuple(groups), secrets.token_hex(16))
        if "kube-apiserver" not in self._processes:
            return None
        self._write_tokens()
        self.restart_apiserver()
        return self.kubeconfig(name)

    def kubeconfig(self, identity: str = "admin", *, namespace: str = "default") -> Path:
        """A kubeconfig by which any client is that identity."""
        path = self.folder / "kubeconfigs" / f"{identity.replace(':', '-')}-{namespace}.yaml"
        path.parent.mkdir(exist_ok=True)
        authority = base64.b64encode(self.ca_file.read_bytes()).decode()
        context = {"cluster": "test", "user": identity, "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "test", "cluster": {"server": self.url, "certificate-authority-data": authority}},
            ],
            "users": [{"name": identity, "user": {"token": self._identities[identity].token}}],
            "contexts": [{"name": "test", "context": context}],
            "current-context": "test",
        }
        temporary = path.with_suffix(".new")
        temporary.write_text(yaml.safe_dump(config, sort_keys=False))
        temporary.chmod(0o600)
        temporary.replace(path)
        return path

    def kubectl(self, *arguments: str, identity: str = "admin", input: str | None = None) -> str:
        """Run kubectl and return what it printed. Raises ApiError with what it complained about."""
        command = [str(self.bin / "kubectl"), "--kubeconfig", str(self.kubeconfig(identity)), *arguments]
        answer = subprocess.run(command, input=input, capture_output=True, text=True)
        if answer.returncode:
            raise ApiError(answer.returncode, answer.stderr.strip())
        return answer.stdout

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        identity: str = "admin",
        content_type: str = "application/json",
        timeout: float = 30.0,
    ) -> Any:
        """One request to the API server, with JSON in and out. Raises ApiError, or OSError when nothing answers."""
        request = urllib.request.Request(self.url + path, method=method)
        request.add_header("Authorization", f"Bearer {self._identities[identity].token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", content_type)
        if self._ssl is None:
            self._ssl = ssl.create_default_context(cafile=str(self.ca_file))
        try:
            with urllib.request.urlopen(request, timeout=timeout, context=self._ssl) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise ApiError(error.code, _message(error.read())) from None
        return json.loads(text) if text.startswith(b"{") else text.decode()

    def apply(self, *objects: dict[str, Any], identity: str = "admin") -> None:
        """Create or change objects, as `kubectl apply --server-side` does."""
        documents = yaml.safe_dump_all(objects)
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", identity=identity, input=documents)

    # What was asked of the API server

    def audit_mark(self) -> int:
        """Now, for `audit_events`."""
        return self.audit_log.stat().st_size if self.audit_log.exists() else 0

    def audit_events(self, since: int = 0, *, identity: str | None = None) -> Iterator[dict[str, Any]]:
        """Every answered request since a mark, oldest first, of one identity or of all; bodies are not kept.

        A watch has two events: of stage `ResponseStarted`, and `ResponseComplete` at its end.
        """
        user = None if identity is None else self._identities[identity].user
        last = self._mark_audit_log()
        with open(self.audit_log, "rb") as file:
            file.seek(since)
            for line in file:
                if last in line or not line.endswith(b"\n"):  # the latter is still being written
                    return
                event: dict[str, Any] = json.loads(line)
                if user is None or event["user"].get("username") == user:
                    yield event

    def denials(self, since: int = 0, *, identity: str) -> list[str]:
        """What an identity asked for and may not have.

        An API server that has only begun may not know yet who may do what; what that one denied does not count.
        """
        return [
            f"{event['verb']} {event['requestURI']}"
            for event in self.audit_events(since, identity=identity)
            if _is_denied(event)
            and not any(start <= time_of(event) <= start + _WARM_UP_SECONDS for start in self._restarts)
        ]

    # Faults

    def stop_apiserver(self, *, kill: bool = False) -> None:
        """End the API server alone: in good order, or at once."""
        process = self._processes["kube-apiserver"]
        process.kill() if kill else process.terminate(30.0)

    def start_apiserver(self) -> None:
        """Start the API server again, at the same place with the same data, and wait until its clients here are back.

        Those that give pods to Jobs and nodes to pods start anew: they would try again only after up to 90 seconds.
        """
        process = self._processes["kube-apiserver"]
        self._restarts.append(time.time())
        process.start()
        process.wait_until(self._answers, _START_SECONDS)
        clients = [self._processes[name] for name in _CLIENTS if name in self._processes]
        for client in clients:
            client.kill()
        # The controller manager writes it again as soon as it works.
        self.request("DELETE", "/api/v1/namespaces/default/configmaps/kube-root-ca.crt")
        for client in clients:
            client.start()
        self._processes["kube-controller-manager"].wait_until(self._gives_accounts, _START_SECONDS)

    def restart_apiserver(self, *, kill: bool = False) -> None:
        """End the API server and start it again: every watch is cut."""
        self.stop_apiserver(kill=kill)
        self.start_apiserver()

    def forget_history(self) -> None:
        """Restart the API server without its memory of past versions: resuming an older watch gets `410 Gone`."""
        self.stop_apiserver()
        revision = self._ask_etcd("range", {"key": base64.b64encode(b"\0").decode()})["header"]["revision"]
        self._ask_etcd("compaction", {"revision": revision, "physical": True})
        self.start_apiserver()

    # Parts

    def _start_storage(self) -> None:
        for attempt in range(_START_TRIES):
            self.etcd_port, peer_port = free_port(), free_port()
            client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{peer_port}"
            process = self._launch(
                "etcd",
                f"--data-dir={self.folder / 'etcd'}",
                "--unsafe-no-fsync",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                "--log-level=warn",
            )
            try:
                process.wait_until(self._stores, _START_SECONDS)
                return
            except StartError:  # another process was quicker to take the port
                if process.is_running or attempt == _START_TRIES - 1:
                    raise

    def _start_apiserver_somewhere(self) -> None:
        for attempt in range(_START_TRIES):
            self.port = free_port(self.address)
            process = self._launch("kube-apiserver", *self._all_apiserver_flags())
            try:
                process.wait_until(self._answers, _START_SECONDS)
                return
            except StartError:
                if process.is_running or attempt == _START_TRIES - 1:
                    raise

    def _all_apiserver_flags(self) -> list[str]:
        # Kubernetes forbids endpoints on the loopback device.
        own_endpoint = "none" if self.address.startswith("127.") else "lease"
        return [
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--secure-port={self.port}",
            f"--endpoint-reconciler-type={own_endpoint}",
            f"--cert-dir={self._certificates}",
            f"--token-auth-file={self._tokens}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--service-cluster-ip-range={self._service_range}",
            "--service-account-issuer=https://kubernetes.default.svc",
            # The key of its own certificate, which it makes before it reads this one.
            f"--service-account-signing-key-file={self._certificates / 'apiserver.key'}",
            f"--service-account-key-file={self._certificates / 'apiserver.key'}",
            "--allow-privileged=true",
            "--kubelet-preferred-address-types=InternalIP",
            f"--default-not-ready-toleration-seconds={self._eviction_seconds}",
            f"--default-unreachable-toleration-seconds={self._eviction_seconds}",
            f"--audit-policy-file={self.folder / 'audit-policy.yaml'}",
            f"--audit-log-path={self.audit_log}",
            "--audit-log-maxsize=100000",
            "--shutdown-watch-termination-grace-period=1s",  # else its end waits a minute for watches that go on
            *self._apiserver_flags,
        ]

    def _controller_manager_flags(self) -> list[str]:
        return [
            f"--kubeconfig={self.kubeconfig('system:kube-controller-manager')}",
            "--secure-port=0",
            "--leader-elect=false",
            "--use-service-account-credentials",
            f"--root-ca-file={self.ca_file}",
            "--node-monitor-period=1s",
            f"--node-monitor-grace-period={self._node_grace_seconds}s",
            f"--kube-api-qps={self._controller_qps}",
            f"--kube-api-burst={2 * self._controller_qps}",
            *self._controller_flags,
        ]

    def _scheduler_flags(self) -> list[str]:
        return [
            f"--kubeconfig={self.kubeconfig('system:kube-scheduler')}",
            "--secure-port=0",
            "--leader-elect=false",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        ]

    def _mark_audit_log(self) -> bytes:
        """Make an event, whose text this returns, and wait for it: events come a moment after the answers."""
        mark = secrets.token_hex(16)
        with contextlib.suppress(OSError):  # the server does not run, and has written all it had
            self.request("GET", f"/version?mark={mark}")
            deadline = time.monotonic() + _START_SECONDS
            while mark.encode() not in self._audit_tail():
                if time.monotonic() > deadline:
                    raise StartError("the audit log has no event of a request that was answered")
                time.sleep(0.01)
        return mark.encode()

    def _audit_tail(self) -> bytes:
        with open(self.audit_log, "rb") as file:
            file.seek(max(0, self.audit_mark() - 2**20))
            return file.read()

    def _launch(self, name: str, *flags: str) -> Process:
        process = Process(name, [self._programs / name, *flags], self.logs / f"{name}.log")
        self._processes[name] = process
        process.start()
        return process

    @property
    def _tokens(self) -> Path:
        return self.folder / "tokens.csv"

    def _write_tokens(self) -> None:
        self._tokens.touch(mode=0o600)
        lines = [
            f'{identity.token},{identity.user},{identity.user},"{",".join(identity.groups)}"'
            for identity in self._identities.values()
        ]
        self._tokens.write_text("\n".join(lines) + "\n")

    def _stores(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            url = f"http://127.0.0.1:{self.etcd_port}/health"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(json.load(answer)["health"] == "true")
        return False

    def _answers(self) -> bool:
        if not self.ca_file.exists():
            return False
        with contextlib.suppress(OSError, ApiError):
            return bool(self.request("GET", "/readyz", timeout=5) == "ok")
        return False

    def _gives_accounts(self) -> bool:
        """Whether pods can be created: without their namespace's service account they are refused."""
        with contextlib.suppress(OSError, ApiError):
            self.request("GET", "/api/v1/namespaces/default/serviceaccounts/default")
            self.request("GET", "/api/v1/namespaces/default/configmaps/kube-root-ca.crt")
            return True
        return False

    def _ask_etcd(self, method: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.etcd_port}/v3/kv/{method}", method="POST", data=json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


def _message(text: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError):
        return str(json.loads(text)["message"])
    return text.decode(errors="replace")


def time_of(event: dict[str, Any]) -> float:
    """When the API server got the request of an audit event; Unix seconds."""
    return datetime.fromisoformat(event["requestReceivedTimestamp"]).timestamp()
