"""What to do about a TrainingRun. Pure: everything it knows is in `Observation`, everything it wants is in the `Plan`.

Order of a run's life: accept the spec → create the Job of attempt n → it runs → it ends → write down why, and n + 1 →
wait until nothing of attempt n runs any more → create the Job of attempt n + 1. Only the write in the middle decides
anything; all else follows from what is there, so an operator that dies anywhere continues where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from opensora_operator import run_states
from opensora_operator import status as states
from opensora_operator.api import (
    AttemptStatus,
    NodesStatus,
    TrainingRunSpec,
    TrainingRunStatus,
)
from opensora_operator.constants import GROUP, ExitCode
from opensora_operator.observation import Observation
from opensora_operator.plans import Action, Create, Delete, Event, Key, Needs, Object, Plan, SetSuspend, Wait
from opensora_operator.pod_states import BROKEN_IMAGE, remove_stuck_pods
from opensora_operator.policies import restart
from opensora_operator.policies.causes import Cause, cause_of
from opensora_operator.reasons import ConditionType, Reason
from opensora_operator.run_resources import wanted_by
from opensora_operator.run_view import Run, job_name, profile_key
from opensora_operator.status import State
from opensora_operator.views import JobView
from opensora_operator.wire import WireError, from_wire, to_wire

KIND = "TrainingRun"
_ATTRIBUTION_SECONDS = 60.0
"""How long an attempt that has failed may keep its cause to itself while pods of it still end."""
_LOOK_AGAIN_SECONDS = 30.0
"""How often something that is missing, and not watched, is looked for."""
_MAX_ATTEMPTS_SHOWN = 10
_MAX_MESSAGE = 2000
_STOPPED_ON_PURPOSE = (Reason.STOPPED, Reason.DISRUPTED, Reason.PREEMPTED)


def needs(run: Object) -> Needs:
    """What has to be looked up for a run."""
    try:
        spec = from_wire(TrainingRunSpec, run.get("spec") or {})
        status = from_wire(TrainingRunStatus, run.get("status") or {})
    except WireError:
        return Needs()
    if status.phase in states.TERMINAL:
        return Needs()
    namespace = run["metadata"]["namespace"]
    resolved = status.resolved.config_map
    if resolved is not None:
        return Needs(children=(("ConfigMap", resolved),), stuck_pod_seconds=float(spec.deadlines.stuck_pod_seconds))
    profile = profile_key(spec, namespace)
    objects = [] if profile is None else [profile]
    if spec.batch_table_ref is not None:
        objects.append(Key("BatchSearch", namespace, spec.batch_table_ref.name))
    named = {spec.config.ref.config_map} if spec.config.ref is not None else set()
    if spec.sampling.prompts_ref is not None:
        named.add(spec.sampling.prompts_ref.config_map)
    if status.resolved.batch_table is not None:
        named.add(status.resolved.batch_table)
    return Needs(
        objects=tuple(objects),
        default_profile=profile is None,
        config_maps=tuple(sorted(named)),
        stuck_pod_seconds=float(spec.deadlines.stuck_pod_seconds),
    )


def plan(observed: Observation) -> Plan:
    """What to do now."""
    try:
        run = Run(observed)
    except WireError as error:
        # The schema lets nothing like this through; an object from before a change of the schema may still have it.
        return _invalid(observed, f"{error}")
    if run.spec.managed_by not in ("", f"{GROUP}/operator"):
        return Plan()
    if run.is_over:
        return _after_the_end(run)
    return _decide(run) or _converge(run)


# ----------------------------------------------------------------------------------------------------------- decisions


def _decide(run: Run) -> Plan | None:
    """The write that has to come before anything else is done, if there is one."""
    newest = max((job.attempt for job in run.observed.jobs if not job.deleting), default=0)
    if newest > run.attempt:
        # The status was lost or set back; the Jobs are the truth about attempts.
        return _decision(run, replace(run.status, attempt=newest))
    job = run.job
    if job is None:
        if run.status.job == job_name(run.name, run.attempt):
            return _job_is_gone(run)
        if run.spec.requests.stop:
            return None if run.earlier_live_pods else _over(run, Reason.CANCELLED, "stopped on request", run.status)
        return _decision(run, _with_restart(run, run.status)) if run.restart_id is not None else _name_table(run)
    if job.condition("Complete") or job.condition("SuccessCriteriaMet"):
        return _succeeded(run, job)
    failed = job.condition("FailureTarget") or job.condition("Failed")
    if failed is not None:
        cause = cause_of(job, run.pods)
        waits_for_more = not cause.is_certain and any(pod.is_live for pod in run.pods)
        if waits_for_more and run.now - failed.time < _ATTRIBUTION_SECONDS:
            return None
        return _attempt_ended(run, _why_it_stopped(run, job, cause))
    if run.must_stop is not None:
        return _stopped_on_purpose(run, job)
    if _was_suspended(run, job):
        by_queue = Cause(reason=Reason.QUEUED, message=f"the queue {run.queue} took its place away")
        by_hand = Cause(reason=Reason.SUSPENDED, message=f"the Job {job.name} was suspended")
        return _attempt_ended(run, by_hand if run.queue is None else by_queue)
    return _deadline(run, job)


def _name_table(run: Run) -> Plan | None:
    """Say which table of batch sizes the run takes, once its search has one: by this name it is looked up."""
    ref, resolved = run.spec.batch_table_ref, run.status.resolved
    if ref is None or resolved.config_map is not None:
        return None
    search = run.observed.objects.get(Key("BatchSearch", run.namespace, ref.name)) or {}
    table = (search.get("status") or {}).get("table")
    if table is None or table == resolved.batch_table:
        return None
    return _decision(run, replace(run.status, resolved=replace(resolved, batch_table=table)))


def _why_it_stopped(run: Run, job: JobView, cause: Cause) -> Cause:
    """A Job that was suspended, and whose pods saved and went, did not fail."""
    if cause.reason not in _STOPPED_ON_PURPOSE:
        return cause
    if run.must_stop is not None:
        return replace(cause, reason=run.must_stop)
    if job.suspended and run.queue is not None:
        return replace(cause, reason=Reason.QUEUED, message=f"the queue {run.queue} took its place away")
    return replace(cause, reason=Reason.SUSPENDED) if job.suspended else cause


def _stopped_on_purpose(run: Run, job: JobView) -> Plan | None:
    """A Job whose pods are gone because they should be, and that has not failed over it."""
    reason = run.must_stop
    if reason is None or not job.suspended or any(pod.is_live for pod in run.pods):
        return None
    if reason is Reason.SUSPENDED and run.record().ran_at is None:
        return None  # nothing of the attempt has run: the same Job can go on
    return _attempt_ended(run, Cause(reason=reason, message=""))


def _was_suspended(run: Run, job: JobView) -> bool:
    """The queue, or somebody, has suspended a Job whose pods ran, and they are gone. What runs next gets a number of
    its own: the number is what keeps processes that were left behind from committing."""
    return job.suspended and run.record().ran_at is not None and not any(pod.is_live for pod in run.pods)


def _job_is_gone(run: Run) -> Plan | None:
    reason = run.must_stop
    if reason is None:
        return _attempt_ended(
            run, Cause(reason=Reason.JOB_DELETED, message=f"the Job {run.status.job} was deleted by somebody")
        )
    if any(pod.is_live for pod in run.pods):
        return None
    return _attempt_ended(run, Cause(reason=reason, message=""))


def _deadline(run: Run, job: JobView) -> Plan | None:
    deadlines = run.spec.deadlines
    if job.suspended or job.started is None:
        return None
    if deadlines.active_seconds and run.status.active_seconds + run.now - job.started > deadlines.active_seconds:
        message = f"active for longer than deadlines.activeSeconds={deadlines.active_seconds}"
        return _attempt_ended(run, Cause(reason=Reason.DEADLINE_EXCEEDED, message=message))
    broken = next((pod for pod in run.pods if pod.waiting_reason == BROKEN_IMAGE), None)
    if broken is not None:
        message = f"pod {broken.name}: {broken.waiting_message or BROKEN_IMAGE}"
        return _attempt_ended(run, Cause(reason=Reason.IMAGE_PULL_FAILED, message=message))
    if run.all_running or run.report is not None or run.now - job.started <= deadlines.startup_seconds:
        return None
    waiting = run_states.running(run)
    what = waiting if run_states.scheduled(run).status else run_states.scheduled(run)
    message = f"not all pods ran after {deadlines.startup_seconds} s: {what.message or what.reason}"
    if _fewer_nodes(run) is not None:
        return _attempt_ended(run, Cause(reason=Reason.NOT_STARTED, message=message))
    is_image = what.reason is Reason.PULLING_IMAGES
    reason = Reason.IMAGE_PULL_FAILED if is_image else Reason.STARTUP_DEADLINE_EXCEEDED
    return _attempt_ended(run, Cause(reason=reason, message=message))


def _fewer_nodes(run: Run) -> int | None:
    """The next smaller number of nodes that the run can do with."""
    allowed = run.spec.elastic.allowed_nodes if run.spec.elastic is not None else ()
    return max((count for count in allowed if count < run.nodes), default=None)


def _succeeded(run: Run, job: JobView) -> Plan:
    by_rank_zero = run.spec.success_policy == "RankZero"
    reason = Reason.RANK_ZERO_SUCCEEDED if by_rank_zero else Reason.ALL_RANKS_SUCCEEDED
    status = _with_report(run, run.status)
    closed = _closed(run, status, Cause(reason=reason, message="", exit_code=int(ExitCode.DONE)))
    status = replace(status, attempts=_with_record(status.attempts, closed))
    if status.progress.total_steps is not None:
        progress = replace(status.progress, step=status.progress.total_steps, percent=100, eta="0s", eta_seconds=0)
        status = replace(status, progress=replace(progress, state="Ended"))
    conditions = {
        ConditionType.COMPLETE: State(status=True, reason=reason, message=f"attempt {run.attempt} is done"),
        ConditionType.RUNNING: State(status=False, reason=reason),
        ConditionType.PROGRESSING: State(status=False, reason=reason),
        ConditionType.RESTARTING: State(status=False, reason=reason),
        ConditionType.SUSPENDED: State(status=False, reason=reason),
    }
    status = replace(status, ended_at=job.finished or run.now, backoff_until=None)
    return _decision(run, status, conditions, Event(reason=reason, message=f"attempt {run.attempt} is done"))


def _attempt_ended(run: Run, cause: Cause) -> Plan:
    """Close the attempt's record; the run is over, or the next attempt has its number."""
    status = _with_report(run, run.status)
    if cause.exit_code == ExitCode.STOPPED:  # it has saved the step that it names, whether it could report that or not
        saved = states.checkpoint_of(
            status.checkpoint, cause.step, saved_at=cause.time or run.now, run_uri=run.spec.run_uri
        )
        status = replace(status, checkpoint=saved)
    record = _closed(run, status, cause)
    ending = restart.after(cause, record, status, run.spec.restart_policy)
    started = run.job.started if run.job is not None else record.started_at
    status = replace(
        status,
        attempts=_with_record(status.attempts, record),
        recent_restarts=ending.recent_restarts,
        no_progress_attempts=ending.no_progress_attempts,
        node_failures=dict(ending.node_failures),
        active_seconds=status.active_seconds + max(0, round(run.now - started)) if started else status.active_seconds,
    )
    if cause.reason is Reason.CANCELLED:
        return _over(run, Reason.CANCELLED, "stopped on request", status)
    if cause.reason in (Reason.DEADLINE_EXCEEDED, Reason.STARTUP_DEADLINE_EXCEEDED, Reason.IMAGE_PULL_FAILED):
        return _over(run, cause.reason, cause.message, status)
    if ending.failed is not None:
        return _over(run, ending.failed, ending.message, status)
    status = replace(
        status,
        attempt=run.attempt + 1,
        restarts=status.restarts + (ending.budget == "failures"),
        disruptions=status.disruptions + (ending.budget == "disruptions"),
        backoff_until=run.now + ending.backoff_seconds if ending.backoff_seconds else None,
    )
    events = []
    if ending.avoid_node is not None:
        status = replace(status, avoid_nodes=(*status.avoid_nodes, ending.avoid_node))
        message = f"node {ending.avoid_node} is avoided from now on: {cause.message}"
        events.append(Event(reason=Reason.NODE_AVOIDED, message=message, warning=True))
    if cause.reason is Reason.NOT_STARTED:
        fewer = _fewer_nodes(run)
        assert fewer is not None
        status = replace(status, nodes=replace(status.nodes, desired=fewer, requested=run.spec.nodes))
        message = f"{run.nodes} nodes were not to be had; going on with {fewer}"
        events.append(Event(reason=Reason.SCALED_DOWN, message=message, warning=True))
    else:
        status = replace(status, nodes=replace(status.nodes, desired=run.nodes, requested=run.spec.nodes))
    if cause.reason is Reason.RESTART_REQUESTED:
        status = _with_restart(run, status)
    message = f"attempt {run.attempt} ended: {cause.message or cause.reason}"
    is_pause = cause.reason in (Reason.SUSPENDED, Reason.QUEUED)
    conditions = {
        ConditionType.RUNNING: State(status=False, reason=cause.reason, message=cause.message),
        ConditionType.PROGRESSING: State(status=False, reason=cause.reason),
        ConditionType.RESTARTING: State(status=not is_pause, reason=cause.reason, message=cause.message),
    }
    if is_pause:
        conditions[ConditionType.SUSPENDED] = State(status=True, reason=cause.reason, message=cause.message)
    else:
        events.insert(0, Event(reason=cause.reason, message=message, warning=ending.budget != "executions"))
    return _decision(run, status, conditions, *events)


