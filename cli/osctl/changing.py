"""Changes of objects: what all commands that make one have in common."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence

from opensora_operator.api import TRAINING_PROFILE

from osctl.client import Object
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.kinds import resource_of
from osctl.options import DryRun
from osctl.session import Session
from osctl.targets import Target, fetch, parse_target, refuse_ended


def change(session: Session, target: Target, spec: Object, *, done: str, dry_run: DryRun | None) -> None:
    """Merge this into the object's spec, and say so."""
    if dry_run is not DryRun.CLIENT:
        resource = resource_of(target.kind)
        is_tried = dry_run is DryRun.SERVER
        session.client.patch(resource, session.namespace, target.name, {"spec": spec}, dry_run=is_tried)
    session.output.data(f"{target} {done}{trial(dry_run)}")


def set_suspend(session: Session, word: str, *, value: bool, dry_run: DryRun | None) -> None:
    """Suspend or resume an object."""
    target = parse_target(word)
    if target.kind.spec is TRAINING_PROFILE.spec:
        raise UsageError(f"{word} is a profile", hint="runs, sample jobs and batch searches can be suspended")
    body = fetch(session, target)
    refuse_ended(target, body, "there is nothing left to suspend or resume")
    done = "suspended" if value else "resumed"
    if bool((body.get("spec") or {}).get("suspend")) == value:
        session.output.data(f"{target} {done} already")
        return
    change(session, target, {"suspend": value}, done=done, dry_run=dry_run)


def trial(dry_run: DryRun | None) -> str:
    """What is said of a change that is only tried."""
    return "" if dry_run is None else f" (dry run: {dry_run.value})"


def new_request() -> str:
    """An id that no other request has."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def confirm(session: Session, what: Sequence[str], *, yes: bool, dry_run: DryRun | None) -> None:
    """Ask before something that cannot be undone. Raises OsctlError where nobody agrees."""
    if dry_run is not None:
        return
    for line in what:
        session.output.note(line)
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked: there is no terminal", hint="--yes does it without asking")
    if not asks(session, "Go on?"):
        raise OsctlError("nothing was done", exit_code=ExitCode.ERROR)


def asks(session: Session, question: str) -> bool:
    """Whether a person says yes. Enter, the end of input and the absence of a terminal are no."""
    if not sys.stdin.isatty():
        return False
    session.output.prompt(f"{question} [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
