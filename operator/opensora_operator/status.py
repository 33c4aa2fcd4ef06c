"""What is observed, as status: conditions, the one word for them, and numbers rounded so that they rarely change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from opensora_operator.api import (
    CheckpointStatus,
    Condition,
    ProgressStatus,
    RunPhase,
    SamplesStatus,
)
from opensora_operator.progress import ProgressReport
from opensora_operator.reasons import ConditionType, Reason

_MAX_MESSAGE = 1000
_HEARTBEATS = 3
"""Reports that may be missing before it is said."""

TERMINAL: tuple[RunPhase, ...] = ("Succeeded", "Failed")


@dataclass(frozen=True, kw_only=True)
class State:
    """A condition as it should be."""

    status: bool
    reason: Reason
    message: str = ""


def set_conditions(
    old: Sequence[Condition], states: Mapping[ConditionType, State], *, now: float, generation: int
) -> tuple[Condition, ...]:
    """The conditions with these states; those that are not named stay, and the time of a change is kept."""
    by_type = {condition.type: condition for condition in old}
    for kind, state in states.items():
        before = by_type.get(kind)
        status: Literal["True", "False"] = "True" if state.status else "False"
        by_type[kind] = Condition(
            type=kind,
            status=status,
            reason=state.reason,
            message=_short(state.message),
            last_transition_time=before.last_transition_time if before and before.status == status else now,
            observed_generation=generation,
        )
    order = {kind: index for index, kind in enumerate(ConditionType)}
    return tuple(sorted(by_type.values(), key=lambda condition: order.get(ConditionType(condition.type), len(order))))


def find(conditions: Sequence[Condition], kind: ConditionType) -> Condition | None:
    """The condition of a type."""
    return next((condition for condition in conditions if condition.type == kind), None)


def is_true(conditions: Sequence[Condition], kind: ConditionType, *reasons: Reason) -> bool:
    """Whether a condition holds, for one of these reasons where some are given."""
    found = find(conditions, kind)
    return found is not None and found.status == "True" and (not reasons or found.reason in reasons)


def phase_of(conditions: Sequence[Condition], *, has_job: bool) -> RunPhase:
    """The conditions of a TrainingRun in one word. Nothing else decides a phase."""
    if is_true(conditions, ConditionType.COMPLETE):
        return "Succeeded"
    if is_true(conditions, ConditionType.FAILED):
        return "Failed"
    if is_true(conditions, ConditionType.SUSPENDED, Reason.QUEUED):
        return "Queued"
    if is_true(conditions, ConditionType.SUSPENDED):
        return "Suspended"
    if is_true(conditions, ConditionType.RESTARTING):
        return "Restarting"
    if is_true(conditions, ConditionType.RUNNING):
        return "Running"
    return "Starting" if has_job else "Pending"


def progressing(report: ProgressReport | None, *, now: float, since: float | None, heartbeat: float) -> State:
    """Whether steps advance, from the newest report of the attempt.

    Args:
        report: None when there is none yet.
        now: seconds since 1970.
        since: when the attempt's pods began to run; None when they do not yet.
        heartbeat: seconds between reports.
    """
    if since is None:
        return State(status=False, reason=Reason.STARTING)
    last = report.received if report is not None else since
    if now - last > _HEARTBEATS * heartbeat:
        return State(status=False, reason=Reason.NO_HEARTBEAT, message=f"no report for {_HEARTBEATS * heartbeat:g} s")
    if report is None or report.state == "Starting":
        return State(status=False, reason=Reason.STARTING)
    still = now - report.advanced
    if report.state == "Training" and still > max(120.0, 20 * (report.seconds_per_step or 0.0)):
        return State(status=False, reason=Reason.STALLED, message=f"step {report.step} has not advanced for some time")
    reasons = {
        "Training": Reason.STEP_ADVANCING,
        "Evaluating": Reason.EVALUATING,
        "Saving": Reason.SAVING_CHECKPOINT,
        "Sampling": Reason.SAMPLING,
        "Stopping": Reason.STOPPING,
    }
    return State(status=True, reason=reasons[report.state])


def progress_of(old: ProgressStatus, report: ProgressReport) -> ProgressStatus:
    """The progress that status shows. The time of the last report is shown only together with something new."""
    total = report.total_steps
    new = ProgressStatus(
        state="Ended" if report.is_last else report.state,
        step=report.step,
        total_steps=total,
        percent=min(100, 100 * report.step // total) if total else None,
        epoch=report.epoch,
        eta_seconds=None if report.eta_seconds is None else round(report.eta_seconds),
        eta=None if report.eta_seconds is None else duration(report.eta_seconds),
        seconds_per_step=_decimal(report.seconds_per_step, digits=3),
        loss=_decimal(report.loss, digits=4),
        samples_per_second=_decimal(report.samples_per_second, digits=3),
        goodput_percent=round(100 * report.goodput),
        last_update=old.last_update,
    )
    return old if new == old else replace(new, last_update=report.received)


def checkpoint_of(old: CheckpointStatus, step: int | None, *, saved_at: float, run_uri: str) -> CheckpointStatus:
    """The newest checkpoint, which never goes back."""
    if not step or (old.latest_step is not None and step <= old.latest_step):
        return old
    uri = f"{run_uri.rstrip('/')}/checkpoints/step-{step:08d}"
    return CheckpointStatus(latest_step=step, uri=uri, saved_at=saved_at)


def samples_of(old: SamplesStatus, report: ProgressReport, *, run_uri: str) -> SamplesStatus:
    """The newest round of samples."""
    step = report.samples_step
    if step is None or step == old.last_step:
        return old
    folder = f"{run_uri.rstrip('/')}/samples/step-{step:08d}"
    return SamplesStatus(last_step=step, uri=folder, sheet=f"{folder}/sheet.png")


def duration(seconds: float) -> str:
    """A duration for people: `45s`, `1m30s`, `12m`, `1h30m`, `3d4h`."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            count, rest = divmod(whole, size)
            rest //= part
            return f"{count}{unit}{rest}{smaller}" if rest else f"{count}{unit}"
    return f"{whole}s"


def _decimal(value: float | None, *, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}g}"


def _short(message: str) -> str:
    return message if len(message) <= _MAX_MESSAGE else message[: _MAX_MESSAGE - 1] + "…"