def _with_restart(run: Run, status: TrainingRunStatus) -> TrainingRunStatus:
    """The status with the restart that is asked for done: the next attempt starts at once."""
    asked = run.spec.requests.restart
    assert asked is not None
    node = asked.exclude_node
    if node is not None and node not in status.avoid_nodes and len(status.avoid_nodes) < restart.MAX_AVOIDED:
        status = replace(status, avoid_nodes=(*status.avoid_nodes, node))
    return replace(status, requests=replace(status.requests, restart=asked.id), backoff_until=None)


def _over(run: Run, reason: Reason, message: str, status: TrainingRunStatus) -> Plan:
    """The run has failed, for good."""
    conditions = {
        ConditionType.FAILED: State(status=True, reason=reason, message=message),
        ConditionType.RUNNING: State(status=False, reason=reason),
        ConditionType.PROGRESSING: State(status=False, reason=reason),
        ConditionType.RESTARTING: State(status=False, reason=reason),
        ConditionType.SUSPENDED: State(status=False, reason=reason),
    }
    status = replace(
        status,
        ended_at=run.now,
        backoff_until=None,
        requests=replace(status.requests, stop=run.spec.requests.stop),
    )
    event = Event(reason=reason, message=message, warning=reason is not Reason.CANCELLED)
    return _decision(run, status, conditions, event)


