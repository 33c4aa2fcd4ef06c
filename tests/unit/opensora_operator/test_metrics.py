"""What is measured, as Prometheus reads it."""

from __future__ import annotations

from typing import Any

import pytest
from opensora_operator.metrics import METRICS, Metrics
from opensora_operator.plans import Object


def run(status: Object | None = None) -> Object:
    metadata = {"name": "demo", "namespace": "team", "creationTimestamp": "1970-01-01T00:01:40Z"}
    return {"kind": "TrainingRun", "metadata": metadata, "status": status or {}}


def lines(metrics: Metrics, name: str) -> dict[str, float]:
    """Labels → value of a metric, with those that are zero left out."""
    found = (line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if line.startswith(name))
    return {labels.removeprefix(name): float(value) for labels, value in found if float(value)}


def test_every_row_of_the_table_is_served_and_none_names_a_run() -> None:
    metrics = Metrics()
    metrics.watch_objects(list)
    text = metrics.text().decode()
    for metric in METRICS.values():
        assert f"# HELP {metric.name} {metric.help}" in text
        assert not {"run", "name", "namespace", "pod"} & set(metric.labels)


def test_objects_are_counted_when_somebody_looks() -> None:
    metrics = Metrics()
    objects = [run({"phase": "Running"}), run({"phase": "Running"}), run()]
    metrics.watch_objects(lambda: objects)
    running, new = ('kind="TrainingRun",phase="Running"}', 'kind="TrainingRun",phase=""}')
    assert lines(metrics, "opensora_objects{") == {running: 2, new: 1}
    del objects[0]
    assert lines(metrics, "opensora_objects{") == {running: 1, new: 1}


def test_an_attempt_that_ends_is_counted_once_with_its_cause() -> None:
    metrics = Metrics()
    before: dict[str, Any] = {"attempt": 1, "attempts": [{"number": 1}]}
    after = {"attempt": 2, "attempts": [{"number": 1, "endedAt": "x", "cause": "OutOfMemory"}, {"number": 2}]}
    metrics.count_status(run(before), after, cause="decision", now=200)
    metrics.count_status(run(after), {**after, "phase": "Running"}, cause="state", now=210)
    assert lines(metrics, "opensora_attempts_total") == {'{outcome="OutOfMemory"}': 1}
    assert lines(metrics, "opensora_restarts_total") == {'{reason="OutOfMemory"}': 1}
    assert lines(metrics, "opensora_status_writes_total") == {'{cause="decision"}': 1, '{cause="state"}': 1}


def test_the_first_attempt_is_no_restart() -> None:
    metrics = Metrics()
    metrics.count_status(run(), {"attempt": 1, "attempts": [{"number": 1}]}, cause="state", now=200)
    assert lines(metrics, "opensora_restarts_total") == {}


def test_the_first_step_is_timed_from_the_creation_of_the_run() -> None:
    metrics = Metrics()
    metrics.count_status(run(), {"progress": {"step": 1}}, cause="progress", now=142)
    metrics.count_status(run({"progress": {"step": 1}}), {"progress": {"step": 2}}, cause="progress", now=500)
    assert lines(metrics, "opensora_time_to_first_step_seconds_count") == {"": 1}
    assert lines(metrics, "opensora_time_to_first_step_seconds_sum") == {"": 42}


def test_requests_and_passes_are_counted() -> None:
    metrics = Metrics()
    metrics.count_request(verb="create", resource="jobs", code=201)
    metrics.count_request(verb="create", resource="jobs", code=0)
    metrics.count_reconcile(kind="TrainingRun", seconds=0.02, failed=True)
    assert lines(metrics, "opensora_api_requests_total") == {
        '{code="201",resource="jobs",verb="create"}': 1,
        '{code="0",resource="jobs",verb="create"}': 1,
    }
    assert lines(metrics, "opensora_reconcile_failures_total") == {'{kind="TrainingRun"}': 1}


@pytest.mark.parametrize("leads", [True, False])
def test_queue_and_leadership_are_shown_as_they_are(leads: bool) -> None:
    metrics = Metrics()
    metrics.watch_queue(depth=lambda: 3, oldest_seconds=lambda: 1.5)
    metrics.set_leader(leads)
    assert lines(metrics, "opensora_queue_") == {"depth": 3, "oldest_seconds": 1.5}
    assert lines(metrics, "opensora_leader") == ({"": 1} if leads else {})
