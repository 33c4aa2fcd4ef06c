"""Waiting for something to become true of an object: the exit code is the answer."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from opensora_operator.status import duration

from osctl.client import Object
from osctl.errors import ApiError, ExitCode, OsctlError, UsageError
from osctl.kinds import resource_of
from osctl.session import Session
from osctl.targets import Target, condition, fetch, is_over, outcome, phase_of

_POLL_SECONDS = 2.0
"""Pause between looks where watching is not allowed, or a watch was cut off."""
_WATCH_SECONDS = 300.0
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "": 1.0}


@dataclass(frozen=True)
class Goal:
    """What is waited for."""

    text: str
    is_reached: Callable[[Object], bool]


def wait_for(session: Session, place: Target, wanted: Goal, *, seconds: float) -> None:
    """Print when it is so. Raises OsctlError, with the exit code that says why it will not be."""
    reach(session, place, wanted, seconds=seconds)
    session.output.data(f"{place} {wanted.text}")


def reach(session: Session, place: Target, wanted: Goal, *, seconds: float) -> Object:
    """The object once it is so. Raises OsctlError, with the exit code that says why it will not be."""
    deadline = time.monotonic() + seconds
    last = ""
    for body in _versions(session, place, deadline):
        if body is None:
            raise OsctlError(f"{place.name} was deleted meanwhile", exit_code=ExitCode.NOT_FOUND)
        phase = phase_of(body)
        if phase and phase != last:
            session.output.note(f"{place.name}: {phase}")
            last = phase
        if wanted.is_reached(body):
            return body
        if is_over(body):
            failed = condition(body, "Failed")
            why = f": {failed.get('reason')}: {failed.get('message')}" if failed.get("status") == "True" else ""
            raise OsctlError(
                f"{place.name} has {phase.lower()}, so it will not be {wanted.text}{why}",
                hint=f"`osctl status {place.name}` tells more" if place.kind.name == "TrainingRun" else None,
                exit_code=outcome(body) or ExitCode.ERROR,
            )
    raise OsctlError(
        f"{place.name} is not {wanted.text} after {duration(seconds)}",
        hint="it goes on; --timeout waits longer",
        exit_code=ExitCode.TIMED_OUT,
    )


def parse_goal(text: str) -> Goal:
    """What `--for` says. Raises UsageError."""
    if text == "complete":
        return Goal("complete", lambda body: phase_of(body) == "Succeeded")
    if text == "failed":
        return Goal("failed", lambda body: phase_of(body) == "Failed")
    step = re.fullmatch(r"step\s*>=\s*([0-9]+)", text)
    if step is not None:
        number = int(step[1])
        return Goal(f"at step {number}", lambda body: _step(body) >= number)
    named = re.fullmatch(r"condition=([A-Za-z]+)(?:=([A-Za-z]+))?", text)
    if named is not None:
        kind, status = named[1], (named[2] or "True").capitalize()
        return Goal(f"{kind}={status}", lambda body: condition(body, kind).get("status") == status)
    raise UsageError(
        f"--for {text!r} is nothing to wait for", hint="give complete, failed, condition=TYPE, or 'step>=N' in quotes"
    )


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `10m`, `2h`, `1d` or `90`. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", text)
    if match is None:
        raise UsageError(f"--timeout {text!r} is no time", hint="give a number with s, m, h or d, such as 10m")
    return float(match[1]) * _UNITS[match[2]]


def _step(body: Object) -> int:
    step = ((body.get("status") or {}).get("progress") or {}).get("step")
    return step if isinstance(step, int) else -1


def _versions(session: Session, place: Target, deadline: float) -> Iterator[Object | None]:
    """The object as it is, and again after every change until the deadline; None once it is gone."""
    may_watch = True
    seen = ""
    while True:
        try:
            body = fetch(session, place)
        except ApiError as error:
            if error.status == 404 and seen:
                yield None
            raise
        if seen and body["metadata"]["uid"] != seen:
            yield None  # another object of the same name
        seen = body["metadata"]["uid"]
        yield body
        left = deadline - time.monotonic()
        if left <= 0:
            return
        if may_watch:
            try:
                for kind, changed in session.client.watch(
                    resource_of(place.kind),
                    session.namespace,
                    place.name,
                    version=body["metadata"]["resourceVersion"],
                    seconds=min(left, _WATCH_SECONDS),
                ):
                    yield None if kind == "DELETED" else changed
                    if time.monotonic() >= deadline:
                        return
            except ApiError as error:
                may_watch = error.status == 410
        pause = min(_POLL_SECONDS, deadline - time.monotonic())
        if pause <= 0:
            return
        time.sleep(pause)
