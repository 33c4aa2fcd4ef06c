"""What to do about a BatchSearch. Pure, like `planner.py`: a bucket is searched by one pod at a time.

Find out what holds and what it is called → take the table that is there already, or: give a bucket the number of a
probe → create its Job → read what the pod said when it ended → the next one. When every bucket has a batch size, the
table is made. Numbers of probes and what was measured are written before anything follows from them, so an operator
that dies anywhere continues where it was, and a probe that was disturbed is followed by one that knows what it knew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from opensora_operator import status as states
from opensora_operator.api import (
    BatchSearchSpec,
    BatchSearchStatus,
    BucketResult,
    ProfileRef,
    ShardsStatus,
    TrainingProfileSpec,
)
from opensora_operator.constants import ExitCode
from opensora_operator.observation import Observation
from opensora_operator.plans import Action, Create, Delete, Event, Needs, Object, Plan, SetSuspend
from opensora_operator.pod_states import (
    BROKEN_IMAGE,
    STUCK_POD_SECONDS,
    job_phase,
    remove_stuck_pods,
    running_state,
    scheduled_state,
    stuck_pods_due,
)
from opensora_operator.policies.causes import cause_of
from opensora_operator.profiles import procs_per_node, profile_key
from opensora_operator.reasons import ConditionType, Reason
from opensora_operator.resources import CONFIG_KEY
from opensora_operator.search_resources import (
    Report,
    Snapshot,
    buckets_of,
    common_step_seconds,
    configuration_of,
    job_name,
    probe_of,
    read_table,
    search_key,
    table_name,
    table_of,
)
from opensora_operator.status import State
from opensora_operator.views import JobView, PodView
from opensora_operator.wire import WireError, from_wire, to_wire

KIND = "BatchSearch"
_LOOK_AGAIN_SECONDS = 30.0
_MAX_MESSAGE = 1000
_DISRUPTIONS = (Reason.DISRUPTED, Reason.PREEMPTED, Reason.NODE_FAILURE, Reason.STOPPED)
_EVICTED_BY_KUBELET = "TerminationByKubelet"
_ENDED = ("Complete", "SuccessCriteriaMet", "FailureTarget", "Failed")


def needs(search: Object) -> Needs:
    """What has to be looked up for a BatchSearch."""
    try:
        spec, status = _read(search)
    except WireError:
        return Needs()
    if status.phase in states.TERMINAL:
        return Needs()
    children = [] if status.key is None else [("ConfigMap", table_name(status.key))]
    if status.resolved.config_map is not None:
        children.append(("ConfigMap", status.resolved.config_map))
    if _has_begun(status):
        return Needs(children=tuple(children), stuck_pod_seconds=float(STUCK_POD_SECONDS))
    profile = profile_key(spec.profile_ref, search["metadata"]["namespace"])
    return Needs(
        objects=() if profile is None else (profile,),
        default_profile=profile is None,
        config_maps=() if spec.config.ref is None else (spec.config.ref.config_map,),
        children=tuple(children),
        stuck_pod_seconds=float(STUCK_POD_SECONDS),
    )


def plan(observed: Observation) -> Plan:
    """What to do now."""
    try:
        search = _Search(observed)
    except WireError as error:
        return _unreadable(observed, str(error))
    if search.is_over:
        return _after_the_end(search)
    return _decide(search) or _converge(search)


def _read(body: Object) -> tuple[BatchSearchSpec, BatchSearchStatus]:
    return from_wire(BatchSearchSpec, body.get("spec") or {}), from_wire(BatchSearchStatus, body.get("status") or {})


def _has_begun(status: BatchSearchStatus) -> bool:
    """A probe has its number: from now on the search's own ConfigMap tells what holds."""
    return any(result.probe for result in status.results)


