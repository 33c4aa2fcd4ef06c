"""`osctl restart`."""

from __future__ import annotations

from typing import Annotated

import typer

from osctl.changing import change, new_request
from osctl.options import DryRunOption, RunName
from osctl.session import Session
from osctl.targets import fetch, parse_run, refuse_ended


def restart(
    session: Session,
    run: RunName,
    exclude_node: Annotated[
        str | None, typer.Option("--exclude-node", metavar="NODE", help="Avoid this node from now on.")
    ] = None,
    dry_run: DryRunOption = None,
) -> None:
    """Start a new attempt of a run.

    The ranks finish their step and save; the next attempt continues from there. It does not count as a failure, and
    ends a pause between attempts.

    Example: `osctl restart first --exclude-node gpu-7`.
    """
    target = parse_run(run)
    refuse_ended(target, fetch(session, target), "it cannot be started again")
    request = {"id": new_request()} | ({"excludeNode": exclude_node} if exclude_node else {})
    done = "restarts" + (f" without {exclude_node}" if exclude_node else "")
    change(session, target, {"requests": {"restart": request}}, done=done, dry_run=dry_run)
