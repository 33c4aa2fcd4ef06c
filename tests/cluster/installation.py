"""The operator as Helm installs it: in a pod of a cluster of two nodes, with an object store and clips beside it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import build
import images
import psutil
import pytest
import yaml
from control_plane import ApiError, ControlPlane
from nodes import Cluster
from run_assertions import ranks_among, wait_until
from training_runs import write_clips

from opensora.quickstart.object_store import ObjectStore
from opensora.storage import Storage

Object = dict[str, Any]
BUCKET = "opensora"
CATALOGUE = f"s3://{BUCKET}/clips/clips.csv"
NAMESPACE = "training"
"""Where the runs are."""
_CHART = images.REPOSITORY / "charts/opensora-operator"
_RELEASE = "opensora-operator"
_OPERATOR_NAMESPACE = "opensora-system"
_SECRET = "object-store"
_UP_SECONDS = 240


class Installation:
    """A context manager, which begins with nothing and ends with nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._exits = contextlib.ExitStack()
        self.cluster = Cluster(folder / "cluster")
        self._values: Object = {}
        self.absences: list[list[float]] = []
        """When the operator was being removed, and when it was back: it has no rights meanwhile."""

    def __enter__(self) -> Self:
        with self._exits:
            self._exits.enter_context(self.cluster)
            self.store = ObjectStore(self._folder / "store", address=self.cluster.host_address)
            self._exits.enter_context(self.store)
            self._exits.enter_context(self._store_in_environment())
            self.store.create_bucket(BUCKET)
            self._write_clips()
            keys = {name: self.store.environment()[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
            secret: Object = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": _SECRET}, "stringData": keys}
            secret["metadata"]["namespace"] = NAMESPACE
            self.control_plane.apply(namespace, secret)
            self.install()
            self._exits = self._exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exits.close()

    @property
    def control_plane(self) -> ControlPlane:
        return self.cluster.control_plane

    # What an administrator does

    def helm(self, *arguments: str, values: Object | None = None) -> str:
        """Run Helm; `values` are what the release is given."""
        command = [str(build.ensure("helm") / "helm"), *arguments, "--namespace", _OPERATOR_NAMESPACE]
        if values is not None:
            command += ["--values", "-"]
        environment = os.environ | {"KUBECONFIG": str(self.control_plane.kubeconfig())}
        answer = subprocess.run(
            command, input=yaml.safe_dump(values or {}), env=environment, capture_output=True, text=True
        )
        assert answer.returncode == 0, f"{' '.join(arguments)}: {answer.stderr}\n{self.describe_operator()}"
        return answer.stdout

    def install(self) -> None:
        """Install the chart, with a default profile for pods of this machine, and wait until the operator works."""
        self._values = {"profiles": {"small": self._profile()}}
        wait = ("--create-namespace", "--wait", f"--timeout={_UP_SECONDS}s")
        self.helm("install", _RELEASE, str(_CHART), *wait, values=self._values)
        for absence in self.absences[-1:]:
            absence.append(time.time())

    def upgrade(self, **changes: Any) -> None:
        """Another version of the release; the operator's pod is replaced when that changes it."""
        values = {**self._values, **changes}
        self.helm("upgrade", _RELEASE, str(_CHART), "--wait", f"--timeout={_UP_SECONDS}s", values=values)

    def uninstall(self) -> None:
        """Remove the release, and wait until the operator's pods are gone."""
        self.absences.append([time.time()])
        self.helm("uninstall", _RELEASE, "--wait", f"--timeout={_UP_SECONDS}s")
        until(lambda: not self.operator_pods(), seconds=_UP_SECONDS, what="no operator")

    def operator_pods(self) -> list[Object]:
        selector = "labelSelector=app.kubernetes.io%2Fcomponent=operator"
        pods: list[Object] = self.control_plane.request(
            "GET", f"/api/v1/namespaces/{_OPERATOR_NAMESPACE}/pods?{selector}"
        )["items"]
        return pods

    def kill_operator(self) -> None:
        """SIGKILL for the operator's process. Its kubelet starts another one."""
        killed = 0
        for process in self.processes():
            if _calls(process, "opensora-operator"):
                process.kill()
                killed += 1
        assert killed, "no operator runs"

    # What is there

    def processes(self) -> list[psutil.Process]:
        """Every process of both nodes."""
        return [process for node in self.cluster.nodes.values() for process in node.processes()]

    def ranks(self, run: str, *, attempt: int) -> dict[int, psutil.Process]:
        """The processes of a run's attempt by their rank, on whatever node."""
        return ranks_among(self.processes(), run, attempt=attempt)

    def describe_operator(self) -> str:
        """What is known of the operator, for people."""
        plane, namespace = self.control_plane, f"--namespace={_OPERATOR_NAMESPACE}"
        selector = "--selector=app.kubernetes.io/component=operator"
        return "\n".join(
            said(plane, *command)
            for command in (
                ("get", "pods", namespace, "--output=wide"),
                ("get", "events", namespace, "--sort-by=.lastTimestamp"),
                ("logs", namespace, selector, "--tail=60", "--prefix"),
                ("logs", namespace, selector, "--tail=20", "--previous"),
            )
        )

    # Parts

    @contextlib.contextmanager
    def _store_in_environment(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.store.environment().items():
                patch.setenv(name, value)
            yield

    def _write_clips(self) -> None:
        folder = self._folder / "clips"
        folder.mkdir()
        write_clips(folder)
        target = Storage(CATALOGUE.rpartition("/")[0])
        for path in folder.iterdir():
            target.upload(path, path.name)

    def _profile(self) -> Object:
        return {
            "default": True,
            "image": images.TRAINER,
            "procsPerNode": 2,
            "storage": {"secretRef": {"name": _SECRET}, "endpoint": self.store.endpoint_url},
            "sharedMemory": {"sizeLimit": "4Gi"},
            "podTemplate": {
                "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
                "resources": {"requests": {"cpu": "100m", "memory": "200Mi"}, "limits": {"memory": "3Gi"}},
                "tolerations": [
                    {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute"}
                    | {"tolerationSeconds": 3}
                    for state in ("not-ready", "unreachable")
                ],
            },
        }


def until(check: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """Wait until a check gives something true, and return it."""
    return wait_until(check, seconds=seconds, what=what, transient=(ApiError, OSError, KeyError))


def said(control_plane: ControlPlane, *arguments: str) -> str:
    """What kubectl prints, or why it prints nothing."""
    try:
        return f"$ kubectl {' '.join(arguments)}\n{control_plane.kubectl(*arguments)}"
    except ApiError as error:
        return f"$ kubectl {' '.join(arguments)}\n{error}"


def _calls(process: psutil.Process, program: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(Path(word).name == program for word in process.cmdline())
    return False
