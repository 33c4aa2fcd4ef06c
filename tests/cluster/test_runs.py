"""Training on a real cluster: the operator installed by Helm, ranks in pods, clips and checkpoints in an object store.

What holds wherever a run goes is asserted by `run_assertions.py`, as for runs on one machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import yaml
from cluster_runs import ClusterRun, Watched
from control_plane import ApiError, time_of
from installation import BUCKET, CATALOGUE, NAMESPACE, Installation, Object, until
from kueue import Kueue
from run_assertions import (
    HASTY_WATCHDOG,
    SAVE_EVERY,
    STEPS,
    assert_crash_is_told,
    assert_ends_like,
    assert_hang_is_told,
    assert_no_step_was_done_twice,
    assert_undisturbed,
    assert_wrong_config_is_not_tried_again,
    small_config,
)

from opensora.datasets.reader import read_clip
from opensora.errors import ExitCode
from opensora.records import EndRecord, rank_record_path, started_path
from opensora.storage import Storage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
NewRun = Callable[[str], ClusterRun]


@dataclass
class Truth:
    """What a run is like that nothing happens to."""

    losses: dict[int, float] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)
    """What `kubectl get tr` printed, while it changed."""


@pytest.fixture(scope="session")
def truth(installation: Installation) -> Truth:
    truth = Truth()
    run = ClusterRun(installation, "undisturbed").create()
    try:

        def is_over() -> bool:
            row = table_row(installation, run.name)
            if not truth.rows or row != truth.rows[-1]:
                truth.rows.append(row)
            return row["PHASE"] == "Succeeded"

        run.until(is_over, what="its end")
        truth.losses = assert_undisturbed(run)
    except AssertionError:
        print(run.describe())
        raise
    return truth


def table_row(installation: Installation, name: str) -> dict[str, str]:
    """A line of `kubectl get tr` by its headings."""
    table = installation.control_plane.kubectl("get", "tr", name, f"--namespace={NAMESPACE}").splitlines()
    starts = [table[0].index(heading) for heading in table[0].split()]
    ends = [*starts[1:], None]
    return {table[0][start:end].strip(): table[1][start:end].strip() for start, end in zip(starts, ends, strict=True)}


def other_node(installation: Installation) -> str:
    """A node that the operator is not on."""
    busy = {pod["spec"]["nodeName"] for pod in installation.operator_pods()}
    return next(name for name in installation.cluster.nodes if name not in busy)


def test_a_run_tells_how_far_it_is(truth: Truth) -> None:
    running = [row for row in truth.rows if row["PHASE"] == "Running"]
    assert {row["NODES"] for row in running} >= {"2/2"}
    assert any(0 < int(row["STEP"] or 0) < STEPS and row["ETA"] for row in running)
    last = truth.rows[-1]
    assert (last["PHASE"], last["STEP"], last["%"], last["ATTEMPT"], last["RESTARTS"]) == (
        "Succeeded", str(STEPS), "100", "1", "0",
    )  # fmt: skip


def test_crashes_hangs_and_lack_of_memory_change_no_loss(
    installation: Installation, new_run: NewRun, truth: Truth
) -> None:
    memory = {"resources": {"limits": {"memory": "2Gi"}}}
    run = new_run("failures").create("storage.retry_deadline_seconds=10", podTemplate=memory, watchdog=HASTY_WATCHDOG)

    kill_operator = installation.kill_operator
    crashed = assert_crash_is_told(run, attempt=1, rank=3, after_step=SAVE_EVERY + 1, meanwhile=kill_operator)
    assert crashed["node"] == run.pod(1, attempt=1)["spec"]["nodeName"]

    run.until_step(2 * SAVE_EVERY + 1, attempt=2)
    # What lies in /dev/shm counts as memory of the pod. Of its processes, the kernel kills the one that holds most.
    fill = ("dd", "if=/dev/zero", "of=/dev/shm/fill", "bs=1M", "count=2048")
    pod = run.pod(0, attempt=2)["metadata"]["name"]
    with pytest.raises(ApiError):
        installation.control_plane.kubectl("exec", f"--namespace={NAMESPACE}", pod, "--", *fill)
    exceeded = run.until_attempt_ended(2)
    assert (exceeded["cause"], exceeded["exitCode"]) == ("OutOfMemory", ExitCode.OUT_OF_MEMORY)
    assert exceeded["pod"] == pod

    assert_hang_is_told(run, attempt=3, rank=2, after_step=3 * SAVE_EVERY + 1)

    status = assert_ends_like(run, truth.losses)
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (4, 3, 0)
    # Nothing is lost but what came after the last checkpoint.
    assert status["attempts"][3]["firstStep"] >= 3 * SAVE_EVERY


def test_a_pod_that_is_deleted_or_evicted_saves_first(
    installation: Installation, new_run: NewRun, truth: Truth
) -> None:
    run = new_run("disruptions").create()

    run.until_step(SAVE_EVERY + 1, attempt=1)
    pod = run.pod(1, attempt=1)["metadata"]["name"]
    installation.kill_operator()
    installation.control_plane.kubectl("delete", "pod", f"--namespace={NAMESPACE}", pod, "--wait=false")
    deleted = run.until_attempt_ended(1)
    assert deleted["cause"] in ("Stopped", "Disrupted")  # nothing may be left of the pod when the operator is back
    # Where it stopped, the pod has told nobody who could still say so; the checkpoint is there all the same.
    first_end = run.saved_step(attempt=1)
    assert first_end >= max(SAVE_EVERY + 1, deleted["lastStep"])

    run.until_step(first_end + 2, attempt=2)
    pod = run.pod(0, attempt=2)["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    installation.control_plane.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction", eviction)
    evicted = run.until_attempt_ended(2)
    assert evicted["cause"] == "Disrupted"

    status = assert_ends_like(run, truth.losses)
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (3, 0, 2)
    assert status["attempts"][2]["firstStep"] == evicted["lastStep"]
    assert_no_step_was_done_twice(run, [0, first_end, evicted["lastStep"], STEPS])


def test_a_run_outlives_its_node(installation: Installation, new_run: NewRun, truth: Truth) -> None:
    run = new_run("node-loss").create(terminationGracePeriodSeconds=15)
    run.until_step(SAVE_EVERY + 1, attempt=1)
    lost = other_node(installation)
    assert lost in {pod["spec"]["nodeName"] for pod in run.pods(1)}
    node = installation.cluster.nodes[lost]
    node.kill()
    try:
        record = run.until_attempt_ended(1)
        assert (record["cause"], record["node"]) == ("NodeFailure", lost)
        run.until(lambda: run.pods(2), what="attempt 2")
    finally:
        node.restart()
    assert "PodForced" in {reason for reason, _ in run.events()}
    status = assert_ends_like(run, truth.losses)
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (2, 0, 1)
    assert status["attempts"][1]["firstStep"] >= SAVE_EVERY


def test_ranks_that_were_given_up_commit_nothing(installation: Installation, new_run: NewRun, truth: Truth) -> None:
    cut_off = other_node(installation)
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [cut_off]}
    preferred = [{"weight": 100, "preference": {"matchExpressions": [here]}}]
    affinity = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
    run = new_run("partition").create(podTemplate={"affinity": affinity})
    run.until_step(SAVE_EVERY + 1, attempt=1)
    assert {pod["spec"]["nodeName"] for pod in run.pods(1)} == {cut_off}
    node = installation.cluster.nodes[cut_off]
    with run.frozen(attempt=1):  # long enough for another attempt to begin
        node.partition()
        try:
            record = run.until_attempt_ended(1)
            assert (record["cause"], record["node"]) == ("NodeFailure", cut_off)
            run.until(lambda: run.storage.exists(started_path(2)), what="announcement of attempt 2")
            before = committed_by(run, attempt=1)
            assert len(installation.ranks(run.name, attempt=1)) == 4
        except BaseException:
            node.restart()
            raise
    try:
        paths = [rank_record_path(1, rank) for rank in range(4)]
        run.until(lambda: all(run.storage.exists(path) for path in paths), what="end of all ranks of attempt 1")
        ends = [EndRecord.from_json(run.storage.read(path)) for path in paths]
        assert ExitCode.SUPERSEDED in {end.code for end in ends}
        assert {end.code for end in ends} <= {ExitCode.SUPERSEDED, ExitCode.PEER_LOST}
        assert committed_by(run, attempt=1) == before
    finally:
        node.restart()
    status = assert_ends_like(run, truth.losses)
    assert (status["attempt"], status["disruptions"]) == (2, 1)


def committed_by(run: ClusterRun, *, attempt: int) -> set[str]:
    """The checkpoints of an attempt that count: a manifest is what makes the objects beside it a checkpoint."""
    paths = {info.path for info in run.storage.list("checkpoints")}
    return {path for path in paths if path.endswith(f"/attempt-{attempt}/manifest.json")}


def test_the_operator_may_go_and_the_store_may_fail(installation: Installation, new_run: NewRun, truth: Truth) -> None:
    run = new_run("surroundings").create()
    run.until_step(2, attempt=1)
    [old] = [pod["metadata"]["name"] for pod in installation.operator_pods()]
    with run.frozen(attempt=1):  # Helm takes its time
        installation.upgrade(logging={"level": "debug"})
        assert old not in {pod["metadata"]["name"] for pod in installation.operator_pods()}

    installation.store.kill()
    time.sleep(20)
    installation.store.start()
    step = run.until_step(SAVE_EVERY, attempt=1)

    with run.frozen(attempt=1):
        installation.uninstall()
    try:
        assert run.status["phase"] == "Running"
        run.until_step(step + 2, attempt=1)
    finally:
        with run.frozen(attempt=1):
            installation.install()
    status = assert_ends_like(run, truth.losses)
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (1, 0, 0)
    assert len(run.pods()) == 2


def test_a_suspended_run_goes_on_in_any_size(installation: Installation, new_run: NewRun, truth: Truth) -> None:
    run = new_run("elastic").create()
    first = SAVE_EVERY + 1
    run.until_step(first, attempt=1)
    for attempt, nodes in ((2, 1), (3, 2)):
        run.edit(suspend=True)
        run.until_phase("Suspended")
        run.until(lambda: not any(is_live(pod) for pod in run.pods()), what="no pods")
        run.edit(nodes=nodes, suspend=False)
        if attempt == 2:
            run.until_step(first + SAVE_EVERY, attempt=attempt)
            assert len(run.pods(attempt)) == nodes
    status = run.until_phase("Succeeded")
    assert run.losses() == pytest.approx(truth.losses, rel=1e-10)
    assert [record["nodes"] for record in status["attempts"]] == [2, 1, 2]
    assert [record["cause"] for record in status["attempts"]] == ["Suspended", "Suspended", "AllRanksSucceeded"]
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (3, 0, 0)


def is_live(pod: Object) -> bool:
    return pod["status"]["phase"] in ("Pending", "Running")


def test_what_cannot_work_is_not_tried_again(installation: Installation, new_run: NewRun) -> None:
    no_image = new_run("no-image").create(image="opensora-missing:1", deadlines={"startupSeconds": 60})
    no_such_model = new_run("no-such-model").create("model.type=STDiT9")

    no_image.until(lambda: no_image.condition("Running").get("reason") == "PullingImages", what="PullingImages")
    assert "opensora-missing:1" in no_image.condition("Running")["message"]

    assert_wrong_config_is_not_tried_again(no_such_model)

    status = no_image.until_phase("Failed")
    assert status["attempt"] == 1
    assert no_image.condition("Failed")["reason"] == "ImagePullFailed"
    until(lambda: not any(is_live(pod) for pod in no_image.pods()), seconds=60, what="no pods")


def test_a_queue_lets_runs_wait_and_takes_places_away(
    installation: Installation, new_run: NewRun, truth: Truth
) -> None:
    plane = installation.control_plane
    for name, value in (("humble", 1), ("urgent", 1000)):
        body = {"metadata": {"name": name}, "value": value}
        plane.apply(
            {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", **body},
        )
    with Kueue(plane) as kueue:
        for name, value in (("humble", 1), ("urgent", 1000)):
            body = {"metadata": {"name": name}, "value": value}
            plane.apply({"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "WorkloadPriorityClass", **body})
        kueue.make_queue("gpus", namespace=NAMESPACE, cpu="250m", memory="1Gi")
        first = new_run("queued-first").create(scheduling={"queue": "gpus", "priorityClassName": "humble"})
        first.until_step(SAVE_EVERY + 1, attempt=1)

        second = new_run("queued-second").create(scheduling={"queue": "gpus", "priorityClassName": "humble"})
        second.until_phase("Queued")
        assert second.condition("Scheduled")["reason"] == "WaitingForQuota"
        assert not second.pods()
        assert first.status["phase"] == "Running"
        second.delete()

        third = new_run("queued-third").create(
            "train.steps=2", nodes=1, scheduling={"queue": "gpus", "priorityClassName": "urgent"}
        )
        preempted = first.until_attempt_ended(1)
        assert preempted["cause"] == "Queued"
        third.until_phase("Succeeded")
        status = assert_ends_like(first, truth.losses)
        assert (status["attempt"], status["restarts"], status["disruptions"]) == (2, 0, 0)
        assert status["attempts"][1]["firstStep"] == preempted["lastStep"] > SAVE_EVERY


def test_a_sample_job_makes_every_clip(installation: Installation, watched: list[Watched], truth: Truth) -> None:
    folder = Storage(f"s3://{BUCKET}/sampled")
    job = Watched(installation, "SampleJob", "clips")
    watched.append(job)
    job.submit(
        {
            "checkpoint": {"runRef": {"name": "undisturbed", "step": "latest"}},
            "prompts": {"inline": ["a ball moves to the right", "a street with cars"]},
            "numFrames": 17,
            "imageSize": [64, 64],
            "samplingSteps": 2,
            "outputUri": folder.uri,
            "workers": 2,
            "procsPerNode": 1,
            "promptsPerShard": 1,
        }
    )
    status = job.until_phase("Succeeded")
    assert status["checkpoint"]["step"] == STEPS
    assert status["shards"]["summary"] == "2/2"
    assert [(output["state"], output["clips"]) for output in status["outputs"]] == [("Done", 1)] * 2
    clips = [info.path for info in folder.list() if info.path.endswith(".mp4")]
    assert len(clips) == 2
    for clip in clips:
        read = read_clip(folder, clip, num_frames=17, rng=np.random.default_rng(0))
        assert read.frames.shape == (17, 64, 64, 3)
    sheet, _, name = status["sheet"].rpartition("/")
    assert Storage(sheet).read(name)


def test_a_batch_search_finds_what_fits(installation: Installation, watched: list[Watched]) -> None:
    search = Watched(installation, "BatchSearch", "sizes")
    watched.append(search)
    search.submit(
        {
            "config": {"inline": yaml.safe_dump(small_config(CATALOGUE))},
            "buckets": [{"resolution": "144p", "frames": 17}],
            "bounds": {"maxBatch": 3},
            "memoryBudget": "2Gi",
            "procsPerNode": 1,
        }
    )
    status = search.until_phase("Succeeded")
    [result] = status["results"]
    assert (result["bucket"], result["state"], result["batch"]) == ("144p/17", "Found", 3)
    assert 0 < int(result["peakBytes"]) < 2 * 2**30
    path = f"/api/v1/namespaces/{NAMESPACE}/configmaps/{status['table']}"
    table = json.loads(installation.control_plane.request("GET", path)["data"]["table.json"])
    assert "144p" in json.dumps(table)


def test_the_operator_asked_for_nothing_that_it_may_not(installation: Installation, truth: Truth) -> None:
    user = "system:serviceaccount:opensora-system:opensora-operator"
    mine = [event for event in installation.control_plane.audit_events() if event["user"]["username"] == user]
    assert len(mine) > 100
    refused = [
        f"{event['verb']} {event['requestURI']}"
        for event in mine
        if event.get("responseStatus", {}).get("code") in (401, 403)
        and not any(begin <= time_of(event) <= end for begin, end in installation.absences)
    ]
    assert refused == []
