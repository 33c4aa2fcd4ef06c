"""One run's story: what its object and pods tell, as data and as a screen of text. Pure; time is an argument."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opensora_operator.api import AttemptStatus, TrainingRunSpec, TrainingRunStatus
from opensora_operator.policies.restart import budget_of
from opensora_operator.reasons import EXPLANATIONS, ConditionType, Reason
from opensora_operator.status import duration, find
from opensora_operator.views import PodView
from opensora_operator.wire import WireError, from_wire, parse_time

from osctl.client import Object
from osctl.output import Style, as_table, printable
from osctl.targets import read_status, unreadable

_SILENT_OPERATOR_SECONDS = 30.0
"""An operator that works answers a change within a second or two."""
_BAR = 24
_MAX_WORDS = 8
_MAX_PODS = 8
Paint = Callable[[str, Style], str]
_PHASES: dict[str, Style] = {"Succeeded": "good", "Running": "good", "Failed": "bad", "Restarting": "warn"}
_BAD_STATES = (
    (ConditionType.FAILED, "True"),
    (ConditionType.ACCEPTED, "False"),
    (ConditionType.RESTARTING, "True"),
    (ConditionType.SUSPENDED, "True"),
    (ConditionType.SCHEDULED, "False"),
    (ConditionType.RUNNING, "False"),
    (ConditionType.PROGRESSING, "False"),
)
_ENDED_WELL = (Reason.ALL_RANKS_SUCCEEDED, Reason.RANK_ZERO_SUCCEEDED)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The first rank that failed in an attempt."""

    attempt: int
    cause: str
    rank: int | None
    pod: str | None
    node: str | None
    exit_code: int | None
    last_words: str


@dataclass(frozen=True, kw_only=True)
class PodLine:
    """A pod that does not run as it should, or any pod in the JSON."""

    name: str
    node: str
    state: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Story:
    """What `osctl status` tells. Its JSON is this, with the status of the object as it is."""

    name: str
    namespace: str
    phase: str
    since: float
    """Seconds that the run has lasted, from its creation to its end or to now."""
    run_uri: str
    next: str
    """The next thing to do."""
    failure: Failure | None
    """Of the newest attempt that failed."""
    pods: tuple[PodLine, ...]
    unseen: tuple[str, ...]
    """What could not be looked at, and why."""
    status: TrainingRunStatus
    spec: TrainingRunSpec


def tell(body: Object, pods: Sequence[PodView] | None, *, now: float, unseen: Sequence[str] = ()) -> Story:
    """The story of a run.

    Args:
        body: the TrainingRun.
        pods: of all its attempts; None where they could not be looked at.
        now: seconds since 1970.
        unseen: what could not be looked at, and why.

    Raises:
        OsctlError: the object is of a version that this osctl cannot read.
    """
    try:
        spec = from_wire(TrainingRunSpec, body.get("spec") or {}, path="spec")
    except WireError as error:
        raise unreadable(body, error) from error
    status = read_status(body)
    created = parse_time(body["metadata"]["creationTimestamp"])
    return Story(
        name=body["metadata"]["name"],
        namespace=body["metadata"].get("namespace", ""),
        phase=status.phase or "New",
        since=max(0.0, (status.ended_at or now) - created),
        run_uri=spec.run_uri,
        next=_next_step(body, spec, status, now=now, waited=now - created),
        failure=newest_failure(status),
        pods=tuple(pod_state(pod) for pod in pods or () if pod.attempt == max(1, status.attempt)),
        unseen=tuple(unseen),
        status=status,
        spec=spec,
    )


def as_data(story: Story, body: Object) -> dict[str, Any]:
    """What `-o json` prints: names stay as they are once they are here."""
    return {
        "name": story.name,
        "namespace": story.namespace,
        "phase": story.phase,
        "seconds": round(story.since),
        "runUri": story.run_uri,
        "next": story.next,
        "firstFailure": None if story.failure is None else _camel(dataclasses.asdict(story.failure)),
        "pods": [dataclasses.asdict(pod) for pod in story.pods],
        "unseen": list(story.unseen),
        "status": body.get("status") or {},
    }


