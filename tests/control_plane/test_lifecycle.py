"""Runs from their creation to their end, on a real API server with Kubernetes' own controllers; pods are scripted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from control_plane import ApiError, ControlPlane
from operator_process import OperatorProcess, grant
from stage import Kubelets, Stage, playing_kubelets, set_status

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


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
def stage(control_plane: ControlPlane, kubelets: Kubelets, operator: OperatorProcess, namespace: str) -> Stage:
    return Stage(control_plane, kubelets, namespace)


def events(stage: Stage) -> set[str]:
    return {event["reason"] for event in stage.events()}


POD_GROUPS = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "podgroups.scheduling.x-k8s.io",
        "annotations": {"api-approved.kubernetes.io": "unapproved, of a test"},
    },
    "spec": {
        "group": "scheduling.x-k8s.io",
        "names": {"kind": "PodGroup", "plural": "podgroups"},
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1alpha1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}
"""The kind of the coscheduling plugin, as far as an API server has to know it."""


# ---------------------------------------------------------------------------------------------------- from end to end


def test_a_run_goes_from_creation_to_success(stage: Stage) -> None:
    stage.create().until_phase("Running")
    assert stage.status["nodes"]["summary"] == "2/2"
    assert stage.status["resolved"]["worldSize"] == 4
    stage.succeed()
    stage.until_phase("Succeeded")
    assert stage.status["attempts"][0]["exitCode"] == 0
    stage.until(lambda: events(stage) >= {"AttemptStarted", "AllRanksSucceeded"}, what="an event for each decision")


def test_kubectl_shows_the_run_as_people_read_it(stage: Stage) -> None:
    stage.create().until_phase("Running")
    header, row = stage.control_plane.kubectl("get", "tr", "-n", stage.namespace).splitlines()
    assert header.split() == ["NAME", "PHASE", "NODES", "STEP", "%", "ETA", "ATTEMPT", "RESTARTS", "AGE"]
    assert row.split()[:3] == ["demo", "Running", "2/2"]


def test_rank_zero_decides_where_the_policy_says_so(stage: Stage) -> None:
    stage.create(successPolicy="RankZero").until_phase("Running")
    stage.end(0, 0)
    stage.until_phase("Succeeded")
    assert stage.condition("Complete")["reason"] == "RankZeroSucceeded"
    stage.until(lambda: not stage.pods() or all(p["status"]["phase"] != "Running" for p in stage.pods()))


# ------------------------------------------------------------------------------------------------- ends of an attempt


@pytest.mark.parametrize(
    ("code", "cause", "counter"),
    [
        (1, "WorkerFailed", "restarts"),
        (75, "Stopped", "disruptions"),
        (85, "Hang", "restarts"),
        (86, "OutOfMemory", "restarts"),
        (87, "Diverged", "restarts"),
        (88, "NodeFailure", "restarts"),
    ],
)
def test_a_failed_pod_restarts_the_gang(stage: Stage, code: int, cause: str, counter: str) -> None:
    stage.create().until_phase("Running")
    stage.end(1, code, rank=3, step=7, message="boom")
    stage.until_phase("Running", attempt=2)
    record = stage.status["attempts"][0]
    assert (record["cause"], record["rank"], record["node"]) == (cause, 3, "node-1")
    assert stage.status[counter] == 1
    assert cause in stage.until(lambda: events(stage) & {cause})


@pytest.mark.parametrize("code", [64, 65, 78, 89])
def test_what_cannot_succeed_is_not_repeated(stage: Stage, code: int) -> None:
    stage.create().until_phase("Running")
    stage.end(0, code, message="data.path: no such file")
    stage.until_phase("Failed")
    assert stage.condition("Failed")["reason"] == "NonRetryableExit"
    assert "data.path: no such file" in stage.condition("Failed")["message"]
    assert [*stage.jobs()] == ["demo-a1"]


def test_a_lost_peer_is_not_taken_for_the_cause(stage: Stage) -> None:
    stage.kubelets.exit_codes[stage.namespace] = 86  # the pod that is asked to stop was the one that ran out of memory
    stage.create().until_phase("Running")
    stage.end(0, 84, rank=0)
    stage.until_phase("Running", attempt=2)
    assert stage.status["attempts"][0]["cause"] == "OutOfMemory"


def test_an_evicted_pod_is_a_disruption(stage: Stage) -> None:
    stage.create().until_phase("Running")
    stage.evict(1)
    stage.until_phase("Running", attempt=2)
    assert stage.status["attempts"][0]["cause"] in ("Disrupted", "Stopped")
    assert (stage.status["restarts"], stage.status["disruptions"]) == (0, 1)


def test_a_deleted_pod_is_a_disruption(stage: Stage) -> None:
    stage.create().until_phase("Running")
    stage.control_plane.kubectl("delete", "pod", "-n", stage.namespace, stage.pods(1)[0]["metadata"]["name"])
    stage.until_phase("Running", attempt=2)
    assert (stage.status["restarts"], stage.status["disruptions"]) == (0, 1)


def test_a_deleted_job_is_made_anew_under_the_next_number(stage: Stage) -> None:
    stage.create().until_phase("Running")
    stage.control_plane.kubectl("delete", "job", "-n", stage.namespace, "demo-a1", "--wait=false")
    stage.until_phase("Running", attempt=2)
    assert stage.status["attempts"][0]["cause"] == "JobDeleted"


def test_the_next_attempt_waits_for_the_last_pod_of_this_one(stage: Stage) -> None:
    stage.create().until_phase("Running")
    stage.kubelets.habits[stage.namespace] = "stubborn"
    stage.end(0, 1)
    stage.until(lambda: stage.condition("Restarting").get("reason") == "DrainingPods")
    assert [*stage.jobs()] == ["demo-a1"]
    del stage.kubelets.habits[stage.namespace]
    stage.until_phase("Running", attempt=2)


def test_the_budget_of_restarts_ends(stage: Stage) -> None:
    stage.create(restartPolicy={"maxRestarts": 1, "backoff": {"baseSeconds": 0, "maxSeconds": 0}})
    for attempt in (1, 2):
        stage.until_phase("Running", attempt=attempt)
        stage.end(0, 1, message="again")
    stage.until_phase("Failed")
    assert stage.condition("Failed")["reason"] == "RestartBudgetExceeded"
    assert stage.status["restarts"] == 1


def test_there_is_a_pause_before_the_next_attempt(stage: Stage) -> None:
    stage.create(restartPolicy={"backoff": {"baseSeconds": 3, "maxSeconds": 3}}).until_phase("Running")
    stage.end(0, 1)
    stage.until(lambda: stage.condition("Restarting").get("reason") == "BackingOff")
    assert [*stage.jobs()] == ["demo-a1"]
    stage.until_phase("Running", attempt=2)


def test_old_jobs_are_removed_as_the_history_says(stage: Stage) -> None:
    stage.create(cleanup={"attemptHistoryLimit": 0})
    stage.until_phase("Running")
    stage.end(0, 1)
    stage.until_phase("Running", attempt=2)
    stage.until(lambda: [*stage.jobs()] == ["demo-a2"])


# ---------------------------------------------------------------------------------------------------- what users ask


def test_suspend_and_resume(stage: Stage) -> None:
    stage.create().until_phase("Running")
    stage.edit(suspend=True)
    stage.until_phase("Suspended")
    stage.until(lambda: not [p for p in stage.pods() if p["status"]["phase"] == "Running"])
    stage.edit(suspend=False)
    stage.until_phase("Running")
    assert (stage.status["restarts"], stage.status["disruptions"]) == (0, 0)
    stage.succeed()
    stage.until_phase("Succeeded")


def test_scaled_while_suspended(stage: Stage) -> None:
    stage.create().until_phase("Running")
    stage.edit(suspend=True)
    stage.until_phase("Suspended")
    stage.edit(nodes=1)
    stage.edit(suspend=False)
    stage.until_phase("Running")
    assert stage.status["nodes"]["summary"] == "1/1"


def test_scaled_while_running_within_what_is_allowed(stage: Stage) -> None:
    stage.create(elastic={"allowedNodes": [2, 1]}).until_phase("Running")
    stage.edit(nodes=1)
    stage.until_phase("Running", attempt=2)
    assert stage.status["nodes"]["summary"] == "1/1"
    assert stage.status["attempts"][0]["cause"] == "Resized"


def test_stopped_for_good(stage: Stage) -> None:
    stage.create().until_phase("Running")
    stage.edit(requests={"stop": True})
    stage.until_phase("Failed")
    assert stage.condition("Failed")["reason"] == "Cancelled"
    stage.until(lambda: not [p for p in stage.pods() if p["status"]["phase"] == "Running"])


def test_restarted_on_request_without_a_node(stage: Stage) -> None:
    stage.create().until_phase("Running")
    stage.edit(requests={"restart": {"id": "one", "excludeNode": "node-1"}})
    stage.until_phase("Running", attempt=2)
    assert stage.status["requests"]["restart"] == "one"
    assert stage.status["avoidNodes"] == ["node-1"]


def test_a_terminal_state_is_for_ever(stage: Stage) -> None:
    stage.create().until_phase("Running")
    stage.succeed()
    stage.until_phase("Succeeded")
    stage.control_plane.kubectl("delete", "job", "-n", stage.namespace, "--all", "--wait=false")
    stage.until(lambda: not stage.jobs())
    stage.edit(requests={"restart": {"id": "again"}})
    stage.until(lambda: stage.status["observedGeneration"] == stage.run["metadata"]["generation"])
    assert stage.status["phase"] == "Succeeded"
    assert not stage.jobs()


def test_a_run_is_gone_after_its_time_with_all_it_owned(stage: Stage) -> None:
    stage.create(cleanup={"ttlSecondsAfterFinished": 1}).until_phase("Running")
    stage.succeed()

    def is_gone() -> bool:
        try:
            return stage.run is None
        except ApiError as error:
            return error.code == 404

    stage.until(is_gone)
    kinds = "jobs,pods,services,configmaps,networkpolicies"
    left = lambda: stage.control_plane.kubectl(  # noqa: E731
        "get", kinds, "-n", stage.namespace, "-l", "opensora.dev/uid", "-o", "name"
    )
    stage.until(lambda: not left(), what="everything is collected")


# ------------------------------------------------------------------------------------------------------------- queues


def test_a_queue_decides_when_a_run_starts_and_may_take_its_place_away(stage: Stage) -> None:
    path = f"/apis/batch/v1/namespaces/{stage.namespace}/jobs"
    stage.create(scheduling={"queue": "team-a"}).until_phase("Queued")
    assert stage.jobs()["demo-a1"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    stage.patch(f"{path}/demo-a1", {"spec": {"suspend": False}})
    stage.until_phase("Running")
    stage.patch(f"{path}/demo-a1", {"spec": {"suspend": True}})
    stage.until(lambda: "demo-a2" in stage.jobs())
    assert stage.jobs()["demo-a2"]["spec"]["suspend"]
    stage.until_phase("Queued", attempt=2)
    assert (stage.status["restarts"], stage.status["disruptions"]) == (0, 0)
    stage.patch(f"{path}/demo-a2", {"spec": {"suspend": False}})
    stage.until_phase("Running", attempt=2)
    stage.succeed()
    stage.until_phase("Succeeded")


# -------------------------------------------------------------------------------------------------------- wrong input


def test_a_profile_that_comes_later_is_found(stage: Stage) -> None:
    stage.create(profileRef={"kind": "TrainingProfile", "name": "mine"})
    stage.until(lambda: stage.condition("Accepted").get("reason") == "ProfileNotFound")
    stage.apply(
        "apiVersion: opensora.dev/v1alpha1\nkind: TrainingProfile\nmetadata: {name: mine}\n"
        "spec: {podTemplate: {nodeSelector: {pool: gpu}}}\n"
    )
    stage.until_phase("Running")
    assert stage.pods()[0]["spec"]["nodeSelector"] == {"pool": "gpu"}


def test_a_missing_config_map_is_named(stage: Stage) -> None:
    stage.create(config={"ref": {"configMap": "mine", "key": "config.yaml"}})
    stage.until(lambda: "there is no ConfigMap mine" in stage.condition("Accepted").get("message", ""))


def test_a_service_of_somebody_else_is_left_alone(stage: Stage) -> None:
    stage.apply("apiVersion: v1\nkind: Service\nmetadata: {name: demo}\nspec: {ports: [{port: 80}]}\n")
    stage.create()
    stage.until(lambda: stage.condition("Accepted").get("reason") == "NameConflict")
    assert not stage.jobs()
    stage.control_plane.kubectl("delete", "service", "-n", stage.namespace, "demo")
    stage.until_phase("Running", seconds=60)


def test_a_job_of_somebody_else_is_left_alone(stage: Stage) -> None:
    stage.apply(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {name: demo-a1}\n"
        "spec: {suspend: true, template: {spec: {restartPolicy: Never, containers: [{name: x, image: x}]}}}\n"
    )
    stage.create()
    stage.until(lambda: stage.condition("Accepted").get("reason") == "NameConflict")
    assert "labels" not in stage.jobs()["demo-a1"]["spec"]["template"]["metadata"].get("labels", {})
    assert stage.jobs()["demo-a1"]["spec"]["suspend"]


def test_what_the_api_server_refuses_is_told_in_its_own_words(stage: Stage) -> None:
    stage.apply("apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: none}\nspec: {hard: {count/jobs.batch: 0}}\n")
    stage.until(lambda: "hard" in stage.control_plane.kubectl("get", "quota", "-n", stage.namespace, "-o", "yaml"))
    stage.create()
    stage.until(lambda: stage.condition("Accepted").get("reason") == "Rejected")
    assert "exceeded quota" in stage.condition("Accepted")["message"]


def test_pods_that_coscheduling_counts_come_with_their_group(stage: Stage) -> None:
    definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    group = f"/apis/scheduling.x-k8s.io/v1alpha1/namespaces/{stage.namespace}/podgroups/demo-a1"
    stage.create(scheduling={"gang": {"mode": "Coscheduling", "timeoutSeconds": 90}})
    stage.until(lambda: stage.condition("Accepted").get("reason") == "Rejected")
    assert "does not know the kind PodGroup" in stage.condition("Accepted")["message"]
    assert stage.jobs() == {}
    stage.request("POST", definitions, POD_GROUPS)
    try:
        name = POD_GROUPS["metadata"]["name"]
        stage.control_plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", f"crd/{name}")
        other = {"apiVersion": "scheduling.x-k8s.io/v1alpha1", "kind": "PodGroup", "metadata": {"name": "demo-a1"}}
        stage.until(lambda: stage.request("POST", group.removesuffix("/demo-a1"), other), what="the new kind")
        stage.edit(cleanup={"ttlSecondsAfterFinished": 600})  # a change is tried at once
        stage.until(lambda: stage.condition("Accepted").get("reason") == "NameConflict")
        stage.request("DELETE", group)
        stage.until_phase("Running", seconds=90)
        assert stage.request("GET", group)["spec"] == {"minMember": 2, "scheduleTimeoutSeconds": 90}
        pod = stage.pods(1)[0]
        assert pod["metadata"]["labels"]["scheduling.x-k8s.io/pod-group"] == "demo-a1"
        assert pod["spec"]["schedulerName"] == "scheduler-plugins-scheduler"
    finally:
        stage.request("DELETE", f"{definitions}/{POD_GROUPS['metadata']['name']}")


def test_an_image_that_cannot_be_named_fails_at_once(stage: Stage) -> None:
    stage.kubelets.habits[stage.namespace] = "pending"
    stage.create()
    pod = stage.until(lambda: stage.pods())[0]
    state = {"waiting": {"reason": "InvalidImageName", "message": "couldn't parse image name"}}
    set_status(stage.control_plane, pod, "Pending", state)
    stage.until_phase("Failed")
    assert stage.condition("Failed")["reason"] == "ImagePullFailed"


def test_a_missing_secret_is_named_while_the_pod_waits(stage: Stage) -> None:
    stage.kubelets.habits[stage.namespace] = "pending"
    stage.create(storage={"secretRef": {"name": "s3"}})
    pod = stage.until(lambda: stage.pods())[0]
    assert {"secretRef": {"name": "s3"}} in pod["spec"]["containers"][0]["envFrom"]
    state = {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}}
    set_status(stage.control_plane, pod, "Pending", state)
    stage.until(lambda: 'secret "s3" not found' in stage.condition("Running").get("message", ""))


def test_edited_children_do_not_confuse_a_run(stage: Stage) -> None:
    stage.create().until_phase("Running")
    path = f"/apis/batch/v1/namespaces/{stage.namespace}/jobs/demo-a1"
    stage.patch(path, {"spec": {"suspend": True}})  # by hand: what ran once gets a new number
    stage.until_phase("Running", attempt=2)
    stage.succeed()
    stage.until_phase("Succeeded")


def test_two_runs_do_not_touch_each_other(stage: Stage, namespace: str) -> None:
    other = Stage(stage.control_plane, stage.kubelets, namespace, name="other")
    stage.create()
    other.create()
    stage.until_phase("Running")
    other.until_phase("Running")
    stage.end(0, 1)
    stage.until_phase("Running", attempt=2)
    assert other.attempt == 1
    stage.delete()
    stage.until(lambda: not [name for name in stage.jobs() if name.startswith("demo")])
    assert other.status["phase"] == "Running"


def test_a_name_that_is_used_again_begins_anew(stage: Stage) -> None:
    stage.create().until_phase("Running")
    stage.end(0, 1)
    stage.until_phase("Running", attempt=2)
    stage.delete()
    stage.create()
    stage.until(lambda: stage.status.get("attempt") == 1, seconds=60)
    stage.until_phase("Running", attempt=1, seconds=60)


def test_pods_get_what_the_run_and_its_profile_say(stage: Stage) -> None:
    template: dict[str, Any] = {
        "env": [{"name": "MINE", "value": "$(nope); `id`"}],
        "resources": {"limits": {"memory": "2Gi"}},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
    }
    stage.create(podTemplate=template, config={"inline": "a: 1", "overrides": ["optim.lr=$(reboot)"]})
    stage.until_phase("Running")
    spec = stage.pods()[0]["spec"]
    container = spec["containers"][0]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert env["MINE"] == "$(nope); `id`"
    assert env["OPENSORA_MASTER_ADDR"] == "demo-a1-0.demo"
    assert container["args"][-1] == "optim.lr=$$(reboot)"  # which the kubelet reads as one dollar and no variable
    assert spec["subdomain"] == "demo"
    assert spec["automountServiceAccountToken"] is False
    assert {"medium": "Memory", "sizeLimit": str(2**30)} in [volume.get("emptyDir") for volume in spec["volumes"]]
    assert any(toleration.get("key") == "gpu" for toleration in spec["tolerations"])