def _invalid(observed: Observation, message: str) -> Plan:
    """A spec that cannot be read at all; its status is told in the few fields that are sure."""
    conditions = states.set_conditions(
        (),
        {ConditionType.ACCEPTED: State(status=False, reason=Reason.INVALID_SPEC, message=message)},
        now=observed.now,
        generation=observed.body["metadata"].get("generation", 0),
    )
    old = observed.body.get("status") or {}
    if any(condition.get("message") == message for condition in old.get("conditions", ())):
        return Plan()
    new = to_wire(TrainingRunStatus(phase="Pending", conditions=conditions))
    return Plan(status={**old, **new}, events=(Event(reason=Reason.INVALID_SPEC, message=message, warning=True),))


def _decision(
    run: Run,
    status: TrainingRunStatus,
    conditions: Mapping[ConditionType, State] | None = None,
    *events: Event,
) -> Plan:
    return Plan(status=to_wire(_finished(run, status, conditions or {})), is_decision=True, events=events)


def _finished(
    run: Run, status: TrainingRunStatus, conditions: Mapping[ConditionType, State], *, has_job: bool = False
) -> TrainingRunStatus:
    """The status with its conditions, and the phase that follows from them."""
    new = states.set_conditions(status.conditions, conditions, now=run.now, generation=run.generation)
    phase = states.phase_of(new, has_job=has_job)
    return replace(status, conditions=new, phase=phase, observed_generation=run.generation)


