"""A real Kueue beside a control plane, as a process of this machine.

Its webhooks are not installed. So a Job with the label of a queue must be created suspended: nothing else suspends it.
"""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from types import TracebackType
from typing import Any, Self

import build
import yaml
from control_plane import ControlPlane
from processes import Process, free_port

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_START_SECONDS = 120.0


class Kueue:
    """Kueue with its resource definitions. A context manager. It acts as the control plane's `admin`."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane
        self._folder = control_plane.folder / "kueue"
        self._process: Process | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Install the definitions, start Kueue and wait until it has what it needs to decide. Raises StartError."""
        programs = build.ensure("kueue")
        plane = self._control_plane
        plane.kubectl("apply", "--server-side", "-f", str(build.build_folder() / "kueue-crds"))
        plane.kubectl(
            "wait", "--for=condition=Established", "--timeout=60s", "-f", str(build.build_folder() / "kueue-crds")
        )
        # It serves webhooks that nobody calls, with the certificate that it expects in this place.
        certificates = self._folder / "k8s-webhook-server" / "serving-certs"
        certificates.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plane.ca_file, certificates / "tls.crt")
        shutil.copyfile(plane.ca_file.with_suffix(".key"), certificates / "tls.key")
        health = f"127.0.0.1:{free_port()}"
        config = self._folder / "config.yaml"
        config.write_text(yaml.safe_dump(_config(health)))
        self._process = Process(
            "kueue",
            [
                programs / "kueue",
                f"--config={config}",
                f"--kubeconfig={plane.kubeconfig()}",
                "--feature-gates=VisibilityOnDemand=false",
            ],
            plane.logs / "kueue.log",
            os.environ | {"TMPDIR": str(self._folder)},
        )
        self._process.start()
        self._process.wait_until(lambda: _is_ready(health), _START_SECONDS)

    def stop(self) -> None:
        """End Kueue at once; its objects stay."""
        if self._process is not None:
            self._process.kill()

    def make_queue(self, name: str, *, namespace: str = "default", **quota: str) -> None:
        """A queue `name` in a namespace with a quota such as `cpu="2"`, in which higher priority preempts lower."""
        resources = [{"name": resource, "nominalQuota": amount} for resource, amount in quota.items()]
        self._control_plane.apply(
            _object("ResourceFlavor", "default"),
            _object(
                "ClusterQueue",
                name,
                namespaceSelector={},
                preemption={"withinClusterQueue": "LowerPriority"},
                resourceGroups=[
                    {"coveredResources": list(quota), "flavors": [{"name": "default", "resources": resources}]}
                ],
            ),
            _object("LocalQueue", name, namespace=namespace, clusterQueue=name),
        )


def _object(kind: str, name: str, *, namespace: str = "", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": kind, "metadata": metadata, "spec": spec}


def _config(health: str) -> dict[str, Any]:
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta1",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": health},
        "metrics": {"bindAddress": f"127.0.0.1:{free_port()}"},
        "webhook": {"host": "127.0.0.1", "port": free_port()},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "clientConnection": {"qps": 50, "burst": 100},
        "integrations": {"frameworks": ["batch/job"]},
    }


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
