"""Waiting for something to become true of an object: the exit code is the answer."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from opensora_operator.status import duration

from osctl.client import RETRIED, Client, Object
from osctl.errors import ApiError, ExitCode, OsctlError, UnreachableError, UsageError
from osctl.kinds import resource_of
from osctl.session import Session
from osctl.targets import Target, condition, is_over, outcome, phase_of

_POLL_SECONDS = 2.0
"""Pause between looks where watching is not allowed, or a watch was cut off."""
_WATCH_SECONDS = 300.0
_OUTAGE_SECONDS = 600.0
"""Longest time that an API server may be away while something is waited for: as long as its update takes."""
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

    def say(trouble: OsctlError) -> None:
        session.output.note(f"{trouble.message}; trying again")

    for body in versions(session.client, session.namespace, place, deadline=deadline, on_trouble=say):
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


def parse_duration(text: str, *, flag: str = "--timeout") -> float:
    """Seconds of `90s`, `10m`, `2h`, `1d` or `90`, given with a flag. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", text)
    if match is None:
        raise UsageError(f"{flag} {text!r} is no time", hint="give a number with s, m, h or d, such as 10m")
    return float(match[1]) * _UNITS[match[2]]


def _step(body: Object) -> int:
    step = ((body.get("status") or {}).get("progress") or {}).get("step")
    return step if isinstance(step, int) else -1


def versions(
    client: Client,
    namespace: str,
    place: Target,
    *,
    deadline: float = math.inf,
    on_trouble: Callable[[OsctlError], None] = lambda error: None,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[Object | None]:
    """The object as it is, and again after every change until the deadline; None once it is gone.

    An API server that is away for a while is waited for, after it has answered once.

    Args:
        client: of the thread that this runs in.
        namespace: of the object.
        place: the object.
        deadline: monotonic time at which it ends.
        on_trouble: told when the API server goes away, once each time.
        sleep: pauses between looks; where it returns something true, it ends.
    """
    may_watch = True
    seen = ""
    away_since: float | None = None
    while True:
        try:
            body = client.get(resource_of(place.kind), namespace, place.name)
        except (ApiError, UnreachableError) as error:
            if isinstance(error, ApiError) and error.status == 404 and seen:
                yield None
                return
            now = time.monotonic()
            is_passing = isinstance(error, UnreachableError) or error.status in RETRIED
            if not seen or not is_passing or now - (away_since or now) > _OUTAGE_SECONDS:
                raise
            if away_since is None:
                away_since = now
                on_trouble(error)
        else:
            away_since = None
            if seen and body["metadata"]["uid"] != seen:
                yield None  # another object of the same name
                return
            seen = body["metadata"]["uid"]
            yield body
            if may_watch:
                try:
                    yield from _changes(client, namespace, place, body, deadline)
                except ApiError as error:
                    may_watch = error.status in (410, *RETRIED)
        pause = min(_POLL_SECONDS, deadline - time.monotonic())
        if pause <= 0 or sleep(pause):
            return


def _changes(client: Client, namespace: str, place: Target, body: Object, deadline: float) -> Iterator[Object | None]:
    left = deadline - time.monotonic()
    if left <= 0:
        return
    version = body["metadata"]["resourceVersion"]
    seconds = min(left, _WATCH_SECONDS)
    for kind, changed in client.watch(resource_of(place.kind), namespace, place.name, version=version, seconds=seconds):
        yield None if kind == "DELETED" else changed
        if time.monotonic() >= deadline:
            return
