"""What to do about a SampleJob. Pure, like `planner.py`, and simpler: its pods know nothing of each other.

Choose the checkpoint → create one Indexed Job over the shards of the prompts → it ends. The choice is written before
anything is made, so that all shards sample the same weights, whatever the run saves meanwhile. The Job itself tries
shards again; clips that are there are never made twice, so a Job that was deleted is made anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from opensora_operator import status as states
from opensora_operator.api import (
    ConfigMapRef,
    ProfileRef,
    ResolvedStatus,
    SampledCheckpoint,
    SampleJobSpec,
    SampleJobStatus,
    SampleOutput,
    ShardsStatus,
    TrainingProfileSpec,
    TrainingRunSpec,
    TrainingRunStatus,
)
from opensora_operator.observation import Observation
from opensora_operator.plans import Action, Create, Delete, Event, Key, Needs, Object, Plan, SetSuspend
from opensora_operator.pod_states import (
    BROKEN_IMAGE,
    STUCK_POD_SECONDS,
    job_phase,
    remove_stuck_pods,
    running_state,
    scheduled_state,
    stuck_pods_due,
)
from opensora_operator.profiles import procs_per_node, profile_key
from opensora_operator.reasons import ConditionType, Reason
from opensora_operator.resources import CONFIG_KEY
from opensora_operator.sample_resources import (
    PROMPTS_KEY,
    Snapshot,
    checkpoint_of_uri,
    clips_of_shard,
    job_name,
    objects_of,
    prompt_lines,
    sheet_uri,
)
from opensora_operator.status import State
from opensora_operator.views import JobView
from opensora_operator.wire import WireError, from_wire, to_wire

KIND = "SampleJob"
_LOOK_AGAIN_SECONDS = 30.0
_MAX_OUTPUTS = 512
_MAX_MESSAGE = 1000
_MAX_NAMED = 16
"""Shards that a message lists."""


def needs(job: Object) -> Needs:
    """What has to be looked up for a SampleJob."""
    try:
        spec, status = _read(job)
    except WireError:
        return Needs()
    if status.phase in states.TERMINAL:
        return Needs()
    if status.resolved.config_map is not None:
        children = (("ConfigMap", status.resolved.config_map),)
        return Needs(children=children, stuck_pod_seconds=float(STUCK_POD_SECONDS))
    namespace = job["metadata"]["namespace"]
    profile = profile_key(spec.profile_ref or status.resolved.profile, namespace)
    run = _run_key(spec, namespace)
    refs = [ref for ref in (spec.config.ref, spec.prompts.ref) if ref is not None]
    return Needs(
        objects=tuple(key for key in (profile, run) if key is not None),
        default_profile=profile is None,
        config_maps=tuple(sorted({ref.config_map for ref in refs})),
        stuck_pod_seconds=float(STUCK_POD_SECONDS),
    )


def plan(observed: Observation) -> Plan:
    """What to do now."""
    try:
        job = _SampleJob(observed)
    except WireError as error:
        return _unreadable(observed, str(error))
    if job.is_over:
        return _after_the_end(job)
    return _decide(job) or _converge(job)


def _read(body: Object) -> tuple[SampleJobSpec, SampleJobStatus]:
    return from_wire(SampleJobSpec, body.get("spec") or {}), from_wire(SampleJobStatus, body.get("status") or {})


def _run_key(spec: SampleJobSpec, namespace: str) -> Key | None:
    ref = spec.checkpoint.run_ref
    return None if ref is None else Key("TrainingRun", namespace, ref.name)


class _SampleJob:
    """A SampleJob with what can be read off it."""

    def __init__(self, observed: Observation) -> None:
        self.observed = observed
        self.now = observed.now
        self.object = observed.body
        self.name: str = observed.body["metadata"]["name"]
        self.namespace: str = observed.body["metadata"]["namespace"]
        self.generation: int = observed.body["metadata"].get("generation", 0)
        self.spec, self.status = _read(observed.body)

    @property
    def is_over(self) -> bool:
        return self.status.phase in states.TERMINAL

    @cached_property
    def job(self) -> JobView | None:
        return next((job for job in self.observed.jobs if job.name == job_name(self.name) and not job.deleting), None)

    @property
    def is_draining(self) -> bool:
        """A deleted Job, or pods of one, are still there."""
        return any(job.deleting for job in self.observed.jobs) or any(pod.is_live for pod in self.observed.pods)

    @cached_property
    def run(self) -> Object | None:
        """The run to sample from."""
        key = _run_key(self.spec, self.namespace)
        return None if key is None else self.observed.objects.get(key)

    @cached_property
    def kept(self) -> Mapping[str, str] | None:
        """Data of the ConfigMap that the pods read; None before there is one."""
        name = self.status.resolved.config_map
        child = None if name is None else self.observed.children.get(("ConfigMap", name))
        return None if child is None else child.data

    @cached_property
    def snapshot(self) -> Snapshot | None:
        return None if self.kept is None else Snapshot.from_data(self.kept)

    @property
    def queue(self) -> str | None:
        """The queue that starts the Job."""
        return self.snapshot.queue if self.snapshot is not None else self.status.resolved.queue


# ----------------------------------------------------------------------------------------------------------- decisions


def _decide(job: _SampleJob) -> Plan | None:
    """The write that has to come before anything else is done, if there is one."""
    found = job.job
    if found is not None:
        if found.condition("Complete") or found.condition("SuccessCriteriaMet"):
            return _succeeded(job, found)
        failed = found.condition("FailureTarget") or found.condition("Failed")
        if failed is not None:
            return _shards_failed(job, found, failed.message)
        return _deadline(job, found)
    if job.status.checkpoint.uri is None:
        return _choose_checkpoint(job)
    return None


def _choose_checkpoint(job: _SampleJob) -> Plan | None:
    """Say which weights are sampled; None while that cannot be said."""
    ref = job.spec.checkpoint.run_ref
    if ref is None:
        assert job.spec.checkpoint.uri is not None, "the schema wants one of the two"
        config = job.spec.config
        has_config = any(source is not None for source in (config.inline, config.ref, config.file))
        checkpoint = checkpoint_of_uri(job.spec.checkpoint.uri, has_config=has_config)
        return _decision(job, replace(job.status, checkpoint=checkpoint))
    if job.run is None:
        return None
    spec, status = _read_run(job.run)
    newest, step = status.checkpoint.latest_step, ref.step
    wanted = newest if step == "latest" else step
    if wanted is None or newest is None or newest < wanted:
        if status.phase in states.TERMINAL:
            what = "has no checkpoint" if newest is None else f"has no checkpoint of step {wanted}, only up to {newest}"
            return _over(job, Reason.CHECKPOINT_NOT_FOUND, f"run {ref.name} has ended and {what}")
        return None
    resolved = replace(job.status.resolved, profile=job.spec.profile_ref or status.resolved.profile)
    checkpoint = SampledCheckpoint(step=wanted, uri=spec.run_uri)
    return _decision(job, replace(job.status, checkpoint=checkpoint, resolved=resolved))


def _read_run(run: Object) -> tuple[TrainingRunSpec, TrainingRunStatus]:
    return from_wire(TrainingRunSpec, run["spec"]), from_wire(TrainingRunStatus, run.get("status") or {})


def _succeeded(job: _SampleJob, found: JobView) -> Plan:
    status = _with_shards(job, job.status, found)
    message = f"{found.completions} of {found.completions} shards are done"
    sheet = sheet_uri(job.spec, job.kept or {})
    return _ended(
        job,
        replace(status, sheet=sheet, ended_at=found.finished or job.now),
        ConditionType.COMPLETE,
        Reason.ALL_SHARDS_SUCCEEDED,
        message,
    )


def _shards_failed(job: _SampleJob, found: JobView, why: str) -> Plan:
    status = _with_shards(job, job.status, found)
    failed = [output for output in status.outputs if output.state == "Failed"]
    names = ", ".join(str(output.index) for output in failed[:_MAX_NAMED])
    words = next((output.message for output in failed if output.message), why)
    message = f"shards {names} of {found.completions} failed: {words}" if failed else f"the Job failed: {words}"
    return _over(job, Reason.SHARDS_FAILED, message, status)


def _deadline(job: _SampleJob, found: JobView) -> Plan | None:
    """The end by a clock, or by a pod that can never start."""
    broken = next((pod for pod in job.observed.pods if pod.waiting_reason == BROKEN_IMAGE), None)
    if broken is not None:
        return _over(job, Reason.IMAGE_PULL_FAILED, f"pod {broken.name}: {broken.waiting_message or BROKEN_IMAGE}")
    limit, started = job.spec.active_deadline_seconds, job.status.started_at
    if limit and started is not None and job.now - started > limit:
        status = _with_shards(job, job.status, found)
        return _over(job, Reason.DEADLINE_EXCEEDED, f"longer than activeDeadlineSeconds={limit}", status)
    return None


def _over(job: _SampleJob, reason: Reason, message: str, status: SampleJobStatus | None = None) -> Plan:
    status = replace(status or job.status, ended_at=job.now)
    return _ended(job, status, ConditionType.FAILED, reason, message)


def _ended(job: _SampleJob, status: SampleJobStatus, kind: ConditionType, reason: Reason, message: str) -> Plan:
    conditions = {
        kind: State(status=True, reason=reason, message=message),
        ConditionType.RUNNING: State(status=False, reason=reason),
        ConditionType.SUSPENDED: State(status=False, reason=reason),
    }
    event = Event(reason=reason, message=message, warning=kind is ConditionType.FAILED)
    return _decision(job, status, conditions, event)


def _decision(
    job: _SampleJob,
    status: SampleJobStatus,
    conditions: Mapping[ConditionType, State] | None = None,
    *events: Event,
) -> Plan:
    return Plan(status=to_wire(_finished(job, status, conditions or {})), is_decision=True, events=events)


def _finished(job: _SampleJob, status: SampleJobStatus, conditions: Mapping[ConditionType, State]) -> SampleJobStatus:
    """The status with its conditions, and the phase that follows from them."""
    new = states.set_conditions(status.conditions, conditions, now=job.now, generation=job.generation)
    phase = job_phase(new, has_started=status.started_at is not None)
    return replace(status, conditions=new, phase=phase, observed_generation=job.generation)


# --------------------------------------------------------------------------------------------------------- convergence


def _converge(job: _SampleJob) -> Plan:
    """Make what is there what should be there, and tell how it is."""
    actions, events = remove_stuck_pods(job.observed.pods, dead_nodes=job.observed.dead_nodes, now=job.now)
    problem: State | None = None
    waiting: State | None = None
    if job.job is not None:
        _start_or_stop(job, job.job, actions)
    elif not job.spec.suspend and not job.is_draining:
        waiting = _waiting(job)
        if waiting is None:
            objects = _objects(job)
            if isinstance(objects, State):
                problem = objects
            else:
                actions += [Create(manifest=manifest) for manifest in objects]
                spec = objects[-1]["spec"]
                message = f"{spec['completions']} shards, {spec['parallelism']} at a time: Job {job_name(job.name)}"
                events.append(Event(reason=Reason.ATTEMPT_STARTED, message=message))
        elif waiting.reason is Reason.RUN_NOT_FOUND:
            problem, waiting = waiting, None
    status = _described(job, problem=problem, waiting=waiting)
    new, old = to_wire(status), job.object.get("status") or {}
    due = stuck_pods_due(job.observed.pods, now=job.now)
    if problem is not None:
        due.append(_LOOK_AGAIN_SECONDS)
    if job.spec.active_deadline_seconds and status.started_at is not None:
        due.append(status.started_at + job.spec.active_deadline_seconds - job.now)
    return Plan(
        status=None if new == old else new,
        is_progress_only=not actions and not events and _decisive(new) == _decisive(old),
        actions=tuple(actions),
        events=tuple(events),
        requeue_seconds=min((max(1.0, seconds + 0.5) for seconds in due), default=None),
    )


def _decisive(status: Object) -> Object:
    """A status without what may wait for the next flush."""
    return {key: value for key, value in status.items() if key not in ("shards", "outputs", "observedGeneration")}


def _start_or_stop(job: _SampleJob, found: JobView, actions: list[Action]) -> None:
    """Suspend or resume the Job. Where a queue decides about that, stopping it means deleting it: clips stay."""
    if job.spec.suspend:
        if job.queue is not None:
            actions.append(Delete(kind="Job", name=found.name, uid=found.uid))
        elif not found.suspended:
            actions.append(SetSuspend(name=found.name, uid=found.uid, suspend=True))
    elif found.suspended and job.queue is None and job.kept is not None:
        actions.append(SetSuspend(name=found.name, uid=found.uid, suspend=False))


def _waiting(job: _SampleJob) -> State | None:
    """What stands between the object and its Job."""
    if job.status.checkpoint.uri is not None:
        return None
    ref = job.spec.checkpoint.run_ref
    assert ref is not None, "a URI is decided at once"
    if job.run is None:
        message = f"spec.checkpoint.runRef: there is no TrainingRun {ref.name} in this namespace"
        return State(status=False, reason=Reason.RUN_NOT_FOUND, message=message)
    phase = (job.run.get("status") or {}).get("phase") or "Pending"
    what = "a checkpoint" if ref.step == "latest" else f"the checkpoint of step {ref.step}"
    message = f"run {ref.name} is {phase} and has not saved {what} yet"
    return State(status=False, reason=Reason.WAITING_FOR_CHECKPOINT, message=message)


def _objects(job: _SampleJob) -> list[Object] | State:
    """What is made; or why it cannot be."""
    if job.kept is not None and job.snapshot is not None:
        snapshot, data = job.snapshot, {key: job.kept[key] for key in (PROMPTS_KEY, CONFIG_KEY) if key in job.kept}
    elif job.status.resolved.config_map is not None:
        message = f"the ConfigMap {job.status.resolved.config_map} that this job was begun with is gone"
        return State(status=False, reason=Reason.CONFIG_MISSING, message=message)
    else:
        found = _data(job)
        if isinstance(found, State):
            return found
        data = found
        taken = _take_snapshot(job, num_prompts=len(prompt_lines(data[PROMPTS_KEY])))
        if isinstance(taken, State):
            return taken
        snapshot = taken
    objects = objects_of(job.object, job.spec, job.status.checkpoint, snapshot, data)
    return _refused(job, objects) or objects


def _refused(job: _SampleJob, objects: list[Object]) -> State | None:
    for manifest in objects:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        child = job.observed.children.get((kind, name))
        if child is not None and child.owner_uid != job.object["metadata"]["uid"]:
            message = f"the {kind} {name} in this namespace does not belong to this SampleJob"
            return State(status=False, reason=Reason.NAME_CONFLICT, message=message)
        refusal = job.observed.rejected.get(name)
        if refusal is not None:
            return State(status=False, reason=Reason.REJECTED, message=f"{kind} {name}: {refusal}")
    return None


def _data(job: _SampleJob) -> dict[str, str] | State:
    """The files of the pods."""
    spec = job.spec
    data: dict[str, str] = {}
    if spec.prompts.inline is not None:
        data[PROMPTS_KEY] = "\n".join(spec.prompts.inline) + "\n"
    if spec.config.inline is not None:
        data[CONFIG_KEY] = spec.config.inline
    refs: tuple[tuple[str, ConfigMapRef | None, str], ...] = (
        ("prompts.ref", spec.prompts.ref, PROMPTS_KEY),
        ("config.ref", spec.config.ref, CONFIG_KEY),
    )
    for name, ref, key in refs:
        if ref is None:
            continue
        found = job.observed.config_maps.get(ref.config_map)
        if found is None or ref.key not in found:
            what = f"ConfigMap {ref.config_map}" if found is None else f"key {ref.key} in ConfigMap {ref.config_map}"
            return State(status=False, reason=Reason.CONFIG_MISSING, message=f"spec.{name}: there is no {what}")
        data[key] = found[ref.key]
    if not prompt_lines(data[PROMPTS_KEY]):
        return State(status=False, reason=Reason.INVALID_SPEC, message="spec.prompts: there is no prompt, only blanks")
    return data


def _take_snapshot(job: _SampleJob, *, num_prompts: int) -> Snapshot | State:
    """What holds from now on. The object's own word comes first, then the run's, then the profile's."""
    spec = job.spec
    run_spec, run_image = None, None
    if spec.checkpoint.run_ref is not None:
        if job.run is None:
            message = f"the TrainingRun {spec.checkpoint.run_ref.name} is gone"
            return State(status=False, reason=Reason.RUN_NOT_FOUND, message=message)
        run_spec, run_status = _read_run(job.run)
        run_image = run_status.resolved.image or run_spec.image
    ref = spec.profile_ref or job.status.resolved.profile
    source = _profile(job, ref)
    if ref is not None and source is None:
        message = f"there is no {ref.kind} {ref.name}, which spec.profileRef or the run names"
        return State(status=False, reason=Reason.PROFILE_NOT_FOUND, message=message)
    profile = TrainingProfileSpec() if source is None else from_wire(TrainingProfileSpec, source.get("spec") or {})
    image = spec.image or run_image or profile.image
    if image is None:
        message = "spec.image is missing, and neither the run nor a profile gives one: name an image"
        return State(status=False, reason=Reason.INVALID_SPEC, message=message)
    accesses = [access for access in (spec.storage, run_spec and run_spec.storage, profile.storage) if access]
    secrets = [access.secret_ref for access in accesses if access.secret_ref is not None]
    endpoints = [access.endpoint for access in accesses if access.endpoint is not None]
    return Snapshot(
        profile=profile,
        image=image,
        procs_per_node=procs_per_node(spec.procs_per_node, profile, spec.pod_template),
        num_shards=-(-num_prompts // spec.prompts_per_shard),
        queue=spec.scheduling.queue or profile.scheduling.queue,
        storage_secret=secrets[0].name if secrets else None,
        endpoint=endpoints[0] if endpoints else None,
    )


def _profile(job: _SampleJob, ref: ProfileRef | None) -> Object | None:
    key = profile_key(ref, job.namespace)
    return job.observed.default_profile if key is None else job.observed.objects.get(key)


# --------------------------------------------------------------------------------------------------------- description


def _described(job: _SampleJob, *, problem: State | None, waiting: State | None) -> SampleJobStatus:
    """The status as it follows from what is there."""
    found, pods = job.job, job.observed.pods
    conditions: dict[ConditionType, State] = {
        ConditionType.ACCEPTED: problem or State(status=True, reason=Reason.ACCEPTED),
        ConditionType.SUSPENDED: _suspended_state(job),
        ConditionType.SCHEDULED: waiting or _scheduled(job),
        ConditionType.RUNNING: running_state(pods),
    }
    status = job.status
    if found is not None:
        status = replace(_with_shards(job, status, found), job=found.name)
        status = replace(status, resolved=_resolved(job, found))
    if status.started_at is None and any(pod.ready or pod.exit_code is not None for pod in pods):
        status = replace(status, started_at=job.now)
    return _finished(job, status, conditions)


def _resolved(job: _SampleJob, found: JobView) -> ResolvedStatus:
    resolved = replace(job.status.resolved, config_map=found.config)
    digest = next((pod.image_id for pod in job.observed.pods if pod.image_id), resolved.image_digest)
    if job.snapshot is not None:
        resolved = replace(
            resolved,
            image=job.snapshot.image,
            procs_per_node=job.snapshot.procs_per_node,
            queue=job.snapshot.queue,
        )
    return replace(resolved, image_digest=digest)


def _scheduled(job: _SampleJob) -> State:
    if job.job is not None and job.job.suspended and job.queue is not None:
        return State(status=False, reason=Reason.WAITING_FOR_QUOTA)
    return scheduled_state(job.observed.pods)


def _suspended_state(job: _SampleJob) -> State:
    if job.spec.suspend:
        ending = sum(pod.is_live for pod in job.observed.pods)
        message = f"{ending} pods still finish their clip" if ending else ""
        return State(status=True, reason=Reason.SUSPENDED, message=message)
    if job.queue is not None and job.job is not None and job.job.suspended:
        return State(status=True, reason=Reason.QUEUED, message=f"the queue {job.queue} holds it back")
    return State(status=False, reason=Reason.RESUMED)


def _with_shards(job: _SampleJob, status: SampleJobStatus, found: JobView) -> SampleJobStatus:
    """The status with what became of the shards."""
    done, failed = parse_indexes(found.completed_indexes), parse_indexes(found.failed_indexes)
    if found.condition("Complete") or found.condition("SuccessCriteriaMet"):
        done = set(range(found.completions))
    shards = ShardsStatus(
        total=found.completions,
        active=found.active,
        done=len(done),
        failed=len(failed),
        summary=f"{len(done)}/{found.completions}",
    )
    known = {output.index: output for output in status.outputs}
    # Failures first: where there are more shards than room, they are what somebody looks for.
    shown = [_failed_output(job, index, known.get(index)) for index in sorted(failed)[:_MAX_OUTPUTS]]
    shown += [_done_output(job, index) for index in sorted(done)[: _MAX_OUTPUTS - len(shown)]]
    return replace(status, shards=shards, outputs=tuple(sorted(shown, key=lambda output: output.index)))


def _done_output(job: _SampleJob, index: int) -> SampleOutput:
    clips = None
    if job.snapshot is not None and job.kept is not None:
        clips = clips_of_shard(index, job.spec, job.snapshot, job.kept)
    return SampleOutput(index=index, state="Done", uri=job.spec.output_uri, clips=clips)


def _failed_output(job: _SampleJob, index: int, known: SampleOutput | None) -> SampleOutput:
    """What is known of a shard's last failure, which outlives its pod."""
    ended = [pod for pod in job.observed.pods if pod.index == index and pod.exit_code not in (None, 0)]
    if not ended:
        return known if known is not None and known.state == "Failed" else SampleOutput(index=index, state="Failed")
    pod = max(ended, key=lambda pod: pod.finished_at or 0.0)
    told: Any = (pod.verdict or {}).get("message") or pod.last_words or pod.end_reason
    message = f"pod {pod.name} on {pod.node}: {told}"[:_MAX_MESSAGE]
    return SampleOutput(index=index, state="Failed", exit_code=pod.exit_code, message=message)


def parse_indexes(text: str) -> set[int]:
    """Kubernetes' way to write sets of indexes: `0-3,7`."""
    found: set[int] = set()
    for part in re.findall(r"[0-9]+(?:-[0-9]+)?", text):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


# ------------------------------------------------------------------------------------------------------ after the end


def _after_the_end(job: _SampleJob) -> Plan:
    """Nothing runs any more; what is kept is kept for its time."""
    actions, events = remove_stuck_pods(job.observed.pods, dead_nodes=job.observed.dead_nodes, now=job.now)
    found = job.job
    if found is not None and not any(
        found.condition(kind) for kind in ("Complete", "SuccessCriteriaMet", "FailureTarget", "Failed")
    ):
        if job.status.resolved.queue is not None:
            actions.append(Delete(kind="Job", name=found.name, uid=found.uid))
        elif not found.suspended:
            actions.append(SetSuspend(name=found.name, uid=found.uid, suspend=True))
    ttl, ended_at = job.spec.cleanup.ttl_seconds_after_finished, job.status.ended_at
    left = None if ttl is None or ended_at is None else ended_at + ttl - job.now
    return Plan(
        actions=tuple(actions),
        events=tuple(events),
        delete_self=left is not None and left <= 0,
        requeue_seconds=None if left is None else max(1.0, left + 0.5),
    )


def _unreadable(observed: Observation, message: str) -> Plan:
    """A spec from before a change of the schema."""
    state = State(status=False, reason=Reason.INVALID_SPEC, message=message)
    generation = observed.body["metadata"].get("generation", 0)
    conditions = states.set_conditions((), {ConditionType.ACCEPTED: state}, now=observed.now, generation=generation)
    old = observed.body.get("status") or {}
    if any(condition.get("message") == message for condition in old.get("conditions", ())):
        return Plan()
    new = to_wire(SampleJobStatus(phase="Pending", conditions=conditions))
    return Plan(status={**old, **new}, events=(Event(reason=Reason.INVALID_SPEC, message=message, warning=True),))