def as_text(story: Story, *, width: int, now: float, paint: Paint) -> str:
    """The screen."""
    phase = paint(story.phase, _PHASES.get(story.phase, "bold"))
    head = f"TrainingRun {story.name} in {story.namespace}: {phase}, {_since(story)}"
    parts = [
        head,
        _facts(story, width=width, now=now),
        _attempts(story, width=width, now=now),
        _pods(story, width=width),
    ]
    parts.append(_failure(story, width=width, paint=paint))
    parts += [f"not seen: {words}" for words in story.unseen]
    parts.append(_wrapped(f"next: {story.next}", width).replace("next:", paint("next:", "bold"), 1))
    return "\n\n".join(part for part in parts if part)


def as_line(story: Story) -> str:
    """The state in one line, without ages: two lines differ only where the run has changed."""
    status, progress = story.status, story.status.progress
    total = f" of {progress.total_steps}" if progress.total_steps is not None else ""
    parts = [
        story.phase,
        f"attempt {status.attempt}" if status.attempt > 1 else "",
        f"step {progress.step}{total}" if progress.step is not None else "",
        f"loss {progress.loss}" if progress.loss else "",
        f"{progress.seconds_per_step} s/step" if progress.seconds_per_step else "",
        f"checkpoint of step {status.checkpoint.latest_step}" if status.checkpoint.latest_step is not None else "",
    ]
    reason = _reason(status)
    return f"{story.name}: " + ", ".join(part for part in parts if part) + (f"; {reason}" if reason else "")


# -------------------------------------------------------------------------------------------------- the next thing


def _next_step(body: Object, spec: TrainingRunSpec, status: TrainingRunStatus, *, now: float, waited: float) -> str:
    """What the reader should do now, or that there is nothing to do."""
    name = body["metadata"]["name"]
    generation = int(body["metadata"].get("generation") or 0)
    if status.phase == "Succeeded":
        return f"nothing to do: the run is done. Weights and samples are in {spec.run_uri}"
    if status.phase == "Failed":
        return _remedy(status, ConditionType.FAILED) or "read the attempts, and start a new run"
    if status.phase is None or status.observed_generation < generation:
        what = "this run" if status.phase is None else "the last change of this run"
        if waited < _SILENT_OPERATOR_SECONDS:
            return f"wait a moment: the operator has not looked at {what} yet"
        return f"the operator has not looked at {what}: `osctl doctor` tells whether it works"
    accepted = find(status.conditions, ConditionType.ACCEPTED)
    if accepted is not None and accepted.status == "False":
        return f"{accepted.message or accepted.reason}. {_remedy(status, ConditionType.ACCEPTED)}".strip()
    if spec.requests.stop:
        return f"nothing to do: the run is being stopped; `osctl wait {name} --for failed` waits for its end"
    if spec.suspend:
        return f"`osctl resume {name}` goes on from the newest checkpoint"
    if status.phase == "Restarting":
        if status.backoff_until is not None and status.backoff_until > now:
            return f"nothing to do: attempt {status.attempt} starts in {duration(status.backoff_until - now)}"
        return f"nothing to do: attempt {status.attempt} starts as soon as the pods of the one before are gone"
    for kind in (
        ConditionType.SUSPENDED,
        ConditionType.SCHEDULED,
        ConditionType.RUNNING,
        ConditionType.PROGRESSING,
    ):
        words = _trouble(status, kind)
        if words:
            return words
    return f"nothing to do: it goes on by itself; `osctl wait {name}` ends when it does"


def _trouble(status: TrainingRunStatus, kind: ConditionType) -> str:
    """What a condition asks of a person; empty where it asks nothing."""
    found = find(status.conditions, kind)
    if found is None or found.status == ("False" if kind is ConditionType.SUSPENDED else "True"):
        return ""
    remedy = _remedy(status, kind)
    return f"{found.message}. {remedy}" if remedy and found.message else remedy


