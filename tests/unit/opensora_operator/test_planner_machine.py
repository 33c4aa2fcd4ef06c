"""The planner among random events: pods, Jobs, queues, nodes, users, time, and an operator that dies between writes."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from opensora_operator.constants import ExitCode
from operator_world import CrashError, World, ended, is_live

CODES = [code for code in ExitCode if code is not ExitCode.DONE] + [137, 143]
CODES += 4 * [ExitCode.FAILED, ExitCode.STALLED, ExitCode.PEER_LOST, ExitCode.STOPPED]
MAX_RESTARTS, MAX_DISRUPTIONS = 3, 4


class Machine(RuleBasedStateMachine):
    """What holds whatever happens: see the invariants. `World` itself refuses a second live attempt and a second Job
    of a name."""

    def __init__(self) -> None:
        super().__init__()
        self.attempt = 0
        self.verdict: str | None = None
        self.is_calm = False

    @initialize(
        queue=st.booleans(),
        elastic=st.booleans(),
        history=st.integers(0, 3),
        policy=st.sampled_from(["AllRanks", "RankZero"]),
        backoff=st.sampled_from([0, 10]),
        suspended_jobs_fail=st.booleans(),
    )
    def begin(
        self, queue: bool, elastic: bool, history: int, policy: str, backoff: int, suspended_jobs_fail: bool
    ) -> None:
        self.world = World(
            scheduling={"queue": "team"} if queue else {},
            cleanup={"attemptHistoryLimit": history, "ttlSecondsAfterFinished": None},
            restartPolicy={
                "maxRestarts": MAX_RESTARTS,
                "maxDisruptions": MAX_DISRUPTIONS,
                "noProgressAttempts": 3,
                "healthySteps": 20,
                "backoff": {"baseSeconds": backoff},
            },
            successPolicy=policy,
            **({"elastic": {"allowedNodes": [2, 1]}} if elastic else {}),
        )
        self.world.suspended_jobs_fail = suspended_jobs_fail
        self.can_resize = elastic
        self._reconcile()

    # What happens

    @rule()
    def operator_works(self) -> None:
        self._reconcile()

    @rule(writes=st.integers(0, 6))
    def operator_dies_after_some_writes(self, writes: int) -> None:
        self.world.writes_left = writes
        try:
            self.world.reconcile()
        except CrashError:
            pass
        finally:
            self.world.writes_left = None
        self.is_calm = False

    @rule(ready=st.sampled_from([True, True, False]))
    def cluster_starts_pods(self, ready: bool) -> None:
        self._reconcile()
        self._happens()
        self.world.start_pods(ready=ready)
        self._reconcile()

    @rule(code=st.sampled_from([ExitCode.STOPPED, ExitCode.PEER_LOST, ExitCode.FAILED]))
    def cluster_and_operator_work(self, code: int) -> None:
        self._happens()
        self.world.settle(code=code)
        self.is_calm = True

    @rule()
    def job_controller_works(self) -> None:
        self._happens()
        self.world.run_job_controller()

    @rule(code=st.sampled_from([ExitCode.STOPPED, ExitCode.PEER_LOST, ExitCode.FAILED, 137]))
    def pods_that_were_asked_to_end(self, code: int) -> None:
        self._happens()
        self.world.let_pods_end(code)

    @precondition(lambda self: self._live_pods())
    @rule(data=st.data(), code=st.sampled_from(CODES), has_verdict=st.booleans(), step=st.integers(0, 100))
    def a_pod_fails(self, data: st.DataObject, code: int, has_verdict: bool, step: int) -> None:
        self._happens()
        name = data.draw(st.sampled_from(self._live_pods()))
        self.world.end_pod(name, code, has_verdict=has_verdict, step=step, rank=1, message="m")
        self.world.run_job_controller()

    @precondition(lambda self: self._live_pods())
    @rule(data=st.data(), reason=st.sampled_from(["EvictionByEvictionAPI", "DeletionByTaintManager"]))
    def a_pod_is_evicted(self, data: st.DataObject, reason: str) -> None:
        self._happens()
        self.world.end_pod(data.draw(st.sampled_from(self._live_pods())), 143, disruption=reason, has_verdict=False)
        self.world.run_job_controller()

    @precondition(lambda self: self._live_pods())
    @rule()
    def all_pods_succeed(self) -> None:
        self._happens()
        for name, pod in self.world.pods.items():
            if is_live(pod) and pod["metadata"]["labels"]["opensora.dev/attempt"] == str(self.world.attempt):
                self.world.end_pod(name, 0)

    @rule(node=st.sampled_from(["node-0", "node-1"]))
    def a_node_dies(self, node: str) -> None:
        self._happens()
        self.world.dead_nodes.add(node)
        for pod in self.world.pods.values():
            if pod["spec"]["nodeName"] == node and is_live(pod):
                self.world._ask_to_end(pod)

    @rule()
    def nodes_come_back(self) -> None:
        self._happens()
        self.world.dead_nodes.clear()

    @rule(seconds=st.sampled_from([1.0, 11.0, 70.0, 130.0, 2000.0]))
    def time_passes(self, seconds: float) -> None:
        self._happens()
        self.world.now += seconds

    @rule(suspend=st.booleans())
    def the_queue_decides(self, suspend: bool) -> None:
        if not self.world.run["spec"]["scheduling"]:
            return
        self._happens()
        for name, job in self.world.jobs.items():
            if not ended(job) and job["spec"]["suspend"] != suspend:
                self.world.suspend_job(name, suspend)

    @rule(suspend=st.booleans())
    def a_user_suspends_or_resumes(self, suspend: bool) -> None:
        self._happens()
        self.world.edit(suspend=suspend)

    @precondition(lambda self: self.can_resize)
    @rule(nodes=st.sampled_from([1, 2]))
    def a_user_scales(self, nodes: int) -> None:
        self._happens()
        self.world.edit(nodes=nodes)

    @rule(name=st.sampled_from(["r1", "r2", "r3"]))
    def a_user_asks_for_a_restart(self, name: str) -> None:
        self._happens()
        self.world.edit(requests={**self.world.run["spec"].get("requests", {}), "restart": {"id": name}})

    @rule(really=st.integers(0, 7).map(lambda draw: draw == 7))
    def a_user_stops_the_run(self, really: bool) -> None:
        if not really:
            return
        self._happens()
        self.world.edit(requests={**self.world.run["spec"].get("requests", {}), "stop": True})

    @rule(data=st.data())
    def somebody_deletes_a_job(self, data: st.DataObject) -> None:
        if self.world.jobs:
            self._happens()
            self.world.delete_job(data.draw(st.sampled_from(sorted(self.world.jobs))))

    @rule(step=st.integers(0, 100), saved=st.booleans())
    def rank_zero_reports(self, step: int, saved: bool) -> None:
        self._happens()
        self.world.say(step, checkpoint_step=step if saved else None)

    # What holds

    @invariant()
    def attempts_only_go_up(self) -> None:
        if hasattr(self, "world"):
            assert self.world.attempt >= self.attempt
            self.attempt = self.world.attempt

    @invariant()
    def an_end_is_for_ever(self) -> None:
        if not hasattr(self, "world"):
            return
        if self.verdict is not None:
            assert self.world.phase == self.verdict
        elif self.world.phase in ("Succeeded", "Failed"):
            self.verdict = self.world.phase
            jobs = set(self.world.jobs)
            self.world.settle()
            assert set(self.world.jobs) <= jobs

    @invariant()
    def budgets_are_kept(self) -> None:
        if hasattr(self, "world"):
            assert self.world.status.get("recentRestarts", 0) <= MAX_RESTARTS + (self.verdict is not None)
            assert self.world.status.get("disruptions", 0) <= MAX_DISRUPTIONS

    @invariant()
    def phase_and_conditions_agree(self) -> None:
        if not hasattr(self, "world") or not self.world.status:
            return
        ends = [kind for kind in ("Complete", "Failed") if self.world.condition(kind).get("status") == "True"]
        assert len(ends) <= 1
        assert bool(ends) == (self.world.phase in ("Succeeded", "Failed"))
        if self.world.phase == "Running":
            assert self.world.condition("Suspended")["status"] == "False"

    @invariant()
    def nothing_is_left_to_do_after_the_work_is_done(self) -> None:
        if self.is_calm:
            again = self.world.plan()
            assert not again.actions
            assert again.status is None
            assert not again.is_decision

    def teardown(self) -> None:
        """However it went, a run that is left in peace on sound nodes comes to rest: with the Job of its attempt and no
        pod of another one; or, if it has ended, without a pod."""
        if not hasattr(self, "world"):
            return
        self.world.dead_nodes.clear()
        for _ in range(4):
            self.world.start_pods()
            self.world.settle()
            self.world.now += 700
        alive = {pod["metadata"]["labels"]["opensora.dev/attempt"] for pod in self.world.pods.values() if is_live(pod)}
        assert len(alive) <= 1
        if self.world.phase in ("Succeeded", "Failed"):
            assert not alive
        elif not self.world.run["spec"].get("suspend"):
            assert f"demo-a{max(1, self.world.attempt)}" in self.world.jobs, "the next attempt never comes"

    def _live_pods(self) -> list[str]:
        return [name for name, pod in self.world.pods.items() if is_live(pod)] if hasattr(self, "world") else []

    def _happens(self) -> None:
        self.is_calm = False

    def _reconcile(self) -> None:
        self.world.reconcile()
        self.is_calm = True


TestMachine = Machine.TestCase
# A failure is told as it was found: to make it shorter takes minutes.
TestMachine.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