def _closed(run: Run, status: TrainingRunStatus, cause: Cause) -> AttemptStatus:
    record = run.record()
    last_step = cause.step if cause.step is not None else status.progress.step
    return replace(
        record,
        ended_at=cause.time or run.now,
        cause=cause.reason,
        exit_code=cause.exit_code,
        rank=cause.rank,
        pod=cause.pod,
        node=cause.node or None,
        last_step=last_step if last_step is not None else record.last_step,
        checkpoint_step=status.checkpoint.latest_step,
        message=cause.message[:_MAX_MESSAGE],
    )


def _with_record(records: Sequence[AttemptStatus], record: AttemptStatus) -> tuple[AttemptStatus, ...]:
    kept = [known for known in records if known.number != record.number]
    return tuple(sorted([*kept, record], key=lambda known: known.number)[-_MAX_ATTEMPTS_SHOWN:])


def _with_report(run: Run, status: TrainingRunStatus) -> TrainingRunStatus:
    """The status with what rank 0 has reported."""
    report = run.report
    if report is None:
        return status
    requests = status.requests
    return replace(
        status,
        progress=states.progress_of(status.progress, report),
        checkpoint=states.checkpoint_of(
            status.checkpoint, report.checkpoint_step, saved_at=report.received, run_uri=run.spec.run_uri
        ),
        samples=states.samples_of(status.samples, report, run_uri=run.spec.run_uri),
        requests=replace(
            requests,
            checkpoint=report.requests.get("checkpoint", requests.checkpoint),
            dump=report.requests.get("dump", requests.dump),
        ),
    )


