"""`osctl watch`: the story of one run, live."""

from __future__ import annotations

from typing import Annotated

import typer
from opensora_operator.api import TRAINING_RUN

from osctl.completing import complete_target
from osctl.errors import ExitCode, OsctlError
from osctl.kinds import resource_of
from osctl.session import Session
from osctl.targets import Target, is_over, parse_run
from osctl.watching import LeftError, watch_run


def watch(
    session: Session,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="Name of the run. [default: the newest that goes on]",
            autocompletion=complete_target,
            show_default=False,
        ),
    ] = None,
) -> ExitCode:
    """Tell one run's story live, until it ends.

    On a terminal it is the screen of `status`, drawn again after every change and every second; elsewhere a line for
    each change. It ends with the run, and with the exit code that `wait` has: 0 it succeeded, 6 it failed, 7 it was
    stopped, 9 there was no place for it, 10 it made no progress. With q or Ctrl-C it ends at once, with 130, and the
    run goes on.

    Examples: `osctl watch`, `osctl watch first`, `osctl watch first | tee first.log`.
    """
    target = _newest(session) if run is None else parse_run(run)
    try:
        return watch_run(session, target)
    except LeftError:
        session.output.note(f"{target.name} goes on; `osctl watch {target.name}` comes back to it")
        raise typer.Abort from None


def _newest(session: Session) -> Target:
    """The run of the namespace that was made last, of those that go on."""
    found = session.client.list(resource_of(TRAINING_RUN), session.namespace)
    going_on = [body for body in found if not is_over(body)]
    if not going_on:
        raise OsctlError(
            f"no run goes on in namespace {session.namespace}",
            hint="name one, or -n names another namespace",
            exit_code=ExitCode.NOT_FOUND,
        )
    newest = max(going_on, key=lambda body: (body["metadata"]["creationTimestamp"], body["metadata"]["name"]))
    name = str(newest["metadata"]["name"])
    if len(going_on) > 1:
        session.output.note(f"{name} is the newest of {len(going_on)} runs that go on")
    return Target(TRAINING_RUN, name)
