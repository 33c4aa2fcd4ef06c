"""The planner of TrainingRun: what follows from every end of an attempt, and what never happens."""

from __future__ import annotations

from typing import Any

import pytest
from opensora_operator.constants import ExitCode
from opensora_operator.plans import FailPod, Key
from opensora_operator.wire import format_time
from operator_world import World


def restart_policy(**values: Any) -> dict[str, Any]:
    return {"restartPolicy": {"backoff": {"baseSeconds": 0}, **values}}


def last_attempt(world: World) -> dict[str, Any]:
    return dict(world.status["attempts"][-1])


def fail(world: World, code: int, *, pod: int = 0, **how: Any) -> None:
    """One pod ends with a code and the others lose their peer."""
    world.end_pod(f"demo-a{world.attempt}-{pod}", code, **how)
    world.settle(code=ExitCode.PEER_LOST)


# A run without trouble


def test_a_new_run_gets_its_objects_before_its_job_and_one_job_alone() -> None:
    world = World()
    kinds = [action.manifest["kind"] for action in world.plan().actions]  # type: ignore[union-attr]
    assert kinds == ["ConfigMap", "Service", "NetworkPolicy", "Job"]
    world.reconcile()
    assert list(world.jobs) == ["demo-a1"]
    assert world.phase == "Starting"


def test_a_run_whose_pods_all_succeed_is_complete() -> None:
    world = World().running()
    assert world.phase == "Running"
    for name in ("demo-a1-0", "demo-a1-1"):
        world.end_pod(name, 0)
    world.settle()
    assert world.phase == "Succeeded"
    assert world.condition("Complete")["reason"] == "AllRanksSucceeded"
    assert last_attempt(world)["exitCode"] == 0


def test_what_is_calm_is_not_written_again() -> None:
    world = World().running()
    writes = world.num_writes
    world.reconcile()
    world.reconcile()
    assert world.num_writes == writes


def test_a_report_is_shown_and_counts_as_progress_only() -> None:
    world = World().running()
    world.say(40, checkpoint_step=30, samples_step=20)
    first = world.plan()
    assert first.status is not None
    assert not first.is_progress_only, "the state of `Progressing` changes with the first report"
    world.reconcile()
    world.say(41, checkpoint_step=30, samples_step=20, sequence=2, state="Saving")
    assert world.plan().is_progress_only
    assert world.status["progress"]["percent"] == 40
    assert world.status["checkpoint"]["latestStep"] == 30
    assert world.status["samples"]["sheet"] == "s3://bucket/demo/samples/step-00000020/sheet.png"


def test_a_run_that_says_nothing_is_reported_as_silent() -> None:
    world = World().running()
    world.now += 91
    world.reconcile()
    assert world.condition("Progressing")["reason"] == "NoHeartbeat"


# How an attempt ends


@pytest.mark.parametrize(
    ("code", "cause", "budget"),
    [
        (ExitCode.FAILED, "WorkerFailed", "restarts"),
        (ExitCode.STALLED, "Hang", "restarts"),
        (ExitCode.OUT_OF_MEMORY, "OutOfMemory", "restarts"),
        (ExitCode.DIVERGED, "Diverged", "restarts"),
        (ExitCode.NODE_UNHEALTHY, "NodeFailure", "restarts"),
        (ExitCode.STOPPED, "Stopped", "disruptions"),
    ],
)
def test_an_exit_code_decides_what_an_attempt_counts_as(code: ExitCode, cause: str, budget: str) -> None:
    world = World().running()
    fail(world, code, rank=2, step=7, message="boom")
    record = world.status["attempts"][0]
    assert (record["cause"], record["exitCode"], record["rank"]) == (cause, code, 2)
    assert world.attempt == 2
    assert world.status[budget] == 1
    assert list(world.jobs) == ["demo-a1", "demo-a2"]


def test_ranks_that_stopped_have_saved_whether_they_could_report_it_or_not() -> None:
    world = World().running()
    world.say(7, checkpoint_step=5)
    fail(world, ExitCode.STOPPED, step=9)
    assert world.status["checkpoint"]["latestStep"] == 9
    assert world.status["checkpoint"]["uri"] == "s3://bucket/demo/checkpoints/step-00000009"
    assert last_attempt(world)["firstStep"] == 9