class _Search:
    """A BatchSearch with what can be read off it."""

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

    @property
    def results(self) -> tuple[BucketResult, ...]:
        return self.status.results

    @property
    def running(self) -> list[BucketResult]:
        return [result for result in self.results if result.state == "Running"]

    @property
    def step_seconds(self) -> float | None:
        """How long a step may take, once that is known."""
        if self.spec.objective == "MaxFit":
            return None
        if self.spec.step_seconds is not None:
            return self.spec.step_seconds
        return None if self.status.step_seconds is None else float(self.status.step_seconds)

    def job(self, probe: int) -> JobView | None:
        return next((job for job in self.observed.jobs if job.name == job_name(self.name, probe)), None)

    def pods(self, probe: int) -> list[PodView]:
        return [pod for pod in self.observed.pods if pod.attempt == probe]

    @cached_property
    def stale_jobs(self) -> list[JobView]:
        """Jobs that may run although nobody waits for them any more."""
        current = {job_name(self.name, result.probe) for result in self.running}
        return [job for job in self.observed.jobs if job.name not in current and not _has_ended(job)]

    @cached_property
    def begun(self) -> Mapping[str, str] | None:
        """Data of the ConfigMap that the probes read; None where it is not there."""
        name = self.status.resolved.config_map
        child = None if name is None else self.observed.children.get(("ConfigMap", name))
        return None if child is None else child.data

    @cached_property
    def table(self) -> Mapping[str, str] | None:
        """Data of the ConfigMap of the table; None where it is not there."""
        if self.status.key is None:
            return None
        child = self.observed.children.get(("ConfigMap", table_name(self.status.key)))
        return None if child is None else child.data

    def read_table(self) -> list[BucketResult] | State | None:
        """What the table says; or that something else has its name; None where there is none."""
        if self.table is None or self.status.key is None:
            return None
        found = read_table(self.table, self.status.key, [result.bucket for result in self.results])
        if found is not None:
            return found
        message = f"the ConfigMap {table_name(self.status.key)} in this namespace is no table of this search: delete it"
        return State(status=False, reason=Reason.NAME_CONFLICT, message=message)


def _has_ended(job: JobView) -> bool:
    return any(job.condition(kind) for kind in _ENDED)


# ----------------------------------------------------------------------------------------------------------- decisions


def _decide(search: _Search) -> Plan | None:
    """The write that has to come before anything else is done, if there is one."""
    if not _has_begun(search.status):
        return _begin(search)
    broken = next((pod for pod in search.observed.pods if pod.waiting_reason == BROKEN_IMAGE), None)
    if broken is not None:
        return _over(search, Reason.IMAGE_PULL_FAILED, f"pod {broken.name}: {broken.waiting_message or BROKEN_IMAGE}")
    return _collect(search) or _equalise(search) or _conclude(search) or _assign(search)


def _begin(search: _Search) -> Plan | None:
    """Say what the search is called and what it consists of; then, whether its table is there already."""
    wanted = _wanted(search)
    if isinstance(wanted, State):
        return None
    if wanted.key != search.status.key or wanted.configuration != search.status.resolved.config_map:
        results = tuple(BucketResult(bucket=name, state="Pending") for name in wanted.buckets)
        resolved = replace(
            search.status.resolved,
            config_map=wanted.configuration,
            profile=wanted.profile,
            image=wanted.snapshot.image,
            procs_per_node=wanted.snapshot.procs_per_node,
            world_size=wanted.snapshot.procs_per_node,
            queue=wanted.snapshot.queue,
        )
        return _decision(search, replace(search.status, key=wanted.key, results=results, resolved=resolved))
    found = search.read_table()
    if isinstance(found, list):
        return _complete(search, replace(search.status, results=tuple(found), reused=True), Reason.CACHE_HIT)
    if found is None and search.begun is not None:
        return _assign(search)
    return None


def _collect(search: _Search) -> Plan | None:
    """Write down what became of the probes that have ended."""
    status = search.status
    for result in search.running:
        ended = _ended_result(search, result)
        if ended is None:
            continue
        new, report, is_hopeless = ended
        if new.state == "Found" and report is not None:
            facts = json.dumps(report.facts or {}, sort_keys=True)
            if status.facts and facts != status.facts:
                new = _failed(new, _disagreement(status.facts, facts))
            else:
                status = replace(status, facts=facts, empty_bytes=max(status.empty_bytes, report.empty_bytes))
        status = replace(status, results=_with_result(status.results, new))
        if is_hopeless:
            return _over(search, Reason.NON_RETRYABLE_EXIT, f"{new.bucket}: {new.message}", status)
    return None if status == search.status else _decision(search, status)


_Ended = tuple[BucketResult, Report | None, bool]
"""What became of a bucket, the report, and whether all others would end so, too."""


