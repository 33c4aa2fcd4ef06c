"""`osctl top`: what runs take, and how fast they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer
from opensora_operator.api import TRAINING_RUN, AttemptStatus, TrainingRunStatus
from opensora_operator.constants import GROUP
from opensora_operator.status import duration
from opensora_operator.wire import parse_time

from osctl.client import Object
from osctl.kinds import resource_of
from osctl.options import Format, OutputFormat
from osctl.output import as_json, as_table, as_yaml
from osctl.session import Session
from osctl.targets import read_status


class Sort(StrEnum):
    """What `--sort` takes."""

    HOURS = "hours"
    NAME = "name"
    RANKS = "ranks"
    STEP_TIME = "step-time"
    GOODPUT = "goodput"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One run's line."""

    namespace: str
    name: str
    phase: str
    nodes: int
    ranks: int
    rank_hours: float
    """Of all attempts so far."""
    step: int | None
    seconds_per_step: float | None
    samples_per_second: float | None
    goodput_percent: int | None
    reported_seconds: float | None
    """Since the last report; None where the run has ended, or has never reported."""
    age_seconds: float


_ORDERS: Mapping[Sort, Callable[[Usage], Any]] = {
    Sort.HOURS: lambda usage: -usage.rank_hours,
    Sort.NAME: lambda usage: (usage.namespace, usage.name),
    Sort.RANKS: lambda usage: -usage.ranks,
    Sort.STEP_TIME: lambda usage: -(usage.seconds_per_step or 0.0),
    Sort.GOODPUT: lambda usage: 101 if usage.goodput_percent is None else usage.goodput_percent,
}
"""What comes first is what one looks for: the dearest, the slowest, the one that wastes most."""


def top(
    session: Session,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")] = False,
    selector: Annotated[str, typer.Option("--selector", "-l", metavar="LABELS", help="With these labels.")] = "",
    sort: Annotated[Sort, typer.Option("--sort", help="What comes first: the most hours, the slowest, …")] = Sort.HOURS,
    output: OutputFormat = None,
) -> None:
    """Compare what runs take and how fast they are.

    NODES and RANKS are those that a run has now. RANK-HOURS are what all its attempts took so far, ranks times hours; a
    rank has an accelerator of its own where the profile gives it one. REPORT is how long ago rank 0 has reported.

    Examples: `osctl top`, `osctl top -A --sort goodput`, `osctl top -o json`.
    """
    resource = resource_of(TRAINING_RUN)
    namespace = None if all_namespaces else session.namespace
    now = time.time()
    found = [usage_of(body, now=now) for body in session.client.list(resource, namespace, labels=selector)]
    shown = sorted(found, key=_ORDERS[sort])
    chosen = output or Format(session.settings.output)
    if chosen in (Format.JSON, Format.YAML):
        data = [_as_data(usage) for usage in shown]
        session.output.data(as_json(data) if chosen is Format.JSON else as_yaml(data))
    elif chosen is Format.NAME:
        for usage in shown:
            session.output.data(f"{TRAINING_RUN.singular}.{GROUP}/{usage.name}")
    elif shown:
        session.output.data(_table(shown, has_namespaces=all_namespaces, is_wide=chosen is Format.WIDE))
    else:
        where = "anywhere" if namespace is None else f"in namespace {namespace}"
        session.output.note(f"no {resource.plural} {where}")


def usage_of(body: Object, *, now: float) -> Usage:
    """What a run takes."""
    name = body["metadata"]["name"]
    status = read_status(body)
    progress = status.progress
    has_pods = status.phase in ("Starting", "Running")
    procs = status.resolved.procs_per_node or 1
    is_over = status.ended_at is not None
    reported = None if is_over or progress.last_update is None else max(0.0, now - progress.last_update)
    return Usage(
        namespace=body["metadata"].get("namespace", ""),
        name=name,
        phase=status.phase or "New",
        nodes=status.nodes.desired if has_pods else 0,
        ranks=status.nodes.desired * procs if has_pods else 0,
        rank_hours=_rank_seconds(status, procs, now) / 3600,
        step=progress.step,
        seconds_per_step=_number(progress.seconds_per_step),
        samples_per_second=_number(progress.samples_per_second),
        goodput_percent=progress.goodput_percent,
        reported_seconds=reported,
        age_seconds=max(0.0, now - parse_time(body["metadata"]["creationTimestamp"])),
    )


def _rank_seconds(status: TrainingRunStatus, procs: int, now: float) -> float:
    """Of all attempts. Status keeps the last ones; those before them took what is left of the active time, with as many
    nodes as the oldest that is known."""
    known = [(_seconds(record, now), record) for record in status.attempts]
    total = sum(seconds * record.nodes for seconds, record in known)
    if status.attempts and status.attempts[0].number > 1:
        ended = sum(seconds for seconds, record in known if record.ended_at is not None)
        total += max(0.0, status.active_seconds - ended) * status.attempts[0].nodes
    return procs * total


def _seconds(record: AttemptStatus, now: float) -> float:
    """For which the pods of an attempt ran."""
    return 0.0 if record.ran_at is None else max(0.0, (record.ended_at or now) - record.ran_at)


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def _as_data(usage: Usage) -> dict[str, Any]:
    return {
        "namespace": usage.namespace,
        "name": usage.name,
        "phase": usage.phase,
        "nodes": usage.nodes,
        "ranks": usage.ranks,
        "rankHours": round(usage.rank_hours, 2),
        "step": usage.step,
        "secondsPerStep": usage.seconds_per_step,
        "samplesPerSecond": usage.samples_per_second,
        "goodputPercent": usage.goodput_percent,
        "reportedSecondsAgo": None if usage.reported_seconds is None else round(usage.reported_seconds),
        "ageSeconds": round(usage.age_seconds),
    }


def _table(shown: list[Usage], *, has_namespaces: bool, is_wide: bool) -> str:
    header = ["NAMESPACE"] * has_namespaces + ["NAME", "PHASE", "NODES", "RANKS", "RANK-HOURS", "S/STEP"]
    header += ["CLIPS/S", "GOODPUT", "REPORT"] + ["STEP", "AGE"] * is_wide
    return as_table(header, [_row(usage, has_namespaces, is_wide) for usage in shown])


def _row(usage: Usage, has_namespace: bool, is_wide: bool) -> list[str]:
    return [
        *[usage.namespace] * has_namespace,
        usage.name,
        usage.phase,
        str(usage.nodes or "-"),
        str(usage.ranks or "-"),
        f"{usage.rank_hours:.1f}",
        _or_dash(usage.seconds_per_step, "g"),
        _or_dash(usage.samples_per_second, "g"),
        "-" if usage.goodput_percent is None else f"{usage.goodput_percent} %",
        "-" if usage.reported_seconds is None else f"{duration(usage.reported_seconds)} ago",
        *([_or_dash(usage.step, "d"), duration(usage.age_seconds)] if is_wide else []),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