def _reason(status: TrainingRunStatus) -> str:
    """The condition that matters most of those that are not as in a run that goes on; empty where there is none."""
    if status.phase == "Succeeded":
        return ""
    for kind, bad in _BAD_STATES:
        found = find(status.conditions, kind)
        if found is not None and found.status == bad:
            return printable(f"{found.reason}: {found.message}" if found.message else found.reason)
    return ""


def _remedy(status: TrainingRunStatus, kind: ConditionType) -> str:
    found = find(status.conditions, kind)
    try:
        explanation = EXPLANATIONS[Reason(found.reason)] if found is not None else None
    except ValueError:  # of a newer operator
        return found.message if found is not None else ""
    return "" if explanation is None or explanation.remedy == "Nothing to do." else explanation.remedy


def newest_failure(status: TrainingRunStatus) -> Failure | None:
    """The first rank that failed in the newest attempt that did."""
    for record in reversed(status.attempts):
        if _is_failure(record):
            return Failure(
                attempt=record.number,
                cause=str(record.cause),
                rank=record.rank,
                pod=record.pod,
                node=record.node,
                exit_code=record.exit_code,
                last_words=record.message,
            )
    return None


def pod_state(pod: PodView) -> PodLine:
    """How a pod is, in words."""
    if pod.deleting_since is not None and pod.is_live:
        state, message = "Ending", ""
    elif pod.exit_code is not None:
        state, message = f"Ended with {pod.exit_code}", pod.end_reason
    elif pod.ready:
        state, message = "Running", ""
    elif not pod.scheduled:
        state, message = "No node", pod.unschedulable
    else:
        state, message = pod.waiting_reason or pod.phase, pod.waiting_message
    return PodLine(name=pod.name, node=pod.node, state=state, message=message)


def _is_failure(record: AttemptStatus) -> bool:
    if record.cause is None or record.cause in _ENDED_WELL or record.cause == Reason.CANCELLED:
        return False
    return budget_of(record.cause, accused_by_rank=record.rank is not None) == "failures"


# ------------------------------------------------------------------------------------------------------------- text


def _since(story: Story) -> str:
    if story.status.ended_at is not None:
        return f"after {duration(story.since)}"
    return f"for {duration(story.since)}"


def _facts(story: Story, *, width: int, now: float) -> str:
    status, progress = story.status, story.status.progress
    facts: list[tuple[str, str]] = []
    if progress.step is not None:
        total = f" of {progress.total_steps}" if progress.total_steps is not None else ""
        percent = f" ({progress.percent} %)" if progress.percent is not None else ""
        is_moving = status.phase not in ("Succeeded", "Failed", "Suspended")
        eta = f", {progress.eta} to go" if progress.eta and is_moving else ""
        facts.append(("progress", f"{_bar(progress.percent)}step {progress.step}{total}{percent}{eta}"))
    speed = [
        f"{progress.seconds_per_step} s/step" if progress.seconds_per_step else "",
        f"{progress.samples_per_second} clips/s" if progress.samples_per_second else "",
        f"goodput {progress.goodput_percent} %" if progress.goodput_percent is not None else "",
    ]
    facts.append(("speed", ", ".join(part for part in speed if part)))
    facts.append(("loss", progress.loss or ""))
    if progress.last_update is not None and status.ended_at is None:
        doing = f"{progress.state}, " if progress.state else ""
        facts.append(("reported", f"{doing}{duration(max(0.0, now - progress.last_update))} ago"))
    checkpoint = status.checkpoint
    if checkpoint.latest_step is not None:
        when = f", {duration(max(0.0, now - checkpoint.saved_at))} ago" if checkpoint.saved_at is not None else ""
        facts.append(("checkpoint", f"step {checkpoint.latest_step}{when}"))
    ranks = f", {status.resolved.world_size} ranks" if status.resolved.world_size else ""
    if status.nodes.desired:
        facts.append(("nodes", f"{status.nodes.ready} of {status.nodes.desired} ready{ranks}"))
    policy = story.spec.restart_policy
    if status.restarts or status.disruptions:
        failures = f"{status.restarts} after failures ({status.recent_restarts} of {policy.max_restarts} used)"
        facts.append(("restarts", f"{failures}, {status.disruptions} after disruptions"))
    facts += [("avoids", ", ".join(status.avoid_nodes)), ("queue", status.resolved.queue or "")]
    facts += [("samples", status.samples.sheet or ""), ("run", story.run_uri)]
    rows = [(name, text) for name, text in facts if text]
    indent = max(len(name) for name, _ in rows) + 5
    return "\n".join(_wrapped(f"  {name:<{indent - 2}}{printable(text)}", width, indent=indent) for name, text in rows)


