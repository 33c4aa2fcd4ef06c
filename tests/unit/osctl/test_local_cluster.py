"""The cluster in memory: the planner finds in it what it finds in Kubernetes, and comes to the same decisions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from opensora_operator.constants import ExitCode
from opensora_operator.plans import Event, Object
from opensora_operator.progress import ProgressReport
from operator_world import MINIMAL_SPEC
from osctl.forecast import Files
from osctl.local_cluster import LocalCluster, PodEnd, new_run
from osctl.manifests import RUN
from osctl.targets import outcome
from osctl.validation import schema_of, with_defaults


class Process:
    """A pod that does as it is told."""

    def __init__(self, stage: Stage, pod: Object, config: Mapping[str, str]) -> None:
        self.stage, self.pod, self.config = stage, pod, config
        self.index = int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])
        self.end: PodEnd | None = None
        self.asked = self.killed = False

    def poll(self) -> PodEnd | None:
        return self.end

    def terminate(self) -> None:
        self.asked = True

    def kill(self) -> None:
        self.killed = True
        self.finish(137, verdict=False)

    def finish(self, code: int, *, rank: int = 0, step: int | None = None, verdict: bool = True) -> None:
        if self.end is not None:
            return
        first = {"rank": rank, "time": self.stage.now, "code": code, "reason": "E", "message": "boom", "step": step}
        message = {"code": code, "message": f"rank {rank} failed first", "first": first if code else None}
        text = json.dumps(message) if verdict else ""
        self.end = PodEnd(code=code, time=self.stage.now, message=text)


class Stage:
    """A run in a cluster in memory, with scripted processes and a clock."""

    def __init__(self, *, attempt: int = 0, files: Files | None = None, **spec: Any) -> None:
        self.now = 1_000_000.0
        self.processes: list[Process] = []
        self.events: list[Event] = []
        schema = schema_of(RUN)["properties"]["spec"]
        body = {"apiVersion": "opensora.dev/v1alpha1", "kind": RUN, "metadata": {"name": "demo"}}
        body["spec"] = with_defaults({**MINIMAL_SPEC, **spec}, schema)
        self.cluster = LocalCluster(
            new_run(body, namespace="team", attempt=attempt, saved_step=None, now=self.now),
            files or Files(),
            node="here",
            start=self._start,
            tell=self.events.append,
            clock=lambda: self.now,
        )

    def _start(self, pod: Object, config: Mapping[str, str]) -> Process:
        self.processes.append(Process(self, pod, config))
        return self.processes[-1]

    def settle(self, *, seconds: float = 1.0) -> Stage:
        """Everybody does what is theirs to do."""
        for _ in range(4):
            self.cluster.reconcile()
            self.cluster.advance()
        self.now += seconds
        self.cluster.reconcile()
        return self

    @property
    def live(self) -> list[Process]:
        return [process for process in self.processes if process.end is None]

    @property
    def status(self) -> Object:
        return self.cluster.run["status"]

    def reason(self, kind: str) -> str:
        return next(str(found["reason"]) for found in self.status["conditions"] if found["type"] == kind)

    def say(self, step: int, *, checkpoint: int | None = None, state: str = "Training") -> None:
        self.cluster.report(
            ProgressReport(
                pod_uid="", attempt=self.status["attempt"], sequence=int(self.now), phase="training", state=state,  # type: ignore[arg-type]
                step=step, total_steps=100, epoch=0, loss=0.5, seconds_per_step=1.0, samples_per_second=4.0,
                eta_seconds=10.0, goodput=0.9, checkpoint_step=checkpoint, samples_step=None, received=self.now,
                advanced=self.now,
            )
        )  # fmt: skip


def test_a_run_that_nothing_disturbs() -> None:
    stage = Stage().settle()
    assert [process.index for process in stage.live] == [0, 1]
    assert stage.status["phase"] == "Running"
    assert "train: {steps: 10}" in stage.live[0].config["config.yaml"]
    stage.say(50, checkpoint=40)
    stage.settle()
    assert (stage.status["progress"]["percent"], stage.status["checkpoint"]["latestStep"]) == (50, 40)
    assert stage.reason("Progressing") == "StepAdvancing"
    for process in stage.live:
        process.finish(0)
    stage.settle()
    assert (stage.status["phase"], stage.reason("Complete")) == ("Succeeded", "AllRanksSucceeded")
    assert stage.cluster.is_over
    assert outcome(stage.cluster.run) == 0


def test_the_first_failure_ends_all_pods_and_another_attempt_starts() -> None:
    stage = Stage().settle()
    first, second = stage.live
    second.finish(ExitCode.OUT_OF_MEMORY, rank=3, step=7)
    stage.settle()
    assert first.asked
    assert stage.status["attempt"] == 2
    assert stage.live == [first], "no attempt starts beside what is left of another"
    first.finish(ExitCode.PEER_LOST)
    stage.settle()
    record = stage.status["attempts"][0]
    assert (record["cause"], record["rank"], record["lastStep"], record["node"]) == ("OutOfMemory", 3, 7, "here")
    assert [process.pod["metadata"]["name"] for process in stage.live] == ["demo-a2-0", "demo-a2-1"]
    assert stage.status["phase"] == "Running"


def test_pods_of_earlier_attempts_are_forgotten() -> None:
    stage = Stage(deadlines={"stuckPodSeconds": 10}).settle()
    for process in stage.live:
        process.finish(1)
        stage.settle()
    assert len(stage.cluster.pods) == 4
    stage.settle(seconds=11).settle()
    assert [pod["metadata"]["name"] for pod in stage.cluster.pods if "a1" in pod["metadata"]["name"]] == ["demo-a1-0"]


def test_a_pod_that_does_not_end_is_killed_after_its_grace_period() -> None:
    stage = Stage(terminationGracePeriodSeconds=30).settle()
    first, second = stage.live
    second.finish(1)
    stage.settle(seconds=31)
    assert first.asked
    assert not first.killed
    stage.settle()
    assert first.killed
    assert stage.settle().status["phase"] == "Running"


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (ExitCode.CONFIG, "NonRetryableExit"),
        (ExitCode.STALLED, "Hang"),
        (ExitCode.DIVERGED, "Diverged"),
        (ExitCode.NODE_UNHEALTHY, "NodeFailure"),
        (1, "WorkerFailed"),
    ],
)
def test_exit_codes_are_causes_by_the_jobs_own_rules(code: int, cause: str) -> None:
    stage = Stage(nodes=1).settle()
    stage.live[0].finish(code)
    stage.settle()
    assert stage.status["attempts"][0]["cause"] == cause
    assert (stage.status["phase"] == "Failed") == (cause == "NonRetryableExit")


def test_backoff_and_the_stop_without_progress_are_the_planners() -> None:
    policy = {"backoff": {"baseSeconds": 60, "maxSeconds": 600}, "noProgressAttempts": 2}
    stage = Stage(nodes=1, restartPolicy=policy).settle()
    stage.live[0].finish(1)
    stage.settle()
    assert (stage.status["phase"], stage.reason("Restarting"), stage.live) == ("Restarting", "BackingOff", [])
    assert 0 < (stage.cluster.reconcile() or 0) < 62
    stage.now += 61
    stage.settle().live[0].finish(1)
    stage.settle()
    assert (stage.status["phase"], stage.reason("Failed")) == ("Failed", "NoProgress")
    assert outcome(stage.cluster.run) == 10


def test_a_stop_has_the_ranks_save_and_is_no_failure() -> None:
    stage = Stage().settle()
    stage.cluster.stop()
    stage.settle()
    assert all(process.asked for process in stage.live)
    for process in stage.live:
        process.finish(ExitCode.STOPPED, step=12)
    stage.settle()
    assert (stage.status["phase"], stage.reason("Failed")) == ("Failed", "Cancelled")
    assert stage.status["checkpoint"]["latestStep"] == 12
    assert outcome(stage.cluster.run) == 7


def test_a_run_that_is_killed_is_cancelled() -> None:
    stage = Stage().settle()
    stage.cluster.stop()
    stage.cluster.kill()
    stage.settle().settle()
    assert all(process.killed for process in stage.processes)
    assert (stage.reason("Failed"), stage.cluster.is_over) == ("Cancelled", True)


def test_a_deadline_ends_it() -> None:
    stage = Stage(nodes=1, deadlines={"activeSeconds": 100}).settle(seconds=101)
    assert stage.reason("Failed") == "DeadlineExceeded"
    stage.settle()
    assert stage.live[0].asked
    assert not stage.cluster.is_over
    stage.live[0].finish(ExitCode.STOPPED)
    stage.settle()
    assert stage.cluster.is_over


def test_rank_zero_may_decide() -> None:
    stage = Stage(successPolicy="RankZero").settle()
    first, second = stage.live
    first.finish(0)
    stage.settle()
    assert second.asked
    second.finish(ExitCode.STOPPED)
    stage.settle()
    assert (stage.status["phase"], stage.reason("Complete")) == ("Succeeded", "RankZeroSucceeded")


def test_a_queue_admits_at_once() -> None:
    stage = Stage(scheduling={"queue": "gpus"}).settle()
    assert (stage.status["phase"], stage.status["resolved"]["queue"]) == ("Running", "gpus")


def test_attempts_of_the_run_directory_are_counted_on() -> None:
    stage = Stage(attempt=3).settle()
    assert stage.live[0].pod["metadata"]["name"] == "demo-a4-0"
    env = {entry["name"]: entry.get("value") for entry in stage.live[0].pod["spec"]["containers"][0]["env"]}
    assert env["OPENSORA_ATTEMPT"] == "4"
