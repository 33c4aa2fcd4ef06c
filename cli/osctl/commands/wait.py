"""`osctl wait`."""

from __future__ import annotations

from typing import Annotated

import typer

from osctl.options import Target
from osctl.session import Session
from osctl.targets import parse_target
from osctl.waiting import parse_duration, parse_goal, wait_for


def wait(
    session: Session,
    target: Target,
    goal: Annotated[
        str, typer.Option("--for", metavar="WHAT", help="complete, failed, condition=TYPE[=STATUS], or 'step>=N'.")
    ] = "complete",
    timeout: Annotated[str, typer.Option("--timeout", metavar="TIME", help="Give up then: 90s, 10m, 2h.")] = "24h",
) -> None:
    """Wait until a run is done, or a condition holds.

    Exit codes: 0 it holds, 5 the time is over, 3 the object is gone; where it has ended otherwise, 6 it failed, 7 it
    was stopped, 9 there was no place for it, 10 it made no progress, 1 it succeeded.

    Examples: `osctl wait first`, `osctl wait first --for 'step>=1000' --timeout 2h`, `osctl wait sj/nightly`.
    """
    wait_for(session, parse_target(target), parse_goal(goal), seconds=parse_duration(timeout))
