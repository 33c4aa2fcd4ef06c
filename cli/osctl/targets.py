"""The objects that a command is about: found by the words of the command line, and what they say about themselves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opensora_operator.api import TRAINING_RUN, Kind, TrainingRunStatus
from opensora_operator.constants import GROUP
from opensora_operator.reasons import Reason
from opensora_operator.status import TERMINAL, duration
from opensora_operator.wire import WireError, from_wire, parse_time

from osctl.client import Object
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.kinds import find_kind, resource_of
from osctl.session import Session

_OUTCOMES: Mapping[str, ExitCode] = {
    Reason.CANCELLED: ExitCode.CANCELLED,
    Reason.STARTUP_DEADLINE_EXCEEDED: ExitCode.NO_CAPACITY,
    Reason.NO_PROGRESS: ExitCode.NO_PROGRESS,
}


@dataclass(frozen=True)
class Target:
    """An object by its name."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind.singular}.{GROUP}/{self.name}"


def parse_target(word: str, *, default: Kind = TRAINING_RUN) -> Target:
    """`NAME` or `KIND/NAME`. Raises UsageError."""
    kind, slash, name = word.partition("/")
    if not slash:
        kind, name = default.name, word
    if not name or "/" in name:
        raise UsageError(f"{word!r} is no name", hint="give NAME, or KIND/NAME such as tr/first")
    return Target(find_kind(kind), name)


def parse_run(word: str) -> Target:
    """The name of a run. Raises UsageError for other kinds."""
    target = parse_target(word)
    if target.kind is not TRAINING_RUN:
        raise UsageError(f"{word} is no TrainingRun", hint="this command is for runs alone")
    return target


def fetch(session: Session, target: Target) -> Object:
    """The object as it is now."""
    return session.client.get(resource_of(target.kind), session.namespace, target.name)


def phase_of(body: Object) -> str:
    """The object's phase; empty before the operator has looked at it."""
    return str((body.get("status") or {}).get("phase") or "")


def read_status(body: Object) -> TrainingRunStatus:
    """The status of a run. Raises OsctlError for one that this osctl cannot read."""
    try:
        return from_wire(TrainingRunStatus, body.get("status") or {}, path="status")
    except WireError as error:
        raise unreadable(body, error) from error


def unreadable(body: Object, error: WireError) -> OsctlError:
    """The error for an object of another version."""
    return OsctlError(
        f"this osctl cannot read {body['metadata']['name']}: {error}",
        hint="the operator may be of another version: update osctl, or use `osctl get tr NAME -o yaml`",
    )


def is_over(body: Object) -> bool:
    """Whether it has succeeded or failed."""
    return phase_of(body) in TERMINAL


def condition(body: Object, kind: str) -> Mapping[str, Any]:
    """A condition of the object; empty where there is none."""
    found = (body.get("status") or {}).get("conditions") or ()
    return next((entry for entry in found if entry.get("type") == kind), {})


def outcome(body: Object) -> ExitCode:
    """What the end of an object means as an exit code."""
    if phase_of(body) == "Succeeded":
        return ExitCode.OK
    return _OUTCOMES.get(str(condition(body, "Failed").get("reason")), ExitCode.RUN_FAILED)


def refuse_ended(target: Target, body: Object, what: str) -> None:
    """An object that is over cannot be changed any more."""
    if is_over(body):
        raise OsctlError(
            f"{target.name} has {phase_of(body).lower()}: {what}",
            hint=f"`osctl status {target.name}` tells how it ended; start a new run",
            exit_code=ExitCode.CONFLICT,
        )


def age(body: Object, *, now: float | None = None) -> str:
    """Since when there is the object."""
    created = parse_time(body["metadata"]["creationTimestamp"])
    return duration(max(0.0, (time.time() if now is None else now) - created))


def split_kind(words: list[str]) -> tuple[Kind, list[str]]:
    """`[KIND] [NAME…]` as `get` takes them. A first word that is no kind is a mistake, with a hint.

    Raises:
        UsageError: there is no such kind, or the names are of several kinds.
    """
    if not words:
        return TRAINING_RUN, []
    if "/" in words[0]:
        targets = [parse_target(word) for word in words]
        if len({target.kind.name for target in targets}) > 1:
            raise UsageError("the names are of several kinds", hint="ask for one kind at a time")
        return targets[0].kind, [target.name for target in targets]
    kind = find_kind(words[0])
    wrong = next((word for word in words[1:] if "/" in word), None)
    if wrong is not None:
        raise UsageError(f"{wrong!r} is no name", hint="give KIND NAME…, or KIND/NAME…")
    return kind, words[1:]
