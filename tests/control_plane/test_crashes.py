"""The operator dies at every single write of a run's life, right before it or right after it, and is started again.

Whatever it had begun is finished once and no more than once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from control_plane import ControlPlane
from dying_operator import EXIT_CODE
from job_stage import SAMPLE, SEARCH, JobStage, report, verdict
from operator_process import OperatorProcess, grant
from stage import API, Kubelets, Stage, playing_kubelets

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
WHEN = {"after each write": "after:1", "before each write": "before:2"}


class MortalOperators(threading.Thread):
    """One operator after another, each of which lives for a single write. A context manager."""

    def __init__(self, control_plane: ControlPlane, folder: Path, namespace: str, when: str) -> None:
        super().__init__(name="mortal-operators", daemon=True)
        grant(control_plane)
        self._stopping = threading.Event()
        self._operator = OperatorProcess(
            control_plane.kubeconfig("operator"),
            folder,
            namespaces=namespace,
            leader_election=False,
            program=[Path(__file__).with_name("dying_operator.py")],
            environment={**os.environ, "DIE": WHEN[when]},
        )
        self.codes: list[int] = []
        """What those that are gone ended with."""

    def run(self) -> None:
        self._operator.start()
        while not self._stopping.wait(0.02):
            if not self._operator.is_running:
                self.codes.append(self._operator.wait_for_end(0))
                self._operator.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.join(10)
        self._operator.terminate(20)
        assert set(self.codes) == {EXIT_CODE}
        assert "this is a bug" not in self._operator.log.read_text()


@pytest.fixture(scope="module")
def kubelets(control_plane: ControlPlane) -> Iterator[Kubelets]:
    with playing_kubelets(control_plane) as kubelets:
        yield kubelets


@pytest.fixture(params=WHEN)
def operators(
    request: pytest.FixtureRequest, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> Iterator[MortalOperators]:
    with MortalOperators(control_plane, tmp_path, namespace, request.param) as operators:
        yield operators


class CrashStage(Stage):
    """One run in a namespace of its own, and what was ever made for it."""

    mark: int = 0

    def jobs_made(self) -> list[str]:
        """All Jobs that were ever created."""
        return sorted(
            event["objectRef"]["name"]
            for event in self.control_plane.audit_events(self.mark, identity="operator")
            if event["verb"] == "create"
            and event["objectRef"]["resource"] == "jobs"
            and event["objectRef"].get("namespace") == self.namespace
            and event["responseStatus"]["code"] == 201
        )


@pytest.fixture
def stage(control_plane: ControlPlane, kubelets: Kubelets, operators: MortalOperators, namespace: str) -> CrashStage:
    stage = CrashStage(control_plane, kubelets, namespace)
    stage.mark = control_plane.audit_mark()
    return stage


def test_failures_are_counted_once_each(stage: CrashStage, operators: MortalOperators) -> None:
    stage.create(restartPolicy={"maxRestarts": 1, "backoff": {"baseSeconds": 0, "maxSeconds": 0}})
    stage.until_phase("Running", seconds=60)
    stage.end(1, 1, rank=3, step=7, message="boom")
    stage.until_phase("Running", attempt=2, seconds=60)
    stage.end(0, 86)
    stage.until_phase("Failed", seconds=60)
    status = stage.status
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (2, 1, 0)
    assert [(record["cause"], record.get("rank")) for record in status["attempts"]] == [
        ("WorkerFailed", 3), ("OutOfMemory", 0),
    ]  # fmt: skip
    assert stage.jobs_made() == ["demo-a1", "demo-a2"]
    assert len(operators.codes) >= 6


def test_disruptions_are_counted_once_each_and_the_run_ends_well(stage: CrashStage) -> None:
    stage.create().until_phase("Running", seconds=60)
    stage.control_plane.kubectl("delete", "pod", "-n", stage.namespace, stage.pods(1)[0]["metadata"]["name"])
    stage.until_phase("Running", attempt=2, seconds=60)
    stage.evict(1)
    stage.until_phase("Running", attempt=3, seconds=60)
    stage.succeed()
    stage.until_phase("Succeeded", seconds=60)
    status = stage.status
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (3, 0, 2)
    assert stage.jobs_made() == ["demo-a1", "demo-a2", "demo-a3"]


def test_a_suspended_run_goes_on_in_another_size_and_is_removed_in_the_end(stage: CrashStage) -> None:
    stage.create(cleanup={"ttlSecondsAfterFinished": 5}).until_phase("Running", seconds=60)
    stage.edit(suspend=True)
    stage.until_phase("Suspended", seconds=60)
    stage.until(lambda: not stage.pods(), what="no pods")
    stage.edit(suspend=False, nodes=1)
    stage.until_phase("Running", attempt=2, seconds=60)
    assert stage.status["nodes"]["summary"] == "1/1"
    stage.succeed()
    path = f"{API}/namespaces/{stage.namespace}/trainingruns"
    stage.until(lambda: not stage.request("GET", path)["items"], seconds=60, what="its removal")
    stage.until(lambda: not stage.jobs() and not stage.pods(), what="nothing is left")
    assert stage.jobs_made() == ["demo-a1", "demo-a2"]


def test_the_next_attempt_waits_for_pods_that_are_slow_to_end(stage: CrashStage) -> None:
    stage.create().until_phase("Running", seconds=60)
    stage.kubelets.habits[stage.namespace] = "stubborn"
    stage.end(0, 88)
    stage.until(lambda: stage.condition("Restarting").get("reason") == "DrainingPods", seconds=60)
    del stage.kubelets.habits[stage.namespace]
    stage.until_phase("Running", attempt=2, seconds=60)
    assert stage.status["attempts"][0]["cause"] == "NodeFailure"
    assert stage.jobs_made() == ["demo-a1", "demo-a2"]


def test_every_shard_is_sampled_once(stage: CrashStage) -> None:
    sample = JobStage(stage, "SampleJob", "samplejobs", SAMPLE)
    sample.create().until_phase("Running", seconds=60)
    for index in range(3):
        sample.end_pod(sample.running_pod(index), 0, verdict(0, "done"))
    sample.until_phase("Succeeded", seconds=60)
    assert sample.status["shards"]["summary"] == "3/3"
    assert stage.jobs_made() == ["demo-sample"]


def test_a_search_probes_every_bucket_once(stage: CrashStage) -> None:
    search = JobStage(stage, "BatchSearch", "batchsearches", SEARCH)
    search.create()
    for number, bucket in enumerate(("144p/1", "144p/17"), start=1):
        pod = search.until(
            lambda number=number: search.running_probe(number),  # type: ignore[misc]
            seconds=60,
            what=f"probe {number}",
        )
        found = {"known": "1:5:0.1 8:40:0.8", "batch_size": 8, "peak_bytes": 40, "seconds_per_step": 0.8}
        search.end_pod(pod, 0, report(bucket, **found))
    search.until_phase("Succeeded", seconds=60)
    assert stage.jobs_made() == ["demo-p1", "demo-p2"]