# --------------------------------------------------------------------------------------------------------- convergence


def _converge(run: Run) -> Plan:
    """Make what is there what should be there, and tell how it is."""
    actions, events = _remove_stuck_pods(run)
    status = _with_report(run, run.status)
    _stop_earlier_attempts(run, actions)
    _trim_history(run, actions)

    job, problem, waiting = run.job, None, None
    if job is not None:
        _start_or_stop(run, job, actions)
        status = _with_attempt(run, job, status, actions)
    elif run.wants_pods and run.status.job != job_name(run.name, run.attempt):  # never the same Job twice
        wanted = wanted_by(run)
        if isinstance(wanted, State):
            problem = wanted
        else:
            waiting = _why_not_yet(run)
            if waiting is None:
                actions += [Create(manifest=manifest) for manifest in wanted.objects]
                message = f"attempt {run.attempt} with {run.nodes} pods: Job {job_name(run.name, run.attempt)}"
                events.append(Event(reason=Reason.ATTEMPT_STARTED, message=message))
    status = _described(run, status, problem=problem, waiting=waiting, job_exists=job is not None)
    new, old = to_wire(status), run.object.get("status") or {}
    waits = _waits(run, problem)
    return Plan(
        status=None if new == old else new,
        is_progress_only=not actions and not events and _decisive(new) == _decisive(old),
        actions=tuple(actions),
        events=tuple(events),
        requeue_seconds=_look_again(waits),
        waits=waits,
    )


def _start_or_stop(run: Run, job: JobView, actions: list[Action]) -> None:
    """Suspend or resume the Job. Where a queue decides about that, stopping it means deleting it."""
    if job.condition("FailureTarget") or job.condition("Failed"):
        return
    if run.must_stop is not None:
        if run.queue is not None:
            actions.append(Delete(kind="Job", name=job.name, uid=job.uid))
        elif not job.suspended:
            actions.append(SetSuspend(name=job.name, uid=job.uid, suspend=True))
    elif job.suspended and run.queue is None and run.record().ran_at is None:
        actions.append(SetSuspend(name=job.name, uid=job.uid, suspend=False))


def _stop_earlier_attempts(run: Run, actions: list[Action]) -> None:
    """Nothing of an earlier attempt may run beside this one."""
    ending = set()
    for job in run.observed.jobs:
        if job.attempt == run.attempt:
            continue
        if job.deleting or any(job.condition(kind) for kind in ("FailureTarget", "Failed", "Complete")):
            ending.add(job.name)
        elif run.queue is not None or job.active or not job.suspended:
            actions.append(Delete(kind="Job", name=job.name, uid=job.uid))
            ending.add(job.name)
    for pod in run.earlier_live_pods:
        if pod.deleting_since is None and pod.job not in ending:
            actions.append(Delete(kind="Pod", name=pod.name, uid=pod.uid))


def _remove_stuck_pods(run: Run) -> tuple[list[Action], list[Event]]:
    """A pod of this attempt is kept until the attempt's end is written down: it alone tells that a node was lost."""
    return remove_stuck_pods(
        run.observed.pods,
        dead_nodes=run.observed.dead_nodes,
        now=run.now,
        patience=run.spec.deadlines.stuck_pod_seconds,
        is_needed=lambda pod: pod.attempt == run.attempt and not run.is_over,
    )


def _trim_history(run: Run, actions: list[Action]) -> None:
    oldest = run.attempt - run.spec.cleanup.attempt_history_limit
    deleted = {action.name for action in actions if isinstance(action, Delete)}
    for job in run.observed.jobs:
        if job.attempt < oldest and not job.deleting and job.name not in deleted:
            actions.append(Delete(kind="Job", name=job.name, uid=job.uid))


