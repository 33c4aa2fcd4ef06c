"""SampleJobs and BatchSearches from their creation to their end, on a real API server with Kubernetes' own Job
controller; pods are scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from control_plane import ControlPlane
from job_stage import SAMPLE, SEARCH, JobStage, report, verdict
from operator_process import OperatorProcess, grant
from stage import API, Kubelets, Stage, playing_kubelets

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def kubelets(control_plane: ControlPlane) -> Iterator[Kubelets]:
    with playing_kubelets(control_plane) as kubelets:
        yield kubelets


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    grant(control_plane)
    operator = OperatorProcess(control_plane.kubeconfig("operator"), tmp_path_factory.mktemp("operator"))
    operator.start_and_lead()
    yield operator
    operator.terminate(30.0)
    assert '"level": "critical"' not in operator.log.read_text()
    assert "this is a bug" not in operator.log.read_text()


@pytest.fixture
def sample(control_plane: ControlPlane, kubelets: Kubelets, operator: OperatorProcess, namespace: str) -> JobStage:
    return JobStage(Stage(control_plane, kubelets, namespace), "SampleJob", "samplejobs", SAMPLE)


@pytest.fixture
def search(control_plane: ControlPlane, kubelets: Kubelets, operator: OperatorProcess, namespace: str) -> JobStage:
    return JobStage(Stage(control_plane, kubelets, namespace), "BatchSearch", "batchsearches", SEARCH)


# --------------------------------------------------------------------------------------------------------- SampleJob


def test_all_shards_are_sampled_two_at_a_time(sample: JobStage) -> None:
    sample.create().until_phase("Running")
    for index in range(3):
        assert len([pod for pod in sample.pods() if pod.get("status", {}).get("phase") == "Running"]) <= 2
        sample.end_pod(sample.running_pod(index), 0, verdict(0, "done"))
    sample.until_phase("Succeeded")
    assert sample.status["shards"]["summary"] == "3/3"
    assert [output["clips"] for output in sample.status["outputs"]] == [2, 2, 2]
    assert sample.status["sheet"] == "s3://bucket/clips/sheet.png"
    header, row = sample.control_plane.kubectl("get", "sj", "-n", sample.namespace).splitlines()
    assert header.split() == ["NAME", "PHASE", "SHARDS", "FAILED", "STEP", "AGE"]
    assert row.split()[:3] == ["demo", "Succeeded", "3/3"]


def test_a_sample_job_is_gone_after_its_time_with_all_it_owned(sample: JobStage) -> None:
    sample.create(cleanup={"ttlSecondsAfterFinished": 1}).until_phase("Running")
    for index in range(3):
        sample.end_pod(sample.running_pod(index), 0, verdict(0, "done"))
    path = f"{API}/namespaces/{sample.namespace}/samplejobs"
    sample.until(lambda: not sample.request("GET", path)["items"], what="its removal")
    sample.until(lambda: not sample.jobs() and not sample.pods(), what="nothing is left")


def test_a_shard_that_fails_is_tried_again_and_a_hopeless_one_is_not(sample: JobStage) -> None:
    sample.create(workers=3, retriesPerShard=1).until_phase("Running")
    sample.end_pod(sample.running_pod(0), 1, verdict(1, "rank 0 failed first: boom"))
    sample.end_pod(sample.running_pod(1), 65, verdict(65, "rank 0 failed first: cat.png is missing"))
    sample.end_pod(sample.running_pod(2), 0, verdict(0, "done"))
    sample.until(lambda: sample.status["shards"]["failed"] == 1, what="the hopeless shard")
    sample.end_pod(sample.running_pod(0), 0, verdict(0, "done"))  # the second try
    sample.until_phase("Failed")
    assert sample.condition("Failed")["reason"] == "ShardsFailed"
    assert "shards 1 of 3 failed" in sample.condition("Failed")["message"]
    assert "cat.png is missing" in sample.condition("Failed")["message"]
    assert [output["state"] for output in sample.status["outputs"]] == ["Done", "Failed", "Done"]


def test_an_evicted_pod_costs_its_shard_no_try(sample: JobStage) -> None:
    sample.create(workers=1, retriesPerShard=0).until_phase("Running")
    pod = sample.running_pod(0)
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod["metadata"]["name"]}}
    sample.request("POST", f"/api/v1/namespaces/{sample.namespace}/pods/{pod['metadata']['name']}/eviction", body)
    sample.until(lambda: sample.running_pod(0)["metadata"]["uid"] != pod["metadata"]["uid"], what="another pod")
    for index in range(3):
        sample.end_pod(sample.running_pod(index), 0, verdict(0, "done"))
    sample.until_phase("Succeeded")


def test_samples_wait_for_the_first_checkpoint_of_their_run(sample: JobStage) -> None:
    sample.create(checkpoint={"runRef": {"name": "parent"}}, image=None).until(
        lambda: sample.condition("Accepted").get("reason") == "RunNotFound", what="the run is missed"
    )
    parent = Stage(sample.control_plane, sample.kubelets, sample.namespace, name="parent")
    parent.create(image="example.com/opensora:2", storage={"endpoint": "http://store"}).until_phase("Running")
    sample.until_phase("Waiting")
    assert sample.condition("Scheduled")["reason"] == "WaitingForCheckpoint"
    sample.patch(f"{parent._path}/status", {"status": {"checkpoint": {"latestStep": 40}}})
    sample.until_phase("Running")
    assert sample.status["checkpoint"] == {"step": 40, "uri": "s3://bucket/demo"}
    container = sample.jobs()["demo-sample"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "example.com/opensora:2"
    assert "step=40" in container["args"]


def test_suspended_samples_give_up_their_pods_and_go_on_later(sample: JobStage) -> None:
    sample.create(workers=1).until_phase("Running")
    sample.end_pod(sample.running_pod(0), 0, verdict(0, "done"))
    sample.running_pod(1)
    sample.edit(suspend=True)
    sample.until_phase("Suspended")
    sample.until(lambda: not [pod for pod in sample.pods() if pod["status"]["phase"] == "Running"], what="no pods")
    sample.edit(suspend=False)
    for index in (1, 2):
        sample.end_pod(sample.running_pod(index), 0, verdict(0, "done"))
    sample.until_phase("Succeeded")


def test_a_job_of_that_name_that_is_not_ours_stays(sample: JobStage) -> None:
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "x", "image": "x"}]}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "demo-sample"}, "spec": {"suspend": True}}
    job["spec"]["template"] = template
    sample.request("POST", f"/apis/batch/v1/namespaces/{sample.namespace}/jobs", job)
    sample.create()
    sample.until(lambda: sample.condition("Accepted").get("reason") == "NameConflict", what="the conflict")
    assert sample.jobs()["demo-sample"]["spec"]["template"]["spec"]["containers"][0]["name"] == "x"


# ------------------------------------------------------------------------------------------------------- BatchSearch


def test_a_search_probes_bucket_by_bucket_and_leaves_a_table(search: JobStage) -> None:
    search.create().until_phase("Running")
    assert list(search.jobs()) == ["demo-p1"]
    for number, bucket in enumerate(("144p/1", "144p/17"), start=1):
        pod = search.until(lambda number=number: search.running_probe(number), what=f"probe {number}")
        found = {"known": "1:5:0.1 8:40:0.8", "batch_size": 8, "peak_bytes": 40, "seconds_per_step": 0.8}
        search.end_pod(pod, 0, report(bucket, **found))
    search.until_phase("Succeeded")
    assert search.condition("Complete")["reason"] == "SearchComplete"
    name = search.status["table"]
    table = search.request("GET", f"/api/v1/namespaces/{search.namespace}/configmaps/{name}")
    assert set(json.loads(table["data"]["table.json"])["buckets"]) == {"144p/1", "144p/17"}
    header, row = search.control_plane.kubectl("get", "bs", "-n", search.namespace).splitlines()
    assert header.split() == ["NAME", "PHASE", "BUCKETS", "FAILED", "TABLE", "AGE"]
    assert row.split()[:5] == ["demo", "Succeeded", "2/2", "0", name]

    search.delete()
    later = JobStage(search, "BatchSearch", "batchsearches", SEARCH)
    later.name = "later"
    later.create().until_phase("Succeeded")
    assert later.condition("Complete")["reason"] == "CacheHit"
    assert later.status["reused"] is True


def test_a_probe_killed_for_memory_is_followed_by_one_that_knows_it(search: JobStage) -> None:
    search.create(buckets=[{"resolution": "144p", "frames": 17}]).until_phase("Running")
    search.end_pod(search.running_pod(), 137, report("144p/17", trying=16), reason="OOMKilled")
    search.until(lambda: "demo-p2" in search.jobs(), what="the second probe")
    arguments = search.jobs()["demo-p2"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--known") + 1 :][:2] == ["1:5:0.1", "16:oom"]
    assert search.status["results"][0]["failures"] == 0


def test_a_bucket_that_keeps_failing_ends_the_search_with_its_words(search: JobStage) -> None:
    search.create(buckets=[{"resolution": "144p", "frames": 17}], retriesPerBucket=1).until_phase("Running")
    for number in (1, 2):
        pod = search.until(lambda number=number: search.running_probe(number), what=f"probe {number}")
        search.end_pod(pod, 1, report("144p/17", reason="no space left", code=1))
    search.until_phase("Failed")
    assert search.condition("Failed")["reason"] == "BucketsFailed"
    assert "no space left" in search.condition("Failed")["message"]
