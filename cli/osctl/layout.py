"""Where a run would go: its nodes, ranks and resources, as the operator renders them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opensora_operator.constants import LABEL_KUEUE_QUEUE
from opensora_operator.plans import Object
from opensora_operator.resources import parse_quantity

from osctl.forecast import Forecast
from osctl.output import printable


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The pods of a run's first attempt, and what is made with them."""

    nodes: int
    procs_per_node: int
    image: str | None
    """None where neither the file nor a profile in it names one."""
    queue: str | None
    requests: Mapping[str, str]
    """Of a pod."""
    limits: Mapping[str, str]
    objects: tuple[str, ...]
    """`Kind/name`, in the order in which they are created."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.procs_per_node


def job_of(planned: Forecast) -> Object:
    """The Job of the first attempt."""
    return next(body for body in planned.objects if body["kind"] == "Job")


def container_of(planned: Forecast) -> Object:
    """The trainer's container."""
    container: Object = job_of(planned)["spec"]["template"]["spec"]["containers"][0]
    return container


def image_of(planned: Forecast) -> str:
    """The trainer's image."""
    return str(container_of(planned)["image"])


def layout_of(planned: Forecast, *, has_image: bool = True) -> Layout:
    """The layout of what the operator makes of a run. `has_image`: the image is the run's, and no stand-in."""
    job, container = job_of(planned), container_of(planned)
    resources = container.get("resources", {})
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    return Layout(
        nodes=int(job["spec"]["completions"]),
        procs_per_node=int(env["OPENSORA_NPROC_PER_NODE"]),
        image=str(container["image"]) if has_image else None,
        queue=job["metadata"]["labels"].get(LABEL_KUEUE_QUEUE),
        requests=resources.get("requests", {}),
        limits=resources.get("limits", {}),
        objects=tuple(f"{body['kind']}/{body['metadata']['name']}" for body in planned.objects),
    )


def as_data(layout: Layout) -> dict[str, Any]:
    """What `-o json` prints."""
    return {
        "nodes": layout.nodes,
        "procsPerNode": layout.procs_per_node,
        "worldSize": layout.ranks,
        "image": layout.image,
        "queue": layout.queue,
        "resources": {"requests": dict(layout.requests), "limits": dict(layout.limits)},
        "objects": list(layout.objects),
    }


def as_text(layout: Layout) -> str:
    """For people."""
    nodes = "1 node" if layout.nodes == 1 else f"{layout.nodes} nodes"
    ranks = "1 rank" if layout.procs_per_node == 1 else f"{layout.procs_per_node} ranks"
    facts = [
        ("ranks", f"{nodes} with {ranks}{' each' if layout.nodes > 1 else ''}: {layout.ranks} in all"),
        ("image", layout.image or "that of the cluster's profile"),
        ("queue", layout.queue or ""),
        ("requests", _resources(layout.requests, layout.nodes)),
        ("limits", _resources(layout.limits, layout.nodes)),
        ("objects", ", ".join(layout.objects)),
    ]
    return "\n".join(f"  {name:<8} {printable(text)}" for name, text in facts if text)


def _resources(of_a_pod: Mapping[str, str], nodes: int) -> str:
    """`nvidia.com/gpu 8 (16 in all)`."""
    if nodes == 1:
        return ", ".join(f"{name} {value}" for name, value in of_a_pod.items())
    return ", ".join(f"{name} {value} ({_times(value, nodes)} in all)" for name, value in of_a_pod.items())


def _times(quantity: str, count: int) -> str:
    number = parse_quantity(quantity) * count
    for unit, factor in (("Ti", 2.0**40), ("Gi", 2.0**30), ("Mi", 2.0**20)):
        if number >= factor:
            return f"{number / factor:.4g}{unit}"
    return f"{number:.4g}"