def _why_not_yet(run: Run) -> State | None:
    """What the next attempt waits for."""
    if run.earlier_live_pods:
        names = ", ".join(sorted(pod.name for pod in run.earlier_live_pods)[:8])
        return State(status=True, reason=Reason.DRAINING_PODS, message=f"still ending: {names}")
    until = run.status.backoff_until
    if until is not None and run.now < until:
        message = f"attempt {run.attempt} starts in {states.duration(until - run.now)} at the latest"
        return State(status=True, reason=Reason.BACKING_OFF, message=message)
    return None


def _with_attempt(run: Run, job: JobView, status: TrainingRunStatus, actions: list[Action]) -> TrainingRunStatus:
    """The status with the attempt whose Job is there, and with what its pods were made from."""
    if status.job == job.name:
        return status
    if job.config != status.resolved.config_map and not isinstance(wanted := wanted_by(run), State):
        status = replace(status, resolved=wanted.resolved)
        if wanted.resolved.config_map != job.config:
            # The profile has changed between the Job and this: it holds for the attempts to come.
            actions.append(Create(manifest=wanted.objects[0]))
    record = replace(run.record(), started_at=job.created)
    return replace(
        status,
        attempt=run.attempt,
        attempts=_with_record(status.attempts, record),
        executions=status.executions + 1,
        job=job.name,
        nodes=replace(status.nodes, desired=run.nodes, requested=run.spec.nodes),
        backoff_until=None,
    )


def _waits(run: Run, problem: State | None) -> tuple[Wait, ...]:
    """What comes with time alone."""
    found: list[Wait] = []

    def wait(until: float, what: str) -> None:
        found.append(Wait(seconds=until - run.now, what=what))

    if problem is not None:
        wait(run.now + _LOOK_AGAIN_SECONDS, "what is wrong is looked at again")
    if run.status.backoff_until is not None:
        wait(run.status.backoff_until, f"the pause before attempt {run.attempt} is over")
    deadlines = run.spec.deadlines
    for pod in run.observed.pods:
        if pod.deleting_since is not None and pod.is_live:
            stuck = pod.deleting_since + deadlines.stuck_pod_seconds
            wait(stuck, f"pod {pod.name}, if it has not ended by then, counts as stuck (deadlines.stuckPodSeconds)")
    if run.job is not None and run.job.started is not None and not run.job.suspended:
        if not run.all_running:
            wait(run.job.started + deadlines.startup_seconds, "all pods must run (deadlines.startupSeconds)")
        if deadlines.active_seconds:
            end = run.job.started + deadlines.active_seconds - run.status.active_seconds
            wait(end, "the run has had its time (deadlines.activeSeconds)")
        failed = run.job.condition("FailureTarget")
        if failed is not None:
            wait(failed.time + _ATTRIBUTION_SECONDS, "the attempt's end is put down to what is known by then")
    if run.running_since is not None and run.observed.platform.progress_url is not None:
        last = run.report.received if run.report is not None else run.running_since
        wait(last + 3 * run.spec.watchdog.heartbeat_seconds, "without a report until then, the run counts as silent")
    return tuple(sorted(found, key=lambda one: one.seconds))


def _look_again(waits: Sequence[Wait]) -> float | None:
    """When to look though nothing may have happened; what came long ago has been looked at."""
    return next((max(1.0, wait.seconds + 0.5) for wait in waits if wait.seconds > -_LOOK_AGAIN_SECONDS), None)


_CALM_CONDITIONS = frozenset({Reason.STEP_ADVANCING, Reason.EVALUATING, Reason.SAVING_CHECKPOINT, Reason.SAMPLING})
_PROGRESS_KEYS = ("progress", "checkpoint", "samples", "requests", "observedGeneration")


def _decisive(status: Object) -> Object:
    """A status without what may wait for the next flush."""
    conditions = [
        {key: "" if key in ("reason", "message", "observedGeneration") else value for key, value in condition.items()}
        if condition.get("reason") in _CALM_CONDITIONS
        else {key: value for key, value in condition.items() if key != "observedGeneration"}
        for condition in status.get("conditions", ())
    ]
    return {**{key: value for key, value in status.items() if key not in _PROGRESS_KEYS}, "conditions": conditions}


