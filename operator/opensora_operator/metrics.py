"""What is measured: one table of names. No labels name a run, so their number does not grow with use."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from opensora_operator.plans import Object
from opensora_operator.views import parse_time


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    type: type[Counter] | type[Gauge] | type[Histogram]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""


METRICS: dict[str, Metric] = {
    "objects": Metric(Gauge, "opensora_objects", "Objects by kind and phase", ("kind", "phase")),
    "attempts": Metric(Counter, "opensora_attempts_total", "Attempts that ended, by why", ("outcome",)),
    "restarts": Metric(Counter, "opensora_restarts_total", "New attempts, by why the last one ended", ("reason",)),
    "first_step": Metric(
        Histogram,
        "opensora_time_to_first_step_seconds",
        "From the creation of a run to its first step",
        buckets=(5, 15, 30, 60, 120, 300, 600, 1800, 3600, 14400),
    ),
    "reconcile": Metric(
        Histogram,
        "opensora_reconcile_seconds",
        "Time to observe, plan and apply one object once",
        ("kind",),
        (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30),
    ),
    "failures": Metric(Counter, "opensora_reconcile_failures_total", "Passes that have to be tried again", ("kind",)),
    "queue_depth": Metric(Gauge, "opensora_queue_depth", "Objects that wait to be looked at"),
    "queue_oldest": Metric(Gauge, "opensora_queue_oldest_seconds", "How long the oldest of them has waited"),
    "requests": Metric(
        Counter,
        "opensora_api_requests_total",
        "Requests to the API server; code 0 is no answer",
        ("verb", "resource", "code"),
    ),
    "status_writes": Metric(Counter, "opensora_status_writes_total", "Statuses written, by what for", ("cause",)),
    "leader": Metric(Gauge, "opensora_leader", "1 in the replica that works, 0 in those that wait"),
}


class Metrics:
    """The numbers of one operator."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._made: dict[str, Any] = {key: self._make(metric) for key, metric in METRICS.items() if key != "objects"}

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def watch_queue(self, *, depth: Callable[[], float], oldest_seconds: Callable[[], float]) -> None:
        """Ask the queue whenever somebody looks."""
        self._made["queue_depth"].set_function(depth)
        self._made["queue_oldest"].set_function(oldest_seconds)

    def watch_objects(self, objects: Callable[[], Iterable[Object]]) -> None:
        """Count the objects whenever somebody looks."""
        self._registry.register(_Objects(objects))

    def set_leader(self, is_leader: bool) -> None:
        """Whether this replica leads."""
        self._made["leader"].set(is_leader)

    def count_request(self, *, verb: str, resource: str, code: int) -> None:
        """A request to the API server was answered; code 0: it was not."""
        self._made["requests"].labels(verb, resource, str(code)).inc()

    def count_reconcile(self, *, kind: str, seconds: float, failed: bool) -> None:
        """One object was looked at."""
        self._made["reconcile"].labels(kind).observe(seconds)
        if failed:
            self._made["failures"].labels(kind).inc()

    def count_status(self, body: Object, status: Object, *, cause: str, now: float) -> None:
        """A status was written: `body` has the one before."""
        self._made["status_writes"].labels(cause).inc()
        old = body.get("status") or {}
        ended = {record["number"]: record for record in status.get("attempts", ()) if record.get("endedAt")}
        for record in old.get("attempts", ()):
            if record.get("endedAt"):
                ended.pop(record["number"], None)
        for record in ended.values():
            self._made["attempts"].labels(record.get("cause", "")).inc()
        if status.get("attempt", 0) > old.get("attempt", 0) > 0:
            causes = {record["number"]: record.get("cause", "") for record in status.get("attempts", ())}
            self._made["restarts"].labels(causes.get(old["attempt"], "")).inc()
        if not _step(old) and _step(status):
            created = parse_time(body["metadata"].get("creationTimestamp"))
            if created is not None:
                self._made["first_step"].observe(max(0.0, now - created))

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        options: dict[str, Any] = {"buckets": metric.buckets} if metric.buckets else {}
        return metric.type(metric.name, metric.help, metric.labels, registry=self._registry, **options)


class _Objects(Collector):
    """Counts objects by kind and phase at the time of asking: nothing to keep in step."""

    def __init__(self, objects: Callable[[], Iterable[Object]]) -> None:
        self._objects = objects

    def collect(self) -> Iterator[GaugeMetricFamily]:
        metric = METRICS["objects"]
        family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
        phases = Count((body["kind"], (body.get("status") or {}).get("phase", "")) for body in self._objects())
        for labels, number in sorted(phases.items()):
            family.add_metric(labels, number)
        yield family


def _step(status: Object) -> int:
    return int((status.get("progress") or {}).get("step") or 0)
