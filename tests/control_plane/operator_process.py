"""Starts the operator as a process of its own, with exactly the permissions of `permissions.py`."""

from __future__ import annotations

import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from control_plane import ControlPlane
from opensora_operator.packaging import rbac_rules
from opensora_operator.permissions import Scope
from processes import Process

SMALL = Path(__file__).with_name("small_operator.py")
"""The operator with a planner of a few lines."""


class OperatorProcess(Process):
    """One replica. Its lines are JSON objects, in the file `log`."""

    def __init__(
        self,
        kubeconfig: Path,
        folder: Path,
        *,
        namespace: str = "default",
        program: Sequence[str | Path] = ("-m", "opensora_operator"),
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """`namespace`: where its Lease lives. `settings`: those of `settings.py`."""
        self.identity = f"operator-{uuid4().hex[:8]}"
        settings = {
            "kubeconfig": kubeconfig,
            "own_namespace": namespace,
            "identity": self.identity,
            "http_address": "127.0.0.1",
            "http_port": 0,
        } | settings
        flags = [f"--{name.replace('_', '-')}={_text(value)}" for name, value in settings.items()]
        super().__init__(
            self.identity, [sys.executable, *program, *flags], folder / f"{self.identity}.log", environment
        )

    def start_and_lead(self, seconds: float = 60.0) -> None:
        """Start it and wait until it works."""
        since = self.log.stat().st_size if self.log.exists() else 0
        self.start()
        self.wait_until(lambda: "at work in" in self.log.read_text()[since:], seconds)

    def wait_for_end(self, seconds: float) -> int:
        """Wait until it ends by itself and return its exit code."""
        assert self._popen is not None
        return self._popen.wait(seconds)

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of /healthz or /metrics."""
        addresses = re.findall(r"metrics and health at 127\.0\.0\.1:(\d+)", self.log.read_text())
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{addresses[-1]}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all labels that are not given."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match and labels.items() <= dict(re.findall(r'(\w+)="([^"]*)"', match[1] or "")).items():
                total += float(match[2])
        return total

    @property
    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def grant(control_plane: ControlPlane, *, namespace: str = "default", user: str = "operator") -> None:
    """Give a user the operator's permissions, of which the ones over its own things hold in this namespace."""
    subject = [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": user}]
    everywhere = rbac_rules(Scope.CLUSTER) + rbac_rules(Scope.WATCHED)
    control_plane.apply(
        _role("ClusterRole", None, everywhere),
        _binding("ClusterRole", None, "opensora-operator", subject),
        _role("Role", namespace, rbac_rules(Scope.OWN)),
        _binding("Role", namespace, "opensora-operator", subject),
    )


def eventually(check: Callable[[], Any], *, seconds: float = 30.0, what: str = "") -> Any:
    """Wait until a check gives something true, and return it. What it raises counts as false until time is up."""
    deadline = time.monotonic() + seconds
    while True:
        problem: Exception | None = None
        try:
            found = check()
        except Exception as error:
            found, problem = None, error
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what or check}") from problem
        time.sleep(0.05)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _role(kind: str, namespace: str | None, rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": {"name": "opensora-operator"} | ({"namespace": namespace} if namespace else {}),
        "rules": rules,
    }


def _binding(kind: str, namespace: str | None, role: str, subjects: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": f"{kind}Binding",
        "metadata": {"name": role} | ({"namespace": namespace} if namespace else {}),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
        "subjects": subjects,
    }