def _ended_result(search: _Search, result: BucketResult) -> _Ended | None:
    """What became of a probe; None while it goes on."""
    job, pods = search.job(result.probe), search.pods(result.probe)
    ended = [pod for pod in pods if pod.exit_code is not None]
    pod = max(ended, key=lambda pod: pod.finished_at or 0.0, default=None)
    if job is None or job.deleting:
        # Somebody deleted it. Without any trace of a pod, it may as well never have been made.
        is_gone = pod is not None and not any(other.is_live for other in pods)
        return (*_pending(result, _report(pod)), False) if is_gone else None
    if job.condition("Complete") or job.condition("SuccessCriteriaMet"):
        report = _report(pod)
        if report is None or report.batch_size is None:
            return _retried(search, result, report, "the probe left no result"), report, False
        return _found(result, report), report, False
    if job.condition("FailureTarget") or job.condition("Failed"):
        return _failure(search, result, job, pod)
    limit = search.spec.trial_timeout_seconds
    if job.started is not None and not job.suspended and search.now - job.started > limit:
        return _retried(search, result, None, f"longer than trialTimeoutSeconds={limit}"), None, False
    return None


def _failure(search: _Search, result: BucketResult, job: JobView, pod: PodView | None) -> _Ended:
    report = _report(pod)
    if pod is None:
        cause = cause_of(job, ())
        if cause.reason in _DISRUPTIONS:
            return *_pending(result, None), False
        return _retried(search, result, None, cause.message), None, False
    message = report.reason if report is not None and report.reason else pod.last_words
    message = f"pod {pod.name} ended with {pod.exit_code}: {message or pod.end_reason}"
    if pod.end_reason == "OOMKilled":
        return _killed_for_memory(result, report, pod), report, False
    if pod.disruption is not None or pod.exit_code == ExitCode.STOPPED or pod.deleting_since is not None:
        if pod.disruption is not None and pod.disruption.reason == _EVICTED_BY_KUBELET:
            return _retried(search, result, report, f"{message}: {pod.disruption.message}"), report, False
        return *_pending(result, report), False
    if pod.exit_code == ExitCode.OUT_OF_MEMORY:
        return replace(_failed(_learned(result, report), message), batch=0), report, False
    if pod.exit_code in (ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG):
        return _failed(_learned(result, report), message), report, pod.exit_code == ExitCode.CONFIG
    return _retried(search, result, report, message), report, False


def _report(pod: PodView | None) -> Report | None:
    return None if pod is None else Report.from_message(pod.verdict)


def _learned(result: BucketResult, report: Report | None) -> BucketResult:
    """With what the probe knew: it began with all that was known."""
    return result if report is None or not report.known else replace(result, evidence=report.known)


def _found(result: BucketResult, report: Report) -> BucketResult:
    return replace(
        _learned(result, report),
        state="Found",
        batch=report.batch_size,
        peak_bytes=report.peak_bytes,
        seconds=f"{report.seconds_per_step or 0:.4g}",
        message="",
    )


def _pending(result: BucketResult, report: Report | None) -> tuple[BucketResult, Report | None]:
    """Another probe goes on where this one was disturbed."""
    return replace(_learned(result, report), state="Pending"), report


def _failed(result: BucketResult, message: str) -> BucketResult:
    return replace(result, state="Failed", message=message[:_MAX_MESSAGE])


def _retried(search: _Search, result: BucketResult, report: Report | None, message: str) -> BucketResult:
    """A failure that may not come again; too many of them are the end of it."""
    result = replace(_learned(result, report), failures=result.failures + 1, message=message[:_MAX_MESSAGE])
    return replace(result, state="Failed" if result.failures > search.spec.retries_per_bucket else "Pending")


def _killed_for_memory(result: BucketResult, report: Report | None, pod: PodView) -> BucketResult:
    """The whole pod was killed, and with it who would have said so. It had said which batch it tries."""
    result = _learned(result, report)
    if report is None or not report.trying:
        return _failed(result, f"pod {pod.name} exceeded its memory limit before a clip was measured: raise the limit")
    evidence = " ".join([*result.evidence.split(), f"{report.trying}:oom"])
    return replace(result, state="Pending", evidence=evidence)


def _disagreement(first: str, second: str) -> str:
    ours, theirs = json.loads(first), json.loads(second)
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    told = ", ".join(f"{name} {theirs.get(name)} instead of {ours.get(name)}" for name in names)
    return f"measured on something else than the other buckets: {told}; select nodes of one kind"


def _with_result(results: Sequence[BucketResult], new: BucketResult) -> tuple[BucketResult, ...]:
    return tuple(new if result.bucket == new.bucket else result for result in results)