@pytest.mark.parametrize("code", [ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG, ExitCode.SUPERSEDED])
def test_what_would_end_the_same_way_is_not_tried_again(code: ExitCode) -> None:
    world = World().running()
    fail(world, code, message="train.lr: unknown key")
    assert world.phase == "Failed"
    assert world.condition("Failed")["reason"] == "NonRetryableExit"
    assert "train.lr: unknown key" in world.condition("Failed")["message"]
    assert list(world.jobs) == ["demo-a1"]


def test_the_rank_that_failed_is_named_although_its_peers_ended_first() -> None:
    world = World().running()
    world.end_pod("demo-a1-0", ExitCode.PEER_LOST, rank=0)
    world.run_job_controller()
    world.reconcile()
    assert world.attempt == 1, "while the other pod may still tell more, nothing is decided"
    world.now += 5
    world.end_pod("demo-a1-1", ExitCode.CONFIG, rank=3, message="no such bucket")
    world.settle()
    assert world.phase == "Failed"
    assert last_attempt(world)["rank"] == 3


def test_lost_peers_without_a_cause_are_a_failure_after_a_while() -> None:
    world = World().running()
    world.end_pod("demo-a1-0", ExitCode.PEER_LOST)
    world.run_job_controller()
    world.dead_nodes.add("node-1")
    world.now += 61
    world.settle()
    assert last_attempt(world)["cause"] == "PeerLost"


def test_the_cause_survives_the_pods() -> None:
    world = World().running()
    world.end_pod("demo-a1-0", ExitCode.OUT_OF_MEMORY)
    world.run_job_controller()
    world.pods.clear()
    world.settle()
    assert world.status["attempts"][0]["cause"] == "OutOfMemory"


def test_a_container_that_the_kernel_killed_as_a_whole_is_out_of_memory() -> None:
    world = World().running()
    fail(world, 137, has_verdict=False, reason="OOMKilled")
    assert world.status["attempts"][0]["cause"] == "OutOfMemory"


def test_an_evicted_pod_is_a_disruption_whatever_its_exit_code() -> None:
    world = World().running()
    world.end_pod("demo-a1-1", 143, disruption="EvictionByEvictionAPI", has_verdict=False)
    world.settle(code=ExitCode.PEER_LOST)
    assert world.status["attempts"][0]["cause"] == "Disrupted"
    assert (world.status["restarts"], world.status["disruptions"]) == (0, 1)


def test_a_run_whose_job_was_deleted_goes_on() -> None:
    world = World().running()
    world.delete_job("demo-a1")
    world.settle()
    assert world.status["attempts"][0]["cause"] == "JobDeleted"
    assert list(world.jobs) == ["demo-a2"]


def test_no_pod_starts_while_one_of_the_last_attempt_still_ends() -> None:
    world = World().running()
    world.end_pod("demo-a1-0", ExitCode.FAILED, message="x")
    world.run_job_controller()
    world.reconcile()
    assert world.attempt == 2
    assert "demo-a2" not in world.jobs
    assert world.condition("Restarting")["reason"] == "DrainingPods"
    world.let_pods_end()
    world.reconcile()
    assert "demo-a2" in world.jobs


# Budgets


def test_failures_without_end_end_the_run() -> None:
    world = World(**restart_policy(maxRestarts=2, noProgressAttempts=50))
    for _ in range(3):
        world.running()
        fail(world, ExitCode.FAILED)
    assert world.condition("Failed")["reason"] == "RestartBudgetExceeded"
    assert world.status["restarts"] == 2


def test_failures_are_forgiven_after_healthy_steps() -> None:
    world = World(**restart_policy(maxRestarts=1, healthySteps=10, noProgressAttempts=50))
    for attempt in range(1, 6):
        world.running()
        world.say(attempt * 20, checkpoint_step=attempt * 20)
        world.reconcile()
        fail(world, ExitCode.FAILED, step=attempt * 20)
    assert world.phase == "Restarting"
    assert (world.status["restarts"], world.status["recentRestarts"]) == (5, 1)


