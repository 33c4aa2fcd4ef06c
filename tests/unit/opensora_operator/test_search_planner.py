"""The planner of BatchSearch: probes, what their words lead to, the table, and what never happens.

The probes' words are made by the core's own search, on a machine whose memory is a function of the batch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jobs_world import CrashError, JobsWorld, has_ended, is_live
from opensora_operator import search_planner
from opensora_operator.api import BatchSearchSpec
from opensora_operator.plans import Key, Object
from opensora_operator.search_resources import Report, buckets_of
from opensora_operator.wire import from_wire

import opensora.search_batch_size
from opensora.batch_search.fresh_process import Outcome, OutOfMemory
from opensora.batch_search.probe import ProbeResult
from opensora.batch_search.report import SearchReport
from opensora.config.load import parse_train_config
from opensora.config.train import StorageConfig
from opensora.datasets.batch_table import facts_of, read_batch_table, with_batch_sizes

CONFIG = """\
model: {type: STDiT3, hidden_size: 32, depth: 1, num_heads: 2}
data:
  bucket_config:
    144p: {1: [1.0, 1], 17: [1.0, 1], 34: [0.0, null]}
    64px: {17: [1.0, 1]}
train: {steps: 10}
"""
BUCKETS = ["144p/1", "144p/17", "64px/17"]
PER_CLIP = {"144p/17": 30 * 2**20, "144p/1": 3 * 2**20, "64px/17": 2**20}


def world(**spec: Any) -> JobsWorld:
    return JobsWorld(
        search_planner,
        name="b",
        **{
            "image": "example.com/opensora:1",
            "config": {"inline": CONFIG},
            "memoryBudget": "1Gi",
            "parallelTrials": 2,
            **spec,
        },
    )


class Machine:
    """Where the probes run: a clip takes the same memory and time in every batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._patch = monkeypatch
        self._folder = folder
        self.accelerator = "cpu"
        self.dies_above = math.inf
        self.measured: list[tuple[str, int]] = []

    def run(self, made: JobsWorld, name: str) -> tuple[int, str]:
        """What the pod's command does: exit code and termination message."""
        pod = made.pods[name]
        container = pod["spec"]["containers"][0]
        assert container["command"] == ["python", "-m", "opensora.search_batch_size"]
        volume = next(v for v in pod["spec"]["volumes"] if v["name"] == "opensora-config")
        config = self._folder / f"{name}.yaml"
        config.write_text(made.others[("ConfigMap", volume["configMap"]["name"])]["data"]["config.yaml"])
        places = {"/etc/opensora/run/config.yaml": str(config), "/tmp/batch-table.json": str(config) + ".json"}
        arguments = [places.get(text, text).replace("$$", "$") for text in container["args"]]
        message = self._folder / f"{name}.message"
        self._patch.setenv("OPENSORA_TERMINATION_LOG", str(message))
        self._patch.setattr(opensora.search_batch_size, "FreshProcesses", lambda *_, **__: self.measure)
        code = opensora.search_batch_size.main(arguments)
        return code, message.read_text()

    def measure(self, bucket: str, batch_size: int) -> Outcome:
        self.measured.append((bucket, batch_size))
        taken = PER_CLIP[bucket] * batch_size
        if taken > self.dies_above:
            return OutOfMemory("killed by SIGKILL")
        return ProbeResult(
            peak_bytes=400 * 2**20 + taken,
            seconds_per_step=0.1 + taken / 2**30,
            accelerator=self.accelerator,
            device_bytes=None,
            ranks=1,
            versions={"torch": "2"},
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def finish(made: JobsWorld, machine: Machine) -> None:
    """Pods start and do their work, until no new one comes."""
    for _ in range(20):
        made.settle()
        made.start_pods()
        made.reconcile()
        for name in made.live_pods():
            code, message = machine.run(made, name)
            made.end_pod(name, code, message=message)
        if not made.pods or not made.jobs:
            return
        made.run_job_controller()
        if made.phase in ("Succeeded", "Failed"):
            return


def started(made: JobsWorld) -> list[str]:
    """Bring the search to where its first probes run; returns their pods."""
    made.reconcile()
    names = made.start_pods()
    made.reconcile()
    return names


def result_of(made: JobsWorld, bucket: str) -> Object:
    return next(dict(found) for found in made.status["results"] if found["bucket"] == bucket)


def table_in(made: JobsWorld) -> Object:
    return made.others[("ConfigMap", made.status["table"])]


def said(bucket: str, **values: Any) -> str:
    return SearchReport(bucket=bucket, **values).to_json()


# A search without trouble


def test_every_bucket_is_searched_and_the_table_is_the_cores_own(machine: Machine, tmp_path: Path) -> None:
    made = world()
    finish(made, machine)
    assert made.phase == "Succeeded"
    assert made.condition("Complete")["reason"] == "SearchComplete"
    batches = {found["bucket"]: found["batch"] for found in made.status["results"]}
    budget = 0.92 * 2**30
    assert batches == {bucket: math.floor(budget / taken) for bucket, taken in PER_CLIP.items()}
    assert made.status["buckets"]["summary"] == "3/3"

    path = tmp_path / "table.json"
    path.write_text(table_in(made)["data"]["table.json"])
    table = read_batch_table(str(path), storage=StorageConfig())
    assert table is not None
    config = parse_train_config(CONFIG + "run_uri: x\n", source="t", overrides=["data.path=x"])
    assert with_batch_sizes(config.data.bucket_config, table, uri="t") == {
        "144p": {1: (1.0, batches["144p/1"]), 17: (1.0, batches["144p/17"]), 34: (0.0, None)},
        "64px": {17: (1.0, batches["64px/17"])},
    }
    expected = facts_of(config, ranks=1, accelerator="cpu")
    assert {name: table.facts[name] for name in expected} == expected
    assert table.empty_bytes == 400 * 2**20
    found = table.buckets["144p/17"]
    assert found.fit is not None
    assert found.fit.bytes_per_clip == pytest.approx(PER_CLIP["144p/17"])
    assert found.batch_size in [point.batch_size for point in found.evidence.points]


def test_probes_run_as_many_at_a_time_as_are_allowed() -> None:
    made = world(parallelTrials=2)
    assert len(started(made)) == 2
    assert sorted(made.jobs) == ["b-p1", "b-p2"]
    assert made.phase == "Running"
    assert made.status["buckets"] == {"total": 3, "active": 2, "done": 0, "failed": 0, "summary": "0/3"}
    assert [found["state"] for found in made.status["results"]] == ["Running", "Running", "Pending"]


def test_a_probe_is_one_pod_and_one_try() -> None:
    made = world(
        procsPerNode=4, headroomPercent=5, bounds={"maxBatch": 64}, config={"inline": CONFIG, "overrides": ["seed=3"]}
    )
    started(made)
    spec = made.jobs["b-p1"]["spec"]
    assert (spec["completions"], spec["backoffLimit"]) == (1, 0)
    arguments = spec["template"]["spec"]["containers"][0]["args"]
    assert arguments == [
        "/etc/opensora/run/config.yaml", "--bucket", "144p/1", "--output", "/tmp/batch-table.json", "--max-batch", "64",
        "--headroom-percent", "5", "--nproc-per-node", "4", "--probe-timeout-seconds", "1800",
        "--memory-budget", str(2**30), "run_uri=/tmp/run", "data.path=/tmp/catalogue.csv", "seed=3",
    ]  # fmt: skip


def test_what_is_calm_is_not_written_again() -> None:
    made = world()
    started(made)
    writes = made.num_writes
    made.reconcile()
    made.reconcile()
    assert made.num_writes == writes


# The table, and who finds it


def test_the_table_belongs_to_nobody_and_cannot_be_changed(machine: Machine) -> None:
    made = world()
    finish(made, machine)
    table = table_in(made)
    assert "ownerReferences" not in table["metadata"]
    assert table["immutable"] is True
    assert table["metadata"]["name"] == f"batch-table-{made.status['key'][:16]}"


def test_a_later_search_for_the_same_takes_the_table(machine: Machine) -> None:
    first = world()
    finish(first, machine)
    later = world(parallelTrials=1, cleanup={"ttlSecondsAfterFinished": 5})
    later.others[("ConfigMap", first.status["table"])] = table_in(first)
    later.reconcile()
    assert later.phase == "Succeeded"
    assert later.condition("Complete")["reason"] == "CacheHit"
    assert later.status["reused"] is True
    assert later.status["table"] == first.status["table"]
    assert not later.jobs
    for bucket in BUCKETS:
        assert result_of(later, bucket)["batch"] == result_of(first, bucket)["batch"]
        assert result_of(later, bucket)["evidence"] == result_of(first, bucket)["evidence"]


@pytest.mark.parametrize(
    "change",
    [
        {"image": "example.com/opensora:2"},
        {"config": {"inline": CONFIG + "seed: 3\n"}},
        {"config": {"inline": CONFIG, "overrides": ["dtype=fp32"]}},
        {"procsPerNode": 2},
        {"memoryBudget": "2Gi"},
        {"headroomPercent": 9},
        {"objective": "EqualStepTime"},
        {"bounds": {"maxBatch": 7}},
        {"buckets": [{"resolution": "144p", "frames": 1}]},
        {"podTemplate": {"nodeSelector": {"gpu": "h100"}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_question_has_another_key(change: Object) -> None:
    first, other = world(), world(**change)
    first.reconcile()
    other.reconcile()
    assert first.status["key"] != other.status["key"]


def test_what_does_not_matter_to_the_result_keeps_the_key() -> None:
    first, other = world(), world(parallelTrials=8, retriesPerBucket=9, suspend=True, memoryBudget="1024Mi")
    first.reconcile()
    other.reconcile()
    assert first.status["key"] == other.status["key"]


def test_a_table_that_appears_while_we_measure_ours_is_the_one_that_counts(machine: Machine) -> None:
    first, other = world(), world()
    finish(first, machine)
    started(other)
    other.others[("ConfigMap", first.status["table"])] = table_in(first)
    finish(other, machine)
    assert other.condition("Complete")["reason"] == "SearchComplete"
    assert other.status["table"] == first.status["table"]


@pytest.mark.parametrize("data", [{}, {"table.json": "{}"}, {"table.json": "no json"}, {"other": "x"}])
def test_a_config_map_in_the_tables_place_is_left_alone_and_told(data: dict[str, str]) -> None:
    made = world(suspend=True)
    made.reconcile()
    name = f"batch-table-{made.status['key'][:16]}"
    made.others[("ConfigMap", name)] = {"metadata": {"name": name, "uid": "x"}, "data": data}
    made.edit(suspend=False)
    made.reconcile()
    assert made.condition("Accepted")["reason"] == "NameConflict"
    assert name in made.condition("Accepted")["message"]
    assert not made.jobs


# What probes say


def test_a_probe_that_is_killed_as_a_whole_has_said_what_it_tried(machine: Machine) -> None:
    made = world(buckets=[{"resolution": "144p", "frames": 17}])
    (name,) = started(made)
    known = f"1:{PER_CLIP['144p/17']}:0.13 2:{2 * PER_CLIP['144p/17']}:0.16"
    made.end_pod(name, 137, reason="OOMKilled", message=said("144p/17", known=known, trying=16))
    made.settle()
    found = result_of(made, "144p/17")
    assert found["evidence"] == f"{known} 16:oom"
    assert (found["state"], found["failures"], found["probe"]) == ("Running", 0, 2)
    arguments = made.jobs["b-p2"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--known") + 1 :][:3] == [*known.split(), "16:oom"]
    finish(made, machine)
    assert made.phase == "Succeeded"
    assert result_of(made, "144p/17")["batch"] == 15
    assert (("144p/17", 1) in machine.measured) is False


def test_a_model_that_kills_its_pod_before_a_clip_is_a_failure_with_a_remedy() -> None:
    made = world(buckets=[{"resolution": "144p", "frames": 17}])
    (name,) = started(made)
    made.end_pod(name, 137, reason="OOMKilled", message=said("144p/17", trying=0))
    made.settle()
    assert made.phase == "Failed"
    assert "raise the limit" in made.condition("Failed")["message"]


@pytest.mark.parametrize(
    "how",
    [
        {"code": 75, "disruption": None},
        {"code": 143, "disruption": "EvictionByEvictionAPI"},
        {"code": 137, "disruption": "DeletionByTaintManager"},
    ],
)
def test_a_disturbed_probe_is_followed_by_one_that_knows_what_it_knew(how: Object) -> None:
    made = world(buckets=[{"resolution": "144p", "frames": 17}], retriesPerBucket=0)
    (name,) = started(made)
    message = said("144p/17", known="1:5:0.1", trying=2)
    made.end_pod(name, how["code"], disruption=how["disruption"], message=message)
    made.settle()
    found = result_of(made, "144p/17")
    assert (found["state"], found["evidence"], found["probe"], found["failures"]) == ("Running", "1:5:0.1", 2, 0)


def test_a_probe_whose_node_vanished_with_its_pod_is_followed_by_another() -> None:
    made = world(buckets=[{"resolution": "144p", "frames": 17}], retriesPerBucket=0)
    (name,) = started(made)
    del made.pods[name]
    condition = {"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy"}
    message = "Pod team/x has condition DisruptionTarget matching FailJob rule at index 1"
    made.jobs["b-p1"]["status"]["conditions"] = [{**condition, "message": message}]
    made.settle()
    assert (result_of(made, "144p/17")["state"], result_of(made, "144p/17")["probe"]) == ("Running", 2)


def test_other_failures_are_retried_so_often_and_then_end_the_bucket(machine: Machine) -> None:
    made = world(retriesPerBucket=1)
    for number in (1, 2):
        names = started(made)
        name = next(n for n in made.live_pods() if made.pods[n]["spec"]["containers"][0]["args"][2] == "144p/1")
        assert names
        made.end_pod(name, 1, message=said("144p/1", known=f"{number}:5:0.1", reason="no space left", code=1))
        made.settle()
    found = result_of(made, "144p/1")
    assert (found["state"], found["failures"], found["evidence"]) == ("Failed", 2, "2:5:0.1")
    assert "no space left" in found["message"]
    finish(made, machine)
    assert made.phase == "Failed"
    assert made.condition("Failed")["reason"] == "BucketsFailed"
    assert "144p/1" in made.condition("Failed")["message"]
    assert [result_of(made, bucket)["state"] for bucket in BUCKETS[1:]] == ["Found", "Found"]
    assert not [place for place in made.others if place[1].startswith("batch-table-")]


def test_a_bucket_of_which_one_clip_does_not_fit_is_told_with_numbers(machine: Machine) -> None:
    made = world(memoryBudget="20Mi")
    finish(made, machine)
    assert made.phase == "Failed"
    found = result_of(made, "144p/17")
    assert (found["state"], found["batch"]) == ("Failed", 0)
    assert "one clip takes" in found["message"]
    assert result_of(made, "144p/1")["batch"] == 6


def test_a_wrong_config_ends_the_whole_search_at_once() -> None:
    made = world(parallelTrials=1)
    (name,) = started(made)
    made.end_pod(name, 78, message=said("144p/1", reason="model.depht: unknown key", code=78))
    made.settle()
    assert made.phase == "Failed"
    assert made.condition("Failed")["reason"] == "NonRetryableExit"
    assert "model.depht" in made.condition("Failed")["message"]
    assert list(made.jobs) == ["b-p1"]


def test_buckets_that_were_measured_on_different_hardware_do_not_make_a_table(machine: Machine) -> None:
    made = world(parallelTrials=1)
    for accelerator in ("NVIDIA A100", "NVIDIA H200", "NVIDIA A100"):
        machine.accelerator = accelerator
        made.settle()
        made.start_pods()
        for name in made.live_pods():
            code, message = machine.run(made, name)
            made.end_pod(name, code, message=message)
        made.run_job_controller()
    made.settle()
    assert made.phase == "Failed"
    assert "accelerator NVIDIA H200 instead of NVIDIA A100" in made.condition("Failed")["message"]


def test_words_that_are_no_report_are_a_failure() -> None:
    made = world(buckets=[{"resolution": "144p", "frames": 17}], retriesPerBucket=0)
    (name,) = started(made)
    made.end_pod(name, 0, message="hello")
    made.settle()
    assert "left no result" in result_of(made, "144p/17")["message"]
    assert made.phase == "Failed"


def test_a_probe_that_takes_too_long_is_given_up() -> None:
    made = world(trialTimeoutSeconds=600, retriesPerBucket=0, parallelTrials=1)
    started(made)
    made.now += 601
    made.reconcile()
    assert result_of(made, "144p/1")["state"] == "Failed"
    assert not [name for name in made.jobs if name != "b-p1"], "the next one waits until the first one's pod is gone"
    made.settle()
    assert "deletionTimestamp" in made.jobs.get("b-p1", {}).get("metadata", {"deletionTimestamp": ""})
    made.settle()
    assert "b-p2" in made.jobs


@pytest.mark.parametrize("message", [None, {"bucket": 3}, {"bucket": "a"}, {}, {"known": ""}])
def test_reports_are_read_with_care(message: Object | None) -> None:
    assert Report.from_message(message) is None


def test_the_documented_keys_of_a_report_are_those_of_both_sides() -> None:
    page = (Path(__file__).parents[3] / "docs/reference/pod-contract.md").read_text(encoding="utf-8")
    table = page.partition("## Pods of a BatchSearch")[2].partition("| --- |")[2]
    documented = {
        name for names in re.findall(r"^\| (`[^|]+`) \|", table, re.M) for name in re.findall(r"`(\w+)`", names)
    }
    assert documented == {item.name for item in fields(SearchReport)} == {item.name for item in fields(Report)}


def test_a_report_of_the_core_is_understood_whole() -> None:
    report = SearchReport(
        bucket="144p/1", known="1:2:0.5", trying=4, batch_size=1, peak_bytes=2, seconds_per_step=0.5, empty_bytes=7,
        facts={"dtype": "bf16", "ema": True}, reason="r", code=86,
    )  # fmt: skip
    read = Report.from_message(json.loads(report.to_json()))
    assert read is not None
    assert read.__dict__ == report.__dict__


# Steps of equal length


def test_steps_are_made_alike_once_every_bucket_has_its_largest_batch(machine: Machine) -> None:
    made = world(objective="EqualStepTime", bounds={"maxBatch": 200})
    finish(made, machine)
    assert made.phase == "Succeeded"
    alike = float(made.status["stepSeconds"])
    assert alike == pytest.approx(0.1 + 200 / 1024, rel=1e-3)
    for bucket in BUCKETS:
        found = result_of(made, bucket)
        assert float(found["seconds"]) <= alike * 1.001
        longer = 0.1 + (found["batch"] + 1) * PER_CLIP[bucket] / 2**30
        assert longer > alike * 0.999 or found["batch"] == 200
    assert len(machine.measured) == len(set(machine.measured)) + machine.measured.count(("144p/1", 0)) * 0 + sum(
        machine.measured.count((bucket, 0)) - 1 for bucket in BUCKETS
    ), "what a first probe has measured, the second one knows"


def test_a_given_step_time_needs_one_probe_a_bucket(machine: Machine) -> None:
    made = world(objective="EqualStepTime", stepSeconds=0.3)
    finish(made, machine)
    assert made.phase == "Succeeded"
    assert sorted(made.jobs) == ["b-p1", "b-p2", "b-p3"]
    assert all(float(found["seconds"]) <= 0.3 for found in made.status["results"])


# Which buckets


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"config": {"inline": CONFIG}}, BUCKETS),
        ({"config": {"inline": "bucket_config: {240p: {51: [[0.5, 0.5], 2]}}"}}, ["240p/51"]),
        ({"config": {"file": "configs/a.py"}, "buckets": [{"resolution": "240p", "frames": 51}]}, ["240p/51"]),
        ({"config": {"file": "configs/a.py"}}, "name the buckets"),
        ({"config": {"inline": CONFIG, "overrides": ["data.bucket_config.240p.51=[1.0, 2]"]}}, "name the buckets"),
        ({"config": {"inline": "data: {path: x}"}}, "no bucket that takes clips"),
        ({"config": {"inline": "a: [1"}}, "no YAML"),
        ({"config": {"inline": "just text"}}, "no bucket that takes clips"),
    ],
)
def test_buckets_come_from_the_spec_or_the_config(spec: Object, expected: list[str] | str) -> None:
    made = world(**spec)
    found = buckets_of(from_wire(BatchSearchSpec, made.body["spec"]), {"config.yaml": spec["config"].get("inline", "")})
    if isinstance(expected, list):
        assert found == expected
        return
    assert isinstance(found, str)
    assert expected in found
    made.reconcile()
    assert made.condition("Accepted")["reason"] == "InvalidSpec"
    assert expected in made.condition("Accepted")["message"]
    assert not made.jobs


# What stands in the way


@pytest.mark.parametrize(
    ("spec", "reason", "words"),
    [
        ({"config": {"ref": {"configMap": "c", "key": "x"}}}, "ConfigMissing", "no ConfigMap c"),
        ({"profileRef": {"name": "none"}}, "ProfileNotFound", "none"),
        ({"image": None}, "InvalidSpec", "spec.image"),
        ({"parallelism": {"tensor": 2}}, "InvalidSpec", "tensor"),
    ],
)
def test_what_is_missing_is_named_and_looked_for_again(spec: Object, reason: str, words: str) -> None:
    made = world(**spec)
    made.reconcile()
    assert made.condition("Accepted")["reason"] == reason
    assert words in made.condition("Accepted")["message"]
    assert made.plan().requeue_seconds is not None


def test_a_config_that_changes_before_the_first_probe_is_the_one_that_counts() -> None:
    made = world(config={"ref": {"configMap": "c", "key": "config.yaml"}}, suspend=True)
    made.user_config_maps["c"] = {"config.yaml": CONFIG}
    made.reconcile()
    first = made.status["key"]
    made.user_config_maps["c"] = {"config.yaml": CONFIG.replace("64px", "128px")}
    made.edit(suspend=False)
    made.reconcile()
    assert made.status["key"] != first
    assert [found["bucket"] for found in made.status["results"]][-1] == "128px/17"
    volume = made.jobs["b-p1"]["spec"]["template"]["spec"]["volumes"][0]
    assert "128px" in made.others[("ConfigMap", volume["configMap"]["name"])]["data"]["config.yaml"]
    made.user_config_maps["c"] = {"config.yaml": CONFIG}
    made.reconcile()
    assert made.status["key"] != first, "after it, no more"


def test_a_job_of_that_name_that_is_not_ours_is_left_alone() -> None:
    made = world()
    made.others[("Job", "b-p1")] = {"metadata": {"name": "b-p1", "uid": "x"}}
    made.reconcile()
    assert made.condition("Accepted")["reason"] == "NameConflict"
    assert "b-p1" not in made.jobs


def test_profile_and_queue_hold_for_probes() -> None:
    made = world(image=None, scheduling={"queue": "team"}, profileRef={"name": "gpu"})
    made.objects[Key("ClusterTrainingProfile", "", "gpu")] = {
        "kind": "ClusterTrainingProfile",
        "metadata": {"name": "gpu"},
        "spec": {"image": "example.com/gpu:1", "accelerator": {"count": 8, "name": "H200"}},
    }
    made.reconcile()
    job = made.jobs["b-p1"]
    assert job["spec"]["suspend"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "example.com/gpu:1"
    assert container["args"][container["args"].index("--nproc-per-node") + 1] == "8"
    assert made.phase == "Queued"


def test_suspending_gives_the_pods_up_and_resuming_goes_on(machine: Machine) -> None:
    made = world()
    started(made)
    made.edit(suspend=True)
    made.settle()
    assert made.phase == "Suspended"
    assert not made.live_pods()
    made.edit(suspend=False)
    finish(made, machine)
    assert made.phase == "Succeeded"


def test_the_time_to_live_begins_at_the_end_and_spares_the_table(machine: Machine) -> None:
    made = world(cleanup={"ttlSecondsAfterFinished": 100})
    finish(made, machine)
    made.now += 101
    made.reconcile()
    assert made.was_deleted
    assert "ownerReferences" not in table_in(made)["metadata"]


# Whatever happens


class SearchMachine(RuleBasedStateMachine):
    """Random ends of probes, users, queues, crashes. `JobsWorld` itself refuses a second Job of a name."""

    LIMIT = 2

    def __init__(self) -> None:
        super().__init__()
        self.verdict: str | None = None
        self.is_calm = False
        self.found: dict[str, int] = {}

    @initialize(queue=st.booleans(), retries=st.integers(0, 2), objective=st.sampled_from(["MaxFit", "EqualStepTime"]))
    def begin(self, queue: bool, retries: int, objective: str) -> None:
        scheduling = {"queue": "q"} if queue else {}
        self.world = world(
            scheduling=scheduling, retriesPerBucket=retries, objective=objective, parallelTrials=self.LIMIT
        )
        self._reconcile()

    @rule()
    def operator_works(self) -> None:
        self._reconcile()

    @rule(writes=st.integers(0, 5))
    def operator_dies_after_some_writes(self, writes: int) -> None:
        self.world.writes_left = writes
        try:
            self.world.reconcile()
        except CrashError:
            pass
        finally:
            self.world.writes_left = None
        self.is_calm = False

    @rule(ready=st.booleans())
    def cluster_starts_pods(self, ready: bool) -> None:
        self._happens()
        self.world.start_pods(ready=ready)

    @precondition(lambda self: hasattr(self, "world") and self.world.live_pods())
    @rule(data=st.data(), batch=st.integers(1, 40))
    def a_probe_finds_its_batch(self, data: st.DataObject, batch: int) -> None:
        self._happens()
        self._succeed(data.draw(st.sampled_from(self.world.live_pods())), batch)
        self.world.run_job_controller()

    @precondition(lambda self: hasattr(self, "world") and self.world.live_pods())
    @rule(
        data=st.data(),
        code=st.sampled_from([1, 75, 75, 86, 137, 143]),
        oom=st.booleans(),
        evicted=st.booleans(),
        trying=st.sampled_from([None, 0, 4, 8]),
    )
    def a_probe_ends_badly(self, data: st.DataObject, code: int, oom: bool, evicted: bool, trying: int | None) -> None:
        self._happens()
        name = data.draw(st.sampled_from(self.world.live_pods()))
        bucket = self._bucket(name)
        reason = "OOMKilled" if oom and code == 137 else "Error"
        message = data.draw(st.sampled_from([None, said(bucket, known="1:5:0.1", trying=trying, code=code)]))
        self.world.end_pod(name, code, reason=reason, message=message, disruption="Eviction" if evicted else None)
        self.world.run_job_controller()

    @rule()
    def cluster_and_operator_work(self) -> None:
        self.world.settle()
        self.is_calm = True

    @rule(suspend=st.booleans())
    def a_user_suspends_or_resumes(self, suspend: bool) -> None:
        self._happens()
        self.world.edit(suspend=suspend)

    @rule(suspend=st.booleans())
    def the_queue_decides(self, suspend: bool) -> None:
        self._happens()
        for name, job in self.world.jobs.items():
            if "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"] and not has_ended(job):
                self.world.suspend_job(name, suspend)

    @rule(data=st.data())
    def somebody_deletes_a_job(self, data: st.DataObject) -> None:
        if self.world.jobs:
            self._happens()
            self.world.delete_job(data.draw(st.sampled_from(sorted(self.world.jobs))))

    @rule(seconds=st.sampled_from([1.0, 130.0, 1801.0]))
    def time_passes(self, seconds: float) -> None:
        self._happens()
        self.world.now += seconds

    @rule(node=st.sampled_from(["node-0", None]))
    def a_node_dies_or_comes_back(self, node: str | None) -> None:
        self._happens()
        self.world.dead_nodes = {node} if node else set()

    @invariant()
    def an_end_is_for_ever(self) -> None:
        if not hasattr(self, "world"):
            return
        if self.verdict is not None:
            assert self.world.phase == self.verdict
        elif self.world.phase in ("Succeeded", "Failed"):
            self.verdict = self.world.phase

    @invariant()
    def never_more_probes_than_allowed(self) -> None:
        if hasattr(self, "world"):
            alive = [job for job in self.world.jobs.values() if not has_ended(job)]
            alive = [job for job in alive if "deletionTimestamp" not in job["metadata"]]
            assert len(alive) <= self.LIMIT
            assert sum(found["state"] == "Running" for found in self.world.status.get("results", ())) <= self.LIMIT

    @invariant()
    def each_bucket_has_one_probe_at_a_time(self) -> None:
        if hasattr(self, "world"):
            numbers = [found.get("probe", 0) for found in self.world.status.get("results", ())]
            given = [number for number in numbers if number]
            assert len(given) == len(set(given))

    @invariant()
    def a_success_has_a_table_with_every_bucket(self) -> None:
        if hasattr(self, "world") and self.world.phase == "Succeeded":
            table = json.loads(table_in(self.world)["data"]["table.json"])
            assert sorted(table["buckets"]) == BUCKETS
            assert all(entry["batch_size"] >= 1 for entry in table["buckets"].values())

    @invariant()
    def nothing_is_left_to_do_after_the_work_is_done(self) -> None:
        if self.is_calm:
            again = self.world.plan()
            assert (again.actions, again.status, again.is_decision) == ((), None, False)

    def teardown(self) -> None:
        """Left in peace, with probes that succeed, it ends."""
        if not hasattr(self, "world"):
            return
        self.world.dead_nodes.clear()
        if self.verdict is None:
            self.world.edit(suspend=False)
            for _ in range(24):
                self.world.settle()
                for name, job in self.world.jobs.items():
                    if not has_ended(job) and job["spec"]["suspend"]:
                        self.world.suspend_job(name, False)
                self.world.start_pods()
                for name in self.world.live_pods():
                    self._succeed(name, 3)
                self.world.run_job_controller()
        self.world.settle()
        assert self.world.phase in ("Succeeded", "Failed")
        assert not [pod for pod in self.world.pods.values() if is_live(pod)]

    def _bucket(self, name: str) -> str:
        arguments = self.world.pods[name]["spec"]["containers"][0]["args"]
        return str(arguments[arguments.index("--bucket") + 1])

    def _succeed(self, name: str, batch: int) -> None:
        known = f"1:5:0.1 {batch + 1}:{batch}:{batch / 10}"
        message = said(
            self._bucket(name), known=known, batch_size=batch + 1, peak_bytes=batch, seconds_per_step=batch / 10,
            facts={"accelerator": "cpu"},
        )  # fmt: skip
        self.world.end_pod(name, 0, message=message)

    def _happens(self) -> None:
        self.is_calm = False

    def _reconcile(self) -> None:
        self.world.reconcile()
        self.is_calm = True


TestSearchMachine = SearchMachine.TestCase
TestSearchMachine.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