def _equalise(search: _Search) -> Plan | None:
    """Once every bucket has its largest batch: how long a step may take, and which buckets have to step back."""
    results, status = search.results, search.status
    if search.spec.objective == "MaxFit" or search.step_seconds is not None:
        return None
    if any(result.state != "Found" for result in results):
        return None
    seconds = f"{common_step_seconds(results):.6g}"
    results = tuple(
        replace(result, state="Pending")
        if float(result.seconds or 0) > float(seconds) and result.batch != 1
        else result
        for result in results
    )
    return _decision(search, replace(status, step_seconds=seconds, results=results))


def _seconds(result: BucketResult) -> float:
    return float(result.seconds or 0)


def _conclude(search: _Search) -> Plan | None:
    """The end, when every bucket has come to one."""
    results = search.results
    if any(result.state in ("Pending", "Running") for result in results):
        return None
    failed = [result for result in results if result.state == "Failed"]
    if failed:
        words = "; ".join(f"{result.bucket}: {result.message}" for result in failed)
        return _over(
            search, Reason.BUCKETS_FAILED, f"{len(failed)} of {len(results)} buckets have no batch size: {words}"
        )
    if isinstance(search.read_table(), list):
        return _complete(search, search.status, Reason.SEARCH_COMPLETE)
    return None


def _assign(search: _Search) -> Plan | None:
    """Give waiting buckets their probes' numbers, as far as there is room."""
    if search.spec.suspend:
        return None
    room = search.spec.parallel_trials - len(search.running) - len(search.stale_jobs)
    waiting = [result for result in search.results if result.state == "Pending"][: max(0, room)]
    if not waiting:
        return None
    number = max(result.probe for result in search.results)
    results: tuple[BucketResult, ...] = search.results
    for offset, result in enumerate(waiting, start=1):
        results = _with_result(results, replace(result, state="Running", probe=number + offset))
    names = ", ".join(result.bucket for result in waiting)
    event = Event(reason=Reason.ATTEMPT_STARTED, message=f"measuring {names}")
    return _decision(search, replace(search.status, results=results), {}, event)


def _complete(search: _Search, status: BatchSearchStatus, reason: Reason) -> Plan:
    assert status.key is not None
    status = replace(status, table=table_name(status.key))
    message = f"{len(status.results)} batch sizes in the ConfigMap {status.table}"
    return _ended(search, status, ConditionType.COMPLETE, reason, message)


def _over(search: _Search, reason: Reason, message: str, status: BatchSearchStatus | None = None) -> Plan:
    return _ended(search, status or search.status, ConditionType.FAILED, reason, message)


def _ended(search: _Search, status: BatchSearchStatus, kind: ConditionType, reason: Reason, message: str) -> Plan:
    conditions = {
        kind: State(status=True, reason=reason, message=message),
        ConditionType.ACCEPTED: State(status=True, reason=Reason.ACCEPTED),
        ConditionType.RUNNING: State(status=False, reason=reason),
        ConditionType.SUSPENDED: State(status=False, reason=reason),
    }
    event = Event(reason=reason, message=message[:_MAX_MESSAGE], warning=kind is ConditionType.FAILED)
    return _decision(search, replace(status, ended_at=search.now), conditions, event)


def _decision(
    search: _Search,
    status: BatchSearchStatus,
    conditions: Mapping[ConditionType, State] | None = None,
    *events: Event,
) -> Plan:
    return Plan(status=to_wire(_finished(search, status, conditions or {})), is_decision=True, events=events)


def _finished(
    search: _Search, status: BatchSearchStatus, conditions: Mapping[ConditionType, State]
) -> BatchSearchStatus:
    """The status with its conditions and numbers, and the phase that follows from them."""
    new = states.set_conditions(status.conditions, conditions, now=search.now, generation=search.generation)
    done, failed, active = (
        sum(result.state == state for result in status.results) for state in ("Found", "Failed", "Running")
    )
    total = len(status.results)
    buckets = ShardsStatus(total=total, active=active, done=done, failed=failed, summary=f"{done}/{total}")
    phase = job_phase(new, has_started=status.started_at is not None)
    return replace(status, conditions=new, phase=phase, buckets=buckets, observed_generation=search.generation)


# --------------------------------------------------------------------------------------------------------- convergence