def test_attempts_that_save_nothing_new_end_the_run_early() -> None:
    world = World(**restart_policy(maxRestarts=100, noProgressAttempts=3))
    for _ in range(3):
        world.running()
        world.say(5, checkpoint_step=None)
        fail(world, ExitCode.FAILED, step=5)
    assert world.condition("Failed")["reason"] == "NoProgress"


def test_disruptions_have_a_budget_of_their_own() -> None:
    world = World(**restart_policy(maxRestarts=0, maxDisruptions=2))
    for _ in range(3):
        world.running()
        world.end_pod(f"demo-a{world.attempt}-0", 143, disruption="EvictionByEvictionAPI", has_verdict=False)
        world.settle(code=ExitCode.PEER_LOST)
    assert world.condition("Failed")["reason"] == "DisruptionBudgetExceeded"


def test_the_pause_doubles_and_has_an_end() -> None:
    policy = {"maxRestarts": 10, "noProgressAttempts": 50, "backoff": {"baseSeconds": 10, "maxSeconds": 30}}
    world = World(restartPolicy=policy)
    pauses = []
    for _ in range(4):
        world.running()
        fail(world, ExitCode.FAILED)
        until = world.status["backoffUntil"]
        assert world.condition("Restarting")["reason"] == "BackingOff"
        pause = 0
        while format_time(world.now + pause) < until:
            pause += 1
        pauses.append(pause)
        world.now += pause - 1
        world.reconcile()
        assert f"demo-a{world.attempt}" not in world.jobs
        world.now += 1.5
    assert pauses == [10, 20, 30, 30]


def test_a_run_that_diverges_twice_at_the_same_step_is_over() -> None:
    world = World(**restart_policy(noProgressAttempts=50))
    world.running()
    fail(world, ExitCode.DIVERGED, step=77)
    assert world.attempt == 2
    world.running()
    fail(world, ExitCode.DIVERGED, step=77)
    assert world.condition("Failed")["reason"] == "NonRetryableExit"
    assert "diverged twice at step 77" in world.condition("Failed")["message"]


# Nodes


