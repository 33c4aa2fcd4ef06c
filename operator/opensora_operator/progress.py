"""Progress as rank 0 of a run reports it: the message, the newest one of each run, and what the reply asks for.

Pure: the server that takes the messages is `progress_server.py`. docs/reference/progress.md describes the channel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

from opensora_operator.plans import Object

MAX_BODY_BYTES = 64 * 1024

Phase = Literal["training", "done", "stopped", "failed"]
State = Literal["Starting", "Training", "Evaluating", "Saving", "Sampling", "Stopping"]

_INTERVAL_SECONDS = 15.0
"""Longest time between two reports: commands wait for the next one."""
_COMMANDS = ("checkpoint", "dump")
"""Requests with an id, which a run carries out once each."""
_ID = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9._]{0,62}[A-Za-z0-9])?")
_MAX_COUNT = 2**53
_MAX_NUMBER = 1e300


class BadReportError(Exception):
    """A message that is none."""


class StaleReportError(Exception):
    """A message that is not newer than one that has come already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressReport:
    """What rank 0 said last. Seconds are since 1970, by the operator's clock unless said otherwise."""

    pod_uid: str
    """The pod it came from."""
    attempt: int
    sequence: int
    """Counts the messages of one process."""
    phase: Phase
    """`training`, or how the attempt ended."""
    state: State
    """What the ranks do at the moment; `Stopping` also once they have ended."""
    step: int
    """Optimiser steps done."""
    total_steps: int | None
    epoch: int
    loss: float | None
    seconds_per_step: float | None
    samples_per_second: float | None
    eta_seconds: float | None
    goodput: float
    """Share of the attempt's time that was spent on training itself, 0 to 1."""
    checkpoint_step: int | None
    """Newest step that was saved completely."""
    samples_step: int | None
    """Newest step whose samples are complete."""
    requests: Mapping[str, str] = field(default_factory=dict)
    """`checkpoint` and `dump` → id of the newest request that is carried out."""
    received: float
    advanced: float
    """When the step was first seen to have its value: what `Stalled` is judged by."""

    @property
    def is_last(self) -> bool:
        """Whether the attempt's ranks have ended."""
        return self.phase != "training"


def parse_report(body: bytes, *, pod_uid: str, received: float) -> ProgressReport:
    """The report in a message. Keys that are not known are ignored: the core may be newer than the operator.

    Raises:
        BadReportError: it is no such message; names the key.
    """
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadReportError(f"the body is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadReportError(f"the body is a JSON object, not {type(values).__name__}")
    return ProgressReport(
        pod_uid=pod_uid,
        attempt=_count(values, "attempt"),
        sequence=_count(values, "sequence"),
        phase=_word(values, "phase", Phase),
        state=_word(values, "state", State),
        step=_count(values, "step"),
        total_steps=_count_or_none(values, "total_steps"),
        epoch=_count(values, "epoch"),
        loss=_number(values, "loss", lowest=-_MAX_NUMBER),
        seconds_per_step=_number(values, "seconds_per_step"),
        samples_per_second=_number(values, "samples_per_second"),
        eta_seconds=_number(values, "eta_seconds"),
        goodput=min(1.0, _number(values, "goodput") or 0.0),
        checkpoint_step=_count_or_none(values, "checkpoint_step"),
        samples_step=_count_or_none(values, "samples_step"),
        requests=_ids(values.get("requests")),
        received=received,
        advanced=received,
    )


class ProgressBook:
    """The newest report of each run, in memory alone: a new leader hears from every run within one interval."""

    def __init__(self) -> None:
        self._newest: dict[str, ProgressReport] = {}

    def record(self, run_uid: str, report: ProgressReport) -> None:
        """Keep a report.

        Raises:
            StaleReportError: it is of an earlier attempt, or not newer than the last one of its process.
        """
        last = self._newest.get(run_uid)
        if last is not None:
            if report.attempt < last.attempt:
                raise StaleReportError(f"attempt {report.attempt} is over; attempt {last.attempt} has reported")
            if report.attempt == last.attempt:
                if report.pod_uid == last.pod_uid and report.sequence <= last.sequence:
                    raise StaleReportError(f"message {report.sequence} is not newer than message {last.sequence}")
                if report.step == last.step and report.phase == last.phase:
                    report = replace(report, advanced=last.advanced)
        self._newest[run_uid] = report

    def newest(self, run_uid: str, *, attempt: int) -> ProgressReport | None:
        """The newest report of an attempt."""
        found = self._newest.get(run_uid)
        return found if found is not None and found.attempt == attempt else None

    def forget(self, run_uid: str) -> None:
        """The run is gone."""
        self._newest.pop(run_uid, None)

    def __len__(self) -> int:
        return len(self._newest)


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """What the server has to know of a run."""

    uid: str
    attempt: int
    pod_uids: frozenset[str]
    """The pods of this attempt: they alone may report."""
    heartbeat_seconds: float
    """Longest time between two reports that the spec allows (`watchdog.heartbeatSeconds`)."""
    requests: Mapping[str, Any]
    """`spec.requests`."""
    answered: Mapping[str, Any]
    """`status.requests`."""


class RunDirectory(Protocol):
    """Where the server looks runs up."""

    def live_run(self, namespace: str, name: str) -> LiveRun | None:
        """The run and its current attempt; None where there is no such run, or it has ended."""


def reply_to(report: ProgressReport, run: LiveRun) -> Object:
    """What rank 0 is answered: when to report again, and what is asked of the run."""
    return {
        "interval_seconds": min(_INTERVAL_SECONDS, run.heartbeat_seconds),
        **command_for(run.requests, run.answered, report),
    }


def command_for(requests: Mapping[str, Any], answered: Mapping[str, Any], report: ProgressReport) -> Object:
    """The requests of a spec that are neither answered in the status nor carried out by the report's own word."""
    if report.is_last:
        return {}
    commands: Object = {}
    for name in _COMMANDS:
        wanted = (requests.get(name) or {}).get("id")
        if wanted and wanted not in (answered.get(name), report.requests.get(name)):
            commands[name] = wanted
    if requests.get("stop"):
        commands["stop"] = True
    return commands


# ----------------------------------------------------------------------------------------------- parts of a message


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _required(values: Mapping[str, Any], key: str) -> Any:
    if key not in values:
        raise BadReportError(f"{key} is missing")
    return values[key]


def _count(values: Mapping[str, Any], key: str) -> int:
    value = _required(values, key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_COUNT:
        raise BadReportError(f"{key} is a whole number from 0, not {_shown(value)}")
    return value


def _count_or_none(values: Mapping[str, Any], key: str) -> int | None:
    return None if values.get(key) is None else _count(values, key)


def _number(values: Mapping[str, Any], key: str, *, lowest: float = 0.0) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value <= _MAX_NUMBER:
        raise BadReportError(f"{key} is a number, not {_shown(value)}")
    return float(value)


def _word(values: Mapping[str, Any], key: str, kind: Any) -> Any:
    value = _required(values, key)
    if not isinstance(value, str) or value not in get_args(kind):
        raise BadReportError(f"{key} is one of {', '.join(get_args(kind))}, not {_shown(value)}")
    return value


def _ids(value: Any) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadReportError(f"requests is an object, not {_shown(value)}")
    found = {name: value[name] for name in _COMMANDS if value.get(name) is not None}
    for name, given in found.items():
        if not isinstance(given, str) or _ID.fullmatch(given) is None:
            raise BadReportError(f"requests.{name} is an id, not {_shown(given)}")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
