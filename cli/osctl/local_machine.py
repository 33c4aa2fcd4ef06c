"""What this machine has for a run, and in what a run here differs from one in a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from opensora_operator.api import TrainingProfileSpec
from opensora_operator.wire import from_wire

from opensora.errors import MissingExtraError
from osctl.errors import ExitCode, OsctlError
from osctl.forecast import Forecast
from osctl.layout import container_of, job_of, layout_of
from osctl.resolved import config_of


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a run's pods."""

    names: tuple[str, ...] | None
    """As `CUDA_VISIBLE_DEVICES` has them; none hides them from the ranks, None leaves it as it is."""
    per_pod: int


def check_python() -> None:
    """Raise OsctlError, or an error of the core, where nothing can be trained."""
    if os.name != "posix":
        raise OsctlError("--local needs Linux or macOS", hint="use WSL, or a cluster")
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("training on this machine", extra="train")


def gpus_for(planned: Forecast) -> Gpus:
    """The GPUs that the pods get: as many as they ask for, or else one for each rank where this machine has any.

    Raises:
        OsctlError: this machine has fewer.
    """
    config = config_of(planned)
    device = "auto" if config is None else config.device
    if device == "cpu":
        return Gpus((), 0)
    there = gpus_here()
    data = next(body for body in planned.objects if body["kind"] == "ConfigMap")["data"]
    resource = from_wire(TrainingProfileSpec, json.loads(data["profile.json"])).accelerator.resource
    asked = int(container_of(planned).get("resources", {}).get("limits", {}).get(resource, 0))
    if not asked and not there and device == "auto":
        return Gpus(None, 0)
    asks = layout_of(planned)
    nodes, per_pod = asks.nodes, asked or asks.procs_per_node
    if nodes * per_pod > len(there):
        raise OsctlError(
            f"{counted(nodes, 'node')} with {counted(per_pod, 'GPU')} each: this machine has {len(there) or 'none'}",
            hint="ask for fewer with --nodes and --procs-per-node, or train on the CPU with --set device=cpu",
            exit_code=ExitCode.NO_CAPACITY,
        )
    return Gpus(tuple(there), per_pod)


def gpus_here(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """The GPUs of this machine: those that `CUDA_VISIBLE_DEVICES` names already, or else all."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        words = [word.strip() for word in given.split(",")]
        return words[: words.index("-1")] if "-1" in words else [word for word in words if word]
    found = [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return [str(number) for number in range(len(found))]


def differences(planned: Forecast, *, image: str | None) -> Iterator[str]:
    """What is not as in a cluster, in words.

    Args:
        planned: what the operator makes of the run.
        image: that of the run or its profile; None where it names none.
    """
    job, container = job_of(planned), container_of(planned)
    pod = job["spec"]["template"]["spec"]
    secrets = [source["secretRef"]["name"] for source in container.get("envFrom", ()) if "secretRef" in source]
    if secrets:
        yield f"what the Secret {', '.join(secrets)} holds is taken from your environment"
    limits = [name for name in container.get("resources", {}).get("limits", {}) if "/" not in name]
    placed = any(key in pod for key in ("affinity", "nodeSelector", "schedulerName", "runtimeClassName"))
    own = [volume["name"] for volume in pod["volumes"] if not volume["name"].startswith("opensora-")]
    ignored = (
        f"the image {image}: the ranks run with {sys.executable}" if image is not None else "",
        f"limits of {' and '.join(limits)}" if limits else "",
        "the queue" if job["spec"]["suspend"] else "",
        "placement on nodes" if placed else "",
        f"volumes ({', '.join(own)}): what the config reads there has to be on this machine" if own else "",
        "a /dev/shm and /tmp of its own for each node",
    )
    yield f"without effect here: {'; '.join(filter(None, ignored))}"


def counted(number: int, noun: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