def test_a_node_that_a_rank_accuses_is_avoided_at_once() -> None:
    world = World().running()
    fail(world, ExitCode.NODE_UNHEALTHY, pod=1, rank=2)
    assert world.status["avoidNodes"] == ["node-1"]
    affinity = world.job(2)["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["node-1"]}]
    assert "NodeAvoided" in world.events


def test_a_node_on_which_ranks_fail_first_twice_is_avoided() -> None:
    world = World(**restart_policy(noProgressAttempts=50))
    for _ in range(2):
        world.running()
        fail(world, ExitCode.FAILED, pod=1, rank=2)
    assert world.status["avoidNodes"] == ["node-1"]


def test_a_pod_on_a_dead_node_is_ended_for_the_job_and_then_removed() -> None:
    world = World().running()
    world.dead_nodes.add("node-1")
    world._ask_to_end(world.pods["demo-a1-1"])
    asked = world.now
    world.reconcile()
    assert "demo-a1-1" in world.pods
    world.now = asked + 119
    assert not world.plan().actions
    world.now = asked + 121
    assert [type(action) for action in world.plan().actions] == [FailPod]
    world.reconcile()
    assert "PodForced" in world.events
    world.settle()
    assert "demo-a1-1" not in world.pods


def test_a_lost_node_is_the_cause_also_when_all_pods_were_on_it() -> None:
    world = World().running()
    for pod in world.pods.values():
        world.dead_nodes.add(pod["spec"]["nodeName"])
        world._ask_to_end(pod)
    world.now += 121
    world.settle()
    assert (world.attempt, world.status["attempts"][0]["cause"]) == (2, "NodeFailure")
    assert not [name for name in world.pods if name.startswith("demo-a1-")]


def test_a_pod_that_takes_long_on_a_node_that_answers_is_left_alone() -> None:
    world = World().running()
    world._ask_to_end(world.pods["demo-a1-1"])
    world.now += 10_000
    assert not any(isinstance(action, FailPod) for action in world.plan().actions)


def test_a_run_that_finds_no_place_goes_on_with_fewer_nodes() -> None:
    world = World(elastic={"allowedNodes": [2, 1]})
    world.reconcile()
    world.start_pods(ready=False)
    world.now += 1801
    world.settle()
    assert world.status["attempts"][0]["cause"] == "NotStarted"
    assert list(world.jobs) == ["demo-a2"], "what has not started must not start later"
    assert world.job(2)["spec"]["completions"] == 1
    assert "ScaledDown" in world.events
    env = {item["name"]: item.get("value") for item in world.job(2)["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["OPENSORA_NNODES"] == "1"


def test_a_run_that_never_starts_fails_and_says_what_it_waited_for() -> None:
    world = World()
    world.reconcile()
    world.start_pods(ready=False)
    pod = world.pods["demo-a1-0"]
    waiting = {"reason": "ImagePullBackOff", "message": "not found"}
    pod["status"]["containerStatuses"][0]["state"] = {"waiting": waiting}
    world.reconcile()
    assert world.condition("Running")["reason"] == "PullingImages"
    world.now += 1801
    world.settle()
    assert world.condition("Failed")["reason"] == "ImagePullFailed"
    assert "not found" in world.condition("Failed")["message"]
    assert not any(pod["status"]["phase"] == "Running" for pod in world.pods.values())


# What people ask for


@pytest.mark.parametrize("job_fails", [True, False])
def test_suspending_and_resuming_continues_with_a_new_attempt_that_counts_as_nothing(job_fails: bool) -> None:
    world = World()
    world.suspended_jobs_fail = job_fails
    world.running()
    world.edit(suspend=True)
    world.settle()
    assert world.phase == "Suspended"
    assert world.job(1)["spec"]["suspend"]
    assert list(world.jobs) == ["demo-a1"]
    world.edit(suspend=False)
    world.settle()
    assert list(world.jobs) == ["demo-a1", "demo-a2"]
    assert (world.status["restarts"], world.status["disruptions"]) == (0, 0)
    assert world.status["attempts"][0]["cause"] == "Suspended"


def test_a_run_that_is_suspended_before_its_pods_exist_keeps_its_attempt() -> None:
    world = World(suspend=True)
    world.settle()
    assert (world.phase, world.jobs) == ("Suspended", {})
    world.edit(suspend=False)
    world.settle()
    world.edit(suspend=True)
    world.settle()
    world.edit(suspend=False)
    world.settle()
    assert list(world.jobs) == ["demo-a1"]
    assert not world.job(1)["spec"]["suspend"]


def test_a_suspended_run_that_is_scaled_resumes_with_the_new_size() -> None:
    world = World().running()
    world.edit(suspend=True)
    world.settle()
    world.edit(nodes=1)
    world.settle()
    assert world.phase == "Suspended"
    world.edit(suspend=False)
    world.settle()
    assert world.job(world.attempt)["spec"]["completions"] == 1


def test_another_number_of_nodes_is_a_new_attempt_that_counts_as_nothing() -> None:
    world = World(elastic={"allowedNodes": [2, 1]}).running()
    world.edit(nodes=1)
    world.settle()
    assert world.status["attempts"][0]["cause"] == "Resized"
    assert world.job(2)["spec"]["completions"] == 1
    assert world.status["restarts"] == 0


def test_stopping_lets_the_ranks_save_and_ends_the_run_for_good() -> None:
    world = World().running()
    world.edit(requests={"stop": True})
    world.settle()
    assert world.phase == "Failed"
    assert world.condition("Failed")["reason"] == "Cancelled"
    assert world.job(1)["spec"]["suspend"]
    world.edit(requests={})
    world.settle()
    assert world.phase == "Failed"
    assert list(world.jobs) == ["demo-a1"]


def test_a_restart_is_done_once_per_id_and_avoids_the_node() -> None:
    world = World().running()
    world.edit(requests={"restart": {"id": "one", "excludeNode": "node-1"}})
    world.settle()
    assert world.status["requests"]["restart"] == "one"
    assert world.status["avoidNodes"] == ["node-1"]
    assert list(world.jobs) == ["demo-a1", "demo-a2"]
    world.running()
    world.settle()
    assert list(world.jobs) == ["demo-a1", "demo-a2"]


def test_a_restart_does_not_wait_for_the_back_off() -> None:
    world = World(restartPolicy={"backoff": {"baseSeconds": 300}}).running()
    fail(world, ExitCode.FAILED)
    assert world.condition("Restarting")["reason"] == "BackingOff"
    world.edit(requests={"restart": {"id": "now"}})
    world.settle()
    assert "demo-a2" in world.jobs


# Queues


def test_with_a_queue_the_job_is_made_suspended_and_left_to_the_queue() -> None:
    world = World(scheduling={"queue": "team-a", "priorityClassName": "high"})
    world.settle()
    job = world.job(1)
    assert job["spec"]["suspend"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert world.phase == "Queued"
    assert world.condition("Scheduled")["reason"] == "WaitingForQuota"
    world.suspend_job("demo-a1", False)
    world.running()
    assert world.phase == "Running"


@pytest.mark.parametrize("job_fails", [True, False])
def test_a_run_that_loses_its_place_in_the_queue_waits_again_and_counts_no_failure(job_fails: bool) -> None:
    world = World(scheduling={"queue": "team-a"})
    world.suspended_jobs_fail = job_fails
    world.settle()
    world.suspend_job("demo-a1", False)
    world.running()
    world.suspend_job("demo-a1", True)
    world.settle()
    assert world.status["attempts"][0]["cause"] == "Queued"
    assert world.job(2)["spec"]["suspend"]
    assert job_fails or "demo-a1" not in world.jobs, "the queue must not start it again"
    assert world.phase == "Queued"
    assert (world.status["restarts"], world.status["disruptions"]) == (0, 0)


def test_a_queued_run_that_is_suspended_gives_up_its_place() -> None:
    world = World(scheduling={"queue": "team-a"})
    world.settle()
    world.suspend_job("demo-a1", False)
    world.running()
    world.edit(suspend=True)
    world.settle()
    assert world.phase == "Suspended"
    assert world.jobs == {}
    world.edit(suspend=False)
    world.settle()
    assert world.phase == "Queued"
    assert list(world.jobs) == ["demo-a2"]


# What is wrong from the start


def test_a_missing_profile_is_told_and_waited_for() -> None:
    world = World(profileRef={"kind": "ClusterTrainingProfile", "name": "h200"})
    world.settle()
    assert world.condition("Accepted")["reason"] == "ProfileNotFound"
    assert world.phase == "Pending"
    assert world.plan().requeue_seconds is not None
    world.profiles[Key("ClusterTrainingProfile", "", "h200")] = {
        "kind": "ClusterTrainingProfile",
        "metadata": {"name": "h200", "generation": 3},
        "spec": {"accelerator": {"count": 8}},
    }
    world.settle()
    assert world.status["resolved"]["profile"] == {"kind": "ClusterTrainingProfile", "name": "h200"}
    container = world.job(1)["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}


def test_an_edited_profile_does_not_change_a_run_that_has_begun() -> None:
    world = World()
    world.default_profile = {
        "kind": "TrainingProfile",
        "metadata": {"name": "p", "generation": 1},
        "spec": {"podTemplate": {"nodeSelector": {"pool": "old"}}},
    }
    world.running()
    world.default_profile["spec"] = {"podTemplate": {"nodeSelector": {"pool": "new"}}}
    fail(world, ExitCode.FAILED)
    assert world.job(2)["spec"]["template"]["spec"]["nodeSelector"] == {"pool": "old"}


def test_a_missing_key_of_a_config_map_is_named() -> None:
    world = World(config={"ref": {"configMap": "mine", "key": "config.yaml"}})
    world.settle()
    assert "there is no ConfigMap mine" in world.condition("Accepted")["message"]
    world.user_config_maps["mine"] = {"other.yaml": ""}
    world.settle()
    assert "there is no key config.yaml in ConfigMap mine" in world.condition("Accepted")["message"]
    world.user_config_maps["mine"] = {"config.yaml": "seed: 1\n"}
    world.settle()
    assert world.others["ConfigMap", world.status["resolved"]["configMap"]]["data"]["config.yaml"] == "seed: 1\n"


def test_an_object_of_somebody_else_under_our_name_is_left_alone_and_named() -> None:
    world = World()
    world.others["Service", "demo"] = {"metadata": {"uid": "theirs"}, "data": {}}
    world.reconcile()
    assert world.jobs == {}
    assert world.condition("Accepted")["reason"] == "NameConflict"
    assert "Service demo" in world.condition("Accepted")["message"]


def test_what_the_api_server_refuses_is_told_in_its_words() -> None:
    world = World()
    world.rejected["demo-a1"] = "exceeded quota: pods"
    world.settle()
    assert world.condition("Accepted")["reason"] == "Rejected"
    assert "exceeded quota: pods" in world.condition("Accepted")["message"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"image": None}, "spec.image is missing"),
        ({"parallelism": {"tensor": 2}}, "spec.parallelism.tensor = 2"),
        ({"sampling": {"maxPerStep": 2}}, "spec.sampling.maxPerStep needs spec.sampling.promptsRef"),
        ({"parallelism": {"sequence": 3}}, "do not divide by parallelism.sequence = 3"),
        ({"nodes": "two"}, "nodes: expected a whole number"),
    ],
)
def test_a_spec_that_cannot_be_used_is_told_which_field(spec: dict[str, Any], message: str) -> None:
    world = World(**spec)
    world.reconcile()
    assert world.jobs == {}
    assert world.condition("Accepted")["reason"] == "InvalidSpec"
    assert message in world.condition("Accepted")["message"]


def test_a_run_that_another_controller_manages_is_left_alone() -> None:
    world = World(managedBy="kueue.x-k8s.io/multikueue")
    world.reconcile()
    assert (world.jobs, world.status) == ({}, {})


# The end


def test_a_finished_run_is_removed_after_its_time_and_not_before() -> None:
    world = World(cleanup={"ttlSecondsAfterFinished": 100}).running()
    for name in ("demo-a1-0", "demo-a1-1"):
        world.end_pod(name, 0)
    world.settle()
    world.now += 99
    world.reconcile()
    assert not world.was_deleted
    world.now += 2
    world.reconcile()
    assert world.was_deleted


def test_jobs_beyond_the_history_are_removed() -> None:
    world = World(cleanup={"attemptHistoryLimit": 1}, **restart_policy(noProgressAttempts=50))
    for _ in range(4):
        world.running()
        fail(world, ExitCode.FAILED)
    assert sorted(world.jobs) == ["demo-a4", "demo-a5"]


def test_a_deadline_counts_all_attempts_together() -> None:
    world = World(deadlines={"activeSeconds": 100}).running()
    world.now += 60
    fail(world, ExitCode.FAILED)
    world.running()
    world.now += 39
    world.reconcile()
    assert world.phase == "Running"
    world.now += 2
    world.settle()
    assert world.condition("Failed")["reason"] == "DeadlineExceeded"


def test_a_status_that_was_lost_is_found_again_from_the_jobs() -> None:
    world = World(**restart_policy(noProgressAttempts=50))
    world.running()
    fail(world, ExitCode.FAILED)
    world.running()
    world.run["status"] = {}
    world.settle()
    assert world.attempt == 2
    assert sorted(world.jobs) == ["demo-a1", "demo-a2"]


def test_shell_characters_and_names_of_variables_stay_what_they_are() -> None:
    """There is no shell; and the kubelet, which puts a variable's value for `$(NAME)`, reads `$$` as a dollar."""
    nasty = "a=$(AWS_SECRET_ACCESS_KEY); $$ `id` && \"'|\\"
    world = World(config={"inline": "x: 1", "overrides": [nasty]}, runUri="s3://bucket/a b;c$(HOME)")
    world.reconcile()
    container = world.job(1)["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][-1] == "a=$$(AWS_SECRET_ACCESS_KEY); $$$$ `id` && \"'|\\"
    assert "run_uri=s3://bucket/a b;c$$(HOME)" in container["args"]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert env["OPENSORA_RUN_URI"] == "s3://bucket/a b;c$$(HOME)"
    assert container["command"] == ["python", "-m", "opensora.launch"]


def test_a_job_that_somebody_suspends_by_hand_is_followed_by_the_next_attempt() -> None:
    world = World()
    world.suspended_jobs_fail = False
    world.running()
    world.suspend_job("demo-a1", True)
    world.settle()
    assert world.job(1)["spec"]["suspend"]
    assert not world.job(2)["spec"]["suspend"]
    assert (world.status["restarts"], world.status["disruptions"]) == (0, 0)