def _converge(search: _Search) -> Plan:
    """Make what is there what should be there, and tell how it is."""
    actions, events = remove_stuck_pods(search.observed.pods, dead_nodes=search.observed.dead_nodes, now=search.now)
    problem = _prepare(search, actions) if not _has_begun(search.status) else _probe(search, actions)
    actions += [Delete(kind="Job", name=job.name, uid=job.uid) for job in search.stale_jobs if not job.deleting]
    status = _described(search, problem)
    new, old = to_wire(status), search.object.get("status") or {}
    due = stuck_pods_due(search.observed.pods, now=search.now)
    if problem is not None:
        due.append(_LOOK_AGAIN_SECONDS)
    for result in search.running:
        job = search.job(result.probe)
        if job is not None and job.started is not None and not job.suspended:
            due.append(job.started + search.spec.trial_timeout_seconds - search.now)
    return Plan(
        status=None if new == old else new,
        actions=tuple(actions),
        events=tuple(events),
        requeue_seconds=min((max(1.0, seconds + 0.5) for seconds in due), default=None),
    )


def _prepare(search: _Search, actions: list[Action]) -> State | None:
    """Before the first probe: the ConfigMap that all of them read."""
    wanted = _wanted(search)
    if isinstance(wanted, State):
        return wanted
    found = search.read_table()
    if isinstance(found, State):
        return found
    if search.begun is None and not search.spec.suspend:
        manifest = configuration_of(search.object, wanted.snapshot, wanted.data)
        return _make(search, actions, manifest)
    return None


def _probe(search: _Search, actions: list[Action]) -> State | None:
    """The Jobs of the probes that have numbers; and at last the table."""
    if search.begun is None:
        message = f"the ConfigMap {search.status.resolved.config_map} that this search was begun with is gone"
        return State(status=False, reason=Reason.CONFIG_MISSING, message=message)
    snapshot = Snapshot.from_data(search.begun)
    problem = None
    for result in search.running:
        job = search.job(result.probe)
        if job is not None:
            _start_or_stop(search, snapshot, job, actions)
        elif not search.spec.suspend and not search.pods(result.probe):
            assert search.status.resolved.config_map is not None
            manifest = probe_of(
                search.object,
                search.spec,
                snapshot,
                configuration=search.status.resolved.config_map,
                result=result,
                step_seconds=search.step_seconds,
            )
            problem = _make(search, actions, manifest) or problem
    if all(result.state == "Found" for result in search.results):
        found = search.read_table()
        if isinstance(found, State):
            return found
        manifest = _table(search)
        problem = _make(search, actions, manifest)
    return problem


def _table(search: _Search) -> Object:
    status = search.status
    assert status.key is not None
    return table_of(
        search.object,
        search.spec,
        status.key,
        facts=status.facts,
        empty_bytes=status.empty_bytes,
        step_seconds=search.step_seconds,
        results=status.results,
    )


def _make(search: _Search, actions: list[Action], manifest: Object) -> State | None:
    """Create an object; or say why that cannot be."""
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    refusal = search.observed.rejected.get(name)
    if refusal is not None:
        return State(status=False, reason=Reason.REJECTED, message=f"{kind} {name}: {refusal}")
    child = search.observed.children.get((kind, name))
    if child is not None and child.owner_uid != search.object["metadata"]["uid"]:
        message = f"the {kind} {name} in this namespace does not belong to this BatchSearch"
        return State(status=False, reason=Reason.NAME_CONFLICT, message=message)
    actions.append(Create(manifest=manifest))
    return None


def _start_or_stop(search: _Search, snapshot: Snapshot, job: JobView, actions: list[Action]) -> None:
    """Suspend or resume a Job. Where a queue decides about that, stopping it means deleting it."""
    if job.deleting or _has_ended(job):
        return
    if search.spec.suspend:
        if snapshot.queue is not None:
            actions.append(Delete(kind="Job", name=job.name, uid=job.uid))
        elif not job.suspended:
            actions.append(SetSuspend(name=job.name, uid=job.uid, suspend=True))
    elif job.suspended and snapshot.queue is None:
        actions.append(SetSuspend(name=job.name, uid=job.uid, suspend=False))


# ------------------------------------------------------------------------------------------------- what a search is


class _Wanted:
    """What holds for a search, read off its sources: until the first probe they may change."""

    def __init__(self, search: _Search, snapshot: Snapshot, profile: Object | None, data: dict[str, str]) -> None:
        self.snapshot = snapshot
        self.data = data
        self.profile = None if profile is None else ProfileRef(kind=profile["kind"], name=profile["metadata"]["name"])
        self.configuration: str = configuration_of(search.object, snapshot, data)["metadata"]["name"]
        self.buckets: list[str] = []
        self.key = ""