def _bar(percent: int | None) -> str:
    """ASCII, so that every terminal shows it."""
    if percent is None:
        return ""
    full = _BAR * percent // 100
    return f"[{'#' * full}{'.' * (_BAR - full)}] "


def _attempts(story: Story, *, width: int, now: float) -> str:
    if not story.status.attempts:
        return ""
    rows = []
    for record in story.status.attempts:
        last = "" if record.last_step is None else str(record.last_step)
        steps = f"{record.first_step or 0} to {last}" if last else f"from {record.first_step or 0}"
        took = "" if record.started_at is None else duration(max(0.0, (record.ended_at or now) - record.started_at))
        where = f"rank {record.rank}" if record.rank is not None else ""
        where += f" on {record.node}" if record.node else ""
        code = f"exit {record.exit_code}" if record.exit_code else ""
        ended = record.cause or ("goes on" if record.number == story.status.attempt else "unknown")
        blame = ", ".join(part for part in (where.strip(), code) if part)
        rows.append((f"  {record.number}", steps, took, ended, blame))
    table = as_table(("  ATTEMPT", "STEPS", "TOOK", "END", "FIRST FAILED"), rows)
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in table.splitlines())


def _pods(story: Story, *, width: int) -> str:
    """Only pods that do not run: a table of hundreds that do tells nothing."""
    odd = [pod for pod in story.pods if pod.state != "Running"]
    if not odd or story.status.phase in ("Succeeded",):
        return ""
    lines = [f"{len(odd)} of {len(story.pods)} pods do not run:"]
    for pod in odd[:_MAX_PODS]:
        place = f" on {pod.node}" if pod.node else ""
        message = f": {printable(pod.message)}" if pod.message else ""
        lines.append(_wrapped(f"  {pod.name}{place}: {pod.state}{message}", width, indent=4))
    if len(odd) > _MAX_PODS:
        lines.append(f"  and {len(odd) - _MAX_PODS} more")
    return "\n".join(lines)


def _failure(story: Story, *, width: int, paint: Paint) -> str:
    failure = story.failure
    if failure is None:
        return ""
    who = f"rank {failure.rank}" if failure.rank is not None else "a pod"
    place = ", ".join(
        part
        for part in (
            f"pod {failure.pod}" if failure.pod else "",
            f"node {failure.node}" if failure.node else "",
            f"exit code {failure.exit_code}" if failure.exit_code is not None else "",
        )
        if part
    )
    head = f"first failure of attempt {failure.attempt}: {failure.cause}, {who}" + (f" ({place})" if place else "")
    head = _wrapped(head, width).replace("first failure", paint("first failure", "bold"), 1)
    words = [line for line in failure.last_words.splitlines() if line.strip()]
    shown = words[:1] + words[1:][-(_MAX_WORDS - 1) :]
    lines = [_wrapped(f"  | {printable(line)}", width, indent=4) for line in shown]
    return "\n".join([head, *lines])


def _wrapped(text: str, width: int, *, indent: int = 2) -> str:
    return "\n".join(
        textwrap.wrap(
            text,
            width=max(width, indent + 20),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
            break_long_words=False,
            drop_whitespace=True,
            replace_whitespace=False,
        )
    )


def _camel(values: dict[str, Any]) -> dict[str, Any]:
    names = {"exit_code": "exitCode", "last_words": "lastWords"}
    return {names.get(name, name): value for name, value in values.items()}