# --------------------------------------------------------------------------------------------------------- description


def _described(
    run: Run, status: TrainingRunStatus, *, problem: State | None, waiting: State | None, job_exists: bool
) -> TrainingRunStatus:
    """The status as it follows from what is there."""
    conditions: dict[ConditionType, State] = {}
    if problem is not None:
        conditions[ConditionType.ACCEPTED] = problem
    elif run.wants_pods or run.job is not None:
        conditions[ConditionType.ACCEPTED] = State(status=True, reason=Reason.ACCEPTED)
    conditions[ConditionType.SUSPENDED] = run_states.suspended(run, job_exists=job_exists)
    conditions[ConditionType.SCHEDULED] = run_states.scheduled(run)
    conditions[ConditionType.RUNNING] = run_states.running(run)
    heartbeat = float(run.spec.watchdog.heartbeat_seconds)
    if run.observed.platform.progress_url is not None:
        conditions[ConditionType.PROGRESSING] = states.progressing(
            run.report, now=run.now, since=run.running_since, heartbeat=heartbeat
        )
    if waiting is not None:
        conditions[ConditionType.RESTARTING] = waiting
    elif run.all_running or not states.is_true(status.conditions, ConditionType.RESTARTING):
        reason = Reason.ATTEMPT_STARTED if job_exists else Reason.NO_PODS
        conditions[ConditionType.RESTARTING] = State(status=False, reason=reason)
    placed = sum(pod.scheduled for pod in run.pods if pod.is_live)
    ready = sum(pod.ready for pod in run.pods)
    desired = run.nodes
    nodes = NodesStatus(
        desired=desired,
        requested=status.nodes.requested,
        placed=placed,
        ready=ready,
        summary=f"{ready}/{desired}",
    )
    digest = next((pod.image_id for pod in run.pods if pod.image_id), status.resolved.image_digest)
    started = status.started_at
    if started is None and any(pod.ready or pod.exit_code is not None for pod in run.pods):
        started = run.now
    record = run.record()
    if record.ran_at is None and job_exists and any(pod.ready or pod.exit_code is not None for pod in run.pods):
        status = replace(status, attempts=_with_record(status.attempts, replace(record, ran_at=run.now)))
    status = replace(
        status,
        nodes=nodes,
        started_at=started,
        resolved=replace(status.resolved, image_digest=digest),
        requests=replace(status.requests, stop=run.spec.requests.stop),
    )
    return _finished(run, status, conditions, has_job=job_exists)


# ------------------------------------------------------------------------------------------------------ after the end


def _after_the_end(run: Run) -> Plan:
    """Nothing runs any more; what is kept is kept for its time."""
    actions, events = _remove_stuck_pods(run)
    cleanup = run.spec.cleanup
    for job in run.observed.jobs:
        ended = any(job.condition(kind) for kind in ("Complete", "SuccessCriteriaMet", "FailureTarget", "Failed"))
        if job.deleting:
            continue
        if not ended:
            if run.queue is not None:
                actions.append(Delete(kind="Job", name=job.name, uid=job.uid))
            elif not job.suspended:
                actions.append(SetSuspend(name=job.name, uid=job.uid, suspend=True))
        elif cleanup.pod_policy == "DeleteAll" or (cleanup.pod_policy == "KeepFailed" and job.condition("Complete")):
            actions.append(Delete(kind="Job", name=job.name, uid=job.uid))
    live = sum(pod.is_live for pod in run.observed.pods)
    status = run.status
    nodes = replace(status.nodes, placed=live, ready=live, summary=f"{live}/{status.nodes.desired}")
    scheduled = State(status=False, reason=Reason.NO_PODS)
    conditions = {} if live else {ConditionType.SCHEDULED: scheduled}
    status = _finished(run, replace(status, nodes=nodes), conditions)
    new = to_wire(status)
    ttl, ended_at = cleanup.ttl_seconds_after_finished, run.status.ended_at
    left = None if ttl is None or ended_at is None else ended_at + ttl - run.now
    return Plan(
        status=None if new == (run.object.get("status") or {}) else new,
        actions=tuple(actions),
        events=tuple(events),
        delete_self=left is not None and left <= 0,
        requeue_seconds=None if left is None else max(1.0, left + 0.5),
        waits=()
        if left is None
        else (Wait(seconds=left, what="the run is deleted (cleanup.ttlSecondsAfterFinished)"),),
    )