def _wanted(search: _Search) -> _Wanted | State:
    """What holds; or why that cannot be said."""
    spec = search.spec
    for name, degree in (("tensor", spec.parallelism.tensor), ("pipeline", spec.parallelism.pipeline)):
        if (degree or 1) > 1:
            return _invalid(f"spec.parallelism.{name} = {degree}: the core has no {name} parallelism; leave it out")
    key = profile_key(spec.profile_ref, search.namespace)
    source = search.observed.default_profile if key is None else search.observed.objects.get(key)
    if spec.profile_ref is not None and source is None:
        message = f"spec.profileRef: there is no {spec.profile_ref.kind} {spec.profile_ref.name}"
        return State(status=False, reason=Reason.PROFILE_NOT_FOUND, message=message)
    profile = TrainingProfileSpec() if source is None else from_wire(TrainingProfileSpec, source.get("spec") or {})
    image = spec.image or profile.image
    if image is None:
        return _invalid("spec.image is missing, and no profile gives one: name an image")
    data: dict[str, str] = {}
    if spec.config.inline is not None:
        data[CONFIG_KEY] = spec.config.inline
    ref = spec.config.ref
    if ref is not None:
        found = search.observed.config_maps.get(ref.config_map)
        if found is None or ref.key not in found:
            what = f"ConfigMap {ref.config_map}" if found is None else f"key {ref.key} in ConfigMap {ref.config_map}"
            return State(status=False, reason=Reason.CONFIG_MISSING, message=f"spec.config.ref: there is no {what}")
        data[CONFIG_KEY] = found[ref.key]
    buckets = buckets_of(spec, data)
    if isinstance(buckets, str):
        return _invalid(buckets)
    secret = spec.storage.secret_ref or profile.storage.secret_ref
    snapshot = Snapshot(
        profile=profile,
        image=image,
        procs_per_node=procs_per_node(spec.procs_per_node, profile, spec.pod_template),
        queue=spec.scheduling.queue or profile.scheduling.queue,
        storage_secret=None if secret is None else secret.name,
        endpoint=spec.storage.endpoint or profile.storage.endpoint,
    )
    wanted = _Wanted(search, snapshot, source, data)
    wanted.buckets = buckets
    wanted.key = search_key(spec, snapshot, data, buckets)
    return wanted


def _invalid(message: str) -> State:
    return State(status=False, reason=Reason.INVALID_SPEC, message=message)


# --------------------------------------------------------------------------------------------------------- description


def _described(search: _Search, problem: State | None) -> BatchSearchStatus:
    """The status as it follows from what is there."""
    pods = search.observed.pods
    jobs = [job for result in search.running if (job := search.job(result.probe)) is not None]
    is_queued = bool(jobs) and search.status.resolved.queue is not None and all(job.suspended for job in jobs)
    scheduled = scheduled_state(pods)
    suspended = State(status=False, reason=Reason.RESUMED)
    if search.spec.suspend:
        suspended = State(status=True, reason=Reason.SUSPENDED)
    elif is_queued:
        message = f"the queue {search.status.resolved.queue} holds it back"
        suspended = State(status=True, reason=Reason.QUEUED, message=message)
        scheduled = State(status=False, reason=Reason.WAITING_FOR_QUOTA)
    conditions = {
        ConditionType.ACCEPTED: problem or State(status=True, reason=Reason.ACCEPTED),
        ConditionType.SUSPENDED: suspended,
        ConditionType.SCHEDULED: scheduled,
        ConditionType.RUNNING: running_state(pods),
    }
    status = search.status
    digest = next((pod.image_id for pod in pods if pod.image_id), status.resolved.image_digest)
    status = replace(status, resolved=replace(status.resolved, image_digest=digest))
    if status.started_at is None and any(pod.ready or pod.exit_code is not None for pod in pods):
        status = replace(status, started_at=search.now)
    return _finished(search, status, conditions)


# ------------------------------------------------------------------------------------------------------ after the end


def _after_the_end(search: _Search) -> Plan:
    """Nothing runs any more; what is kept is kept for its time. The table stays."""
    actions, events = remove_stuck_pods(search.observed.pods, dead_nodes=search.observed.dead_nodes, now=search.now)
    actions += [
        Delete(kind="Job", name=job.name, uid=job.uid)
        for job in search.observed.jobs
        if not _has_ended(job) and not job.deleting
    ]
    ttl, ended_at = search.spec.cleanup.ttl_seconds_after_finished, search.status.ended_at
    left = None if ttl is None or ended_at is None else ended_at + ttl - search.now
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
    new = to_wire(BatchSearchStatus(phase="Pending", conditions=conditions))
    return Plan(status={**old, **new}, events=(Event(reason=Reason.INVALID_SPEC, message=message, warning=True),))
