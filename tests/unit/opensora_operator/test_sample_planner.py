"""The planner of SampleJob: which weights, which shards, what is told, and what never happens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jobs_world import CrashError, JobsWorld, has_ended, is_live
from opensora_operator import sample_planner
from opensora_operator.plans import Create, Delete, Key, Object, SetSuspend
from opensora_operator.sample_planner import parse_indexes

RUN = Key("TrainingRun", "team", "demo")


def training_run(*, phase: str = "Running", step: int | None = 200, **spec: Any) -> Object:
    return {
        "kind": "TrainingRun",
        "metadata": {"name": "demo", "namespace": "team", "uid": "run-uid"},
        "spec": {
            "runUri": "s3://bucket/demo",
            "config": {"inline": "train: {steps: 1}"},
            "image": "example.com/opensora:1",
            "storage": {"endpoint": "http://store:8333", "secretRef": {"name": "store"}},
            **spec,
        },
        "status": {"phase": phase, "checkpoint": {} if step is None else {"latestStep": step}},
    }


def world(*, run: Object | None = None, num_prompts: int = 5, **spec: Any) -> JobsWorld:
    made = JobsWorld(
        sample_planner,
        name="s",
        **{
            "checkpoint": {"runRef": {"name": "demo"}},
            "prompts": {"inline": [f"cat {number}" for number in range(num_prompts)]},
            "promptsPerShard": 2,
            "workers": 2,
            "outputUri": "s3://bucket/clips",
            **spec,
        },
    )
    made.objects[RUN] = training_run() if run is None else run
    return made


def job_of(made: JobsWorld) -> Object:
    return made.jobs["s-sample"]


def arguments(made: JobsWorld) -> list[str]:
    return list(job_of(made)["spec"]["template"]["spec"]["containers"][0]["args"])


def environment(made: JobsWorld) -> dict[str, str]:
    env = job_of(made)["spec"]["template"]["spec"]["containers"][0]["env"]
    return {item["name"]: item.get("value", "") for item in env}


def finish(made: JobsWorld, code: int = 0, **how: Any) -> None:
    """Every pod ends with the code, until no new one comes."""
    for _ in range(20):
        if not made.start_pods() and not made.live_pods():
            break
        made.reconcile()
        for name in made.live_pods():
            made.end_pod(name, code, **how)
        made.run_job_controller()
    made.settle()


# What is made


def test_prompts_become_shards_of_one_indexed_job() -> None:
    made = world()
    made.reconcile()
    job = job_of(made)
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 2)
    assert job["spec"]["completionMode"] == "Indexed"
    assert environment(made)["OPENSORA_NUM_SHARDS"] == "3"
    name = job["metadata"]["annotations"]["opensora.dev/config"]
    assert made.others[("ConfigMap", name)]["data"]["prompts.txt"] == "cat 0\ncat 1\ncat 2\ncat 3\ncat 4\n"
    assert made.phase == "Pending"
    assert made.events == ["AttemptStarted"]


def test_a_shard_is_retried_alone_and_final_codes_are_not() -> None:
    made = world(retriesPerShard=4)
    made.reconcile()
    spec = job_of(made)["spec"]
    assert spec["backoffLimitPerIndex"] == 4
    assert spec["maxFailedIndexes"] == 3
    rules = spec["podFailurePolicy"]["rules"]
    assert rules[0]["action"] == "FailIndex"
    assert rules[0]["onExitCodes"]["values"] == [64, 65, 78]
    assert [rule["action"] for rule in rules[1:]] == ["Ignore", "Ignore"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_the_command_line_says_what_the_spec_says() -> None:
    made = world(
        seed=7, numSamples=2, numFrames=51, imageSize=[240, 426], fps=12, samplingSteps=30, guidance=7.0,
        config={"overrides": ["align=5"]},
    )  # fmt: skip
    made.reconcile()
    assert arguments(made) == [
        "opensora.sample", 'run="s3://bucket/demo"', "step=200", 'prompt_path="/etc/opensora/run/prompts.txt"',
        'save_dir="s3://bucket/clips"', "seed=7", "num_sample=2", "num_frames=51", "image_size=[240, 426]", "fps=12",
        "num_sampling_steps=30", "cfg_scale=7.0", "align=5",
    ]  # fmt: skip


def test_image_and_store_are_those_of_the_run_unless_given() -> None:
    made = world()
    made.reconcile()
    container = job_of(made)["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "example.com/opensora:1"
    assert container["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert environment(made)["AWS_ENDPOINT_URL"] == "http://store:8333"
    own = world(image="example.com/other:2", storage={"endpoint": "http://elsewhere"})
    own.reconcile()
    container = job_of(own)["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "example.com/other:2"
    assert environment(own)["AWS_ENDPOINT_URL"] == "http://elsewhere"
    assert container["envFrom"] == [{"secretRef": {"name": "store"}}]


def test_the_profile_of_the_run_holds_for_its_samples() -> None:
    run = training_run()
    run["status"]["resolved"] = {"profile": {"kind": "ClusterTrainingProfile", "name": "gpu"}}
    made = world(run=run)
    made.objects[Key("ClusterTrainingProfile", "", "gpu")] = {
        "kind": "ClusterTrainingProfile",
        "metadata": {"name": "gpu"},
        "spec": {"accelerator": {"count": 4}, "podTemplate": {"nodeSelector": {"gpu": "yes"}}},
    }
    made.reconcile()
    assert job_of(made)["spec"]["template"]["spec"]["nodeSelector"] == {"gpu": "yes"}
    assert environment(made)["OPENSORA_NPROC_PER_NODE"] == "4"


def test_a_queue_gets_its_label_and_a_suspended_job() -> None:
    made = world(scheduling={"queue": "team-a"})
    made.reconcile()
    job = job_of(made)
    assert job["spec"]["suspend"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert made.phase == "Queued"
    made.suspend_job("s-sample", False)
    made.start_pods()
    made.reconcile()
    assert made.phase == "Running"


# Which weights


def test_the_newest_checkpoint_is_chosen_once() -> None:
    made = world()
    made.reconcile()
    assert made.status["checkpoint"] == {"step": 200, "uri": "s3://bucket/demo"}
    made.objects[RUN] = training_run(step=400)
    made.settle()
    assert made.status["checkpoint"]["step"] == 200
    assert "step=200" in arguments(made)


@pytest.mark.parametrize(
    ("step", "saved", "waits"), [("latest", None, True), (300, 200, True), (200, 200, False), (100, 200, False)]
)
def test_a_run_that_goes_on_is_waited_for(step: int | str, saved: int | None, waits: bool) -> None:
    made = world(run=training_run(step=saved), checkpoint={"runRef": {"name": "demo", "step": step}})
    made.reconcile()
    if not waits:
        assert made.status["checkpoint"]["step"] == step
        return
    assert made.phase == "Waiting"
    assert made.condition("Scheduled")["reason"] == "WaitingForCheckpoint"
    assert "run demo is Running" in made.condition("Scheduled")["message"]
    assert not made.jobs
    made.objects[RUN] = training_run(step=300)
    made.reconcile()
    assert made.status["checkpoint"]["step"] == 300
    assert made.jobs
    assert made.phase == "Pending"


@pytest.mark.parametrize(("step", "saved"), [("latest", None), (300, 200)])
@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_checkpoint_that_will_never_come_is_a_failure(step: int | str, saved: int | None, phase: str) -> None:
    made = world(run=training_run(phase=phase, step=saved), checkpoint={"runRef": {"name": "demo", "step": step}})
    made.reconcile()
    assert made.phase == "Failed"
    assert made.condition("Failed")["reason"] == "CheckpointNotFound"
    assert not made.jobs


def test_a_run_that_is_not_there_is_named_and_may_come() -> None:
    made = world()
    del made.objects[RUN]
    made.reconcile()
    assert made.phase == "Pending"
    assert made.condition("Accepted")["reason"] == "RunNotFound"
    assert "demo" in made.condition("Accepted")["message"]
    assert made.plan().requeue_seconds is not None
    made.objects[RUN] = training_run()
    made.reconcile()
    assert made.condition("Accepted")["status"] == "True"
    assert made.jobs


@pytest.mark.parametrize(
    ("uri", "config", "expected"),
    [
        ("s3://b/run", None, ['run="s3://b/run"']),
        ("s3://b/run/checkpoints/step-00000400", None, ['run="s3://b/run"', "step=400"]),
        ("s3://b/run/checkpoints/step-00000400/attempt-3/", None, ['run="s3://b/run"', "step=400"]),
        ("s3://b/w.safetensors", "/etc/opensora/run/config.yaml", ['ckpt_path="s3://b/w.safetensors"']),
    ],
)
def test_a_uri_is_a_run_or_a_checkpoint_or_beside_a_config_weights(
    uri: str, config: str | None, expected: list[str]
) -> None:
    given = {} if config is None else {"config": {"inline": "model: {type: STDiT3}"}}
    made = world(checkpoint={"uri": uri}, image="example.com/opensora:1", **given)
    del made.objects[RUN]
    made.reconcile()
    found = arguments(made)
    assert found[1 : 1 + len(expected) + (config is not None)] == ([config] if config else []) + expected


# What is told


def test_shards_are_counted_and_listed_as_they_end() -> None:
    made = world()
    made.reconcile()
    first, second = made.start_pods()
    made.reconcile()
    assert made.phase == "Running"
    assert made.status["shards"] == {"total": 3, "active": 2, "done": 0, "failed": 0, "summary": "0/3"}
    made.end_pod(first, 0)
    made.run_job_controller()
    plan = made.plan()
    assert plan.is_progress_only
    made.reconcile()
    assert made.status["shards"]["summary"] == "1/3"
    assert made.status["outputs"] == [
        {"index": 0, "state": "Done", "uri": "s3://bucket/clips", "clips": 2, "message": ""}
    ]
    assert second in made.live_pods()


def test_all_shards_done_is_success_with_the_sheet() -> None:
    made = world()
    made.reconcile()
    finish(made)
    assert made.phase == "Succeeded"
    assert made.condition("Complete")["reason"] == "AllShardsSucceeded"
    assert made.status["sheet"] == "s3://bucket/clips/sheet.png"
    assert [output["clips"] for output in made.status["outputs"]] == [2, 2, 1]
    assert made.status["shards"]["summary"] == "3/3"


@pytest.mark.parametrize(
    ("config", "sheet"),
    [
        ({"overrides": ["sheet=false"]}, None),
        ({"inline": "sheet: false"}, None),
        ({"overrides": ["sample_name=x"]}, "s3://bucket/clips/x_sheet.png"),
        ({"inline": "sample_name: y"}, "s3://bucket/clips/y_sheet.png"),
    ],
)
def test_the_sheet_is_where_the_settings_put_it(config: Object, sheet: str | None) -> None:
    made = world(config=config)
    made.reconcile()
    finish(made)
    assert made.status.get("sheet") == sheet


def test_a_shard_that_fails_for_good_lets_the_others_go_on_and_is_named() -> None:
    made = world()
    made.reconcile()
    first, *_ = made.start_pods()
    verdict = {"code": 65, "message": "rank 0 failed first: bad data (65): cat.png is missing"}
    made.end_pod(first, 65, message=verdict)
    made.run_job_controller()
    made.reconcile()
    assert made.phase == "Running"
    assert made.status["outputs"][0]["exitCode"] == 65
    finish(made)
    assert made.phase == "Failed"
    failed = made.condition("Failed")
    assert failed["reason"] == "ShardsFailed"
    assert "shards 0 of 3" in failed["message"]
    assert "cat.png is missing" in failed["message"]
    assert [output["state"] for output in made.status["outputs"]] == ["Failed", "Done", "Done"]
    assert "sheet" not in made.status


def test_the_words_of_a_failure_outlive_its_pod() -> None:
    made = world(retriesPerShard=0)
    made.reconcile()
    first, *_ = made.start_pods()
    made.end_pod(first, 1, message="Traceback: boom")
    made.run_job_controller()
    made.reconcile()
    del made.pods[first]
    made.reconcile()
    assert "boom" in made.status["outputs"][0]["message"]


def test_an_eviction_or_a_stop_costs_no_retry() -> None:
    made = world(retriesPerShard=0)
    made.reconcile()
    first, second = made.start_pods()
    made.end_pod(first, 143, disruption="EvictionByEvictionAPI", message=None)
    made.end_pod(second, 75, message=None)
    made.run_job_controller()
    finish(made)
    assert made.phase == "Succeeded"


def test_what_is_calm_is_not_written_again() -> None:
    made = world()
    made.reconcile()
    made.start_pods()
    made.reconcile()
    writes = made.num_writes
    made.reconcile()
    made.reconcile()
    assert made.num_writes == writes


def test_more_shards_than_status_has_room_for_lists_the_failed_ones_first() -> None:
    made = world(num_prompts=600, promptsPerShard=1)
    made.reconcile()
    job = job_of(made)
    job["status"] |= {"completedIndexes": "0-589", "failedIndexes": "590-599"}
    made.reconcile()
    outputs = made.status["outputs"]
    assert len(outputs) == 512
    assert [output["index"] for output in outputs if output["state"] == "Failed"] == list(range(590, 600))
    assert made.status["shards"]["summary"] == "590/600"


@pytest.mark.parametrize(("text", "expected"), [("", set()), ("0", {0}), ("1,3-5,9", {1, 3, 4, 5, 9})])
def test_sets_of_indexes_are_read_as_kubernetes_writes_them(text: str, expected: set[int]) -> None:
    assert parse_indexes(text) == expected


# What stands in the way


@pytest.mark.parametrize(
    ("spec", "reason", "words"),
    [
        ({"prompts": {"ref": {"configMap": "p", "key": "prompts.txt"}}}, "ConfigMissing", "no ConfigMap p"),
        ({"config": {"ref": {"configMap": "c", "key": "x"}}}, "ConfigMissing", "spec.config.ref"),
        ({"prompts": {"inline": [" ", "  "]}}, "InvalidSpec", "spec.prompts"),
        ({"profileRef": {"name": "none"}}, "ProfileNotFound", "none"),
    ],
)
def test_what_is_missing_is_named_and_looked_for_again(spec: Object, reason: str, words: str) -> None:
    made = world(**spec)
    made.reconcile()
    assert made.condition("Accepted")["reason"] == reason
    assert words in made.condition("Accepted")["message"]
    assert not made.jobs
    assert made.plan().requeue_seconds is not None


def test_prompts_of_a_config_map_are_read_once() -> None:
    made = world(prompts={"ref": {"configMap": "p", "key": "prompts.txt"}})
    made.user_config_maps["p"] = {"prompts.txt": "a\n\nb\n c \n"}
    made.reconcile()
    assert job_of(made)["spec"]["completions"] == 2
    made.user_config_maps["p"] = {"prompts.txt": "other"}
    made.delete_job("s-sample")
    made.settle()
    assert job_of(made)["spec"]["completions"] == 2


def test_a_job_of_that_name_that_is_not_ours_is_left_alone() -> None:
    made = world()
    made.others[("Job", "s-sample")] = {"metadata": {"name": "s-sample", "uid": "x", "ownerReferences": []}}
    made.reconcile()
    assert made.condition("Accepted")["reason"] == "NameConflict"
    assert "s-sample" in made.condition("Accepted")["message"]
    assert not made.jobs


def test_what_the_api_server_refuses_is_told() -> None:
    made = world()
    made.rejected["s-sample"] = "exceeded quota: pods"
    made.reconcile()
    assert made.condition("Accepted")["reason"] == "Rejected"
    assert "exceeded quota" in made.condition("Accepted")["message"]


def test_an_image_that_cannot_be_pulled_is_told() -> None:
    made = world()
    made.reconcile()
    name, *_ = made.start_pods(ready=False)
    state = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    made.pods[name]["status"]["containerStatuses"][0]["state"] = state
    made.reconcile()
    assert made.condition("Running")["reason"] == "PullingImages"
    assert "not found" in made.condition("Running")["message"]


# Suspending, ending, cleaning up


def test_suspending_and_resuming_is_a_patch_without_a_queue() -> None:
    made = world()
    made.reconcile()
    made.start_pods()
    made.edit(suspend=True)
    assert [type(action) for action in made.plan().actions] == [SetSuspend]
    made.settle()
    assert made.phase == "Suspended"
    assert not made.live_pods()
    made.edit(suspend=False)
    made.settle()
    finish(made)
    assert made.phase == "Succeeded"


def test_suspending_with_a_queue_gives_the_job_up_and_resuming_makes_it_anew() -> None:
    made = world(scheduling={"queue": "team-a"})
    made.reconcile()
    made.suspend_job("s-sample", False)
    made.start_pods()
    made.reconcile()
    made.edit(suspend=True)
    assert [type(action) for action in made.plan().actions] == [Delete]
    made.settle()
    assert not made.jobs
    assert made.phase == "Suspended"
    made.edit(suspend=False)
    made.settle()
    assert job_of(made)["spec"]["suspend"]


def test_nothing_is_made_for_an_object_that_is_suspended_from_the_start() -> None:
    made = world(suspend=True)
    made.settle()
    assert made.phase == "Suspended"
    assert not made.jobs


def test_a_deleted_job_is_made_anew_once_its_pods_are_gone() -> None:
    made = world()
    made.reconcile()
    made.start_pods()
    made.delete_job("s-sample")
    made.reconcile()
    assert not [action for action in made.plan().actions if isinstance(action, Create)]
    made.settle()
    assert "deletionTimestamp" not in job_of(made)["metadata"]


def test_a_deadline_ends_the_job() -> None:
    made = world(activeDeadlineSeconds=600)
    made.reconcile()
    made.start_pods()
    made.reconcile()
    requeue = made.plan().requeue_seconds
    assert requeue is not None
    assert requeue <= 601
    made.now += 601
    made.settle()
    assert made.condition("Failed")["reason"] == "DeadlineExceeded"
    assert not made.live_pods()


def test_the_time_to_live_begins_at_the_end() -> None:
    made = world(cleanup={"ttlSecondsAfterFinished": 100})
    made.reconcile()
    finish(made)
    requeue = made.plan().requeue_seconds
    assert requeue is not None
    assert 99 <= requeue <= 102
    made.now += 101
    made.reconcile()
    assert made.was_deleted


def test_a_pod_on_a_dead_node_is_removed_by_force_after_its_time() -> None:
    made = world()
    made.reconcile()
    name, *_ = made.start_pods()
    made.dead_nodes.add("node-0")
    made._ask_to_end(made.pods[name])
    made.reconcile()
    assert name in made.live_pods()
    made.now += 200
    made.reconcile()
    assert name not in made.pods
    assert "PodForced" in made.events


def test_a_spec_that_cannot_be_read_is_told_once() -> None:
    made = world(workers="many")
    made.reconcile()
    assert made.condition("Accepted")["reason"] == "InvalidSpec"
    assert "workers" in made.condition("Accepted")["message"]
    assert made.plan().status is None


def test_words_of_users_stay_single_arguments() -> None:
    made = world(outputUri="/data/$(rm -rf x); 'a' \"b\"", prompts={"inline": ["$(x) `y` ; #", '{"a": 1}']})
    made.reconcile()
    container = job_of(made)["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "opensora.launch"]
    save_dir = next(item for item in container["args"] if item.startswith("save_dir="))
    assert json.loads(save_dir.partition("=")[2].replace("$$", "$")) == "/data/$(rm -rf x); 'a' \"b\""


# Whatever happens


class Machine(RuleBasedStateMachine):
    """Random pods, users, queues, crashes. `JobsWorld` itself refuses a second Job of the name."""

    def __init__(self) -> None:
        super().__init__()
        self.verdict: str | None = None
        self.step: int | None = None
        self.is_calm = False

    @initialize(queue=st.booleans(), step=st.sampled_from([None, 100]), retries=st.integers(0, 1))
    def begin(self, queue: bool, step: int | None, retries: int) -> None:
        scheduling = {"queue": "q"} if queue else {}
        self.world = world(run=training_run(step=step), scheduling=scheduling, retriesPerShard=retries)
        self._reconcile()

    @rule()
    def operator_works(self) -> None:
        self._reconcile()

    @rule(writes=st.integers(0, 4))
    def operator_dies_after_some_writes(self, writes: int) -> None:
        self.world.writes_left = writes
        try:
            self.world.reconcile()
        except CrashError:
            pass
        finally:
            self.world.writes_left = None
        self.is_calm = False

    @rule(step=st.sampled_from([200, 300]), phase=st.sampled_from(["Running", "Running", "Succeeded", "Failed"]))
    def the_run_goes_on(self, step: int, phase: str) -> None:
        self._happens()
        self.world.objects[RUN] = training_run(step=step, phase=phase)

    @rule(ready=st.booleans())
    def cluster_starts_pods(self, ready: bool) -> None:
        self._happens()
        self.world.start_pods(ready=ready)

    @precondition(lambda self: hasattr(self, "world") and self.world.live_pods())
    @rule(data=st.data(), code=st.sampled_from([0, 0, 0, 1, 65, 75, 78, 86, 137, 143]), evicted=st.booleans())
    def a_pod_ends(self, data: st.DataObject, code: int, evicted: bool) -> None:
        self._happens()
        name = data.draw(st.sampled_from(self.world.live_pods()))
        self.world.end_pod(name, code, disruption="Eviction" if evicted and code else None)
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

    @rule()
    def somebody_deletes_the_job(self) -> None:
        if "s-sample" in self.world.jobs:
            self._happens()
            self.world.delete_job("s-sample")

    @rule(seconds=st.sampled_from([1.0, 130.0]))
    def time_passes(self, seconds: float) -> None:
        self._happens()
        self.world.now += seconds

    @invariant()
    def an_end_is_for_ever(self) -> None:
        if not hasattr(self, "world"):
            return
        if self.verdict is not None:
            assert self.world.phase == self.verdict
        elif self.world.phase in ("Succeeded", "Failed"):
            self.verdict = self.world.phase

    @invariant()
    def the_weights_are_chosen_once(self) -> None:
        if hasattr(self, "world"):
            step = self.world.status.get("checkpoint", {}).get("step")
            assert self.step in (None, step)
            self.step = step

    @invariant()
    def there_is_one_job_at_most(self) -> None:
        if hasattr(self, "world"):
            assert set(self.world.jobs) <= {"s-sample"}

    @invariant()
    def nothing_is_left_to_do_after_the_work_is_done(self) -> None:
        if self.is_calm:
            again = self.world.plan()
            assert (again.actions, again.status, again.is_decision) == ((), None, False)

    def teardown(self) -> None:
        """Left in peace, with a run that has saved and pods that succeed, it ends."""
        if not hasattr(self, "world"):
            return
        if self.verdict is None:
            self.world.objects[RUN] = training_run(step=500)
            self.world.edit(suspend=False)
            for _ in range(12):
                self.world.settle()
                for name, job in self.world.jobs.items():
                    if not has_ended(job):
                        self.world.suspend_job(name, False)
                self.world.start_pods()
                for name in self.world.live_pods():
                    self.world.end_pod(name, 0)
            self.world.settle()
        assert self.world.phase in ("Succeeded", "Failed")
        assert not [pod for pod in self.world.pods.values() if is_live(pod)]

    def _happens(self) -> None:
        self.is_calm = False

    def _reconcile(self) -> None:
        self.world.reconcile()
        self.is_calm = True


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
